"""What a label map shows: the image, its tokens, one draw, and the same under a student's crop.

All of it goes through the code that training uses: crops (`stl_offline.geometry`), alignment (`stl_offline.targets`)
and draws (`stl_offline.targets`), with the sample's number. So a page shows what a student with that seed gets in that
epoch.

H, W: pixels; Gh, Gw: a label map's grid; k: its stored classes; N: tokens.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from stl_offline.errors import InputError
from stl_offline.geometry import CropSettings, View, draw_views, relative_view
from stl_offline.labels.arrays import LabelMap
from stl_offline.labels.spec import LabelSpec
from stl_offline.reports.encode import see_through
from stl_offline.targets import TokenTargets, roi_align_topk, token_targets

CROP_PIXELS = 256  # longer side of a crop as it is kept
SAMPLING_RATIO = 2  # as students sample by default


@dataclass(frozen=True)
class StudentSettings:
    """Which crop and which draw of a student to show: its seed, the epoch (from 0), and how it crops."""

    seed: int = 0
    epoch: int = 0
    crops: CropSettings = field(default_factory=CropSettings)


@dataclass(frozen=True, eq=False)
class TokenMap:
    """Tokens, and the pixels beneath.

    class_ids: (Gh, Gw, k), best first, −1 where there is none; probabilities: (Gh, Gw, k); drawn: (Gh, Gw), the class
    of one Gumbel draw, −1 for none; pixels: uint8 (H, W, 3) or None; aspect: width / height of what the grid covers.

    Raises:
        InputError: shapes that do not match.
    """

    class_ids: np.ndarray
    probabilities: np.ndarray
    drawn: np.ndarray | None
    pixels: np.ndarray | None
    aspect: float

    def __post_init__(self) -> None:
        if self.class_ids.ndim != 3 or self.class_ids.shape != self.probabilities.shape:
            raise InputError(
                f"class ids and probabilities must both be (Gh, Gw, k), got {self.class_ids.shape} and "
                f"{self.probabilities.shape}"
            )
        if self.drawn is not None and self.drawn.shape != self.grid:
            raise InputError(f"a draw must have one class per token {self.grid}, got {self.drawn.shape}")
        if self.pixels is not None and (self.pixels.dtype != np.uint8 or self.pixels.shape[2:] != (3,)):
            raise InputError(f"pixels must be uint8 (H, W, 3), got {self.pixels.dtype} {self.pixels.shape}")

    @property
    def grid(self) -> tuple[int, int]:
        """(Gh, Gw)."""
        return self.class_ids.shape[:2]

    @property
    def best(self) -> np.ndarray:
        """(Gh, Gw): each token's most probable class, −1 for none."""
        return self.class_ids[..., 0]

    @property
    def confidence(self) -> np.ndarray:
        """(Gh, Gw): its probability."""
        return self.probabilities[..., 0]

    @property
    def kept(self) -> np.ndarray:
        """bool (Gh, Gw): tokens for which the draw gave their most probable class."""
        return (self.drawn == self.best) & (self.best >= 0)

    def own(self, class_id: int) -> np.ndarray:
        """bool (Gh, Gw): the foreground, tokens whose most probable class is the image's own."""
        return self.best == class_id

    @cached_property
    def shares(self) -> Counter[int]:
        """Class id → number of tokens with this most probable class."""
        return Counter(self.best.ravel().tolist())


@dataclass(frozen=True, eq=False)
class Scene:
    """One label map, and the tokens that a student gets from it.

    class_id: the image's own class, None where it has none; view: what the labeler saw of the image; view_index: which
    of the label set's maps; tokens: its tokens, over the labeler's pixels; student_view, student: a student's crop and
    its tokens; None where students replay ``view``; draws: S where a token's probabilities are the frequencies of its
    draws, without a top k, else 0.
    """

    key: str
    class_id: int | None
    view_index: int
    view: View
    image: np.ndarray | None
    tokens: TokenMap
    student_view: View | None = None
    student: TokenMap | None = None
    draws: int = 0

    @property
    def whole(self) -> bool:
        """Whether the labeler saw the whole image."""
        return self.view == View.identity()

    def all_tokens(self) -> Counter[int]:
        """Class id → number of its tokens in the label map and under the student's crop."""
        counts = Counter(self.tokens.shares)
        return counts + self.student.shares if self.student is not None else counts


def make_scenes(
    spec: LabelSpec,
    label_map: LabelMap,
    image: np.ndarray | None,
    sample_id: int,
    student: StudentSettings,
    view_indices: Sequence[int] = (0,),
) -> Iterator[Scene]:
    """A scene for each of the chosen maps of one label.

    Args:
        image: uint8 (H, W, 3), or None to show the labels alone.
        sample_id: the image's number in the data set, which its crops and draws depend on.
    """
    height, width = (spec.preprocessing["height"], spec.preprocessing["width"])
    if image is not None:
        height, width = image.shape[:2]
    # What a draw is made from, in the order in which it is stored: another order gives other draws.
    entries, masses = label_map.entries()
    label_map = label_map.listed()
    probabilities, stored = label_map.probabilities(), label_map.class_ids.shape[-1]
    for index in view_indices:
        view = label_map.view(index)
        ids = label_map.class_ids[index].astype(np.int32)
        pixels, aspect = _seen(image, view, spec, (height, width))
        drawn = _draw(spec, student, entries[index], masses[index], View.identity(), sample_id)
        scene = {
            "key": label_map.key,
            "class_id": label_map.class_id,
            "view_index": index,
            "view": view,
            "image": image,
            "tokens": TokenMap(ids, probabilities[index], drawn, pixels, aspect),
            "draws": 0 if spec.top_k else spec.draws,
        }
        if spec.views["kind"] == "whole":
            six = draw_views(student.seed, student.epoch, [sample_id], [height], [width], student.crops)[0]
            crop = View.from_array(six)
            relative = relative_view(view, crop)
            aligned = roi_align_topk(
                ids, probabilities[index], relative, spec.grid, SAMPLING_RATIO, min(2 * stored, spec.num_classes)
            )
            drawn = _draw(spec, student, entries[index], masses[index], relative, sample_id)
            seen = None if image is None else see_through(image, crop, _size(1.0))
            scene |= {"student_view": crop, "student": TokenMap(aligned[0], aligned[1], drawn, seen, 1.0)}
        yield Scene(**scene)


def _seen(
    image: np.ndarray | None, view: View, spec: LabelSpec, size: tuple[int, int]
) -> tuple[np.ndarray | None, float]:
    """(pixels, aspect) under a label map: the image itself, or the crop as the labeler saw it."""
    if view == View.identity():
        return image, size[1] / size[0]
    aspect = spec.preprocessing["width"] / spec.preprocessing["height"]
    return None if image is None else see_through(image, view, _size(aspect)), aspect


def _size(aspect: float) -> tuple[int, int]:
    return round(CROP_PIXELS / max(1.0, aspect)), round(CROP_PIXELS * min(1.0, aspect))


def _draw(
    spec: LabelSpec,
    student: StudentSettings,
    ids: np.ndarray,
    probabilities: np.ndarray,
    relative: View,
    sample_id: int,
) -> np.ndarray:
    drawn, _ = token_targets(
        TokenTargets(kind="gumbel", grid=spec.grid, m=1, sampling_ratio=SAMPLING_RATIO),
        ids,
        probabilities,
        probabilities[..., 0],
        relative.matrix,
        spec.num_classes,
        seed=student.seed,
        epoch=student.epoch,
        sample_id=sample_id,
    )
    return drawn.reshape(spec.grid)
