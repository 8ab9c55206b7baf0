"""Images: where they come from, how they are checked and stored, and the .beton file that holds them."""

import stl_offline.ffcv_setup  # noqa: F401
