"""``stl-offline transfer zero-train``."""

import json

from stl_offline.cli.command import command, example, setting_option
from stl_offline.cli.options import SOURCE_HELP, debug_option, device_option, json_option, workers_option
from stl_offline.cli.output import percent
from stl_offline.cli.terminal import echo
from stl_offline.config_transfer import ZeroTrainConfig


@command(
    epilog=example("stl-offline transfer zero-train --data images/val --masks boxes.json --checkpoint runs/student")
)
@json_option
@setting_option(ZeroTrainConfig, "--data", group="data", metavar="SRC", more=SOURCE_HELP)
@setting_option(ZeroTrainConfig, "--masks", group="data", metavar="PATH")
@setting_option(ZeroTrainConfig, "--skip-broken", group="data", is_flag=True)
@setting_option(ZeroTrainConfig, "--checkpoint", group="model", metavar="RUN")
@setting_option(ZeroTrainConfig, "--threshold", group="model", metavar="X")
@setting_option(ZeroTrainConfig, "--img-size", group="model", metavar="N")
@setting_option(ZeroTrainConfig, "--batch-size", group="machine", metavar="N")
@setting_option(ZeroTrainConfig, "--amp", group="machine")
@device_option
@workers_option
@debug_option
def zero_train(as_json: bool, **settings: object) -> None:
    """Measure the token head itself as a coarse segmenter: nothing is trained, and no mask has been seen.

    The tokens' log-odds of each image's own class are resized to its mask. Foreground is where they reach --threshold.
    """
    config = ZeroTrainConfig(**settings)
    from stl_offline.transfer import score_token_head

    result = score_token_head(config)
    if as_json:
        echo(json.dumps(result, sort_keys=True))
        return
    auroc = "–" if result["auroc"] is None else f"{result['auroc']:.3f}"
    echo(
        f"masks       {result['samples']:,} of {result['images']:,} images have one",
        f"mean IoU    {percent(result['miou'])}",
        f"foreground  IoU {percent(result['iou/foreground'])} (all foreground: {percent(result['all_foreground'])})",
        f"background  IoU {percent(result['iou/background'])}",
        f"AUROC       {auroc}",
    )
