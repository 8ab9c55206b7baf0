"""``stl-offline evaluate``."""

import json
import os
from collections.abc import Mapping
from typing import Any

from stl_offline.cli.command import NAMES, NUMBERS, command, example, setting_option
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


@command(
    epilog=example(
        "stl-offline evaluate --data images/val --checkpoint runs/student --json",
        "stl-offline evaluate --suite imagenet,a,c --data imagenet=val --data a=imagenet-a --data c=imagenet-c \\",
        "    --model fan_tiny_8_p4_hybrid --checkpoint fan_hybrid_tiny.pth.tar --json > fan.json",
        "stl-offline evaluate --data images/val --corrupt noise,fog:1-3 --model timm:resnet50",
    )
)
@json_option
@setting_option(
    EvaluateConfig,
    "--data",
    group="data",
    multiple=True,
    metavar="SRC|NAME=SRC",
    more=f"{SOURCE_HELP}; with --suite, NAME=SRC for each suite, its folder or its tars",
)
@setting_option(EvaluateConfig, "--suite", group="data", type=NAMES, metavar="NAME,…", show_default="none")
@setting_option(EvaluateConfig, "--corrupt", group="data", metavar="KIND,…", show_default="none")
@setting_option(EvaluateConfig, "--seed", group="data", metavar="N")
@setting_option(EvaluateConfig, "--classes", group="data")
@setting_option(
    EvaluateConfig, "--crop-pct", group="data", type=float, metavar="X", show_default="the model's; 1.0 for a run"
)
@setting_option(EvaluateConfig, "--partial", group="data", is_flag=True)
@setting_option(EvaluateConfig, "--real-labels", group="data", metavar="FILE", show_default="timm's copy")
@skip_broken_option
@setting_option(
    EvaluateConfig, "--checkpoint", group="model", metavar="RUN|FILE", show_default="timm's weights of --model"
)
@setting_option(EvaluateConfig, "--model", group="model", metavar="NAME", show_default="the run's")
@setting_option(EvaluateConfig, "--class-names", group="model", metavar="FILE|SET", show_default="ImageNet's")
@setting_option(EvaluateConfig, "--img-size", group="model", metavar="N")
@setting_option(EvaluateConfig, "--batch-size", group="machine", metavar="N")
@setting_option(EvaluateConfig, "--amp", group="machine")
@setting_option(EvaluateConfig, "--csv", group="output", metavar="FILE")
@setting_option(EvaluateConfig, "--resume/--no-resume", group="output")
@setting_option(EvaluateConfig, "--by-order", group="advanced", is_flag=True)
@setting_option(
    EvaluateConfig, "--mean", group="advanced", type=NUMBERS, metavar="R,G,B", show_default="timm's values for --model"
)
@setting_option(
    EvaluateConfig, "--std", group="advanced", type=NUMBERS, metavar="R,G,B", show_default="timm's values for --model"
)
@device_option
@workers_option
@debug_option
def evaluate(as_json: bool, **settings: object) -> None:
    """Measure a model: accuracy, likelihood and calibration, on images, ImageNet's test sets, or generated corruptions.

    Scored parts of suites are kept, so an interrupted command continues where it stopped.
    For several processes: torchrun --nproc-per-node N -m stl_offline.cli evaluate --suite …
    """
    config = EvaluateConfig(**settings)
    from stl_offline.evaluation import evaluate as measure
    from stl_offline.evaluation import result_lines

    result = measure(config)
    if not config.is_plain and os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        echo(json.dumps(result, sort_keys=True))
    elif config.is_plain:
        echo(_plain_line(result))
    else:
        echo(*result_lines(result))


def _plain_line(result: Mapping[str, Any]) -> str:
    compared = result["classes_compared"]
    which = f"over all {compared:,} classes of the model"
    if compared < result["classes_of_model"]:
        which = f"over the {compared:,} classes of the data, of {result['classes_of_model']:,}"
    return (
        f"{counted(result['samples'], 'image')}: {scores_line(result)}, NLL {result['nll']:.3f}, "
        f"ECE {100 * result['ece']:.2f} %, {which}"
    )
