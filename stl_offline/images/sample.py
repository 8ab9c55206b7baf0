"""A few images of a source, packed to be measured."""

from pathlib import Path

import numpy as np

from stl_offline.errors import InputError
from stl_offline.images.beton import Beton, BetonWriter, open_beton
from stl_offline.images.encode import ImageError, encode_image
from stl_offline.images.sources import open_source


def pack_sample(spec: str | Path, count: int, folder: str | Path, *, skip_broken: bool = False) -> tuple[Beton, int]:
    """Pack at most ``count`` images, spread evenly over the source, into ``folder``.

    Returns: the packed images, and how many the source has.

    Raises:
        InputError: as `stl_offline.images.sources.open_source`; or one of these images is broken.
    """
    source = open_source(spec)
    wanted = set(np.linspace(0, len(source) - 1, min(count, len(source))).astype(np.int64).tolist())
    path = Path(folder) / "sample.beton"
    with open(path, "wb") as stream:
        writer = BetonWriter(stream, len(wanted))
        for position, image in enumerate(source):
            if position not in wanted:
                continue
            try:
                writer.add(image.key, image.class_id, encode_image(image.data))
            except ImageError as error:
                if not skip_broken:
                    raise InputError(
                        f"the image {image.key!r} of {spec} {error}; mend or remove it, or leave broken images out "
                        "with --skip-broken"
                    ) from error
        if not len(writer):
            raise InputError(f"{spec} has no image that can be used")
        writer.finish(source.class_names, {"kind": source.kind, "max_size": None})
    return open_beton(path), len(source)
