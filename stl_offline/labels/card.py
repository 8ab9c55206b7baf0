"""The card of a label set: a README for people who find one."""

from stl_offline.labels.manifest import Manifest

CARD = "README.md"


def make_card(manifest: Manifest) -> bytes:
    """The bytes of the card: what the set is, how it was made, how to use it. The same manifest gives the same card."""
    spec = manifest.spec
    rows, columns = spec.grid
    size = sum(shard.bytes for shard in manifest.shards)
    if spec.views["kind"] == "whole":
        views = "one map of each whole picture"
    else:
        scale, ratio = spec.views["scale"], spec.views["ratio"]
        views = (
            f"{spec.views_per_image} random crops of each picture (area {scale[0]:g} to {scale[1]:g}, ratio "
            f"{ratio[0]:.3g} to {ratio[1]:.3g}, flipped with chance {spec.views['flip']:g}, seed {spec.views['seed']})"
        )
    see = spec.preprocessing
    facts = [
        ("pictures", f"{spec.num_samples:,}"),
        ("classes", f"{spec.num_classes:,} ({_some(spec.class_names)})"),
        ("labels", f"the {spec.top_k} most probable classes of each of {rows} × {columns} tokens; {views}"),
        ("size", f"{size:,} bytes in {len(manifest.shards):,} shards, {size / spec.num_samples:,.0f} a picture"),
        ("format", f"label set version {spec.format_version}, container {spec.container}, encoding {spec.encoding}"),
        (
            "exactness",
            ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in spec.to_json()["bounds"].items()),
        ),
        ("labeler", f"{spec.labeler['architecture']} (weights' SHA-256 {spec.labeler['weights_sha256']})"),
        ("licence of the labeler's weights", str(spec.labeler["licence"])),
        (
            "pictures as the labeler saw them",
            f"{see['height']} × {see['width']} pixels, {see['interpolation']} interpolation, mean {see['mean']}, "
            f"std {see['std']}, decoded by {see['decoder']}",
        ),
        ("fingerprint of the pictures", str(spec.source["fingerprint"])),
    ]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts)
    made = "\n".join(f"    {name}: {_cell(str(value))}" for name, value in sorted(spec.creation.items()))
    return f"""# Token labels

What a labeler says of every token of {spec.num_samples:,} pictures, made once, to train any number of students from.

| | |
|---|---|
{table}

## How it was made

With `stl-offline dump-labels` and these settings:

{made or "    (not recorded)"}

## How to use it

    stl-offline labels verify .
    stl-offline train-student --data PICTURES --val PICTURES --labels . --out RUN

    import stl_offline
    labels = stl_offline.open_label_set(".")
    labels[labels.keys[0]].probabilities()  # (views, rows, columns, classes kept)

Labels belong to pictures by key (the path below the data set's root) and by content. The format is plain
{"zarr in zip files" if spec.container == "zarr" else "webdataset tars"}; `manifest.json` says the rest.
""".encode()


def _some(names: tuple[str, ...], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _cell(text: str) -> str:
    """Text that cannot break the table: class names and settings come from others."""
    return " ".join(text.replace("|", "\\|").split())
