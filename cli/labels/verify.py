"""``stl-offline labels verify``."""

from typing import Any

import click

from stl_offline.cli.options import NUMBERS, SOURCE_HELP, example, machine_options, option

# How many of the tokens must name the same class again: those of other hardware differ where two are as probable.
LEAST_AGREEMENT = 0.99


@click.command(
    epilog=example(
        "stl-offline labels verify labels",
        "stl-offline labels verify labels --recompute 64 --labeler runs/labeler --data images/train",
    )
)
@click.argument("path", metavar="SET")
@option("--recompute", type=int, default=0, metavar="N", help="Label N random images again, too; 0: none.")
@option("--labeler", metavar="RUN|CKPT|timm:NAME", help="The labeler that made the set, with --recompute.")
@option("--labeler-checkpoint", metavar="FILE", help="Weights for a labeler named timm:NAME.")
@option("--labeler-by-order", is_flag=True, help="These weights have other names, but the same tensors in order.")
@option("--labeler-mean", type=NUMBERS, metavar="R,G,B", help="Normalisation, where not as timm notes for NAME.")
@option("--labeler-std", type=NUMBERS, metavar="R,G,B", help="Likewise.")
@option("--data", metavar="SRC", help=f"The images, with --recompute: {SOURCE_HELP}.")
@option("--key-prefix", default="", metavar="OLD=NEW", help="As of train-student.")
@option("--seed", default=0, metavar="N", help="Of the random images.")
@option("--tolerance", default=0.005, metavar="X", help="Of a probability, beyond the set's own bounds.")
@machine_options
def verify(path: str, recompute: int, tolerance: float, workers: int, **options: Any) -> None:
    """Read every shard: sizes, checksums, every value, keys unique in the whole set.

    Every fault is a line; the exit code is 1 where there is one. A store's shards are fetched anew. --recompute also
    runs the labeler again on a sample, under the views that the set holds, and compares: probabilities within the
    bounds of the encoding and --tolerance, and 99 % of the tokens with the same class (this needs the extra [train]).
    """
    if recompute and not (options["labeler"] and options["data"]):
        raise click.UsageError("--recompute needs --labeler and --data")
    from stl_offline.errors import FormatError
    from stl_offline.labels.label_set import open_label_set
    from stl_offline.labels.verify import verify as check

    label_set = open_label_set(path)
    report = check(label_set, workers=workers, found=click.echo)
    for note in report.notes:
        click.echo(f"note: {note}")
    if report.faults:
        count = len(report.faults)
        faults = "1 fault" if count == 1 else f"{count:,} faults"
        raise FormatError(f"{path} has {faults} in {report.shards:,} shards; copy these anew")
    click.echo(f"{path}: all {report.shards:,} shards are whole ({report.samples:,} images)")
    if recompute:
        _recompute(label_set, recompute, tolerance, workers, options)


def _recompute(label_set: Any, images: int, tolerance: float, workers: int, options: dict[str, Any]) -> None:
    from stl_offline.dump import recompute_labels
    from stl_offline.errors import FormatError

    options.pop("debug")
    found = recompute_labels(label_set, images=images, workers=workers, **options)
    click.echo(
        f"{label_set.place}: {found.images:,} images labelled again; {found.top1:.2%} of {found.tokens:,} tokens "
        f"name the same class, probabilities differ by {found.largest:.2g} at most, beyond the bounds by "
        f"{found.beyond:.2g}"
    )
    if found.beyond > tolerance or found.top1 < LEAST_AGREEMENT:
        raise FormatError(
            f"the labels of {label_set.place} are not what this labeler says: at most {tolerance:g} beyond the bounds "
            f"and at least {LEAST_AGREEMENT:.0%} agreement are allowed"
        )
