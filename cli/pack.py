"""``stl-offline pack``."""

from pathlib import Path

import click

from stl_offline.cli.options import example, machine_options


@click.command(
    epilog=example(
        "stl-offline pack images/train train.beton",
        "stl-offline pack 'train-{000..015}.tar' train.beton",
        "stl-offline pack images/some-classes some.beton --classes labels",
    )
)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DEST")
@click.option(
    "--max-size", type=click.IntRange(min=1), metavar="N", help="Shrink images whose longer side exceeds N pixels."
)
@click.option(
    "--classes",
    metavar="PLACE",
    help="The class list, also of classes without images: a label set, to train from its labels; or a text file with "
    "one name a line.  [default: SRC's own]",
)
@click.option("--skip-broken", is_flag=True, help="Leave out and list images that cannot be decoded.")
@machine_options
def pack(
    source: str,
    destination: str,
    max_size: int | None,
    classes: str | None,
    skip_broken: bool,
    workers: int,
    **_: object,
) -> None:
    """Pack the images of SRC into the file DEST (.beton) for fast loading.

    RGB JPEGs are stored byte for byte; other images become RGB. The keys, class names and content hashes go into the
    same file. Commands that are given images do this by themselves and keep the file in a cache.
    """
    from stl_offline.images.pack import pack as pack_images

    report = pack_images(
        source,
        destination,
        max_size=max_size,
        skip_broken=skip_broken,
        workers=workers or None,
        class_names=_read_class_names(classes) if classes else None,
    )
    click.echo(
        f"packed {report.samples:,} images of {report.classes:,} classes into {report.path} "
        f"({report.bytes:,} bytes): {report.stored_as_is:,} as they were, "
        f"{report.converted:,} converted, {len(report.skipped):,} skipped"
    )
    for key, reason in report.skipped:
        click.echo(f"skipped {key}: {reason}")


def _read_class_names(place: str) -> tuple[str, ...]:
    from stl_offline.errors import InputError
    from stl_offline.labels.label_set import open_label_set

    forms = "--classes takes a label set, or a text file with one class name a line"
    if "://" not in place and not Path(place).exists():
        raise InputError(f"{place} is not there; {forms}")
    if not Path(place).is_file():
        return open_label_set(place).spec.class_names
    try:
        text = Path(place).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{place} is not UTF-8 text; {forms}") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())
