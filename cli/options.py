"""Options that several commands share. Their defaults come from `stl_offline.config`, which defines the settings."""

import click

from stl_offline.cli.command import NUMBERS, option, together
from stl_offline.config import AMP_MODES, INTERPOLATIONS, MachineConfig, TrainConfig
from stl_offline.settings import ERASE_MODES, MIX_MODES

SOURCE_HELP = "a folder of class folders, tars, a .beton file, or a timm reader"


def _remember_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if ctx.obj is not None:
        ctx.obj.debug = value


device_option = option(
    "--device",
    group="machine",
    default=MachineConfig.device,
    metavar="NAME",
    help="Device that models run on: auto (a GPU if torch finds one, else the CPU), cpu, cuda, or cuda:N.",
)

workers_option = option(
    "--workers",
    group="machine",
    default=MachineConfig.workers,
    metavar="N",
    help="Threads per process that load, read or send (0 chooses a number).",
)

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

skip_broken_option = option(
    "--skip-broken",
    group="data",
    is_flag=True,
    default=False,
    help="Leave out images that cannot be decoded, and list them, instead of stopping.",
)

timm_labeler_options = together(
    option(
        "--labeler-checkpoint", group="model", metavar="FILE", help="Weights file for a labeler given as timm:NAME."
    ),
    option(
        "--labeler-pretrained",
        group="model",
        is_flag=True,
        help="Take timm's own weights for a labeler given as timm:NAME, from the Hugging Face Hub or its local cache.",
    ),
    option(
        "--labeler-classes",
        group="model",
        metavar="FILE|SET",
        show_default="ImageNet's",
        help="Class names of a timm:NAME or hf-hub:NAME labeler: a text file with one per line, or a label set.",
    ),
)

foreign_labeler_options = together(
    option(
        "--labeler-by-order",
        group="advanced",
        is_flag=True,
        help="Match the tensors of --labeler-checkpoint by their order, not by their names.",
    ),
    option(
        "--labeler-mean",
        group="advanced",
        type=NUMBERS,
        metavar="R,G,B",
        show_default="timm's values for NAME",
        help="Mean of each channel, to normalise the labeler's input with.",
    ),
    option(
        "--labeler-std",
        group="advanced",
        type=NUMBERS,
        metavar="R,G,B",
        show_default="timm's values for NAME",
        help="Standard deviation of each channel, to normalise the labeler's input with.",
    ),
)

