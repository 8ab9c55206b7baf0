"""``stl-offline train-student``."""

import click

from stl_offline.cli.command import NUMBERS, command, example, setting_option
from stl_offline.cli.options import key_prefix_option, match_option, timm_labeler_options, training_options
from stl_offline.cli.stages import print_dry_run, print_run, settings_of_run
from stl_offline.config import StudentConfig
from stl_offline.settings import RESIDUALS, TOKEN_TARGETS


@command(
    epilog=example(
        "stl-offline train-student --recipe fan-tiny --data images/train --val images/val \\",
        "    --labels labels --out runs/student",
        "stl-offline train-student --data images/train --val images/val --labels labels --labels labels-448 \\",
        "    --model fan_tiny_8_p4_hybrid --img-size 224 --epochs 350 --batch-size 128 --out runs/student",
        "",
        "Baselines: --labels none (no token labels), --labels online --labeler runs/labeler (labels every batch)",
    )
)
@training_options
@setting_option(StudentConfig, "--labels", group="labels", multiple=True, metavar="SET|none|online")
@setting_option(StudentConfig, "--labeler", group="labels", metavar="RUN|CKPT|timm:NAME|hf-hub:NAME")
@timm_labeler_options
@setting_option(StudentConfig, "--token-target", group="labels", type=click.Choice(TOKEN_TARGETS))
@setting_option(StudentConfig, "--residual", group="labels", type=click.Choice(RESIDUALS))
@setting_option(StudentConfig, "--token-norm", group="labels")
@setting_option(StudentConfig, "--class-target", group="labels", metavar="own|labels|mix:W")
@setting_option(StudentConfig, "--views", "crops", group="labels")
@match_option
@setting_option(StudentConfig, "--missing", group="labels")
@setting_option(StudentConfig, "--min-confidence", group="labels", metavar="X")
@setting_option(StudentConfig, "--select", group="labels", metavar="all|own|confident:X")
@setting_option(StudentConfig, "--labels-pick", group="advanced")
@setting_option(StudentConfig, "--labels-share", group="advanced", type=NUMBERS, metavar="X,Y", show_default="equal")
@setting_option(StudentConfig, "--columns", "soft_classes", group="advanced", metavar="N")
@setting_option(StudentConfig, "--sampling-ratio", group="advanced", metavar="N")
@setting_option(StudentConfig, "--erased-labels", group="advanced")
@key_prefix_option
@setting_option(StudentConfig, "--allow-changed/--no-allow-changed", group="advanced")
@click.pass_context
def train_student(ctx: click.Context, recipe: str | None, dry_run: bool, **settings: object) -> None:
    """Stage 2: train a model from class labels and token labels.

    Labels are joined by key (or as --match states), follow every crop and flip, and are mixed as the pixels are mixed.
    For several processes: torchrun --nproc-per-node N -m stl_offline.cli train-student …
    """
    config = settings_of_run(StudentConfig, ctx, recipe, settings)
    if dry_run:
        from stl_offline.training.dry_run import dry_run as measure

        print_dry_run(measure(config, "student"))
        return
    from stl_offline.training.train_student import train_student as train

    print_run("student", config.out, train(config))
