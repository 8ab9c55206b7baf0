"""``stl-offline dump-labels``."""

import click

from stl_offline.cli.options import NUMBERS, SOURCE_HELP, example, interpolation_option, machine_options, option
from stl_offline.config import AMP_MODES, DumpConfig


@click.command(
    epilog=example(
        "stl-offline dump-labels --data pictures/train --labeler runs/labeler \\",
        "    --shards 16 --top-k 5 --format zarr --out labels",
    )
)
@option("--data", required=True, metavar="SRC", help=f"Pictures to label: {SOURCE_HELP}.")
@option("--labeler", required=True, metavar="RUN|CKPT|timm:NAME", help="The model that labels.")
@option("--labeler-checkpoint", metavar="FILE", help="Weights for a labeler named timm:NAME.")
@option("--labeler-by-order", is_flag=True, help="These weights have other names, but the same tensors in order.")
@option("--labeler-mean", type=NUMBERS, metavar="R,G,B", help="Normalisation, where not as timm notes for NAME.")
@option("--labeler-std", type=NUMBERS, metavar="R,G,B", help="Likewise.")
@option("--out", required=True, metavar="SET", help="Folder of the label set.")
@option("--shards", default=DumpConfig.shards, metavar="N", help="Files that the set is cut into.")
@option("--top-k", default=DumpConfig.top_k, metavar="K", help="Classes stored for each token.")
@option("--views", default=DumpConfig.views, metavar="V", help="Random crops of each picture; 0: one map of the whole.")
@option("--img-size", default=DumpConfig.img_size, metavar="N", help="Side of the labeler's input; 0: as trained.")
@option("--batch-size", default=DumpConfig.batch_size, metavar="N", help="Pictures a step.")
@option("--seed", default=DumpConfig.seed, metavar="N", help="Of the random crops.")
@option("--scale-min", default=DumpConfig.scale_min, metavar="X", help="Smallest share of the area in a random crop.")
@option("--flip", default=DumpConfig.flip, metavar="X", help="Chance that a random crop is flipped.")
@interpolation_option
@option("--format", default=DumpConfig.format, metavar="NAME", help="Container of the shards: zarr or webdataset.")
@option(
    "--encoding", default=DumpConfig.encoding, metavar="NAME", help="Of the logits: f16 as they are, or q8, compact."
)
@option("--amp", default=DumpConfig.amp, type=click.Choice(AMP_MODES), help="Half precision in the trunk.")
@option("--licence", default=DumpConfig.licence, metavar="TEXT", help="Of the labeler's weights, for the manifest.")
@option("--skip-broken", is_flag=True, default=DumpConfig.skip_broken, help="Leave out unreadable pictures.")
@machine_options
def dump_labels(**options: object) -> None:
    """Label every token of every picture, once, and write the labels as a set of shards.

    A killed dump goes on from its last whole shard when the same command runs again; the bytes come out the same.
    """
    config = DumpConfig(**options)
    from stl_offline.dump import dump_labels as dump

    report = dump(config)
    click.echo(
        f"label set: {report.path} ({report.samples:,} pictures, {report.labelled:,} of them labelled now, "
        f"{report.bytes:,} bytes, {report.seconds:,.0f} s)"
    )
