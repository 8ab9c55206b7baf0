"""``stl-offline train-labeler``."""

import click

from stl_offline.cli.options import example, machine_options, training_options
from stl_offline.cli.output import run_line
from stl_offline.config import LabelerConfig


@click.command(
    epilog=example(
        "stl-offline train-labeler --data pictures/train --val pictures/val \\",
        "    --model fan_tiny_8_p4_hybrid --img-size 224 --epochs 350 --batch-size 128 --out runs/labeler",
    )
)
@training_options
@machine_options
def train_labeler(**options: object) -> None:
    """Stage 1: train a model whose tokens answer for the picture, and so learn to label it.

    The loss is the class loss plus the class loss of the mean over all tokens; no token has a label of its own.
    """
    config = LabelerConfig(**options)
    from stl_offline.training.labeler import train_labeler as train

    click.echo(run_line("labeler", config.out, train(config)))
