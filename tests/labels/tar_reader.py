"""A reader of label set tars for a stranger: the standard library and numpy, written from docs/format.md alone.

Gives, for each sample in stored order: key, class_id, content_hash, views (V, 6), class_ids and probabilities
(V, Gh, Gw, k) and confidence (V, Gh, Gw).
"""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np


def read_label_set(folder):
    folder = Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["format"] != "stl-offline label set" or manifest["format_version"] != 1:
        raise ValueError("not a label set of version 1")
    if manifest["value_kind"] != "logits" or manifest["container"] != "webdataset":
        raise ValueError("not a label set that this reader knows")
    for shard in manifest["shards"]:
        data = (folder / shard["name"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != shard["sha256"]:
            raise ValueError(f"{shard['name']} is damaged")
        yield from read_shard(data, manifest["encoding"])


def read_shard(data, encoding):
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as archive:
        members = iter(archive)
        head = json.loads(archive.extractfile(next(members)).read())
        count = 0
        for member in members:
            packed = archive.extractfile(member).read()
            record = np.load(io.BytesIO(gzip.decompress(packed)), allow_pickle=False)
            yield {"key": record["key"].item().decode(), **decode(record, encoding)}
            count += 1
        if count != head["samples"]:
            raise ValueError("the shard is cut off")


def decode(record, encoding):
    sample = {name: record[name] for name in ("class_id", "content_hash", "views")}
    if encoding == "f16":
        logits = record["logits"].astype(np.float32)
        sample |= {"class_ids": record["class_ids"], "confidence": record["confidence"].astype(np.float32)}
    else:
        classes = np.cumsum(record["palette"], dtype=record["palette"].dtype)
        steps = record["confidence_steps"].astype(np.float64)
        sample["class_ids"] = classes[record["class_ranks"]]
        sample["confidence"] = np.exp(-0.0088 * steps).astype(np.float16).astype(np.float32)
        logits = np.zeros(record["class_ranks"].shape, np.float32)
        if "logit_gaps" in record.dtype.names:
            logits[..., 1:] = -np.cumsum(record["logit_gaps"], axis=-1, dtype=np.int64) * (5 / 128)
    sample["probabilities"] = sample["confidence"][..., None] * np.exp(logits - logits[..., :1])
    return sample
