"""``stl-offline pack``."""

import click

from stl_offline.cli.command import command, example, ignored, option
from stl_offline.cli.options import debug_option, skip_broken_option, workers_option
from stl_offline.cli.output import counted
from stl_offline.cli.terminal import echo


@command(
    epilog=example(
        "stl-offline pack images/train train.beton",
        "stl-offline pack 'train-{000..015}.tar' train.beton",
        "stl-offline pack images/some-classes some.beton --classes labels",
    )
)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DEST")
@option(
    "--max-size",
    group="data",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="none",
    help="Shrink images whose longer side exceeds N pixels.",
)
@option(
    "--classes",
    "class_names",
    group="data",
    metavar="FILE|SET",
    show_default="the classes of SRC",
    help="Class list to use: a label set, or a text file with one name per line. Classes without images are kept.",
)
@option(
    "--class-map",
    group="data",
    metavar="FILE",
    show_default="none",
    help="New names of the classes found in SRC, as for tars whose .cls members are numbers: lines 'NUMBER NAME', or a "
    "JSON list or object. Without --classes it is the class list, too.",
)
@skip_broken_option
@workers_option
@debug_option
@ignored("--device")
def pack(
    source: str,
    destination: str,
    max_size: int | None,
    class_names: str | None,
    class_map: str | None,
    skip_broken: bool,
    workers: int,
) -> None:
    """Pack the images of SRC into the file DEST (.beton) for fast loading.

    RGB JPEGs are stored byte for byte, other images are converted to RGB. Keys, class names and content hashes go
    into the same file. Commands that take images pack them by themselves and keep the file in a cache.
    """
    from stl_offline.images.classes import read_class_map
    from stl_offline.images.pack import pack as pack_images
    from stl_offline.labels.class_names import read_class_names

    report = pack_images(
        source,
        destination,
        max_size=max_size,
        skip_broken=skip_broken,
        workers=workers or None,
        class_names=read_class_names(class_names, "--classes") if class_names else None,
        class_map=read_class_map(class_map) if class_map else None,
    )
    passed = (
        f", {counted(len(report.passed_over), 'file')} passed over: {report.passed_over}" if report.passed_over else ""
    )
    echo(
        f"packed {counted(report.samples, 'image')} of {counted(report.classes, 'class')} into {report.path} "
        f"({counted(report.bytes, 'byte')}): {report.stored_as_is:,} as they were, "
        f"{report.converted:,} converted, {len(report.skipped):,} skipped{passed}"
    )
    for key, reason in report.skipped:
        echo(f"skipped {key}: {reason}")
