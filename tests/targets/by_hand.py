"""Token targets in plain numpy, slow and direct: what the compiled ones are compared with.

Gh, Gw: the map's grid; K: classes; h, w: the student's grid; s: sampling ratio.
"""

import numpy as np

from stl_offline.random import STREAM_TOKEN, random_bits


def to_dense(ids, probabilities, classes):
    """(Gh, Gw, k) → (Gh, Gw, K) float64."""
    full = np.zeros((*ids.shape[:-1], classes))
    np.put_along_axis(full, ids.astype(np.int64), probabilities.astype(np.float64), axis=-1)
    return full


def sample_points(matrix, out_grid, s):
    """Each token's sample points on the map: (h, w, s·s, 2) as (x, y); point i lies in sub-row i // s."""
    h, w = out_grid
    inner = (np.arange(s) + 0.5) / s
    v = (np.arange(h)[:, None] + inner) / h
    u = (np.arange(w)[:, None] + inner) / w
    points = np.stack(np.broadcast_arrays(u[None, :, None, :], v[:, None, :, None], 1.0), axis=-1)
    return (points @ np.asarray(matrix, dtype=np.float64).T).reshape(h, w, s * s, 2)


def on_map(points):
    return ((points >= -1e-6) & (points <= 1 + 1e-6)).all(-1)


def cells_and_weights(point, map_grid):
    """The four cells around a point and their bilinear weights: [((row, column), weight)], upper left first."""
    sides = []
    for position, cells in zip(point[::-1], map_grid, strict=True):
        at = min(max(position * cells - 0.5, 0), cells - 1)
        low = int(at)
        sides.append([(low, 1 - (at - low)), (min(low + 1, cells - 1), at - low)])
    return [((row, column), a * b) for row, a in sides[0] for column, b in sides[1]]


def aligned(dense, matrix, out_grid, s):
    """RoIAlign: (Gh, Gw, K) → (h, w, K) and covered (h, w)."""
    if np.abs(np.asarray(matrix) - np.eye(2, 3)).max() <= 1e-6 and tuple(out_grid) == dense.shape[:2]:
        return dense, np.ones(out_grid)
    points = sample_points(matrix, out_grid, s)
    covered = on_map(points)
    result = np.zeros((*out_grid, dense.shape[-1]))
    for row, column, point in np.argwhere(covered):
        for cell, weight in cells_and_weights(points[row, column, point], dense.shape[:2]):
            result[row, column] += weight * dense[cell] / (s * s)
    return result, covered.mean(-1)


def drawn(ids, probabilities, matrix, out_grid, s, residual, classes, seed, epoch, sample_id, own=None):
    """The gumbel target of each token, with the project's random numbers: ids (h·w,), weights (h·w,); and the cells.

    A draw that falls into the residual has id −2 with "ghost".
    """
    h, w = out_grid
    same = np.abs(np.asarray(matrix) - np.eye(2, 3)).max() <= 1e-6 and tuple(out_grid) == ids.shape[:2]
    points = sample_points(matrix, out_grid, s)
    out, cells = np.full(h * w, -1), np.full((h * w, 2), -1)
    for token in range(h * w):
        bits = random_bits(np.uint64(seed), STREAM_TOKEN, np.uint64(epoch), np.uint64(sample_id), token)
        u = [int(number) / 2**32 for number in bits]
        cell = divmod(token, w)
        if not same:
            point = points[cell][int(u[0] * s * s)]
            if not on_map(point):
                continue
            (top_left, _), (top_right, _), (bottom_left, c), (bottom_right, d) = cells_and_weights(point, ids.shape[:2])
            to_bottom = c + d
            below = u[1] < to_bottom
            rest = u[1] / to_bottom if below else (u[1] - to_bottom) / (1 - to_bottom)
            far = rest < cells_and_weights(point, ids.shape[:2])[1][1] / (1 - to_bottom)
            cell = (bottom_right if far else bottom_left) if below else (top_right if far else top_left)
        cells[token] = cell
        entry = np.searchsorted(np.cumsum(probabilities[cell].astype(np.float64)), u[2], side="right")
        if entry < ids.shape[-1]:
            out[token] = ids[cell][entry]
        elif residual == "uniform":
            out[token] = int(u[3] * classes)
        elif residual != "ignore":
            out[token] = {"class": own, "ghost": -2}[residual]
    return out, (out != -1).astype(np.float32), cells
