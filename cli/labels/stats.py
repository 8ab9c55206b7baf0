"""``stl-offline labels stats``."""

import json

import click

from stl_offline.cli.options import example, machine_options, option


@click.command(
    epilog=example("stl-offline labels stats labels", "stl-offline labels stats labels --shards 4 --json"),
)
@click.argument("path", metavar="SET")
@option("--shards", type=int, metavar="COUNT", help="Read only so many shards, spread over the set.  [default: all]")
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@machine_options
def stats(path: str, shards: int | None, as_json: bool, workers: int, **_: object) -> None:
    """Measure how sure the labels are, what they leave out, and whether they agree with the images' classes."""
    from stl_offline.labels.label_set import open_label_set
    from stl_offline.labels.stats import measure, table, to_json

    found = measure(open_label_set(path), shards=shards, workers=workers)
    if as_json:
        click.echo(json.dumps(to_json(found)))
        return
    for name, value in table(found):
        click.echo(f"{name + ':':<14}{value}")
