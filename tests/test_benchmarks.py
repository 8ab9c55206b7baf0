"""Benchmarks are run by hand, so that a change of what they call would break them unseen: small forms run here."""

import subprocess
import sys

import pytest

from stl_offline.demo.shapes import write_shapes
from tests.source_tree import REPOSITORY


def run(name: str, *arguments: object) -> list[str]:
    """The rows of a benchmark's table."""
    command = [sys.executable, str(REPOSITORY / "tests" / "benchmarks" / name), *map(str, arguments)]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return [line for line in found.stdout.splitlines() if line.startswith("|")][2:]


def test_targets_equal_the_dense_way():
    rows = run("target_speed.py", "--batch", 3, "--pairs", 1)
    assert [row.split("|")[1].strip() for row in rows] == 2 * ["gumbel", "soft", "argmax"]


@pytest.mark.slow
def test_the_loader_and_the_decoder_are_timed(tmp_path):
    images = write_shapes(tmp_path / "shapes", train=60, val=10) / "train"
    assert len(run("loader_speed.py", images, "--rounds", 1, "--passes", 1, "--batch-size", 20)) == 4
    assert run("decoder_speed.py", images, "--sides", 32, "--rounds", 1)
