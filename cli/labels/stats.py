"""``stl-offline labels stats``."""

import json

import click

from stl_offline.cli.command import command, example, ignored, option
from stl_offline.cli.options import debug_option, json_option, workers_option
from stl_offline.cli.terminal import echo


@command(
    epilog=example("stl-offline labels stats labels", "stl-offline labels stats labels --shards 4 --json"),
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
@workers_option
@debug_option
@ignored("--device")
def stats(path: str, shards: int | None, as_json: bool, workers: int) -> None:
    """Measure the labels: confidence, probability outside the stored classes, agreement with the images' classes."""
    from stl_offline.labels.label_set import open_label_set
    from stl_offline.labels.stats import measure, table, to_json

    found = measure(open_label_set(path), shards=shards, workers=workers)
    if as_json:
        echo(json.dumps(to_json(found)))
        return
    for name, value in table(found):
        echo(f"{name + ':':<14}{value}")
