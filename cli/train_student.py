"""``stl-offline train-student``."""

import click

from stl_offline.cli.options import example, machine_options, option, training_options
from stl_offline.cli.output import run_line
from stl_offline.config import RESIDUALS, TOKEN_TARGETS, VIEW_MODES, StudentConfig


@click.command(
    epilog=example(
        "stl-offline train-student --data pictures/train --val pictures/val --labels labels \\",
        "    --model fan_tiny_8_p4_hybrid --img-size 224 --epochs 350 --batch-size 128 --out runs/student",
        "",
        "Baselines: --labels none (no token labels), --labels online --labeler runs/labeler (it runs in every step)",
    )
)
@training_options
@option("--labels", default=StudentConfig.labels, metavar="SET|none|online", help="Where token labels come from.")
@option("--labeler", metavar="RUN|CKPT|timm:NAME", help="The labeler, with --labels online.")
@option("--labeler-checkpoint", metavar="FILE", help="Weights for a labeler named timm:NAME.")
@option(
    "--token-target",
    default=StudentConfig.token_target,
    type=click.Choice(TOKEN_TARGETS),
    help="One class drawn for each token, the distribution, or its best class.",
)
@option(
    "--residual",
    default=StudentConfig.residual,
    type=click.Choice(RESIDUALS),
    help="Mass outside the stored classes: no label, or spread over all classes.",
)
@option(
    "--views",
    default=StudentConfig.views,
    type=click.Choice(VIEW_MODES),
    help="The crops that the labeler saw, new ones, or whichever the set has.",
)
@option("--columns", default=StudentConfig.columns, metavar="N", help="Classes kept for a token of a soft target.")
@option(
    "--sampling-ratio", default=StudentConfig.sampling_ratio, metavar="N", help="RoIAlign's points a cell and side."
)
@option("--min-confidence", default=StudentConfig.min_confidence, metavar="X", help="Leave tokens below it unlabelled.")
@option(
    "--missing",
    default=StudentConfig.missing,
    type=click.Choice(["error", "skip"]),
    help="Pictures without labels: stop, or train them without.",
)
@option(
    "--allow-changed",
    is_flag=True,
    default=StudentConfig.allow_changed,
    help="Use labels of pictures whose content has changed since.",
)
@machine_options
def train_student(**options: object) -> None:
    """Stage 2: train a model from class labels and token labels.

    The labels are joined by key, follow every crop and flip, and mix as the pixels mix.
    """
    config = StudentConfig(**options)
    from stl_offline.training.student import train_student as train

    click.echo(run_line("student", config.out, train(config)))
