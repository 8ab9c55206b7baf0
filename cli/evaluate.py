"""``stl-offline evaluate``."""

import json

import click

from stl_offline.cli.command import command, example, option
from stl_offline.cli.options import (
    SOURCE_HELP,
    debug_option,
    device_option,
    json_option,
    skip_broken_option,
    workers_option,
)
from stl_offline.cli.output import counted, scores_line
from stl_offline.cli.terminal import echo
from stl_offline.config import AMP_MODES, EvaluateConfig


@command(epilog=example("stl-offline evaluate --data images/val --checkpoint runs/student --json"))
@json_option
@option("--data", group="data", required=True, metavar="SRC", help=f"Images to evaluate on: {SOURCE_HELP}.")
@option(
    "--crop-pct",
    group="data",
    default=EvaluateConfig.crop_pct,
    metavar="X",
    help="Part of the image's shorter side that the central crop takes.",
)
@skip_broken_option
@option("--checkpoint", group="model", required=True, metavar="RUN", help="A run's folder, or one of its checkpoints.")
@option(
    "--img-size",
    group="model",
    default=EvaluateConfig.img_size,
    metavar="N",
    help="Height and width of the model's input, in pixels (0 takes the size it was trained with).",
)
@option("--batch-size", group="machine", default=EvaluateConfig.batch_size, metavar="N", help="Images per batch.")
@option(
    "--amp",
    group="machine",
    default=EvaluateConfig.amp,
    type=click.Choice(AMP_MODES),
    help="Mixed precision of the model; auto chooses by device.",
)
@device_option
@workers_option
@debug_option
def evaluate(as_json: bool, **settings: object) -> None:
    """Measure a trained model: top-1 and top-5 of the class head, and top-1 of the mean over its tokens."""
    config = EvaluateConfig(**settings)
    from stl_offline.evaluation import evaluate as measure

    result = measure(config)
    if as_json:
        echo(json.dumps(result, sort_keys=True))
        return
    echo(f"{counted(result['samples'], 'image')}: {scores_line(result)}")
