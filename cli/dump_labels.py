"""``stl-offline dump-labels``."""

import click

from stl_offline.cli.options import NUMBERS, SOURCE_HELP, example, machine_options, option
from stl_offline.cli.output import dump_line, estimate_lines, result_json
from stl_offline.config import AMP_MODES, INTERPOLATIONS, DumpConfig


@click.command(
    epilog=example(
        "stl-offline dump-labels --data images/train --labeler runs/labeler \\",
        "    --shards 16 --top-k 5 --encoding q8 --out labels",
        "stl-offline dump-labels --data images/train --labeler runs/labeler --views 4 --scale-min 0.08 --out crops",
        "stl-offline dump-labels --data imagenet/train --labeler timm:tf_efficientnet_lite0 \\",
        "    --labeler-checkpoint model.safetensors --img-size 448 --licence Apache-2.0 --out labels",
    )
)
@option("--data", required=True, metavar="SRC", help=f"Images to label: {SOURCE_HELP}.")
@option("--labeler", required=True, metavar="RUN|CKPT|timm:NAME", help="The model that labels.")
@option("--labeler-checkpoint", metavar="FILE", help="Weights for a labeler named timm:NAME.")
@option("--labeler-by-order", is_flag=True, help="These weights have other names, but the same tensors in order.")
@option("--labeler-mean", type=NUMBERS, metavar="R,G,B", help="Normalisation, where not as timm notes for NAME.")
@option("--labeler-std", type=NUMBERS, metavar="R,G,B", help="Likewise.")
@option("--out", required=True, metavar="SET", help="Folder of the label set, or its address (s3://…).")
@option(
    "--shards",
    default=DumpConfig.shards,
    metavar="N",
    help="Files that the set is cut into, each by one process; 0: of 512 to 4,096 images, fewer of many crops.",
)
@option("--top-k", default=DumpConfig.top_k, metavar="K", help="Classes stored for each token.")
@option("--views", default=DumpConfig.views, metavar="V", help="Random crops of each image; 0: one map of the whole.")
@option("--img-size", default=DumpConfig.img_size, metavar="N", help="Side of the labeler's input; 0: as trained.")
@option("--batch-size", default=DumpConfig.batch_size, metavar="N", help="Images a step.")
@option("--seed", default=DumpConfig.seed, metavar="N", help="Of the random crops.")
@option("--scale-min", default=DumpConfig.scale_min, metavar="X", help="Smallest share of the area in a random crop.")
@option("--flip", default=DumpConfig.flip, metavar="X", help="Chance that a random crop is flipped.")
@option(
    "--interpolation",
    default=DumpConfig.interpolation,
    type=click.Choice(["auto", *INTERPOLATIONS]),
    help="How images are resized; auto: as the labeler's run did, area for timm:NAME.",
)
@option("--format", default=DumpConfig.format, metavar="NAME", help="Container of the shards: zarr or webdataset.")
@option(
    "--encoding", default=DumpConfig.encoding, metavar="NAME", help="Of the logits: f16 as they are, or q8, compact."
)
@option("--amp", default=DumpConfig.amp, type=click.Choice(AMP_MODES), help="Half precision in the trunk.")
@option("--licence", default=DumpConfig.licence, metavar="TEXT", help="Of the labeler's weights, for the set's card.")
@option("--skip-broken", is_flag=True, default=DumpConfig.skip_broken, help="Leave out unreadable images.")
@option("--estimate", is_flag=True, help="Only say what it would cost: label a few images, write nothing.")
@option("--json", "as_json", is_flag=True, help="Print what was done, or the estimate, as JSON.")
@machine_options
def dump_labels(estimate: bool, as_json: bool, **options: object) -> None:
    """Label every token of every image, once, and write the labels as a set of shards.

    A killed dump goes on from its last whole shard when the same command runs again, with any number of processes; the
    bytes come out the same. Several processes: torchrun --nproc-per-node N -m stl_offline.cli dump-labels …
    """
    config = DumpConfig(**options)
    from stl_offline.dump import dump_labels as dump
    from stl_offline.dump import estimate_dump

    result = estimate_dump(config) if estimate else dump(config)
    if result.is_first:
        click.echo(result_json(result) if as_json else estimate_lines(result) if estimate else dump_line(result))
