"""RoIAlign on sparse token labels: a label map seen through a student's view.

An output cell is the mean of s×s bilinear samples of the map's probabilities, as in He et al., "Mask R-CNN" (ICCV
2017), section 3, half-pixel aligned; for axis-aligned crops it equals torchvision's ``roi_align(aligned=True)`` on
the dense probabilities. It runs on the top k of each cell, so a dense (K, h, w) target is never built.

Gh, Gw: the map's token grid; k: stored classes of a cell; K: classes; h, w: the output's grid; m: kept classes of an
output cell; s: sampling ratio; u to the right, v down, both in [0, 1].
"""

import numpy as np

from stl_offline.compiled import njit
from stl_offline.errors import InputError
from stl_offline.geometry import WHOLE_MAP, View, holds_map, is_identity, is_in_window, is_within


def check_map(class_ids: np.ndarray, probabilities: np.ndarray, matrix: np.ndarray) -> None:
    """Raise InputError unless class ids and probabilities are (Gh, Gw, k), the ids not negative, and the matrix 2×3."""
    if class_ids.ndim != 3 or class_ids.shape != np.shape(probabilities) or 0 in class_ids.shape:
        raise InputError(
            f"a label map is (Gh, Gw, k) class ids and probabilities, got {class_ids.shape} and "
            f"{np.shape(probabilities)}"
        )
    if class_ids.dtype.kind not in "iu":
        raise InputError(f"class ids must be integers, got {class_ids.dtype}")
    if np.shape(matrix) != (2, 3):
        raise InputError(f"a relative view is a 2×3 matrix, got the shape {np.shape(matrix)}")
    if class_ids.min() < 0:
        raise InputError(f"class ids must not be negative, got {class_ids.min()}")


