"""Token labels beside webdataset streams: each sample gets its label map by key, whatever order samples come in.

`TokenLabels` lie in a memory-mapped token cache, which all processes of a machine share; no shard of labels has to be
paired with a shard of images. So shuffling, and splits of shards by node and worker, change nothing.

A `LabelSet` needs no cache: it is read shard by shard, beside image tars of the same order.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from stl_offline.errors import InputError, UnknownKeyError
from stl_offline.labels.join import POLICIES
from stl_offline.labels.keys import rename_key, rename_keys
from stl_offline.labels.label_set import LabelSet
from stl_offline.targets import TokenLabels

_LOGGER = logging.getLogger(__name__)
# A label set's shards hold thousands of labels. A stream of its order asks for another one after as many samples.
_SEEN, _FEW = 64, 8


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
    labels: TokenLabels | LabelSet,
    *,
    field: str = "token_labels",
    key: Callable[[dict[str, Any]], str] | None = None,
    key_prefix: str = "",
    missing: str | None = None,
) -> Any:
    """Add to each sample of a stream its token labels, by key.

    Args:
        pipeline: a webdataset pipeline (the labels become one more stage of it), or any iterable of sample dicts. Of
            a pipeline that decodes, ``decode()`` comes first: webdataset's takes nothing but bytes.
        labels: `TokenLabels.of` a label set, for samples in any order; or a label set, whose labels are read one shard
            at a time as the samples ask for them (the keys of all shards first, which fetches a set in a store). That
            is quick where the tars hold the images in the label set's order, and the stream is shuffled after the join;
            each worker then reads about as much of the labels as its tars' part.
        field: of the sample, where its `JoinedLabels` are put, or, from a label set, its `LabelMap`.
        key: sample → its key in the label set; default: ``__key__``, the member's path up to the first dot. For labels
            of an image folder, whose keys have endings: ``lambda sample: sample["__key__"] + ".jpg"``.
        key_prefix: ``OLD=NEW`` replaces the start OLD of keys, as ``--key-prefix``.
        missing: what happens to samples without labels in a label set: "error" (default), or "skip", which gives them
            None. Token labels have their own.

    Returns:
        A pipeline, or an iterator of the samples.

    Raises:
        JoinError: while iterating: a sample without labels.
        InputError: token labels without keys, or ``missing`` for them.
        FormatError: while iterating: a shard of a label set is damaged.

    Example:
        ::

            labels = TokenLabels.of("labels", grid=(7, 7))
            stream = webdataset.WebDataset("train-{000..015}.tar", shardshuffle=16).decode("pil")
            for sample in join_labels(stream, labels).shuffle(1000):
                sample["jpg"], sample["token_labels"].class_ids
    """
    rename_keys([], key_prefix)
    arguments = {"field": field, "key": key, "key_prefix": key_prefix}
    if isinstance(labels, LabelSet):
        if missing not in (None, *POLICIES):
            raise InputError(f"missing must be one of {', '.join(POLICIES)}, got {missing!r}")
        stage = functools.partial(_joined_maps, label_set=labels, skip=missing == "skip", **arguments)
    elif missing is not None:
        raise InputError("token labels have a `missing` of their own: give it to `TokenLabels.of`")
    elif labels.keys is None:
        raise InputError(
            "samples of a stream are named by keys, but these token labels have none; use `TokenLabels.of`"
        )
    else:
        stage = functools.partial(_joined, labels=labels, **arguments)
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
        if key_prefix:
            name = rename_key(name, key_prefix)
        row = labels.keys.row(name)
        if row < 0:
            labels.rows([name])  # raises, if samples without labels are errors
        found = None if row < 0 else JoinedLabels(row, *[None if array is None else array[row] for array in arrays])
        yield {**sample, field: found}


def _joined_maps(
    stream: Iterable[dict[str, Any]],
    label_set: LabelSet,
    skip: bool,
    field: str,
    key: Callable[[dict[str, Any]], str] | None,
    key_prefix: str,
) -> Iterator[dict[str, Any]]:
    shard, shards = -1, 0
    for number, sample in enumerate(stream, 1):
        name = rename_key(sample["__key__"] if key is None else key(sample), key_prefix)
        try:
            found = label_set[name]
        except UnknownKeyError:
            if not skip:
                raise
            found = None
        else:
            before, shard = shard, label_set.shard_of(name)
            shards += shard != before
            if number >= _SEEN and shards * _FEW > number:
                _LOGGER.warning(
                    "%d of %d samples of this stream needed another shard of %s: join before shuffling, or use "
                    "`TokenLabels.of`, which takes any order",
                    *(shards, number, label_set.place),
                )
                shards = -(1 << 60)  # once is enough
        yield {**sample, field: found}
