"""The token labels of one picture.

V: its views; Gh, Gw: the token grid; k: classes kept for each cell; K: all classes.
"""

from dataclasses import dataclass

import numpy as np

from stl_offline.errors import InputError
from stl_offline.geometry import View
from stl_offline.labels.arrays import probabilities


@dataclass(frozen=True, eq=False)
class LabelMap:
    """One picture's label maps, one for each view under which it was labelled.

    key: path below the data set's root; class_id: the picture's own class; content_hash: xxh3 of its bytes;
    class_ids: (V, Gh, Gw, k), best first; logits: (V, Gh, Gw, k); confidence: (V, Gh, Gw), the probability of the
    best class; views: (V, 6) float32, the rows of each 2×3 view; num_classes: K.
    """

    key: str
    class_id: int
    content_hash: int
    class_ids: np.ndarray
    logits: np.ndarray
    confidence: np.ndarray
    views: np.ndarray
    num_classes: int

    def view(self, index: int = 0) -> View:
        """The view (from the map's unit coordinates to the picture's) of map ``index``."""
        return View.from_array(self.views[index])

    def probabilities(self) -> np.ndarray:
        """float32 (V, Gh, Gw, k): each stored class's probability; what a cell's sum leaves to 1 is its residual."""
        return probabilities(self.logits, self.confidence)

    def residual(self) -> np.ndarray:
        """float32 (V, Gh, Gw): the mass outside the top k."""
        return np.maximum(0, 1 - self.probabilities().sum(-1))

    def dense(self, residual: str = "ignore") -> np.ndarray:
        """float32 (V, Gh, Gw, K): probabilities of all classes.

        residual: what becomes of the mass outside the top k. "ignore" leaves it out, so a cell sums to less than one;
        "uniform" spreads it evenly over all K classes, so a cell sums to one.

        Raises:
            InputError: another word for ``residual``.
        """
        if residual not in ("ignore", "uniform"):
            raise InputError(f'residual must be "ignore" or "uniform", got {residual!r}')
        full = np.zeros((*self.confidence.shape, self.num_classes), dtype=np.float32)
        np.put_along_axis(full, self.class_ids.astype(np.int64), self.probabilities(), axis=-1)
        if residual == "uniform":
            full += self.residual()[..., None] / np.float32(self.num_classes)
        return full
