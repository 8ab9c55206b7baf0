"""``stl-offline dump-labels``."""

import click

from stl_offline.cli.command import command, example, option
from stl_offline.cli.options import (
    SOURCE_HELP,
    debug_option,
    device_option,
    foreign_labeler_options,
    json_option,
    skip_broken_option,
    timm_labeler_options,
    workers_option,
)
from stl_offline.cli.output import dump_line, estimate_lines, result_json
from stl_offline.cli.terminal import echo
from stl_offline.config import AMP_MODES, INTERPOLATIONS, DumpConfig


@command(
    epilog=example(
        "stl-offline dump-labels --data images/train --labeler runs/labeler \\",
        "    --shards 16 --top-k 5 --encoding q8 --out labels",
        "stl-offline dump-labels --data images/train --labeler runs/labeler --views 4 --scale-min 0.08 --out crops",
        "stl-offline dump-labels --data imagenet/train --labeler timm:tf_efficientnet_lite0 \\",
        "    --labeler-checkpoint model.safetensors --img-size 448 --licence Apache-2.0 --out labels",
    )
)
@json_option
@option("--estimate", group="general", is_flag=True, help="Label a few images and print the cost. Write nothing.")
@option("--data", group="data", required=True, metavar="SRC", help=f"Images to label: {SOURCE_HELP}.")
@skip_broken_option
@option(
    "--labeler",
    group="model",
    required=True,
    metavar="RUN|CKPT|timm:NAME|hf-hub:NAME",
    help="Model that labels: a run's folder, one of its checkpoints, or a timm model.",
)
@timm_labeler_options
@option(
    "--img-size",
    group="model",
    default=DumpConfig.img_size,
    metavar="N",
    help="Height and width of the labeler's input, in pixels (0 takes the size it was trained with).",
)
@option("--top-k", group="labels", default=DumpConfig.top_k, metavar="K", help="Classes stored per token.")
@option(
    "--views",
    "crops_per_image",
    group="labels",
    default=DumpConfig.crops_per_image,
    metavar="V",
    help="Random crops labelled per image (0 labels the whole image once).",
)
@option(
    "--encoding",
    group="labels",
    default=DumpConfig.encoding,
    metavar="NAME",
    help="Encoding of the logits: f16 stores them as they are, q8 is smaller with a bounded error.",
)
@option("--format", group="labels", default=DumpConfig.format, metavar="NAME", help="Container: zarr or webdataset.")
@option(
    "--shards",
    group="labels",
    default=DumpConfig.shards,
    metavar="N",
    help="Number of shards, each written by one process (0 chooses 512 to 4,096 images per shard, fewer for crops).",
)
@option(
    "--licence",
    group="labels",
    default=DumpConfig.licence,
    metavar="TEXT",
    help="Licence of the labeler's weights, stored in the manifest and the card.",
)
@option(
    "--scale-min",
    group="augmentation",
    default=DumpConfig.scale_min,
    metavar="X",
    help="Smallest part of an image's area that a random crop takes.",
)
@option(
    "--flip",
    group="augmentation",
    default=DumpConfig.flip,
    metavar="X",
    help="Probability that a random crop is flipped.",
)
@option("--seed", group="augmentation", default=DumpConfig.seed, metavar="N", help="Seed of the random crops.")
@option(
    "--interpolation",
    group="augmentation",
    default=DumpConfig.interpolation,
    type=click.Choice(["auto", *INTERPOLATIONS]),
    help="How images are resized; auto does it as in the labeler's training, and takes area for timm:NAME.",
)
@option("--out", group="output", required=True, metavar="SET", help="Folder or address (s3://…) of the label set.")
@option("--batch-size", group="machine", default=DumpConfig.batch_size, metavar="N", help="Images per batch.")
@option(
    "--amp",
    group="machine",
    default=DumpConfig.amp,
    type=click.Choice(AMP_MODES),
    help="Mixed precision of the labeler's trunk; auto chooses by device.",
)
@device_option
@workers_option
@foreign_labeler_options
@debug_option
def dump_labels(estimate: bool, as_json: bool, **settings: object) -> None:
    """Label every token of every image once, and write the labels as a set of shards.

    An interrupted dump continues from its last complete shard when the same command runs again, with any number of
    processes, and gives the same bytes. For several processes: torchrun --nproc-per-node N -m stl_offline.cli
    dump-labels …
    """
    config = DumpConfig(**settings)
    from stl_offline.dump import dump_labels as dump
    from stl_offline.dump import estimate_dump

    result = estimate_dump(config) if estimate else dump(config)
    if result.is_first:
        lines = result_json(result) if as_json else estimate_lines(result) if estimate else [dump_line(result)]
        echo(*lines)
