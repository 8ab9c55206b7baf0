"""``stl-offline labels preview``."""

import click

from stl_offline.cli.options import SOURCE_HELP, example, machine_options, option
from stl_offline.config import PreviewConfig


@click.command(
    epilog=example(
        "stl-offline labels preview labels --data images/train --out preview",
        "stl-offline labels preview labels --data images/train --key 'ring/*' --samples 4",
    )
)
@click.argument("path", metavar="SET")
@option("--data", metavar="SRC", help=f"The images: {SOURCE_HELP}.  [default: none, labels alone]")
@option("--out", default=PreviewConfig.out, metavar="DIR", help="Folder for labels.html and the PNGs.")
@option("--key", "keys", multiple=True, metavar="KEY", help="A key, or a pattern with * and ?; may be repeated.")
@option("--samples", default=PreviewConfig.samples, metavar="N", help="Labels to draw, of all or of a pattern's.")
@option("--seed", default=PreviewConfig.seed, metavar="N", help="Of the samples.")
@option(
    "--view", "views", multiple=True, default=PreviewConfig.views, metavar="V", help="Which crop of each; repeatable."
)
@option("--threshold", default=PreviewConfig.threshold, metavar="X", help="Confidence of a confident token.")
@option("--student-seed", default=PreviewConfig.student_seed, metavar="N", help="The student's --seed: crops, draws.")
@option(
    "--epoch",
    default=PreviewConfig.epoch,
    metavar="N",
    help="The student's epoch, from 0; its logs and the page count from 1.",
)
@option("--scale-min", default=PreviewConfig.scale_min, metavar="X", help="The student's smallest crop.")
@option("--flip", default=PreviewConfig.flip, metavar="X", help="The student's chance of a flip.")
@option(
    "--missing",
    default=PreviewConfig.missing,
    type=click.Choice(["error", "skip"]),
    help="Labels without an image: stop, or show them alone.",
)
@option("--allow-changed", is_flag=True, default=PreviewConfig.allow_changed, help="Images changed since: go on.")
@option("--all-shards", is_flag=True, default=PreviewConfig.all_shards, help="Read the whole set for the histogram.")
@option("--max-mb", default=PreviewConfig.max_mb, metavar="X", help="Largest page, in megabytes.")
@machine_options
def preview(**options: object) -> None:
    """Look at labels: a page and PNGs with their classes, confidence, draws, and what a student's crop makes of them.

    The page is one file that needs nothing else: pointing at a token, or going there with the keys, shows its most
    probable classes. Only the shards that hold the chosen labels are read (with --key, the keys of all shards).
    """
    config = PreviewConfig(**options)
    from stl_offline.reports.preview import preview_labels

    find_images = None
    if config.data is not None:
        from stl_offline.reports.find import find_images

    report = preview_labels(config, find_images)
    for warning in report.warnings:
        click.echo(f"note: {warning}", err=True)
    for figure in report.figures:
        click.echo(f"image: {figure}")
    click.echo(f"page: {report.page} ({report.shown} label maps, {report.bytes:,} bytes, {report.shards} shards read)")
