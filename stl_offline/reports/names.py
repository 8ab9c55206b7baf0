"""Class names and keys as pages show them: printable, and with English words for ImageNet's synset ids."""

import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from stl_offline.errors import printable

_SYNSET = re.compile(r"n\d{8}")
_LEMMAS = "data/_info/imagenet_synset_to_lemma.txt"  # in timm: "n01440764<tab>tench, Tinca tinca" per line


def display_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """Class names for readers: ``n01440764`` becomes ``n01440764 (tench)`` where timm is installed.

    Names of other forms stay as they are. Characters that do not print appear as their Python escapes: a mark that
    reverses the direction of writing, for one, would otherwise turn the text after it around.
    """
    lemmas = _lemmas() if any(map(_SYNSET.fullmatch, class_names)) else {}
    return tuple(f"{name} ({lemmas[name]})" if name in lemmas else printable(name) for name in class_names)


@cache
def _lemmas() -> dict[str, str]:
    """Synset id → its first lemma, from the table that timm ships. timm is not imported: it would import torch."""
    found = find_spec("timm")
    if found is None:
        return {}
    path = Path(found.submodule_search_locations[0], _LEMMAS)
    if not path.is_file():
        return {}
    rows = (line.partition("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return {synset: lemmas.split(", ")[0] for synset, _, lemmas in rows}
