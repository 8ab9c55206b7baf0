"""``stl-offline dump-labels``."""

import click

from stl_offline.cli.command import command, example, option, setting_option
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
from stl_offline.config import DumpConfig


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
@option(
    "--finish",
    group="general",
    is_flag=True,
    help="Label nothing. Write the manifest of a set whose shards are all there.",
)
@option(
    "--append",
    group="general",
    is_flag=True,
    help="Add the images that the complete label set SET lacks, as further shards. What is there stays as it is.",
)
@option(
    "--worker",
    group="general",
    is_flag=True,
    help="Work beside others on the same label set. Every dump does, so this changes nothing.",
)
@setting_option(DumpConfig, "--data", group="data", metavar="SRC", more=SOURCE_HELP)
@setting_option(DumpConfig, "--class-map", group="data", metavar="FILE", show_default="none")
@skip_broken_option
@setting_option(DumpConfig, "--labeler", group="model", metavar="RUN|CKPT|timm:NAME|hf-hub:NAME")
@timm_labeler_options
@setting_option(DumpConfig, "--img-size", group="model", metavar="N")
@setting_option(
    DumpConfig, "--top-k", group="labels", type=int, metavar="K", show_default="5 or all classes, 0 with --draws"
)
@setting_option(DumpConfig, "--draws", group="labels", metavar="S")
@setting_option(DumpConfig, "--confidence", group="labels", is_flag=True)
@setting_option(DumpConfig, "--class-top-k", group="labels", metavar="K")
@setting_option(DumpConfig, "--class-draws", group="labels", metavar="S")
@setting_option(DumpConfig, "--views", "crops_per_image", group="labels", metavar="V")
@setting_option(DumpConfig, "--first-view", group="labels", metavar="N")
@setting_option(DumpConfig, "--encoding", group="labels", metavar="NAME")
@setting_option(DumpConfig, "--format", group="labels", metavar="NAME")
@setting_option(DumpConfig, "--shards", group="labels", metavar="N")
@setting_option(DumpConfig, "--licence", group="labels", metavar="TEXT")
@setting_option(DumpConfig, "--scale-min", group="augmentation", metavar="X")
@setting_option(DumpConfig, "--flip", group="augmentation", metavar="X")
@setting_option(DumpConfig, "--seed", group="augmentation", metavar="N")
@setting_option(DumpConfig, "--interpolation", group="augmentation")
@setting_option(DumpConfig, "--out", group="output", metavar="SET")
@setting_option(DumpConfig, "--batch-size", group="machine", metavar="N")
@setting_option(DumpConfig, "--amp", group="machine")
@option(
    "--engine",
    group="machine",
    type=click.Choice(("local", "ray")),
    default="local",
    show_default=True,
    help="What runs the work: this process, or actors of a Ray cluster with a shard at a time.",
)
@option(
    "--ray-address",
    group="machine",
    metavar="ADDRESS",
    help="Ray cluster to use, such as auto or ray://head:10001 (by default a new one on this machine).",
)
@device_option
@workers_option
@foreign_labeler_options
@debug_option
def dump_labels(
    estimate: bool,
    finish: bool,
    append: bool,
    worker: bool,
    as_json: bool,
    engine: str,
    ray_address: str | None,
    **settings: object,
) -> None:
    """Label every token of every image once, and write the labels as a set of shards.

    Run the same command on as many machines as you like: each process claims one shard after another until the set is
    complete. An interrupted dump continues from its last complete shard when the same command runs again, and gives the
    same bytes. For several processes on one machine: torchrun --nproc-per-node N -m stl_offline.cli dump-labels …
    """
    if estimate and finish:
        raise click.UsageError("--estimate and --finish exclude each other")
    if estimate and append:
        raise click.UsageError("--estimate and --append exclude each other")
    if engine == "ray" and (estimate or finish or worker or append):
        raise click.UsageError("--engine ray labels; it excludes --estimate, --finish, --append and --worker")
    if ray_address is not None and engine != "ray":
        raise click.UsageError("--ray-address needs --engine ray")
    config = DumpConfig(**settings)
    from stl_offline import dump

    if engine == "ray":
        result = dump.dump_on_ray(config, ray_address)
    else:
        result = dump.estimate_dump(config) if estimate else dump.dump_labels(config, finish=finish, append=append)
    if result.is_first:
        lines = result_json(result) if as_json else estimate_lines(result) if estimate else [dump_line(result)]
        echo(*lines)
