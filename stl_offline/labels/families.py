"""Label sets that hold different views of one random family: the same images, labeler and crops (``first_view``).

V: views of each image.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from stl_offline.errors import InputError
from stl_offline.labels.label_set import LabelSet, image_ranges
from stl_offline.labels.spec import PARTS, Difference, differences

# What sets of one family need not share: which views, how they lie in shards, how the job was run, and how far rounding
# went (conversions).
_OWN = ("views_per_image", "views.first", f"views.{PARTS}", "creation", "bounds")


def family_differences(first: LabelSet, other: LabelSet) -> list[Difference]:
    """The settings that keep two label sets from being of one family."""
    # What version 1 leaves out, it has at version 2's defaults.
    ours, theirs = (replace(each.spec, format_version=2) for each in (first, other))
    found = differences(ours, theirs)
    return [each for each in found if each.name not in _OWN and each.entry not in _OWN]


def in_view_order(label_sets: Sequence[LabelSet]) -> list[LabelSet]:
    """Sets of one family, ordered by their views.

    Raises:
        InputError: views of whole images, settings that differ (all are named), or views that two sets hold or that lie
            between two of them.
    """
    first = label_sets[0]
    if first.spec.views["kind"] != "random":
        raise InputError(f"{first.place} holds labels of whole images: only sets of crops have further views")
    for other in label_sets[1:]:
        found = [str(each) for each in family_differences(first, other)]
        if found:
            raise InputError(f"{first.place} and {other.place} hold no views of one family: {'; '.join(found)}")
        mine, theirs = (image_ranges(each.manifest, each.present)[0] for each in (first, other))
        if mine != theirs:
            raise InputError(
                f"{first.place} and {other.place} hold views of different images, since only some shards were pulled; "
                "pull those of the same images"
            )
    ordered = sorted(label_sets, key=lambda each: each.spec.first_view)
    for before, after in itertools.pairwise(ordered):
        end, start = before.spec.first_view + before.spec.views_per_image, after.spec.first_view
        if start < end:
            both = f"{start}-{min(end, start + after.spec.views_per_image) - 1}"
            raise InputError(f"{before.place} and {after.place} both hold the views {both}; give each view once")
        if start > end:
            raise InputError(
                f"no label set holds the views {end}-{start - 1}, between those of {before.place} and {after.place}; "
                f"dump them with `first_view={end}` and `crops_per_image={start - end}`"
            )
    return ordered


def group_families(label_sets: Sequence[LabelSet]) -> list[list[LabelSet]]:
    """The sets, those of one family together and ordered by their views. Raises as `in_view_order`."""
    groups: list[list[LabelSet]] = []
    for label_set in label_sets:
        is_random = label_set.spec.views["kind"] == "random"
        mine = (group for group in groups if is_random and not family_differences(group[0], label_set))
        group = next(mine, None)
        if group is None:
            groups.append([label_set])
        else:
            group.append(label_set)
    return [in_view_order(group) if len(group) > 1 else group for group in groups]