training_options = together(
    option(
        "--recipe",
        group="general",
        metavar="NAME|FILE",
        show_default="none",
        help="Settings that replace the defaults: fan-tiny, fan-small, fan-base, fan-large, fan-micro, or a YAML file.",
    ),
    option(
        "--dry-run",
        group="general",
        is_flag=True,
        help="Print the settings, the number of steps, and estimated time and memory. Write nothing.",
    ),
    option("--data", group="data", required=True, metavar="SRC", help=f"Training images: {SOURCE_HELP}."),
    option(
        "--val",
        group="data",
        metavar="SRC",
        show_default="none",
        help="Validation images, in any form that --data takes.",
    ),
    option(
        "--skip-broken/--no-skip-broken",
        group="data",
        default=TrainConfig.skip_broken,
        help="Leave out images that cannot be decoded, instead of stopping.",
    ),
    option(
        "--model", group="model", default=TrainConfig.model, metavar="NAME", help="FAN variant to train (see the docs)."
    ),
    option(
        "--img-size",
        group="model",
        default=TrainConfig.img_size,
        metavar="N",
        help="Height and width of the model's input, in pixels.",
    ),
    option(
        "--drop-path",
        group="model",
        default=TrainConfig.drop_path,
        metavar="X",
        help="Rate of stochastic depth (0 disables it).",
    ),
    option(
        "--epochs", group="optimisation", default=TrainConfig.epochs, metavar="N", help="Passes over the training data."
    ),
    option(
        "--batch-size",
        group="optimisation",
        default=TrainConfig.batch_size,
        metavar="N",
        help="Images per batch and process.",
    ),
    option(
        "--accumulate",
        group="optimisation",
        default=TrainConfig.accumulate,
        metavar="N",
        help="Batches whose gradients are summed for one step.",
    ),
    option(
        "--lr",
        group="optimisation",
        default=TrainConfig.lr,
        metavar="X",
        help="Peak learning rate of AdamW; a cosine takes it down to 1e-6.",
    ),
    option(
        "--lr-batch",
        group="optimisation",
        default=TrainConfig.lr_batch,
        metavar="N",
        help="Images per step that --lr is meant for; the rate is scaled to the real number (0 disables scaling).",
    ),
    option(
        "--warmup-epochs",
        group="optimisation",
        default=TrainConfig.warmup_epochs,
        metavar="X",
        help="Epochs of linear warm-up, at most a fifth of the run.",
    ),
    option(
        "--weight-decay",
        group="optimisation",
        default=TrainConfig.weight_decay,
        metavar="X",
        help="Weight decay of AdamW.",
    ),
    option(
        "--clip-grad",
        group="optimisation",
        default=TrainConfig.clip_grad,
        metavar="X",
        help="Maximum norm of the gradient (0 disables clipping).",
    ),
    option(
        "--ema-decay",
        group="optimisation",
        default=TrainConfig.ema_decay,
        metavar="X",
        help="Decay of the moving average of the weights (0 disables the average).",
    ),
    option(
        "--smoothing",
        group="optimisation",
        default=TrainConfig.smoothing,
        metavar="X",
        help="Label smoothing of the class loss (0 disables it).",
    ),
    option(
        "--token-weight",
        group="optimisation",
        default=TrainConfig.token_weight,
        metavar="X",
        help="Weight of the token loss (0 disables it).",
    ),
    option(
        "--seed",
        group="optimisation",
        default=TrainConfig.seed,
        metavar="N",
        help="Seed of the weights, the crops, the order of images and all random draws.",
    ),
    option(
        "--scale-min",
        group="augmentation",
        default=TrainConfig.scale_min,
        metavar="X",
        help="Smallest part of an image's area that a random crop takes.",
    ),
    option(
        "--flip",
        group="augmentation",
        default=TrainConfig.flip,
        metavar="X",
        help="Probability of a horizontal flip.",
    ),
    option(
        "--color-jitter",
        group="augmentation",
        default=TrainConfig.color_jitter,
        type=float,
        metavar="X",
        show_default="0.4, or 0 with --auto-augment",
        help="Strength of colour jitter (0 disables it).",
    ),
    option(
        "--auto-augment",
        group="augmentation",
        metavar="NAME",
        show_default="none",
        help="RandAugment in timm's notation, such as rand-m9-mstd0.5-inc1.",
    ),
    option(
        "--mixup",
        group="augmentation",
        default=TrainConfig.mixup,
        metavar="X",
        help="Alpha of mixup (0 disables it).",
    ),
    option(
        "--cutmix",
        group="augmentation",
        default=TrainConfig.cutmix,
        metavar="X",
        help="Alpha of cutmix (0 disables it).",
    ),
    option(
        "--random-erase",
        group="augmentation",
        default=TrainConfig.random_erase,
        metavar="X",
        help="Probability that a box of an image is erased.",
    ),
    option(
        "--interpolation",
        group="augmentation",
        default=TrainConfig.interpolation,
        type=click.Choice(INTERPOLATIONS),
        help="How crops are resized. A labeler and its students need the same.",
    ),
    option(
        "--resume/--no-resume",
        group="checkpoints",
        default=TrainConfig.resume,
        help="Continue an interrupted run of the same command, or start it again.",
    ),
    option(
        "--checkpoint-every",
        group="checkpoints",
        default=TrainConfig.checkpoint_every,
        metavar="SECONDS",
        help="Seconds between checkpoints within an epoch.",
    ),
    option("--out", group="output", required=True, metavar="RUN", help="Folder for checkpoints, settings and logs."),
    option(
        "--val-every",
        group="output",
        default=TrainConfig.val_every,
        metavar="N",
        help="Epochs between two evaluations on the validation images.",
    ),
    option(
        "--log-every",
        group="output",
        default=TrainConfig.log_every,
        metavar="N",
        help="Steps between two lines of steps.jsonl.",
    ),
    option(
        "--tensorboard/--no-tensorboard",
        group="output",
        default=TrainConfig.tensorboard,
        help="Also write TensorBoard's files to RUN/tensorboard.",
    ),
    device_option,
    workers_option,
    option(
        "--amp",
        group="machine",
        default=TrainConfig.amp,
        type=click.Choice(AMP_MODES),
        help="Mixed precision of the model; auto chooses by device.",
    ),
    option(
        "--compile/--no-compile",
        group="machine",
        default=TrainConfig.compile,
        help="Compile the model with torch.compile.",
    ),
    option(
        "--mix-prob",
        group="advanced",
        default=TrainConfig.mix_prob,
        metavar="X",
        help="Probability that mixup or cutmix is applied.",
    ),
    option(
        "--mix-mode",
        group="advanced",
        default=TrainConfig.mix_mode,
        type=click.Choice(MIX_MODES),
        help="Whether mixup and cutmix are drawn once per batch, per pair of images, or per image.",
    ),
    option(
        "--erase-mode",
        group="advanced",
        default=TrainConfig.erase_mode,
        type=click.Choice(ERASE_MODES),
        help="What --random-erase fills a box with: the mean colour, one random colour, or random pixels.",
    ),
    option(
        "--checkpoint-steps",
        group="advanced",
        default=TrainConfig.checkpoint_steps,
        metavar="N",
        help="Steps between additional checkpoints within an epoch (0 disables them).",
    ),
    option(
        "--channels-last/--no-channels-last",
        group="advanced",
        default=TrainConfig.channels_last,
        help="Keep the model's weights in the channels-last memory format.",
    ),
    option(
        "--sync-bn/--no-sync-bn",
        group="advanced",
        default=TrainConfig.sync_bn,
        help="Compute batch-norm statistics over all processes.",
    ),
    debug_option,
)
