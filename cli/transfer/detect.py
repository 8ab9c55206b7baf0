"""``stl-offline transfer detect``."""

import click

from stl_offline.cli.command import command, example, setting_option
from stl_offline.cli.options import debug_option
from stl_offline.cli.stages import print_dry_run, print_run, settings_of_run
from stl_offline.cli.transfer.options import fine_tuning_options
from stl_offline.config_transfer import DetectConfig

_HELP = "with Pascal VOC's NAME.xml beside NAME.jpg, or in a folder Annotations, or images alone with --annotations"


@command(
    epilog=example(
        "stl-offline transfer detect --data bccd.tar --split train --val bccd.tar --val-split val \\",
        "    --classes RBC,WBC,Platelets --backbone runs/student --out runs/detector",
    )
)
@setting_option(DetectConfig, "--data", group="data", metavar="SRC", more=_HELP)
@setting_option(DetectConfig, "--annotations", group="data", metavar="FILE", show_default="XML files")
@setting_option(DetectConfig, "--val-annotations", group="data", metavar="FILE", show_default="XML files")
@fine_tuning_options(DetectConfig)
@setting_option(DetectConfig, "--masks/--no-masks", group="model")
@setting_option(DetectConfig, "--head-width", group="model", metavar="N")
@setting_option(DetectConfig, "--side", group="model", metavar="N")
@setting_option(DetectConfig, "--longest", group="model", metavar="N")
@setting_option(DetectConfig, "--side-min", group="augmentation", metavar="N")
@debug_option
@click.pass_context
def detect(ctx: click.Context, recipe: str | None, dry_run: bool, **settings: object) -> None:
    """Fine-tune a backbone on boxes: object detection with torchvision's Faster R-CNN and a feature pyramid, or Mask
    R-CNN for masks of objects (--masks).

    Images are scored by COCO's mean average precision (extra [detect]). A run that was interrupted is continued by the
    same command.
    """
    config = settings_of_run(DetectConfig, ctx, recipe, settings)
    from stl_offline.transfer import dry_run_detector, train_detector

    if dry_run:
        print_dry_run(dry_run_detector(config))
        return
    print_run("detector", config.out, train_detector(config))
