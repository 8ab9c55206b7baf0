"""``stl-offline labels verify``."""

from typing import Any

import click

from stl_offline.cli.command import command, example, option
from stl_offline.cli.options import (
    SOURCE_HELP,
    debug_option,
    device_option,
    foreign_labeler_options,
    key_prefix_option,
    match_option,
    skip_broken_option,
    timm_labeler_options,
    workers_option,
)
from stl_offline.cli.output import counted
from stl_offline.cli.terminal import echo

# How many of the tokens must name the same class again: those of other hardware differ where two are as probable.
LEAST_AGREEMENT = 0.99
# Parameters that do something without --recompute.
_ALWAYS = ("path", "recompute", "workers", "debug", "help")


@command(
    epilog=example(
        "stl-offline labels verify labels",
        "stl-offline labels verify labels --recompute 64 --labeler runs/labeler --data images/train",
    )
)
@click.argument("path", metavar="SET")
@option(
    "--recompute",
    group="labels",
    type=int,
    default=0,
    metavar="N",
    help="Label N random images again and compare (0 disables it). Needs --labeler and --data.",
)
@option(
    "--tolerance",
    group="labels",
    type=click.FloatRange(min=0.0, max=1.0),
    default=0.005,
    metavar="X",
    help="Difference of a probability that --recompute allows beyond the set's own bounds.",
)
@option(
    "--seed",
    group="labels",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Seed of the random images of --recompute.",
)
@option("--data", group="data", metavar="SRC", help=f"Images for --recompute: {SOURCE_HELP}.")
@skip_broken_option
@option(
    "--labeler",
    group="model",
    metavar="RUN|CKPT|timm:NAME|hf-hub:NAME",
    help="Labeler that made the set, for --recompute.",
)
@timm_labeler_options
@key_prefix_option
@match_option
@foreign_labeler_options
@device_option
@workers_option
@debug_option
def verify(path: str, recompute: int, tolerance: float, workers: int, **options: Any) -> None:
    """Check every shard: size, checksum, all values, and keys that are unique in the whole set.

    Prints one line per fault; the exit code is then 1. Shards of an object store are fetched again. --recompute also
    runs the labeler on a random sample, under the set's own views, and compares: probabilities must agree within the
    bounds of the encoding plus --tolerance, and 99 % of the tokens must have the same class. Draws must be the same, or
    near ties, in 99 % (needs the extra [train]).
    """
    if recompute and not (options["labeler"] and options["data"]):
        raise click.UsageError("--recompute needs --labeler and --data")
    if not recompute:
        _refuse_recompute_options()
    from stl_offline.errors import FormatError
    from stl_offline.labels.label_set import open_label_set
    from stl_offline.labels.verify import verify as check

    label_set = open_label_set(path)
    report = check(label_set, workers=workers, found=echo)
    for note in report.notes:
        echo(f"note: {note}")
    if report.faults:
        faults, shards = counted(len(report.faults), "fault"), counted(report.shards, "shard")
        raise FormatError(f"{path} has {faults} in {shards}; copy these anew")
    whole = "its shard is whole" if report.shards == 1 else f"all {report.shards:,} shards are whole"
    echo(f"{path}: {whole} ({counted(report.samples, 'image')})")
    if recompute:
        _recompute(label_set, recompute, tolerance, workers, options)


def _refuse_recompute_options() -> None:
    """Raise UsageError for options that would do nothing: a check that was asked for must not seem to be done."""
    context = click.get_current_context()
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in _ALWAYS
        and context.get_parameter_source(parameter.name) not in (None, click.core.ParameterSource.DEFAULT)
    ]
    if given:
        verb = "needs" if len(given) == 1 else "need"
        raise click.UsageError(f"{', '.join(given)} {verb} --recompute N, the number of images to label again")


def _recompute(label_set: Any, images: int, tolerance: float, workers: int, options: dict[str, Any]) -> None:
    from stl_offline.dump import recompute_labels
    from stl_offline.errors import FormatError

    found = recompute_labels(label_set, images=images, workers=workers, **options)
    same = []
    if found.tokens:
        same.append(f"{found.top1:.2%} of {found.tokens:,} tokens have the same class")
    if found.outputs:
        same.append(f"{found.output_top1:.2%} of {found.outputs:,} outputs of the class head have the same class")
    if same:
        same.append(f"probabilities differ by at most {found.largest:.2g}, and exceed the bounds by {found.beyond:.2g}")
    again = f"{label_set.place}: {counted(found.images, 'image')} labelled again"
    echo(f"{again}; {', '.join(same)}" if same else again)
    if found.draws:
        echo(
            f"{label_set.place}: {found.same_draws:.2%} of {found.draws:,} draws are the same, "
            f"{found.near_ties:.2%} are near ties"
        )
    agreement = min(found.top1, found.output_top1, found.same_draws + found.near_ties)
    if found.beyond > tolerance or agreement < LEAST_AGREEMENT:
        raise FormatError(
            f"the labels of {label_set.place} are not those of this labeler: at most {tolerance:g} beyond the bounds "
            f"and at least {LEAST_AGREEMENT:.0%} agreement are allowed"
        )
