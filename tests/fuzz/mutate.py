"""Damage, drawn at random: to bytes, to JSON values, to the parts of an archive."""

import copy
import io
import json
import random
import zipfile
from typing import Any

_WORDS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def damage_bytes(draw: random.Random, data: bytes) -> bytes:
    """One to three changes: flipped bits, other numbers, cuts, pieces moved, doubled or left out."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        size = len(changed)
        if not size:
            return bytes(changed) + draw.randbytes(draw.randrange(64))
        # Heads and ends hold most of what is structure.
        place = draw.randrange(min(size, 64)) if draw.random() < 0.3 else draw.randrange(size)
        if draw.random() < 0.1:
            place = max(0, size - 1 - draw.randrange(64))
        length = min(size - place, draw.choice((1, 2, 4, 8, 16, 64, 512)))
        kind = draw.randrange(8)
        if kind <= 1:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 2:
            width = draw.choice((1, 2, 4, 8))
            word = (draw.choice(_WORDS) & ((1 << 8 * width) - 1)).to_bytes(width, draw.choice(("little", "big")))
            changed[place : place + width] = word[: size - place]
        elif kind == 3:
            changed[place : place + length] = draw.randbytes(length)
        elif kind == 4:
            del changed[place:]
        elif kind == 5:
            del changed[place : place + length]
        elif kind == 6:
            piece = changed[place : place + length]
            at = draw.randrange(size)
            if draw.random() < 0.5:
                changed[at : at + length] = piece
            else:
                changed[at:at] = piece
        else:
            other = draw.randrange(size)
            length = min(length, size - other)
            first, second = changed[place : place + length], changed[other : other + length]
            changed[place : place + length], changed[other : other + length] = second, first
    return bytes(changed)


def odd_value(draw: random.Random) -> Any:
    """A JSON value of any kind."""
    deep: Any = 0
    for _ in range(draw.choice((5, 200))):
        deep = [deep]
    return draw.choice(
        (
            *(None, True, False, 0, 1, -1, 2, 3, 5.0, 0.5, -0.0, 2**31, 2**32, 2**63, 2**64, 10**30, 10**400, 1e308),
            *(float("nan"), float("inf"), -float("inf")),
            *("", "x", "0", "../../x", "/x", "\0", "a\n\x1b[31m", "é", "\ud800", "x" * 100_000, "f16", "q8", "zarr"),
            *([], [0], [[]], [None], {}, {"": 0}, {"name": "x"}, {"kind": "whole"}, deep, [1] * 10_000),
        )
    )


def damage_json(draw: random.Random, value: Any) -> Any:
    """The value with one to three of its parts changed, left out, exchanged or given twice."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return odd_value(draw)
        holder, key = draw.choice(places)
        kind = draw.randrange(6)
        if kind <= 2:
            holder[key] = odd_value(draw)
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            other, other_key = draw.choice(places)
            holder[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(holder[key])
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif type(holder[key]) in (int, float):
            holder[key] = holder[key] + draw.choice((-1, 1, 7, 1000, -1000))
        else:
            holder[f"{key} "] = holder[key]
    return value


def damage_json_text(draw: random.Random, data: bytes) -> bytes:
    """JSON with other values, or as bytes that may be no JSON any more."""
    if draw.random() < 0.25:
        return damage_bytes(draw, data)
    text = json.dumps(damage_json(draw, json.loads(data))).encode()
    if draw.random() < 0.05:
        place = draw.randrange(len(text) + 1)
        text = text[:place] + b"[" * 100_000 + text[place:]
    return text


def damage_zip(draw: random.Random, data: bytes) -> bytes:
    """A zip that is whole, with right checksums, but for one entry: changed, renamed, left out, added or exchanged."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    place, other = draw.randrange(len(entries)), draw.randrange(len(entries))
    name, content = entries[place]
    kind = draw.randrange(8)
    if kind <= 4:
        damage = damage_json_text if name.endswith(".json") else damage_bytes
        entries[place] = (name, damage(draw, content))
    elif kind == 5:
        entries[place] = (draw.choice((name + "0", "x/c/0", "../x", entries[other][0])), content)
    elif kind == 6:
        del entries[place]
    else:
        entries[place], entries[other] = (name, entries[other][1]), (entries[other][0], content)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", draw.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))) as archive:
        archive.filelist = []
        for entry, content in entries:
            info = zipfile.ZipInfo(entry, (1980, 1, 1, 0, 0, 0))
            info.compress_type = archive.compression
            archive.NameToInfo.pop(entry, None)  # no warning of one that is there twice
            archive.writestr(info, content)
    return stream.getvalue()


def _places(value: Any):
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
