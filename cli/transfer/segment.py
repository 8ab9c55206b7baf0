"""``stl-offline transfer segment``."""

import click

from stl_offline.cli.command import command, example, setting_option
from stl_offline.cli.options import debug_option
from stl_offline.cli.stages import print_dry_run, print_run, settings_of_run
from stl_offline.cli.transfer.options import PAIRS_HELP, fine_tuning_options
from stl_offline.config_transfer import SegmentConfig


@command(
    epilog=example(
        "stl-offline transfer segment --data camvid.tar --split train --val camvid.tar --val-split val \\",
        "    --classes camvid.txt --ignore-id 11 --backbone runs/student --out runs/segmenter",
        "stl-offline transfer segment --recipe segment-fan-tiny --data city/train --val city/val \\",
        "    --classes city.txt --backbone runs/student --out runs/segmenter",
    )
)
@setting_option(SegmentConfig, "--data", group="data", metavar="SRC", more=PAIRS_HELP)
@setting_option(SegmentConfig, "--ignore-id", group="data", metavar="N")
@fine_tuning_options(SegmentConfig, "segment-fan-tiny, segment-fan-small, segment-fan-base, segment-fan-large")
@setting_option(SegmentConfig, "--head-width", group="model", metavar="N")
@setting_option(SegmentConfig, "--head-dropout", group="model", metavar="X")
@setting_option(SegmentConfig, "--crop-height", group="augmentation", metavar="N")
@setting_option(SegmentConfig, "--crop-width", group="augmentation", metavar="N")
@setting_option(SegmentConfig, "--scale-min", group="augmentation", metavar="X")
@setting_option(SegmentConfig, "--scale-max", group="augmentation", metavar="X")
@setting_option(SegmentConfig, "--color-jitter", group="augmentation", metavar="X")
@setting_option(SegmentConfig, "--sliding-window/--no-sliding-window", group="output")
@setting_option(SegmentConfig, "--compile/--no-compile", group="machine")
@debug_option
@click.pass_context
def segment(ctx: click.Context, recipe: str | None, dry_run: bool, **settings: object) -> None:
    """Fine-tune a backbone on masks: semantic segmentation with SegFormer's head.

    Images are scored at their full size after every --val-every epochs. A run that was interrupted is continued by the
    same command. For several processes: torchrun --nproc-per-node N -m stl_offline.cli transfer segment …
    """
    config = settings_of_run(SegmentConfig, ctx, recipe, settings)
    from stl_offline.transfer import dry_run_segmenter, train_segmenter

    if dry_run:
        print_dry_run(dry_run_segmenter(config))
        return
    print_run("segmenter", config.out, train_segmenter(config))
