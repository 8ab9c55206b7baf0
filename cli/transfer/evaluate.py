"""``stl-offline transfer evaluate``."""

import json
from collections.abc import Mapping
from typing import Any

from stl_offline.cli.command import command, example, setting_option
from stl_offline.cli.options import debug_option, device_option, json_option, workers_option
from stl_offline.cli.output import counted, percent, scores_line
from stl_offline.cli.terminal import echo
from stl_offline.cli.transfer.options import PAIRS_HELP
from stl_offline.config_transfer import TransferEvaluateConfig


@command(
    epilog=example(
        "stl-offline transfer evaluate --data camvid.tar --split val --checkpoint runs/segmenter --corrupt noise,fog:3"
    )
)
@json_option
@setting_option(TransferEvaluateConfig, "--data", group="data", metavar="SRC", more=PAIRS_HELP)
@setting_option(TransferEvaluateConfig, "--annotations", group="data", metavar="FILE", show_default="XML files")
@setting_option(TransferEvaluateConfig, "--split", group="data", metavar="NAME", show_default="all")
@setting_option(TransferEvaluateConfig, "--checkpoint", group="model", metavar="RUN")
@setting_option(TransferEvaluateConfig, "--sliding-window/--no-sliding-window", group="model")
@setting_option(TransferEvaluateConfig, "--corrupt", group="data", metavar="KINDS", show_default="none")
@setting_option(TransferEvaluateConfig, "--seed", group="data", metavar="N")
@setting_option(TransferEvaluateConfig, "--out", group="output", metavar="FOLDER", show_default="none")
@setting_option(TransferEvaluateConfig, "--page", group="output", metavar="FILE", show_default="none")
@setting_option(TransferEvaluateConfig, "--examples", group="output", metavar="N")
@setting_option(TransferEvaluateConfig, "--amp", group="machine")
@device_option
@workers_option
@debug_option
def evaluate(as_json: bool, **settings: object) -> None:
    """Measure a segmenter (mean IoU, IoU of each class, accuracy) or a detector (mAP of boxes, and of masks) on whole
    images, clean and corrupted.
    """
    config = TransferEvaluateConfig(**settings)
    from stl_offline.transfer import evaluate_transfer

    write_page = None
    if config.page is not None:  # its place and its extra are looked at before the work, and the scores shown before it
        from stl_offline.files import check_place_of_file
        from stl_offline.reports.segments import write_segment_page as write_page

        check_place_of_file(config.page)
    result = evaluate_transfer(config)
    if as_json:
        echo(json.dumps(result, sort_keys=True))
    else:
        _print(result)
    if write_page is not None:
        write_page(config, result)


def _print(result: Mapping[str, Any]) -> None:
    """The scores as lines."""
    echo(f"{counted(result['samples'], 'image')}: {scores_line(result)}")
    kinds = {"iou": "IoU", "ap": "AP", "mask_ap": "mask AP"}
    classes: dict[str, list[str]] = {}
    for key, value in result.items():
        kind, slash, name = key.partition("/")
        if slash:
            classes.setdefault(name, []).append(f"{kinds[kind]} {percent(value):>8}")
    width = max(map(len, classes))
    echo(*(f"  {name:<{width}}  {'  '.join(scores)}" for name, scores in classes.items()))
    if "corrupted" not in result:
        return
    label, mean = ("mean IoU", "corrupted_miou") if "miou" in result else ("mAP", "corrupted_map")
    retention = "" if result["retention"] is None else f", retention {percent(result['retention'])}"
    echo(f"corrupted: {label} {percent(result[mean])}{retention}")
    width = max(map(len, result["corrupted"]))
    for kind, scores in result["corrupted"].items():
        shown = ", ".join(f"{severity}: {percent(value)}" for severity, value in scores.items())
        echo(f"  {kind:<{width}}  {label} by severity {shown}")
