"""``stl-offline train-labeler``."""

import click

from stl_offline.cli.options import example, machine_options, said, training_options
from stl_offline.cli.stages import train_or_look


@click.command(
    epilog=example(
        "stl-offline train-labeler --recipe fan-tiny --data images/train --val images/val --out runs/labeler",
        "stl-offline train-labeler --data images/train --val images/val \\",
        "    --model fan_tiny_8_p4_hybrid --img-size 224 --epochs 350 --batch-size 128 --out runs/labeler",
    )
)
@training_options
@machine_options
@click.pass_context
def train_labeler(ctx: click.Context, **_: object) -> None:
    """Stage 1: train a model whose tokens answer for the image, and so learn to label it.

    The loss is the class loss plus the class loss of the mean over all tokens; no token has a label of its own.
    Several processes: torchrun --nproc-per-node N -m stl_offline.cli train-labeler …
    """
    train_or_look("labeler", said(ctx))
