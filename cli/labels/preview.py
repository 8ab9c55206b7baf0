"""``stl-offline labels preview``."""

import click

from stl_offline.cli.command import command, example, ignored, setting_option
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
@setting_option(
    PreviewConfig,
    "--data",
    group="data",
    metavar="SRC",
    show_default="none, which shows labels alone",
    more=SOURCE_HELP,
)
@setting_option(PreviewConfig, "--match", group="data")
@setting_option(PreviewConfig, "--missing", group="data")
@setting_option(PreviewConfig, "--allow-changed", group="data", is_flag=True)
@setting_option(PreviewConfig, "--key", "keys", group="labels", multiple=True, metavar="KEY")
@setting_option(PreviewConfig, "--samples", group="labels", metavar="N")
@setting_option(PreviewConfig, "--suspects", group="labels", metavar="N")
@setting_option(PreviewConfig, "--seed", group="labels", metavar="N")
@setting_option(PreviewConfig, "--view", "map_index", group="labels", multiple=True, metavar="V")
@setting_option(PreviewConfig, "--threshold", group="labels", metavar="X")
@setting_option(PreviewConfig, "--student-seed", group="augmentation", metavar="N")
@setting_option(PreviewConfig, "--epoch", group="augmentation", metavar="N")
@setting_option(PreviewConfig, "--scale-min", group="augmentation", metavar="X")
@setting_option(PreviewConfig, "--flip", group="augmentation", metavar="X")
@setting_option(PreviewConfig, "--out", group="output", metavar="DIR")
@setting_option(PreviewConfig, "--all-shards", group="output", is_flag=True)
@setting_option(PreviewConfig, "--max-mb", group="output", metavar="X")
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
