"""Drawn classes as labels: what they are worth beside exact top-k, and how they lie in a token cache.

The S draws of a cell are classes drawn from what its k stored classes leave (from the whole softmax where k is 0). Each
stands for 1/S of the mass outside the top k, so that the mean of many cells, or of many draws, is the full softmax.

n: samples; Gh, Gw: the token grid; k: classes kept for each cell; S: classes drawn for each; K: all classes.
"""

import numpy as np

from stl_offline.compiled import njit


def entries(class_ids: np.ndarray, masses: np.ndarray, draws: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Top-k classes and draws as one list per cell.

    Args:
        class_ids, masses: (..., k), the top-k classes and their probabilities; draws: (..., S), or None.

    Returns:
        class ids (..., k + S) and float32 masses of that shape. Each draw has an S-th of what the top k leave.
    """
    if draws is None:
        return class_ids, masses
    share = np.maximum(0, 1 - masses.sum(-1, keepdims=True)) / np.float32(draws.shape[-1])
    shares = np.broadcast_to(share, draws.shape).astype(np.float32)
    return np.concatenate([class_ids, draws], axis=-1), np.concatenate([masses, shares], axis=-1)


def frequencies(class_ids: np.ndarray, masses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each cell's entries with every class named once, most mass first: (..., m) → ids and masses of that shape.

    Entries that are left over have mass 0 and the id of the cell's first class.
    """
    *cells, m = class_ids.shape
    ids = np.ascontiguousarray(class_ids).reshape(-1, m).copy()
    sums = np.ascontiguousarray(masses, dtype=np.float32).reshape(-1, m).copy()
    _merge_cells(ids, sums)
    order = np.argsort(-sums, axis=1, kind="stable")
    ids, sums = np.take_along_axis(ids, order, axis=1), np.take_along_axis(sums, order, axis=1)
    ids = np.where(sums > 0, ids, ids[:, :1])
    return ids.reshape(*cells, m), sums.reshape(*cells, m)


@njit
def _merge_cells(class_ids, masses):
    for cell in range(len(class_ids)):
        merge_same(class_ids[cell], masses[cell])


@njit(inner=True)
def merge_same(class_ids, masses):
    """Give a class's first entry in a cell the mass of its others, which keep none: class_ids, masses (m,)."""
    for entry in range(1, len(class_ids)):
        for earlier in range(entry):
            if class_ids[earlier] == class_ids[entry] and masses[earlier] > 0:
                masses[earlier] += masses[entry]
                masses[entry] = 0.0
                break


def bits_of(num_classes: int) -> int:
    """Bits that a class id takes in a token cache."""
    return max(1, (num_classes - 1).bit_length())


def packed_bytes(draws: int, num_classes: int) -> int:
    """Bytes of ``draws`` packed class ids; three more than their bits need, so that four can be read at each."""
    return -(-draws * bits_of(num_classes) // 8) + 3


def pack_draws(draws: np.ndarray, num_classes: int) -> np.ndarray:
    """Class ids (n, ...) → uint8 (n, bytes): an image's ids one after the other, each as few bits as K takes."""
    ids = np.ascontiguousarray(draws).reshape(len(draws), -1)
    packed = np.empty((len(ids), packed_bytes(ids.shape[1], num_classes)), dtype=np.uint8)
    _pack(ids, bits_of(num_classes), packed)
    return packed


@njit
def _pack(ids, bits, packed):
    for row in range(len(ids)):
        pack_into(ids[row], bits, packed[row])


@njit(inner=True)
def pack_into(ids, bits, packed):
    """`pack_draws` of one map: ids (draws,) → all of packed (bytes,), whatever was in it."""
    waiting = np.uint64(0)
    filled = 0
    byte = 0
    for place in range(len(ids)):
        waiting |= np.uint64(ids[place]) << np.uint64(filled)
        filled += bits
        while filled >= 8:
            packed[byte] = np.uint8(waiting & np.uint64(0xFF))
            waiting >>= np.uint64(8)
            filled -= 8
            byte += 1
    for rest in range(byte, len(packed)):
        packed[rest] = np.uint8(waiting & np.uint64(0xFF))
        waiting = np.uint64(0)


@njit(inline=True)
def unpack_draw(packed, place, bits):
    """The class id at ``place`` of packed ids (bytes,); ``bits``: `bits_of`, at most 25."""
    at = place * bits
    byte = at >> 3
    word = (
        np.uint32(packed[byte])
        | np.uint32(packed[byte + 1]) << np.uint32(8)
        | np.uint32(packed[byte + 2]) << np.uint32(16)
        | np.uint32(packed[byte + 3]) << np.uint32(24)
    )
    return np.int64((word >> np.uint32(at & 7)) & np.uint32((1 << bits) - 1))


@njit
def expand_into(class_ids, masses, packed, bits, merges, out_ids, out_masses):
    """One map's stored classes and draws as one list per cell, as `entries`, without allocation.

    class_ids, masses: (Gh, Gw, k); packed: (bytes,) uint8, the map's draws; bits: `bits_of`; merges: whether a class's
    first entry gets the mass of its others; out_ids, out_masses: (Gh, Gw, k + S).
    """
    rows, columns, stored = class_ids.shape
    draws = out_ids.shape[2] - stored
    place = 0
    for row in range(rows):
        for column in range(columns):
            left = 1.0
            for entry in range(stored):
                out_ids[row, column, entry] = class_ids[row, column, entry]
                out_masses[row, column, entry] = masses[row, column, entry]
                left -= masses[row, column, entry]
            share = np.float32(max(left, 0.0) / draws)
            for draw in range(draws):
                out_ids[row, column, stored + draw] = unpack_draw(packed, place, bits)
                out_masses[row, column, stored + draw] = share
                place += 1
            if merges:
                merge_same(out_ids[row, column], out_masses[row, column])
            elif draws:
                # Who sums masses up to a number below 1 must not pass the last because of rounding.
                out_masses[row, column, stored + draws - 1] += np.float32(1e-6)
