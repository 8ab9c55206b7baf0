"""Space, the one truth about it: views, random crops, and a student's view on a label map."""

from stl_offline.geometry.crops import CropSettings, center_views, draw_views, whole_views
from stl_offline.geometry.relative import (
    IDENTITY_TOLERANCE,
    WHOLE_MAP,
    holds_map,
    is_identity,
    is_in_window,
    is_within,
    relative_view,
    relative_view_into,
    window_of,
)
from stl_offline.geometry.view import View, cells_in_boxes, compose_views, shares_in_boxes

__all__ = [
    "IDENTITY_TOLERANCE",
    "WHOLE_MAP",
    "CropSettings",
    "View",
    "cells_in_boxes",
    "center_views",
    "compose_views",
    "draw_views",
    "holds_map",
    "is_identity",
    "is_in_window",
    "is_within",
    "relative_view",
    "relative_view_into",
    "shares_in_boxes",
    "whole_views",
    "window_of",
]
