"""The embedded data set, which is drawn, and the demo that runs all stages on it."""

from stl_offline.demo.demo import run_demo

__all__ = ["run_demo"]
