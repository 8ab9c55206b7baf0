"""``stl-offline train-labeler``."""

import click

from stl_offline.cli.command import command, example, setting_option
from stl_offline.cli.options import training_options
from stl_offline.cli.stages import print_dry_run, print_run, settings_of_run
from stl_offline.config import LabelerConfig


@command(
    epilog=example(
        "stl-offline train-labeler --recipe fan-tiny --data images/train --val images/val --out runs/labeler",
        "stl-offline train-labeler --data images/train --val images/val \\",
        "    --model fan_tiny_8_p4_hybrid --img-size 224 --epochs 350 --batch-size 128 --out runs/labeler",
    )
)
@training_options
@setting_option(LabelerConfig, "--token-pool", group="labels")
@click.pass_context
def train_labeler(ctx: click.Context, recipe: str | None, dry_run: bool, **settings: object) -> None:
    """Stage 1: train a model whose tokens learn to classify, so that it can label them.

    The loss is the class loss plus the class loss of the pooled tokens. No token has a label of its own.
    For several processes: torchrun --nproc-per-node N -m stl_offline.cli train-labeler …
    """
    config = settings_of_run(LabelerConfig, ctx, recipe, settings)
    if dry_run:
        from stl_offline.training.dry_run import dry_run as measure

        print_dry_run(measure(config, "labeler"))
        return
    from stl_offline.training.train_labeler import train_labeler as train

    print_run("labeler", config.out, train(config))
