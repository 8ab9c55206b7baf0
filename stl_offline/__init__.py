"""Token labels made once, shared like data, and students trained from them at the speed of plain training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stl_offline.labels.label_set import open_label_set

__version__ = "0.1.0"
__all__ = ["__version__", "open_label_set"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: zarr and numba would make `import stl_offline` (and every --help) slow.
    if name == "open_label_set":
        import importlib

        return importlib.import_module("stl_offline.labels.label_set").open_label_set
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
