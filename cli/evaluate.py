"""``stl-offline evaluate``."""

import json

from stl_offline.cli.command import command, example, setting_option
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
from stl_offline.config import EvaluateConfig


@command(epilog=example("stl-offline evaluate --data images/val --checkpoint runs/student --json"))
@json_option
@setting_option(EvaluateConfig, "--data", group="data", metavar="SRC", more=SOURCE_HELP)
@setting_option(EvaluateConfig, "--crop-pct", group="data", metavar="X")
@skip_broken_option
@setting_option(EvaluateConfig, "--checkpoint", group="model", metavar="RUN")
@setting_option(EvaluateConfig, "--img-size", group="model", metavar="N")
@setting_option(EvaluateConfig, "--batch-size", group="machine", metavar="N")
@setting_option(EvaluateConfig, "--amp", group="machine")
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
