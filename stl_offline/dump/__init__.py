"""``stl-offline dump-labels``: run a labeler over images once and write its token labels."""

from stl_offline.dump.estimate import DumpEstimate, estimate_dump
from stl_offline.dump.function import label_with
from stl_offline.dump.job import DumpReport, dump_labels
from stl_offline.dump.labelling import Labelling, check_shards, load_labeler, make_views, top_k_labels
from stl_offline.dump.on_ray import dump_on_ray
from stl_offline.dump.recompute import recompute_labels

__all__ = [
    "DumpEstimate",
    "DumpReport",
    "Labelling",
    "check_shards",
    "dump_labels",
    "dump_on_ray",
    "estimate_dump",
    "label_with",
    "load_labeler",
    "make_views",
    "recompute_labels",
    "top_k_labels",
]
