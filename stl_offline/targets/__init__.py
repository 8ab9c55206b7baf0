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

__all__ = [
    "AlignScratch",
    "TokenTargets",
    "align_classes_into",
    "draw_classes_into",
    "drop_unsure",
    "roi_align_topk",
    "token_targets",
]
