"""Options that the commands of ``stl-offline transfer`` share."""

from collections.abc import Callable

from stl_offline.cli.command import F, option, setting_option, together
from stl_offline.cli.options import device_option, dry_run_option, workers_option
from stl_offline.config_transfer import BackboneConfig

PAIRS_HELP = "images/NAME.jpg with masks/NAME.png at any depth, or NAME.jpg beside NAME.png, masks of class ids"

# Option (the field's name, where it has an opposite) → its group and how its value is named.
_OPTIONS = {
    "--classes": ("data", "FILE|A,B,…"),
    "--split": ("data", "NAME"),
    "--val": ("data", "SRC"),
    "--val-split": ("data", "NAME"),
    "--backbone": ("model", "RUN|CKPT|timm:NAME"),
    "--backbone-checkpoint": ("model", "FILE"),
    "--backbone-pretrained/--no-backbone-pretrained": ("model", None),
    "--freeze/--no-freeze": ("model", None),
    "--drop-path": ("model", "X"),
    "--epochs": ("optimisation", "N"),
    "--batch-size": ("optimisation", "N"),
    "--accumulate": ("optimisation", "N"),
    "--lr": ("optimisation", "X"),
    "--lr-batch": ("optimisation", "N"),
    "--head-lr-scale": ("optimisation", "X"),
    "--layer-decay": ("optimisation", "X"),
    "--schedule": ("optimisation", None),
    "--warmup-epochs": ("optimisation", "X"),
    "--weight-decay": ("optimisation", "X"),
    "--clip-grad": ("optimisation", "X"),
    "--ema-decay": ("optimisation", "X"),
    "--seed": ("optimisation", "N"),
    "--flip": ("augmentation", "X"),
    "--resume/--no-resume": ("checkpoints", None),
    "--checkpoint-every": ("checkpoints", "SECONDS"),
    "--out": ("output", "RUN"),
    "--val-every": ("output", "N"),
    "--log-every": ("output", "N"),
    "--tensorboard/--no-tensorboard": ("output", None),
    "--amp": ("machine", None),
    "--checkpoint-steps": ("advanced", "N"),
    "--channels-last/--no-channels-last": ("advanced", None),
    "--sync-bn/--no-sync-bn": ("advanced", None),
}
_NONE = {"--split": "all", "--val": "none", "--val-split": "all", "--backbone-checkpoint": "random weights"}


def fine_tuning_options(config: type[BackboneConfig], recipes: str = "") -> Callable[[F], F]:
    """The options that every kind of fine-tuning has, with the defaults of its settings class. ``recipes``: the names
    of the package's own, for the help."""
    options = [
        setting_option(
            config,
            names,
            group=group,
            **({"metavar": metavar} if metavar else {}),
            **({"show_default": _NONE[names]} if names in _NONE else {}),
        )
        for names, (group, metavar) in _OPTIONS.items()
    ]
    recipe = option(
        "--recipe",
        group="general",
        metavar="NAME|FILE" if recipes else "FILE",
        show_default="none",
        help=f"Settings that replace the defaults: {f'{recipes}, or ' if recipes else ''}a YAML file.",
    )
    return together(recipe, dry_run_option, *options, device_option, workers_option)
