"""Workers killed and suspended at random moments; `tests/labels/worker_kills.py` counts more of them."""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--kills", "20"], ["--kills", "4", "--s3"]], ids=["folder", "s3"])
def test_sets_are_whole_whoever_is_killed(more, tmp_path):
    line = [
        sys.executable,
        "-m",
        "tests.labels.worker_kills",
        "--shards",
        "40",
        "--out",
        str(tmp_path / "kills"),
        *more,
    ]
    done = subprocess.run(line, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert f"kills: {more[1]}\n" in done.stdout
