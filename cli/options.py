"""Options that commands share. Their defaults come from `stl_offline.config`, where the settings are defined."""

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from stl_offline.config import AMP_MODES, ERASE_MODES, INTERPOLATIONS, MIX_MODES, MachineConfig, TrainConfig

F = TypeVar("F", bound=Callable[..., object])

SOURCE_HELP = "folder of class folders, tars, .beton, or timm reader"


class Numbers(click.ParamType):
    """Numbers with commas between them, as a tuple."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in value.split(",")) if isinstance(value, str) else tuple(value)
        except ValueError:
            self.fail(f"{value!r} is not numbers with commas between them, such as 0.5,0.5,0.5", param, ctx)


NUMBERS = Numbers()


def option(*names: str, **settings: object) -> Callable[[F], F]:
    """click's option, with its default shown."""
    return click.option(*names, **{"show_default": True, **settings})


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, listed by --help in the order given."""

    def decorate(command: F) -> F:
        for single in reversed(options):
            command = single(command)
        return command

    return decorate


def _remember_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    if value and ctx.obj is not None:
        ctx.obj.debug = True
    return value


debug_option = option(
    "--debug", is_flag=True, default=MachineConfig.debug, callback=_remember_debug, help="Show a traceback on failure."
)

machine_options = together(
    option(
        "--device",
        default=MachineConfig.device,
        metavar="NAME",
        help="Where models run: auto (a GPU where torch sees one, else the CPU), cpu, cuda; cuda:1 … for one process",
    ),
    option(
        "--workers",
        default=MachineConfig.workers,
        metavar="N",
        help="Threads that load, read or send, for each process; 0: as many as suit.",
    ),
    debug_option,
)

amp_option = option(
    "--amp", default=TrainConfig.amp, type=click.Choice(AMP_MODES), help="Half precision: which, if any."
)

interpolation_option = option(
    "--interpolation",
    default=TrainConfig.interpolation,
    type=click.Choice(INTERPOLATIONS),
    help="How crops are resized; the same for labeler and student.",
)

training_options = together(
    option(
        "--recipe",
        metavar="NAME|FILE",
        help="In place of the defaults: fan-tiny, -small, -base, -large, -micro, or a YAML file.  [default: none]",
    ),
    option("--dry-run", is_flag=True, help="Only print settings, steps, time and memory; write nothing."),
    option("--data", required=True, metavar="SRC", help=f"Images to learn from: {SOURCE_HELP}."),
    option("--val", metavar="SRC", help="Images to measure on after each epoch.  [default: none]"),
    option("--out", required=True, metavar="RUN", help="Folder of the run: checkpoints, settings, a line an epoch."),
    option("--model", default=TrainConfig.model, metavar="NAME", help="A FAN variant, such as fan_tiny_8_p4_hybrid."),
    option("--img-size", default=TrainConfig.img_size, metavar="N", help="Side of the model's input in pixels."),
    option("--epochs", default=TrainConfig.epochs, metavar="N", help="Times through the data."),
    option("--batch-size", default=TrainConfig.batch_size, metavar="N", help="Images a batch and process."),
    option("--accumulate", default=TrainConfig.accumulate, metavar="N", help="Batches that make one step."),
    option("--seed", default=TrainConfig.seed, metavar="N", help="Same seed, same crops, order and draws."),
    option("--lr", default=TrainConfig.lr, metavar="X", help="Largest learning rate; AdamW with a cosine to 1e-6."),
    option(
        "--lr-batch",
        default=TrainConfig.lr_batch,
        metavar="N",
        help="Images a step that --lr is for: it follows their real number; 0: --lr as it is.",
    ),
    option(
        "--warmup-epochs",
        default=TrainConfig.warmup_epochs,
        metavar="X",
        help="Epochs of rising learning rate; at most a fifth of the run.",
    ),
    option("--weight-decay", default=TrainConfig.weight_decay, metavar="X", help="AdamW's weight decay."),
    option("--clip-grad", default=TrainConfig.clip_grad, metavar="X", help="Largest norm of the gradient; 0: any."),
    option("--ema-decay", default=TrainConfig.ema_decay, metavar="X", help="Of the averaged weights; 0: none kept."),
    option("--smoothing", default=TrainConfig.smoothing, metavar="X", help="Label smoothing."),
    option("--drop-path", default=TrainConfig.drop_path, metavar="X", help="Stochastic depth."),
    option("--mixup", default=TrainConfig.mixup, metavar="X", help="Mixup's alpha; 0: off."),
    option("--cutmix", default=TrainConfig.cutmix, metavar="X", help="Cutmix's alpha; 0: off."),
    option("--mix-prob", default=TrainConfig.mix_prob, metavar="X", help="Chance that a batch, pair or image mixes."),
    option("--mix-mode", default=TrainConfig.mix_mode, type=click.Choice(MIX_MODES), help="What mixes as one."),
    option("--scale-min", default=TrainConfig.scale_min, metavar="X", help="Smallest share of the area in a crop."),
    option("--flip", default=TrainConfig.flip, metavar="X", help="Chance of a left-to-right flip."),
    option(
        "--color-jitter",
        default=TrainConfig.color_jitter,
        type=float,
        metavar="X",
        help="Strength; 0: off.  [default: 0.4; 0 beside --auto-augment]",
    ),
    option("--auto-augment", metavar="NAME", help="timm's RandAugment, such as rand-m9-mstd0.5-inc1.  [default: none]"),
    option("--random-erase", default=TrainConfig.random_erase, metavar="P", help="Chance of an erased box."),
    option("--erase-mode", default=TrainConfig.erase_mode, type=click.Choice(ERASE_MODES), help="What fills it."),
    interpolation_option,
    amp_option,
    option("--compile/--no-compile", default=TrainConfig.compile, help="torch.compile the model."),
    option("--channels-last/--no-channels-last", default=TrainConfig.channels_last, help="Memory layout of weights."),
    option("--sync-bn/--no-sync-bn", default=TrainConfig.sync_bn, help="Batch norms over all processes' images."),
    option("--token-weight", default=TrainConfig.token_weight, metavar="X", help="Of the token loss; 0: none."),
    option("--val-every", default=TrainConfig.val_every, metavar="N", help="Epochs between two measurements."),
    option(
        "--checkpoint-every",
        default=TrainConfig.checkpoint_every,
        metavar="SECONDS",
        help="Time between stored states within an epoch: the most that a kill loses.",
    ),
    option(
        "--checkpoint-steps",
        default=TrainConfig.checkpoint_steps,
        metavar="N",
        help="Steps between them, beside the seconds; 0: seconds alone.",
    ),
    option("--log-every", default=TrainConfig.log_every, metavar="N", help="Steps between lines of steps.jsonl."),
    option("--tensorboard/--no-tensorboard", default=TrainConfig.tensorboard, help="Write RUN/tensorboard, too."),
    option("--resume/--no-resume", default=TrainConfig.resume, help="Go on where the same command stopped."),
    option("--skip-broken/--no-skip-broken", default=TrainConfig.skip_broken, help="Leave out unreadable images."),
)


def said(ctx: click.Context) -> dict[str, Any]:
    """The options that were said, on the command line or in the environment, by name: not the defaults."""
    defaults = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    return {name: value for name, value in ctx.params.items() if ctx.get_parameter_source(name) not in defaults}


def example(*lines: str) -> str:
    """An epilog that shows how a command is called."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])
