"""Progress lines on standard error: count, rate and time left, quiet where nobody watches."""

import os
import sys
from typing import Any

from tqdm import tqdm


def progress_bar(
    total: int | None, description: str, unit: str = "image", *, enabled: bool = True, **options: Any
) -> tqdm:
    """A tqdm bar with this package's look. Use it as a context manager and call ``update(n)``.

    Without a terminal (a log file, CI) it prints a line at most every 30 seconds. ``STL_OFFLINE_QUIET=1`` silences it.
    """
    watched = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=description,
        unit=f" {unit}s",
        dynamic_ncols=watched,
        mininterval=0.2 if watched else 30.0,
        disable=not enabled or bool(os.environ.get("STL_OFFLINE_QUIET")),
        smoothing=0.1,
        **options,
    )
