"""The demo: a synthetic data set of drawn shapes, and all stages run on it."""

from stl_offline.demo.demo import run_demo

__all__ = ["run_demo"]
