"""Counter-based random numbers: every draw is a pure function of what it is for.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) turns a 128-bit counter and a
64-bit key into 128 random bits. The key is the job's seed; the counter names the use (stream), the epoch, the sample
and the draw. So any process, in any order, after any restart, draws the same.
"""

import numpy as np

from stl_offline.compiled import njit

# Streams: one for each use, so that two uses never share numbers. Never renumber: stored views depend on them.
STREAM_VIEW = 1
STREAM_TOKEN = 2
STREAM_ORDER = 3
STREAM_AUGMENT = 4
STREAM_JITTER = 5
STREAM_ERASE = 6
STREAM_LABELS = 7
STREAM_DENSE = 8
STREAM_DRAW = 9
STREAM_CLASS_DRAW = 10

_M0 = np.uint64(0xD2511F53)
_M1 = np.uint64(0xCD9E8D57)
_W0 = np.uint32(0x9E3779B9)
_W1 = np.uint32(0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_MASK = 0xFFFFFFFF
_SHIFT = np.uint64(32)


@njit(inner=True)
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four uint32 of counter and two of key → four random uint32."""
    c0 = np.uint32(c0)
    c1 = np.uint32(c1)
    c2 = np.uint32(c2)
    c3 = np.uint32(c3)
    k0 = np.uint32(k0)
    k1 = np.uint32(k1)
    for _ in range(10):
        p0 = _M0 * np.uint64(c0)
        p1 = _M1 * np.uint64(c2)
        c0, c1, c2, c3 = (
            np.uint32((p1 >> _SHIFT) ^ np.uint64(c1) ^ np.uint64(k0)),
            np.uint32(p1 & _LOW),
            np.uint32((p0 >> _SHIFT) ^ np.uint64(c3) ^ np.uint64(k1)),
            np.uint32(p0 & _LOW),
        )
        k0 = np.uint32(k0 + _W0)
        k1 = np.uint32(k1 + _W1)
    return c0, c1, c2, c3


@njit(inline=True)
def random_bits(seed, stream, epoch, sample_id, draw):
    """Four random uint32 for one draw of one sample.

    seed: uint64; stream: one of this module's; epoch < 2**24; sample_id < 2**40; draw: uint32 within the sample.
    """
    sample = np.uint64(sample_id)
    high = (np.uint64(stream) << np.uint64(24)) | (np.uint64(epoch) & np.uint64(0xFFFFFF))
    return philox(
        np.uint32(draw),
        np.uint32(sample & _LOW),
        np.uint32(high & _LOW),
        np.uint32(sample >> _SHIFT),
        np.uint32(np.uint64(seed) & _LOW),
        np.uint32(np.uint64(seed) >> _SHIFT),
    )


@njit(inline=True)
def unit_interval(bits):
    """A uint32 as a float64 in [0, 1)."""
    return np.float64(bits) * 2.3283064365386963e-10


def uniforms(seed: int, stream: int, epoch: int | np.ndarray, sample_ids: np.ndarray, count: int) -> np.ndarray:
    """``count`` numbers in [0, 1) for each sample: ids (n,) → float64 (n, count). epoch: one for all, or int64 (n,)."""
    numbers = np.empty((len(sample_ids), -(-count // 4) * 4), dtype=np.float64)
    epochs = epoch_of_each(epoch, len(sample_ids))
    _fill_uniforms(np.uint64(seed % 2**64), stream, epochs, np.asarray(sample_ids, dtype=np.uint64), numbers)
    return numbers[:, :count]


def epoch_of_each(epoch: int | np.ndarray, samples: int) -> np.ndarray:
    """One epoch for all samples, or int64 (n,), as compiled code takes them: uint64 (n,)."""
    return np.array(np.broadcast_to(epoch, samples), dtype=np.uint64)


@njit
def _fill_uniforms(seed, stream, epochs, sample_ids, numbers):
    for index in range(len(sample_ids)):
        for draw in range(numbers.shape[1] // 4):
            bits = random_bits(seed, stream, epochs[index], sample_ids[index], draw)
            for place in range(4):
                numbers[index, 4 * draw + place] = unit_interval(bits[place])


def philox_arrays(counter: tuple, key: tuple) -> tuple:
    """`philox` for whole arrays: four of counter and two of key → four, all int64 that hold uint32.

    Only operators are used, so that numpy arrays and tensors on any device serve; they broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product's lower 64 bits are right although int64 overflows; its upper half is masked after the shift.
        p0, p1 = c0 * int(_M0), c2 * int(_M1)
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + int(_W0)) & _MASK, (k1 + int(_W1)) & _MASK
    return c0, c1, c2, c3


def draw_keys(seed: int, stream: int, hashes: np.ndarray, view: int, tokens: int, draw: int) -> np.ndarray:
    """The keys under which classes are drawn for tokens of images: int64 (n, tokens, 4) that hold uint32.

    The first two numbers are a Philox key; the last two, with a block of four classes as counter (block, these), make
    its counter. They are Philox's answer to all that a draw depends on.

    seed: of the dump; stream: `STREAM_DRAW` or `STREAM_CLASS_DRAW`; hashes: uint64 (n,), the images' content; view: its
    number; tokens: how many; draw: its number within the token.
    """
    low = (hashes & np.uint64(_MASK)).astype(np.int64)[:, None]
    high = (hashes >> np.uint64(32)).astype(np.int64)[:, None]
    at = np.arange(tokens, dtype=np.int64)[None]
    first = philox_arrays((at, low, high, np.int64(stream << 24)), (np.int64(seed & _MASK), np.int64(seed >> 32)))
    where = (first[2], first[3], np.int64(view), np.int64(draw))
    return np.stack(philox_arrays(where, (first[0], first[1])), axis=-1)


# numpy's Philox is Philox4x64: its streams have nothing in common with those above. The keys below never change, since
# images, masks and resumed runs depend on them.


def erase_generator(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """The noise in an erased box of one sample."""
    counter = [0, STREAM_ERASE, epoch, sample_id]
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, STREAM_ERASE], counter=counter))


def step_generator(seed: int, rank: int, step: int) -> np.random.Generator:
    """What one process draws in one optimiser step. step: below 2**40."""
    return np.random.Generator(np.random.Philox(key=[seed, rank << 40 | step]))


def drawing_generator(seed: int, split: int, number: int) -> np.random.Generator:
    """One image of the embedded data set. number: below 2**40."""
    return np.random.Generator(np.random.Philox(key=[seed, split << 40 | number]))
