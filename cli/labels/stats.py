"""``stl-offline labels stats``."""

import json

import click

from stl_offline.cli.command import command, example, ignored, option
from stl_offline.cli.options import debug_option, json_option, workers_option
from stl_offline.cli.terminal import echo


@command(
    epilog=example(
        "stl-offline labels stats labels",
        "stl-offline labels stats labels --shards 4 --json",
        "stl-offline labels stats labels --masks runs/demo/images/masks-train.npz --suspects 20",
        "stl-offline labels stats labels-of-crops --worth",
    ),
)
@click.argument("path", metavar="SET")
@json_option
@option(
    "--shards",
    group="labels",
    type=int,
    metavar="N",
    show_default="all",
    help="Number of shards to read, spread over the set.",
)
@option(
    "--masks",
    group="data",
    metavar="SRC",
    show_default="none",
    help="Objects' masks or boxes, to measure whether the labels show the object: a folder with NAME.png masks or "
    "NAME.xml boxes (Pascal VOC) at the images' places, an .npz file, or a .json file of boxes.",
)
@option(
    "--suspects",
    group="labels",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="none",
    help="Also list the N images whose tokens disagree most with their class.",
)
@option(
    "--worth",
    group="labels",
    is_flag=True,
    help="Also measure whether two views of an image agree on where its class is, which ranks label sets of the same "
    "images by what students gain from them. Needs --views 2 or more.",
)
@workers_option
@debug_option
@ignored("--device")
def stats(
    path: str, shards: int | None, masks: str | None, suspects: int | None, worth: bool, as_json: bool, workers: int
) -> None:
    """Measure the labels: confidence, probability outside the stored classes, agreement with the images' classes."""
    from stl_offline.labels import foreground
    from stl_offline.labels import suspects as disagreeing
    from stl_offline.labels import worth as agreement
    from stl_offline.labels.label_set import open_label_set
    from stl_offline.labels.stats import measure, table, to_json

    label_set = open_label_set(path)
    objects = None
    if masks is not None:
        from stl_offline.images.masks import read_masks

        objects = read_masks(masks)
    agreeing = agreement.measure_worth(label_set, shards=shards, workers=workers) if worth else None
    found = measure(label_set, shards=shards, workers=workers)
    inside = None
    if objects is not None:
        inside = foreground.measure_foreground(label_set, objects, shards=shards, workers=workers)
    doubtful = disagreeing.find_suspects(label_set, suspects, shards=shards, workers=workers) if suspects else []
    if as_json:
        values = to_json(found)
        if inside:
            values["foreground"] = foreground.to_json(inside)
        if agreeing:
            values["worth"] = agreement.to_json(agreeing)
        if suspects:
            values["suspects"] = disagreeing.to_json(label_set, doubtful)
        echo(json.dumps(values))
        return
    lines = table(found) + (foreground.table(inside) if inside else [])
    for name, value in lines + (agreement.table(agreeing) if agreeing else []):
        echo(f"{name + ':':<14}{value}")
    if doubtful:
        echo(f"images whose tokens disagree most with their class ({len(doubtful):,}, most doubtful first):")
        for line in disagreeing.table(label_set, doubtful):
            echo(f"  {line}")
