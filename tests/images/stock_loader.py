"""Reads .beton files with stock FFCV alone, in a process of its own: FILE OUT.npz [FILE OUT.npz]…

Prints nothing; a crash is the caller's to see. Alone, because FFCV leaves threads and half-dead compilers behind.
"""

import sys

import numpy as np
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.reader import Reader


def main(path: str, out: str) -> None:
    metadata = Reader(path).metadata
    equal = all(len(set(metadata["f0"][side].tolist())) == 1 for side in ("height", "width"))
    columns = {}
    for os_cache in (True, False):
        loader = Loader(
            path,
            batch_size=4,
            num_workers=1,
            os_cache=os_cache,
            order=OrderOption.SEQUENTIAL,
            drop_last=False,
            pipelines={
                "image": [SimpleRGBImageDecoder() if equal else RandomResizedCropRGBImageDecoder((12, 20))],
                **{name: [IntDecoder()] for name in ("class_id", "key_hash", "content_hash")},
            },
        )
        batches = [[column.copy() for column in batch] for batch in loader]
        for name, parts in zip(loader.pipeline_specs, zip(*batches, strict=True), strict=True):
            columns[f"{name}-{os_cache}"] = np.concatenate(parts)
    np.savez(out, **columns)


if __name__ == "__main__":
    for place in range(1, len(sys.argv), 2):
        main(sys.argv[place], sys.argv[place + 1])
