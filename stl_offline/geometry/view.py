"""The one truth about space: unit coordinates and views.

Unit coordinates: u to the right, v down, both in [0, 1] over the source image; pixel i of W covers [i/W, (i+1)/W].
A view is a 2×3 matrix that takes unit coordinates of an output (a crop, a grid of tokens) to unit coordinates of the
source: ``(u', v') = matrix[:, :2] @ (u, v) + matrix[:, 2]``.
"""

from typing import Self

import numpy as np

from stl_offline.errors import InputError

# Products of stored (float32) views are exact only to rounding. Differences below this are that rounding: it is a
# ten-thousandth of a pixel in an image of 10,000 pixels' side, and far above float64's own noise.
_QUANTUM = 2.0**-36


class View:
    """A spatial transform from output unit coordinates to source unit coordinates.

    ``matrix`` is the float32 2×3 matrix that label sets store. Inverses and products are computed in float64 from the
    stored numbers, and rounded so that ``view.inverse() @ view`` is the identity to the bit.

    Raises:
        InputError: the matrix is not 2×3, not finite, or has no inverse.
    """

    __slots__ = ("_exact",)

    def __init__(self, matrix: np.ndarray) -> None:
        exact = np.array(matrix, dtype=np.float64)
        if exact.shape != (2, 3):
            raise InputError(f"a view is a 2×3 matrix, got the shape {exact.shape}")
        if not np.isfinite(exact).all():
            raise InputError(f"a view needs finite numbers, got {exact.tolist()}")
        if exact[0, 0] * exact[1, 1] - exact[0, 1] * exact[1, 0] == 0:
            raise InputError(f"a view needs an inverse, but {exact.tolist()} has none (is a crop empty?)")
        exact.setflags(write=False)
        self._exact = exact

    @classmethod
    def identity(cls) -> Self:
        """The whole source image."""
        return cls(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))

    @classmethod
    def crop(cls, left: float, top: float, width: float, height: float) -> Self:
        """The part of the source that starts at (left, top) and is width × height, in unit coordinates."""
        if not (width > 0 and height > 0):
            raise InputError(f"a crop needs a positive size, got width {width} and height {height}")
        # Rounded to float32 at once: what a label set stores is what is used.
        return cls(np.array([[width, 0.0, left], [0.0, height, top]], dtype=np.float32))

    @classmethod
    def from_array(cls, six: np.ndarray) -> Self:
        """A view from the six numbers (row by row) that label sets and batches carry."""
        return cls(np.asarray(six).reshape(2, 3))

    @property
    def matrix(self) -> np.ndarray:
        """float32 (2, 3)."""
        return self._exact.astype(np.float32)

    def flipped(self) -> "View":
        """The same part of the source, mirrored left to right."""
        return self @ View(np.array([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))

    def inverse(self) -> "View":
        """The view from source to output coordinates."""
        linear = np.linalg.inv(self._exact[:, :2])
        return View(np.concatenate([linear, -linear @ self._exact[:, 2:]], axis=1))

    def __matmul__(self, inner: "View") -> "View":
        """``(outer @ inner)(p) == outer(inner(p))``: a view within a view."""
        if not isinstance(inner, View):
            return NotImplemented
        linear = self._exact[:, :2] @ inner._exact[:, :2]
        shift = self._exact[:, :2] @ inner._exact[:, 2:] + self._exact[:, 2:]
        # Adding zero makes a negative zero a positive one: the identity has one bit pattern.
        return View(np.round(np.concatenate([linear, shift], axis=1) / _QUANTUM) * _QUANTUM + 0.0)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Take points (..., 2), as (u, v) of the output, to points (..., 2) of the source; float64."""
        return np.asarray(points, dtype=np.float64) @ self._exact[:, :2].T + self._exact[:, 2]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, View) and bool((self.matrix == other.matrix).all())

    def __hash__(self) -> int:
        return hash(self.matrix.tobytes())

    def __repr__(self) -> str:
        return f"View({self.matrix.tolist()})"

    def box(self) -> tuple[float, float, float, float, bool]:
        """(left, top, width, height, flipped) of an axis-aligned view.

        Raises:
            InputError: the view rotates, shears or turns the image upside down.
        """
        (a, b, left), (c, d, top) = self._exact.tolist()
        if b != 0 or c != 0 or d <= 0:
            raise InputError(f"{self} is not a crop: it rotates, shears or flips top to bottom")
        return (left + a, top, -a, d, True) if a < 0 else (left, top, a, d, False)


def compose_views(outer_n6: np.ndarray, inner_n6: np.ndarray) -> np.ndarray:
    """Views within views, many at once: (n, 6) and (n, 6) → outer @ inner, float32 (n, 6).

    Where the inner view is the identity, the outer one comes back to the bit.
    """
    outer, inner = (np.asarray(views, dtype=np.float64).reshape(-1, 2, 3) for views in (outer_n6, inner_n6))
    product = outer[:, :, :2] @ inner
    product[:, :, 2] += outer[:, :, 2]
    return np.ascontiguousarray(product.reshape(-1, 6) + 0.0, dtype=np.float32)


def cells_in_boxes(boxes_B4: np.ndarray, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """The share of each token's cell that a box of pixels covers: float32 (B, h, w).

    Args:
        boxes_B4: integers, y0, y1, x0, x1 of each image's box in pixels.
        size: (H, W) of the images; grid: (h, w) of the tokens. Pixels need not divide into cells.
    """
    down, across = shares_in_boxes(boxes_B4, size, grid)
    return down[:, :, None] * across[:, None, :]


def shares_in_boxes(
    boxes_B4: np.ndarray, size: tuple[int, int], grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The factors of `cells_in_boxes`: the covered shares of rows (B, h) and of columns (B, w), float32."""
    return _overlap(boxes_B4[:, 0:2], size[0], grid[0]), _overlap(boxes_B4[:, 2:4], size[1], grid[1])


def _overlap(spans_B2: np.ndarray, pixels: int, cells: int) -> np.ndarray:
    """Share of each of ``cells`` equal parts of ``pixels`` that lies within a span: float32 (B, cells)."""
    edges = np.arange(cells + 1) * (pixels / cells)
    low = np.maximum(spans_B2[:, :1], edges[None, :-1])
    high = np.minimum(spans_B2[:, 1:], edges[None, 1:])
    return (np.maximum(high - low, 0) * (cells / pixels)).astype(np.float32)
