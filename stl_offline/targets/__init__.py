"""Token targets: RoIAlign on sparse label maps, and token targets of a student."""

from stl_offline.targets.align import roi_align_topk
from stl_offline.targets.kinds import (
    AlignScratch,
    TokenTargets,
    align_classes_into,
    draw_classes_into,
    drop_unsure,
    token_targets,
)
from stl_offline.targets.labels import Filler, TokenLabels, Wanted, check_index

__all__ = [
    "AlignScratch",
    "Filler",
    "TokenLabels",
    "TokenTargets",
    "Wanted",
    "align_classes_into",
    "check_index",
    "draw_classes_into",
    "drop_unsure",
    "roi_align_topk",
    "token_targets",
]
