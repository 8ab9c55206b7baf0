"""Options that several commands share. Their defaults come from `stl_offline.config`, which defines the settings."""

import click

from stl_offline.cli.command import NUMBERS, option, setting_option, together
from stl_offline.config import DumpConfig, MachineConfig, StudentConfig, TrainConfig
from stl_offline.settings import ERASE_MODES, MIX_MODES

SOURCE_HELP = "a folder of class folders, tars, a .beton file, or a timm reader"


def _remember_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if ctx.obj is not None:
        ctx.obj.debug = value


device_option = setting_option(MachineConfig, "--device", group="machine", metavar="NAME")

# Commands on label sets have no settings class that would check it.
workers_option = setting_option(MachineConfig, "--workers", group="machine", type=click.IntRange(min=0), metavar="N")

debug_option = option(
    "--debug",
    group="general",
    is_flag=True,
    default=False,
    expose_value=False,
    callback=_remember_debug,
    help="Show debug messages, warnings of other libraries, and a traceback on failure.",
)

json_option = option("--json", "as_json", group="general", is_flag=True, help="Print the result as one JSON object.")

skip_broken_option = setting_option(TrainConfig, "--skip-broken", group="data", is_flag=True)

key_prefix_option = setting_option(StudentConfig, "--key-prefix", group="advanced", metavar="OLD=NEW")

match_option = setting_option(StudentConfig, "--match", group="labels")

timm_labeler_options = together(
    setting_option(DumpConfig, "--labeler-checkpoint", group="model", metavar="FILE"),
    setting_option(DumpConfig, "--labeler-pretrained", group="model", is_flag=True),
    setting_option(DumpConfig, "--labeler-classes", group="model", metavar="FILE|SET", show_default="ImageNet's"),
)

foreign_labeler_options = together(
    setting_option(DumpConfig, "--labeler-by-order", group="advanced", is_flag=True),
    setting_option(
        DumpConfig,
        "--labeler-mean",
        group="advanced",
        type=NUMBERS,
        metavar="R,G,B",
        show_default="timm's values for NAME",
    ),
    setting_option(
        DumpConfig,
        "--labeler-std",
        group="advanced",
        type=NUMBERS,
        metavar="R,G,B",
        show_default="timm's values for NAME",
    ),
)

dry_run_option = option(
    "--dry-run",
    group="general",
    is_flag=True,
    help="Print the settings, the number of steps, and estimated time and memory. Write nothing.",
)

training_options = together(
    option(
        "--recipe",
        group="general",
        metavar="NAME|FILE",
        show_default="none",
        help="Settings that replace the defaults: fan-tiny, fan-small, fan-base, fan-large, fan-micro, or a YAML file.",
    ),
    dry_run_option,
    setting_option(TrainConfig, "--data", group="data", metavar="SRC", more=SOURCE_HELP),
    setting_option(TrainConfig, "--val", group="data", metavar="SRC", show_default="none"),
    setting_option(TrainConfig, "--skip-broken/--no-skip-broken", group="data"),
    setting_option(TrainConfig, "--loader", group="data"),
    setting_option(TrainConfig, "--model", group="model", metavar="NAME"),
    setting_option(TrainConfig, "--init", group="model", metavar="RUN|FILE|timm", show_default="random"),
    setting_option(TrainConfig, "--freeze/--no-freeze", group="model"),
    setting_option(TrainConfig, "--img-size", group="model", metavar="N"),
    setting_option(TrainConfig, "--drop-path", group="model", metavar="X"),
    setting_option(TrainConfig, "--epochs", group="optimisation", metavar="N"),
    setting_option(TrainConfig, "--batch-size", group="optimisation", metavar="N"),
    setting_option(TrainConfig, "--accumulate", group="optimisation", metavar="N"),
    setting_option(TrainConfig, "--lr", group="optimisation", metavar="X"),
    setting_option(TrainConfig, "--lr-batch", group="optimisation", metavar="N"),
    setting_option(TrainConfig, "--layer-decay", group="optimisation", metavar="X"),
    setting_option(TrainConfig, "--warmup-epochs", group="optimisation", metavar="X"),
    setting_option(TrainConfig, "--weight-decay", group="optimisation", metavar="X"),
    setting_option(TrainConfig, "--clip-grad", group="optimisation", metavar="X"),
    setting_option(TrainConfig, "--ema-decay", group="optimisation", metavar="X"),
    setting_option(TrainConfig, "--smoothing", group="optimisation", metavar="X"),
    setting_option(TrainConfig, "--token-weight", group="optimisation", metavar="X"),
    setting_option(TrainConfig, "--seed", group="optimisation", metavar="N"),
    setting_option(TrainConfig, "--scale-min", group="augmentation", metavar="X"),
    setting_option(TrainConfig, "--flip", group="augmentation", metavar="X"),
    setting_option(
        TrainConfig,
        "--color-jitter",
        group="augmentation",
        type=float,
        metavar="X",
    ),
    setting_option(TrainConfig, "--repeats", group="augmentation", metavar="M"),
    setting_option(TrainConfig, "--auto-augment", group="augmentation", metavar="NAME", show_default="none"),
    setting_option(TrainConfig, "--mixup", group="augmentation", metavar="X"),
    setting_option(TrainConfig, "--cutmix", group="augmentation", metavar="X"),
    setting_option(TrainConfig, "--random-erase", group="augmentation", metavar="X"),
    setting_option(TrainConfig, "--interpolation", group="augmentation"),
    setting_option(TrainConfig, "--resume/--no-resume", group="checkpoints"),
    setting_option(TrainConfig, "--checkpoint-every", group="checkpoints", metavar="SECONDS"),
    setting_option(TrainConfig, "--out", group="output", metavar="RUN"),
    setting_option(TrainConfig, "--val-every", group="output", metavar="N"),
    setting_option(TrainConfig, "--log-every", group="output", metavar="N"),
    setting_option(TrainConfig, "--tensorboard/--no-tensorboard", group="output"),
    device_option,
    workers_option,
    setting_option(TrainConfig, "--amp", group="machine"),
    setting_option(TrainConfig, "--compile/--no-compile", group="machine"),
    setting_option(TrainConfig, "--token-head", group="advanced"),
    setting_option(TrainConfig, "--grad-checkpointing/--no-grad-checkpointing", group="advanced"),
    setting_option(TrainConfig, "--mix-prob", group="advanced", metavar="X"),
    setting_option(TrainConfig, "--mix-mode", group="advanced", type=click.Choice(MIX_MODES)),
    setting_option(TrainConfig, "--erase-mode", group="advanced", type=click.Choice(ERASE_MODES)),
    setting_option(TrainConfig, "--checkpoint-steps", group="advanced", metavar="N"),
    setting_option(TrainConfig, "--channels-last/--no-channels-last", group="advanced"),
    setting_option(TrainConfig, "--sync-bn/--no-sync-bn", group="advanced"),
    debug_option,
)
