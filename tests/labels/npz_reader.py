"""A reader of version 2 tars for a stranger: the standard library and numpy, written from docs/format.md alone.

Gives, for each sample in stored order: key, class_id, content_hash, views (V, 6), and all that is stored of a token's
distribution: class_ids and masses (V, Gh, Gw, k + S).
"""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np


def read_label_set(folder):
    folder = Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["format"] != "stl-offline label set" or manifest["format_version"] != 2:
        raise ValueError("not a label set of version 2")
    if manifest["value_kind"] != "logits" or manifest["container"] != "webdataset":
        raise ValueError("not a label set that this reader knows")
    for shard in manifest["shards"]:
        data = (folder / shard["name"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != shard["sha256"]:
            raise ValueError(f"{shard['name']} is damaged")
        with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as archive:
            for member in archive:
                if member.name != "__labels__":
                    with np.load(io.BytesIO(archive.extractfile(member).read()), allow_pickle=False) as arrays:
                        yield decode(dict(arrays), manifest["encoding"])


def decode(arrays, encoding):
    sample = {"key": str(arrays["key"]), "class_id": int(arrays["class_id"]), "views": arrays["views"]}
    sample["content_hash"] = int(arrays["content_hash"][0])
    ids, masses = [], []
    if encoding == "q8":
        classes = np.cumsum(arrays["palette"], dtype=arrays["palette"].dtype)
        arrays |= {
            name: classes[arrays[ranks]]
            for name, ranks in (("class_ids", "class_ranks"), ("draws", "draw_ranks"))
            if ranks in arrays
        }
    if "class_ids" in arrays:
        ids.append(arrays["class_ids"])
        masses.append(top_k_masses(arrays, encoding))
    if "draws" in arrays:
        draws = arrays["draws"]
        left = 1 - sum(mass.sum(-1, keepdims=True) for mass in masses)
        ids.append(draws)
        masses.append(np.broadcast_to(np.maximum(0, left) / draws.shape[-1], draws.shape))
    return sample | {"class_ids": np.concatenate(ids, axis=-1), "masses": np.concatenate(masses, axis=-1)}


def top_k_masses(arrays, encoding):
    if encoding == "f16":
        logits, confidence = arrays["logits"].astype(np.float32), arrays["confidence"].astype(np.float32)
    else:
        logits = np.zeros(arrays["class_ranks"].shape, np.float32)
        if "logit_gaps" in arrays:
            logits[..., 1:] = -np.cumsum(arrays["logit_gaps"], axis=-1, dtype=np.int64) * (5 / 128)
        steps = arrays["confidence_steps"].astype(np.float64)
        confidence = np.exp(-0.0088 * steps).astype(np.float16).astype(np.float32)
    return confidence[..., None] * np.exp(logits - logits[..., :1])
