"""The card of a label set: a README for people who find one.

It starts with the YAML that data set hubs read, and is made of the manifest alone.
"""

import json

from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.manifest import Manifest
from stl_offline.labels.spec import MEMBER_SUFFIX, LabelSpec, of_cell
from stl_offline.labels.store import format_ranges

# Licences by the names that hubs know them under; any other stands as "other", with its name.
_HUB_LICENCES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unknown"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "openrail"),
}
# Images in the set → the hub's word for it.
_SIZES = (
    (1e3, "n<1K"),
    (1e4, "1K<n<10K"),
    (1e5, "10K<n<100K"),
    (1e6, "100K<n<1M"),
    (1e7, "1M<n<10M"),
    (1e8, "10M<n<100M"),
)

_PACKAGE = """\
import stl_offline
labels = stl_offline.open_label_set(".")  # or its URL
labels[next(iter(labels))].probabilities()  # (views, rows, columns, classes kept); also .class_ids, .views, .dense()
"""
_ZARR = """\
import zarr
shard = zarr.open_group(zarr.storage.ZipStore("{name}", mode="r"), mode="r")
shard["keys"][:], shard["{array}"][:]  # (images, views, rows, columns, classes kept)
"""
_WEBDATASET = """\
import webdataset
for sample in webdataset.WebDataset("{names}", shardshuffle=False).decode():
    sample["__key__"], sample["{member}"]["{array}"]  # (views, rows, columns, classes kept)
"""


def make_card(manifest: Manifest) -> bytes:
    """The bytes of the card: what the set is, how it was made, how to use it. The same manifest gives the same card."""
    spec = manifest.spec
    facts = _summary(manifest) | _details(spec)
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    made = "\n".join(f"    {name}: {_cell(json.dumps(value))}" for name, value in sorted(spec.creation.items()))
    container = "zarr groups in zip files" if spec.container == "zarr" else "webdataset tars"
    return f"""{_front_matter(spec)}
# Token labels

Labels for every token of {_counted(spec.num_samples, "image")}, to train vision transformers with token labels.

| | |
|---|---|
{table}

## How it was made

With `stl-offline dump-labels` and these settings:

{made or "    (not recorded)"}

## How to use it

    stl-offline labels verify .
    stl-offline train-student --data IMAGES --val IMAGES --labels . --out RUN

In Python, with the package stl-offline:

```python
{_PACKAGE}```

Without the package: the shards are plain {container}. The format's specification describes the arrays.

```python
{_plain_snippet(manifest)}```

The images are not part of this set. Labels are joined to images by key, the path below the data set's root, and by a
hash of the image's content. `manifest.json` holds the class names, the shards' checksums, and all settings.
""".encode()


def summary(label_set: LabelSet) -> dict[str, str]:
    """A label set in a few lines, name → text, for the command line and for pages."""
    lines = _summary(label_set.manifest) | {"fingerprint": label_set.fingerprint}
    if label_set.is_partial:
        lines["here"] = f"the shards {format_ranges(label_set.present)}, {_counted(len(label_set), 'image')}"
    return lines


def _summary(manifest: Manifest) -> dict[str, str]:
    spec = manifest.spec
    views = "whole images" if spec.views["kind"] == "whole" else f"{spec.views_per_image} crops of each image"
    if len(spec.parts) > 1:
        views += f" in {len(spec.parts)} parts"
    size = sum(shard.bytes for shard in manifest.shards)
    return {
        "images": f"{spec.num_samples:,} in {_counted(len(manifest.shards), 'shard')}, {_counted(size, 'byte')}",
        "labels": f"{spec.grid[0]} × {spec.grid[1]} tokens, {of_cell(spec)} of {spec.num_classes:,} classes, {views}",
        "encoding": f"{spec.encoding} ({spec.container})",
        "labeler": f"{spec.labeler['architecture']} ({spec.labeler['licence']})",
        "weights": spec.labeler["weights_sha256"],
        "input": f"{spec.preprocessing['height']} × {spec.preprocessing['width']} pixels",
        "source": f"fingerprint of the keys {spec.source['fingerprint']}"
        + ("" if spec.has_own_classes else "; images without classes"),
    }


def _details(spec: LabelSpec) -> dict[str, str]:
    """What the card adds to the summary."""
    see = spec.preprocessing
    details = {
        "preprocessing": f"{see['interpolation']} interpolation, mean {see['mean']}, std {see['std']}, decoded by "
        f"{see['decoder']}",
        "classes": ", ".join(spec.class_names[:6]) + (", …" if spec.num_classes > 6 else ""),
        "error bounds": ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in sorted(spec.bounds.items())),
        "format": f"label set version {spec.format_version}",
    }
    if spec.draws or spec.class_draws:
        details["draws"] = f"seed {spec.draw_seed}" if spec.draw_seed is not None else "by another generator"
    if spec.class_top_k or spec.class_draws:
        details["class answers"] = f"per view, the {spec.class_top_k} best classes and {spec.class_draws} drawn ones"
    if spec.views["kind"] != "whole":
        scale, ratio = (" to ".join(f"{value:.3g}" for value in spec.views[name]) for name in ("scale", "ratio"))
        details["crops"] = (
            f"random, area {scale}, aspect ratio {ratio}, flipped with probability {spec.views['flip']:g}, seed "
            f"{spec.views['seed']}" + (f", from number {spec.first_view} on" if spec.first_view else "")
        )
    return details


def _front_matter(spec: LabelSpec) -> str:
    """YAML whose strings are written as JSON, so that a name cannot break out of its line."""
    licence = str(spec.labeler["licence"])
    known = "unknown" if licence == "unstated" else licence.lower()
    known = known if known in _HUB_LICENCES else "other"
    size = next((word for most, word in _SIZES if spec.num_samples < most), "n>100M")
    named = f"\nlicense_name: {json.dumps(licence)}" if known == "other" else ""
    return f"""---
license: {known}{named}
pretty_name: {json.dumps(f"Token labels of {spec.labeler['architecture']}", ensure_ascii=False)}
task_categories: [image-classification]
size_categories: [{size}]
tags: [token-labels, knowledge-distillation, vision-transformer, stl-offline, {spec.container}]
---
"""


def _plain_snippet(manifest: Manifest) -> str:
    spec = manifest.spec
    array = {
        ("f16", True): "class_ids",
        ("f16", False): "draws",
        ("q8", True): "class_ranks",
        ("q8", False): "draw_ranks",
    }[spec.encoding, spec.top_k > 0]
    if manifest.spec.container == "zarr":
        return _ZARR.format(name=manifest.shards[0].name, array=array)
    # Shards that were appended have another total in their names.
    runs: dict[str, list[str]] = {}
    for shard in manifest.shards:
        _, number, rest = shard.name.split("-", 2)
        runs.setdefault(rest, []).append(number)
    names = "::".join(
        f"labels-{numbers[0]}-{rest}" if len(numbers) == 1 else f"labels-{{{numbers[0]}..{numbers[-1]}}}-{rest}"
        for rest, numbers in runs.items()
    )
    return _WEBDATASET.format(names=names, member=MEMBER_SUFFIX[spec.format_version], array=array)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _cell(text: str) -> str:
    """A value as text that cannot break the table: class names and settings are untrusted."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
