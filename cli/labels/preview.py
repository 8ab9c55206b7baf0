"""``stl-offline labels preview``."""

import click

from stl_offline.cli.command import command, example, ignored, option
from stl_offline.cli.options import SOURCE_HELP, debug_option
from stl_offline.cli.output import counted
from stl_offline.cli.terminal import echo
from stl_offline.config import PreviewConfig


@command(
    epilog=example(
        "stl-offline labels preview labels --data images/train --out preview",
        "stl-offline labels preview labels --data images/train --key 'ring/*' --samples 4",
        "stl-offline labels preview labels --data images/train --suspects 20",
    )
)
@click.argument("path", metavar="SET")
@option(
    "--data",
    group="data",
    metavar="SRC",
    show_default="none, which shows labels alone",
    help=f"Images of the labels: {SOURCE_HELP}.",
)
@option(
    "--missing",
    group="data",
    default=PreviewConfig.missing,
    type=click.Choice(["error", "skip"]),
    help="What to do with labels that have no image: stop, or show them alone.",
)
@option(
    "--allow-changed",
    group="data",
    is_flag=True,
    default=PreviewConfig.allow_changed,
    help="Show images whose content has changed since they were labelled.",
)
@option(
    "--key",
    "keys",
    group="labels",
    multiple=True,
    metavar="KEY",
    help="Key to show, or a pattern with * and ?. May be given several times.",
)
@option(
    "--samples",
    group="labels",
    default=PreviewConfig.samples,
    metavar="N",
    help="Number of images to draw at random, from all keys or from those that match a pattern.",
)
@option(
    "--suspects",
    group="labels",
    default=PreviewConfig.suspects,
    metavar="N",
    help="Show the N images whose tokens disagree most with their class, in place of random ones (0 does not).",
)
@option("--seed", group="labels", default=PreviewConfig.seed, metavar="N", help="Seed of the random choice.")
@option(
    "--view",
    "map_index",
    group="labels",
    multiple=True,
    default=PreviewConfig.map_index,
    metavar="V",
    help="Which of an image's stored crops to show, from 0. May be given several times.",
)
@option(
    "--threshold",
    group="labels",
    default=PreviewConfig.threshold,
    metavar="X",
    help="Confidence from which a token counts as confident.",
)
@option(
    "--student-seed",
    group="augmentation",
    default=PreviewConfig.student_seed,
    metavar="N",
    help="The student's --seed, which its crops and drawn classes depend on.",
)
@option(
    "--epoch",
    group="augmentation",
    default=PreviewConfig.epoch,
    metavar="N",
    help="The student's epoch, counted from 0 (its logs and the page count from 1).",
)
@option(
    "--scale-min",
    group="augmentation",
    default=PreviewConfig.scale_min,
    metavar="X",
    help="The student's --scale-min.",
)
@option("--flip", group="augmentation", default=PreviewConfig.flip, metavar="X", help="The student's --flip.")
@option(
    "--out", group="output", default=PreviewConfig.out, metavar="DIR", help="Folder for labels.html and the PNG files."
)
@option(
    "--all-shards",
    group="output",
    is_flag=True,
    default=PreviewConfig.all_shards,
    help="Read all shards for the histogram, not only those shown.",
)
@option(
    "--max-mb",
    group="output",
    default=PreviewConfig.max_mb,
    metavar="X",
    help="Maximum size of the page, in megabytes.",
)
@debug_option
@ignored("--device", "--workers")
def preview(**settings: object) -> None:
    """Show labels on a page and in PNG files: classes, confidence, drawn classes, and their place in a student's crop.

    The page is one self-contained file. It shows a token's most probable classes under the pointer or the keyboard's
    focus. Only the shards that hold the chosen labels are read (with --key, the keys of all shards).
    """
    config = PreviewConfig(**settings)
    from stl_offline.reports.preview import preview_labels

    find_images = None
    if config.data is not None:
        from stl_offline.reports.find import find_images

    report = preview_labels(config, find_images)
    for warning in report.warnings:
        echo(f"note: {warning}", err=True)
    for figure in report.figures:
        echo(f"image: {figure}")
    facts = [counted(report.shown, "label map"), counted(report.bytes, "byte"), counted(report.shards, "shard")]
    echo(f"page: {report.page} ({', '.join(facts)} read)")
