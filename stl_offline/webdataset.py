"""Token labels beside webdataset streams: each sample gets its label map by key, whatever order samples come in.

The labels lie in a memory-mapped token cache, which all processes of a machine share; no shard of labels has to be
paired with a shard of images. So shuffling, and splits of shards by node and worker, change nothing.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from stl_offline.errors import InputError
from stl_offline.labels.keys import rename_keys
from stl_offline.targets import TokenLabels


class JoinedLabels(NamedTuple):
    """One sample's label maps. Arrays are views of the token cache: read, not written.

    row: its place in the cache, which `TokenLabels` takes for a sample; class_ids: (V, Gh, Gw, k); probabilities:
    float32 of that shape; views: float32 (V, 6). None where the set has no such thing: confidence, float32 (V, Gh, Gw);
    draws, uint8 (V, bytes), packed as `TokenCache` has them.
    """

    row: int
    class_ids: np.ndarray
    probabilities: np.ndarray
    views: np.ndarray
    confidence: np.ndarray | None
    draws: np.ndarray | None


def join_labels(
    pipeline: Any,
    labels: TokenLabels,
    *,
    field: str = "token_labels",
    key: Callable[[dict[str, Any]], str] | None = None,
    key_prefix: str = "",
) -> Any:
    """Add to each sample of a stream its token labels, by key.

    Args:
        pipeline: a webdataset pipeline (the labels become one more stage of it), or any iterable of sample dicts.
        labels: `TokenLabels.of` a label set. Their ``missing`` says what happens to samples without labels: "error", or
            "skip", which gives them None.
        field: of the sample, where its `JoinedLabels` are put.
        key: sample → its key in the label set; default: ``__key__``, the member's path up to the first dot. For labels
            of an image folder, whose keys have endings: ``lambda sample: sample["__key__"] + ".jpg"``.
        key_prefix: ``OLD=NEW`` replaces the start OLD of keys, as ``--key-prefix``.

    Returns:
        A pipeline, or an iterator of the samples.

    Raises:
        JoinError: while iterating: a sample without labels. InputError: labels without keys.

    Example:
        ::

            labels = TokenLabels.of("labels", grid=(7, 7))
            stream = webdataset.WebDataset("train-{000..015}.tar", shardshuffle=16).decode("pil")
            for sample in join_labels(stream, labels).shuffle(1000):
                sample["jpg"], sample["token_labels"].class_ids
    """
    if labels.keys is None:
        raise InputError(
            "samples of a stream are named by keys, but these token labels have none; use `TokenLabels.of`"
        )
    rename_keys([], key_prefix)
    stage = functools.partial(_joined, labels=labels, field=field, key=key, key_prefix=key_prefix)
    return pipeline.compose(stage) if hasattr(pipeline, "compose") else stage(pipeline)


def _joined(
    stream: Iterable[dict[str, Any]],
    labels: TokenLabels,
    field: str,
    key: Callable[[dict[str, Any]], str] | None,
    key_prefix: str,
) -> Iterator[dict[str, Any]]:
    (cache,) = labels.caches
    # Plain arrays over the mapped files: slices of np.memmap cost several times as much.
    parts = (cache.class_ids, cache.probabilities, cache.views, cache.confidence, cache.draws)
    arrays = [None if each is None else np.asarray(each) for each in parts]
    for sample in stream:
        name = sample["__key__"] if key is None else key(sample)
        row = int(labels.rows(rename_keys([name], key_prefix))[0])
        found = None if row < 0 else JoinedLabels(row, *(None if array is None else array[row] for array in arrays))
        yield {**sample, field: found}
