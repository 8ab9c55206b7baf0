"""``stl-offline evaluate``."""

import json

import click

from stl_offline.cli.options import SOURCE_HELP, example, machine_options, option
from stl_offline.cli.output import scores_line
from stl_offline.config import AMP_MODES, EvaluateConfig


@click.command(epilog=example("stl-offline evaluate --data images/val --checkpoint runs/student --json"))
@option("--data", required=True, metavar="SRC", help=f"Images to measure on: {SOURCE_HELP}.")
@option("--checkpoint", required=True, metavar="RUN", help="A run's folder, or a checkpoint of one.")
@option("--batch-size", default=EvaluateConfig.batch_size, metavar="N", help="Images a step.")
@option("--img-size", default=EvaluateConfig.img_size, metavar="N", help="Side of the input; 0: as trained.")
@option("--crop-pct", default=EvaluateConfig.crop_pct, metavar="X", help="Share of the side in the central crop.")
@option("--amp", default=EvaluateConfig.amp, type=click.Choice(AMP_MODES), help="Half precision.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@machine_options
def evaluate(as_json: bool, **options: object) -> None:
    """Measure a trained model: top-1 and top-5 of the class head, and top-1 of the mean over its tokens."""
    config = EvaluateConfig(**options)
    from stl_offline.evaluation import evaluate as measure

    result = measure(config)
    if as_json:
        click.echo(json.dumps(result, sort_keys=True))
        return
    click.echo(f"{result['samples']:,} images: {scores_line(result)}")
