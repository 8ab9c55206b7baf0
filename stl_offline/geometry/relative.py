"""A student's view relative to a label map's: M⁻¹·S, and which part of the map it shows. Compiled.

A view is six numbers, the rows of its 2×3 matrix; a window is (left, right, top, bottom) in unit coordinates of a map.
"""

import numpy as np

from stl_offline.compiled import njit
from stl_offline.geometry.view import View

# A view this near to the identity is the identity: views are stored in float32.
IDENTITY_TOLERANCE = 1e-6
# A sample point this far outside the map is still on it, for the same reason.
EDGE_TOLERANCE = 1e-6
# A window is the part of a map that can be seen: (left, right, top, bottom) in its unit coordinates. This is all of it.
WHOLE_MAP = (0.0, 1.0, 0.0, 1.0)


def relative_view(map_view: View, student_view: View) -> View:
    """From the student's output coordinates to the coordinates of a label map made under ``map_view``: M⁻¹·S.

    The identity, to the bit, where the two views are equal. Views are compared as they are stored, in float32: a crop
    that was flipped in float64 equals the view that a label set gives back.
    """
    relative = np.empty(6, dtype=np.float64)
    relative_view_into(map_view.matrix.ravel(), student_view.matrix.ravel(), relative)
    return View.from_array(relative)


@njit
def relative_view_into(map_view, student_view, relative):
    """`relative_view` of two views of six float32 each, into six float64 that hold float32 numbers."""
    equal = True
    for entry in range(6):
        equal = equal and map_view[entry] == student_view[entry]
        relative[entry] = 1.0 if entry == 0 or entry == 4 else 0.0
    if equal:
        return
    determinant = np.float64(map_view[0]) * map_view[4] - np.float64(map_view[1]) * map_view[3]
    a = map_view[4] / determinant
    b = -map_view[1] / determinant
    c = -map_view[3] / determinant
    d = map_view[0] / determinant
    shift_u = np.float64(student_view[2]) - map_view[2]
    shift_v = np.float64(student_view[5]) - map_view[5]
    relative[0] = np.float32(a * student_view[0] + b * student_view[3])
    relative[1] = np.float32(a * student_view[1] + b * student_view[4])
    relative[2] = np.float32(a * shift_u + b * shift_v)
    relative[3] = np.float32(c * student_view[0] + d * student_view[3])
    relative[4] = np.float32(c * student_view[1] + d * student_view[4])
    relative[5] = np.float32(c * shift_u + d * shift_v)


@njit(inline=True)
def window_of(relative):
    """(left, right, top, bottom): the part of the map that lies in a crop, given by its relative view of six numbers.

    Pixels outside a crop were not decoded, so no warp shows them, although the map may have labels there.
    """
    a, b, u, c, d, v = relative[0], relative[1], relative[2], relative[3], relative[4], relative[5]
    return (
        max(u + min(a, 0.0) + min(b, 0.0), 0.0),
        min(u + max(a, 0.0) + max(b, 0.0), 1.0),
        max(v + min(c, 0.0) + min(d, 0.0), 0.0),
        min(v + max(c, 0.0) + max(d, 0.0), 1.0),
    )


@njit(inline=True)
def is_identity(r00, r01, r02, r10, r11, r12):
    """Whether a relative view is the identity to `IDENTITY_TOLERANCE`."""
    return (
        abs(r00 - 1.0) <= IDENTITY_TOLERANCE
        and abs(r01) <= IDENTITY_TOLERANCE
        and abs(r02) <= IDENTITY_TOLERANCE
        and abs(r10) <= IDENTITY_TOLERANCE
        and abs(r11 - 1.0) <= IDENTITY_TOLERANCE
        and abs(r12) <= IDENTITY_TOLERANCE
    )


@njit(inline=True)
def is_in_window(x, y, window):
    """Whether a point (unit coordinates of the map) lies in the window."""
    return is_within(x, window[0], window[1]) and is_within(y, window[2], window[3])


@njit(inline=True)
def is_within(position, low, high):
    """Whether a unit coordinate lies between two others, to `EDGE_TOLERANCE`."""
    return low - EDGE_TOLERANCE <= position <= high + EDGE_TOLERANCE


@njit(inline=True)
def holds_map(window):
    """Whether a window shows the whole map."""
    low = EDGE_TOLERANCE
    high = 1.0 - EDGE_TOLERANCE
    return window[0] <= low and window[1] >= high and window[2] <= low and window[3] >= high
