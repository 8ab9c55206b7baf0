"""What is attacked, beyond readers: commands that write from damaged files, the loader, caches, and class lists.

A target is as in `tests.fuzz.targets`.
"""

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from stl_offline.errors import StlError
from stl_offline.files import canonical_json
from stl_offline.geometry import whole_views
from stl_offline.images.beton import open_beton
from stl_offline.images.classes import read_class_map
from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.cache_file import open_token_cache
from stl_offline.labels.class_names import read_class_names
from stl_offline.labels.convert import convert
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.labels.merge import merge
from stl_offline.labels.transfer import pull
from stl_offline.loader import ImageSettings, TokenLoader
from tests.fuzz.mutate import damage_bytes, damage_json_text
from tests.fuzz.targets import READERS, Betons, LabelSets, WrongDataError
from tests.labels.synthetic import make_arrays, make_key, make_spec, write_set


class LoaderOfBetons(Betons):
    """A damaged .beton, read through FFCV's loader in compiled code."""

    def read(self, path: Path) -> tuple:
        beton = open_beton(path)
        loader = TokenLoader(beton, ImageSettings((16, 24)), 3, shuffle=False)
        images = []
        with loader.epoch(0, whole_views(len(beton))) as batches:
            for batch in batches:
                images.append((batch.images.numpy().tobytes(), batch.class_ids.tolist(), batch.sample_ids.tolist()))
        return beton.keys, beton.class_names, images


class TokenCaches:
    """A token cache: a file of it damaged, or its description with a checksum made anew."""

    def __init__(self, folder: Path) -> None:
        spec = make_spec(samples=24, view_count=2)
        write_set(folder / "set", spec, shards=2)
        labels = open_label_set(folder / "set")
        keys = [make_key(number) for number in range(24)]
        cache = build_token_cache(labels, keys, make_arrays(spec).content_hash, spec.class_names, folder=folder)
        self.path = cache.path
        self.whole = self._read(cache.path)

    def case(self, draw: random.Random, folder: Path) -> str:
        path = folder / "cache"
        shutil.copytree(self.path, path)
        file = draw.choice(sorted(path.iterdir()))
        again = False
        if file.suffix == ".json" and draw.random() < 0.7:
            data = damage_json_text(draw, file.read_bytes())
            with contextlib.suppress(ValueError, AttributeError, RecursionError, UnicodeError, StlError):
                info = json.loads(data)
                info.pop("own_xxh3", None)
                info["own_xxh3"] = xxhash.xxh3_64_hexdigest(canonical_json(info))
                data, again = canonical_json(info), True
        else:
            data = damage_bytes(draw, file.read_bytes())
        file.write_bytes(data)
        same = self._read(path) == self.whole
        if same or again:
            return "same" if same else "changed"
        raise WrongDataError("another cache, under checksums that fit")

    @staticmethod
    def _read(path: Path) -> tuple:
        cache = open_token_cache(path)
        return tuple(
            np.asarray(array).tobytes()
            for array in (cache.class_ids, cache.probabilities, cache.confidence, cache.views, cache.labelled)
        )


class LabelCommands:
    """labels convert, merge and pull of a damaged set: what they write is what was labelled, or they refuse."""

    def __init__(self, folder: Path) -> None:
        self.sets = []
        for container, encoding in (("zarr", "f16"), ("zarr", "q8"), ("webdataset", "f16"), ("webdataset", "q8")):
            (folder / f"{container}-{encoding}").mkdir()
            self.sets.append(LabelSets(folder / f"{container}-{encoding}", container, encoding))

    def case(self, draw: random.Random, folder: Path) -> str:
        attacked = draw.choice(self.sets)
        source = folder / "source"
        source.mkdir()
        covered = attacked.damage(draw, source)
        write = draw.choice((self._convert, self._merge, self._pull))
        write(draw, open_label_set(source), folder / "out")
        written = open_label_set(folder / "out")
        arrays = [written.read_shard(index) for index in written.present]
        same = len(arrays) == 2 and all(map(lambda ours, theirs: ours.equals(theirs), attacked.arrays, arrays))
        if same or not covered:
            return "same" if same else "changed"
        raise WrongDataError("other labels, under a checksum that fits")

    @staticmethod
    def _convert(draw: random.Random, labels: LabelSet, out: Path) -> None:
        container = draw.choice(("zarr", "webdataset"))
        convert(labels, out, container=container, encoding=draw.choice((None, "f16")), workers=1)

    @staticmethod
    def _merge(draw: random.Random, labels: LabelSet, out: Path) -> None:
        # Two halves of one set: each shard alone, as after `labels pull --shards`.
        halves = [out.parent / f"half-{index}" for index in range(2)]
        for index, half in enumerate(halves):
            pull(labels, half, shards=str(index), workers=1)
        merge([open_label_set(half) for half in halves], out, workers=1)

    @staticmethod
    def _pull(draw: random.Random, labels: LabelSet, out: Path) -> None:
        pull(labels, out, workers=1)


class ClassLists:
    """A class list or a class map, which users write; other names are another list."""

    _NAMES = ("ant", "bee", "größe", "水", "n01440764", "a b")

    def __init__(self, folder: Path) -> None:
        lines = "".join(f"{name}\r\n" for name in self._NAMES)
        numbered = "".join(f"{number} {name}\n" for number, name in enumerate(self._NAMES))
        objects = json.dumps({str(number): name for number, name in enumerate(self._NAMES)})
        self.files = (
            (read_class_map, numbered.encode("utf-8-sig")),
            (read_class_map, json.dumps(self._NAMES).encode()),
            (read_class_map, objects.encode()),
            (lambda path: read_class_names(path, "`class_names`"), lines.encode("utf-8-sig")),
        )

    def case(self, draw: random.Random, folder: Path) -> str:
        read, data = draw.choice(self.files)
        damage = damage_json_text if data[:1] in b"[{" and draw.random() < 0.6 else damage_bytes
        (folder / "names").write_bytes(damage(draw, data))
        names = read(folder / "names")
        names = tuple(names.values()) if isinstance(names, dict) else names
        return "same" if names == self._NAMES else "changed"


TARGETS: dict[str, Callable[[Path], object]] = READERS | {
    "beton, loaded": LoaderOfBetons,
    "token cache": TokenCaches,
    "label commands": LabelCommands,
    "class list": ClassLists,
}