def roi_align_topk(
    class_ids: np.ndarray,
    probabilities: np.ndarray,
    relative_view: np.ndarray | View,
    out_grid: tuple[int, int],
    sampling_ratio: int,
    m: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One label map's token labels under another view.

    Args:
        class_ids: (Gh, Gw, k) integers.
        probabilities: (Gh, Gw, k) float32; a cell's sum is at most 1, the rest is its residual.
        relative_view: (2, 3), from unit coordinates of the output to unit coordinates of the map
            (`stl_offline.geometry.relative_view`).
        out_grid: (h, w) of the output.
        sampling_ratio: s; each output cell is the mean of s×s samples.
        m: how many classes to keep for each output cell.

    Returns:
        ids (h, w, m) int32 and probabilities (h, w, m) float32, by descending probability (ties: the lower class id
        first), unused entries −1 and 0; covered (h, w) float32, the share of the cell's samples that lie on the map.
        Samples off the map add no probability, so a cell's sum is at most its ``covered``. Where the relative view
        is the identity and the grids are equal, the stored cells come back bit for bit, in their stored order.

    Raises:
        InputError: shapes that do not fit each other, or a grid, ratio or m below one.
    """
    class_ids = np.asarray(class_ids)
    probabilities = np.asarray(probabilities)
    matrix = relative_view.matrix if isinstance(relative_view, View) else np.asarray(relative_view)
    check_map(class_ids, probabilities, matrix)
    height, width = (int(side) for side in out_grid)
    if min(height, width, sampling_ratio, m) < 1:
        raise InputError(f"grid, sampling ratio and m must be positive, got {out_grid}, {sampling_ratio} and {m}")
    classes = int(class_ids.max()) + 1
    out_ids = np.empty((height, width, m), dtype=np.int32)
    out_probabilities = np.empty((height, width, m), dtype=np.float32)
    out_covered = np.empty((height, width), dtype=np.float32)
    roi_align_topk_into(
        np.ascontiguousarray(class_ids),
        np.ascontiguousarray(probabilities, dtype=np.float32),
        *(float(number) for number in matrix.ravel()),
        WHOLE_MAP,
        int(sampling_ratio),
        np.zeros(classes, dtype=np.float32),
        np.empty(classes, dtype=np.int32),
        out_ids,
        out_probabilities,
        out_covered,
    )
    return out_ids, out_probabilities, out_covered


@njit(inline=True)
def neighbours(position, cells):
    """The two cells around a unit coordinate along one axis, and the second one's bilinear weight; border clamped."""
    at = min(max(position * cells - 0.5, 0.0), cells - 1.0)
    low = int(at)
    return low, min(low + 1, cells - 1), at - low


@njit
def roi_align_topk_into(
    class_ids,
    probabilities,
    r00,
    r01,
    r02,
    r10,
    r11,
    r12,
    window,
    s,
    scratch,
    touched,
    out_ids,
    out_probabilities,
    out_covered,
):
    """`roi_align_topk` without checks or allocation, for compiled pipelines.

    class_ids, probabilities: (Gh, Gw, k); r00 … r12: the relative view's rows as floats; window: what can be seen of
    the map (`WHOLE_MAP`: all), four floats; samples outside count as off the map; s: sampling ratio; scratch: (K,)
    float32, zeros on entry and on return; touched: (K,) int32, any content; out_ids: (h, w, m) int32;
    out_probabilities: (h, w, m) float32; out_covered: (h, w) float32. Every class id must be below K.
    """
    map_rows, map_columns, stored = class_ids.shape
    rows, columns, _ = out_ids.shape
    same = rows == map_rows and columns == map_columns and is_identity(r00, r01, r02, r10, r11, r12)
    if same and holds_map(window):
        for row in range(rows):
            for column in range(columns):
                _copy_cell(
                    class_ids[row, column],
                    probabilities[row, column],
                    out_ids[row, column],
                    out_probabilities[row, column],
                )
                out_covered[row, column] = 1.0
        return
    if r01 == 0.0 and r10 == 0.0:
        _align_crop(
            class_ids,
            probabilities,
            r00,
            r02,
            r11,
            r12,
            window,
            s,
            scratch,
            touched,
            out_ids,
            out_probabilities,
            out_covered,
        )
        return
    share = 1.0 / (s * s)
    for row in range(rows):
        for column in range(columns):
            # Of the type that it keeps: for a plain 0 numba compiles what takes it once more.
            count = np.int64(0)
            covered = 0
            for i in range(s):
                v = (row + (i + 0.5) / s) / rows
                for j in range(s):
                    u = (column + (j + 0.5) / s) / columns
                    x = r00 * u + r01 * v + r02
                    y = r10 * u + r11 * v + r12
                    if not is_in_window(x, y, window):
                        continue
                    covered += 1
                    left, right, to_right = neighbours(x, map_columns)
                    top, bottom, to_bottom = neighbours(y, map_rows)
                    for corner in range(4):
                        low = corner & 2
                        far = corner & 1
                        weight = share * (to_bottom if low else 1.0 - to_bottom) * (to_right if far else 1.0 - to_right)
                        if weight <= 0.0:
                            continue
                        at_row = bottom if low else top
                        at_column = right if far else left
                        for entry in range(stored):
                            amount = np.float32(weight * probabilities[at_row, at_column, entry])
                            # Nothing that would leave the sum at zero may enter it: zero means "not touched yet".
                            if amount > 0:
                                class_id = class_ids[at_row, at_column, entry]
                                if scratch[class_id] == 0:
                                    touched[count] = class_id
                                    count += 1
                                scratch[class_id] += amount
            _keep_best(scratch, touched, count, row, column, out_ids, out_probabilities)
            out_covered[row, column] = covered * share


@njit
def _align_crop(
    class_ids, probabilities, r00, r02, r11, r12, window, s, scratch, touched, out_ids, out_probabilities, out_covered
):
    """For a crop, rows and columns are independent, so the s·s·4 reads of a cell reduce to a few weighted map cells."""
    map_rows, map_columns, stored = class_ids.shape
    rows, columns, _ = out_ids.shape
    row_cells, row_weights, row_counts, row_covered = _axis_weights(r11, r12, window[2], window[3], s, rows, map_rows)
    column_cells, column_weights, column_counts, column_covered = _axis_weights(
        r00, r02, window[0], window[1], s, columns, map_columns
    )
    for row in range(rows):
        for column in range(columns):
            count = np.int64(0)
            for i in range(row_counts[row]):
                for j in range(column_counts[column]):
                    weight = row_weights[row, i] * column_weights[column, j]
                    at_row = row_cells[row, i]
                    at_column = column_cells[column, j]
                    for entry in range(stored):
                        amount = weight * probabilities[at_row, at_column, entry]
                        # Nothing that would leave the sum at zero may enter it: zero means "not touched yet".
                        if amount > 0:
                            class_id = class_ids[at_row, at_column, entry]
                            if scratch[class_id] == 0:
                                touched[count] = class_id
                                count += 1
                            scratch[class_id] += amount
            _keep_best(scratch, touched, count, row, column, out_ids, out_probabilities)
            out_covered[row, column] = row_covered[row] * column_covered[column]


@njit
def _axis_weights(scale, shift, start, end, s, outputs, cells):
    """Along one axis, the map cells under each output cell: (outputs, 2s) indices and float32 weights, how many of
    them, and the share of samples that lie between ``start`` and ``end``, the window's edges."""
    indices = np.empty((outputs, 2 * s), dtype=np.int64)
    weights = np.empty((outputs, 2 * s), dtype=np.float32)
    counts = np.zeros(outputs, dtype=np.int64)
    covered = np.zeros(outputs, dtype=np.float64)
    for output in range(outputs):
        count = 0
        for sample in range(s):
            position = scale * ((output + (sample + 0.5) / s) / outputs) + shift
            if not is_within(position, start, end):
                continue
            covered[output] += 1.0 / s
            low, high, to_high = neighbours(position, cells)
            for side in range(2):
                cell = high if side else low
                weight = (to_high if side else 1.0 - to_high) / s
                if weight <= 0.0:
                    continue
                place = 0
                while place < count and indices[output, place] != cell:
                    place += 1
                if place == count:
                    indices[output, place] = cell
                    weights[output, place] = 0.0
                    count += 1
                weights[output, place] += weight
        counts[output] = count
    return indices, weights, counts, covered


@njit
def _copy_cell(ids, probabilities, out_ids, out_probabilities):
    """The first m entries as they are stored; a stable sort, in case that they are not by descending probability."""
    kept = len(out_ids)
    filled = np.int64(0)
    for entry in range(len(ids)):
        probability = probabilities[entry]
        place = filled
        while place > 0 and out_probabilities[place - 1] < probability:
            place -= 1
        filled = _insert(ids[entry], probability, place, filled, kept, out_ids, out_probabilities)
    for place in range(filled, kept):
        out_ids[place] = -1
        out_probabilities[place] = 0.0


@njit
def _keep_best(scratch, touched, count, row, column, out_ids, out_probabilities):
    """Write the m classes with the highest sums to an output cell, and reset the scratch row to zeros.

    Most classes have less than all that are kept. Checking this first makes the function four times as fast.
    """
    kept = out_ids.shape[2]
    filled = 0
    for index in range(count):
        class_id = touched[index]
        probability = scratch[class_id]
        scratch[class_id] = 0.0
        place = filled
        if filled == kept:
            place = kept - 1
            least = out_probabilities[row, column, place]
            if probability < least or (probability == least and class_id > out_ids[row, column, place]):
                continue
        else:
            filled += 1
        while place > 0:
            before = out_probabilities[row, column, place - 1]
            if before > probability or (before == probability and out_ids[row, column, place - 1] < class_id):
                break
            out_probabilities[row, column, place] = before
            out_ids[row, column, place] = out_ids[row, column, place - 1]
            place -= 1
        out_probabilities[row, column, place] = probability
        out_ids[row, column, place] = class_id
    for place in range(filled, kept):
        out_ids[row, column, place] = -1
        out_probabilities[row, column, place] = 0.0


@njit
def _insert(class_id, probability, place, filled, kept, out_ids, out_probabilities):
    """Put an entry at its place in a list of at most ``kept``; gives the new length."""
    if place >= kept:
        return filled
    if filled < kept:
        filled += 1
    for later in range(filled - 1, place, -1):
        out_ids[later] = out_ids[later - 1]
        out_probabilities[later] = out_probabilities[later - 1]
    out_ids[place] = class_id
    out_probabilities[place] = probability
    return filled
