"""``stl-offline labels merge``."""

import click

from stl_offline.cli.command import command, example, ignored, option
from stl_offline.cli.labels.output import is_complete, written_line
from stl_offline.cli.options import debug_option, workers_option
from stl_offline.cli.terminal import echo


@command(
    epilog=example(
        "stl-offline labels merge labels-a labels-b s3://team/labels-c labels",
        "stl-offline labels merge --views views-0-9 views-10-19 labels",
    )
)
@click.argument("paths", metavar="SET SET...", nargs=-1, required=True)
@click.argument("out", metavar="OUT")
@option(
    "--views",
    group="labels",
    is_flag=True,
    help="Merge sets with different views of the same images (made with dump-labels --first-view).",
)
@workers_option
@debug_option
@ignored("--device")
def merge(paths: tuple[str, ...], out: str, views: bool, workers: int) -> None:
    """Merge several label sets that were made with the same settings from different images, or with different views.

    Shards are copied byte for byte. Differing settings and keys that occur twice are errors that name them. An
    interrupted merge continues when the same command runs again.
    """
    from stl_offline.labels import merge as merging
    from stl_offline.labels.label_set import open_label_set

    write = merging.merge_views if views else merging.merge
    label_sets, complete = [open_label_set(path) for path in paths], is_complete(out)
    manifest = write(label_sets, out, workers=workers)
    for each in label_sets:
        if each.lacks_shards:
            here = f"{len(each.present):,} of {len(each.shards):,} shards"
            echo(f"{each.place}: {here} are here and were merged; the images of the others are not in {out}")
    echo(written_line(out, manifest, complete))
