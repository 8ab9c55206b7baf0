"""Dumps by several processes, interrupted and killed: the bytes are those of one undisturbed process."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dump.dumping import content, run, start, tree
from tests.forks import Fork


def wait_for_shards(out: Path, count: int, process: subprocess.Popen | Fork) -> None:
    """Return once so many shards are written."""
    deadline = time.monotonic() + 200
    while len(list((out / ".partial" / "records").glob("*/*.json"))) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_stopped_killed_and_gone_on_with_other_numbers_of_processes(long_work, long_undisturbed, tmp_path):
    out = tmp_path / "set"
    # One process, stopped by a signal while it works.
    alone = start(long_work, out)
    wait_for_shards(out, 3, alone)
    alone.send_signal(signal.SIGTERM)
    assert "interrupted; run the same command again to go on" in alone.communicate(timeout=60)[1]
    assert alone.returncode == 143
    done = len(list((out / ".partial" / "records").glob("*/*.json")))
    assert 3 <= done < long_work["shards"]
    assert not list(out.rglob(".*.tmp")) and not list((out / ".partial" / "claims").iterdir())
    # Two, of which one is killed: torchrun ends the other, and the job, at once.
    two = start(long_work, out, 2)
    wait_for_shards(out, done + 3, two)
    os.kill(tree(two.pid)[-1], signal.SIGKILL)
    killed = time.monotonic()
    two.communicate(timeout=100)
    assert two.returncode != 0
    assert time.monotonic() - killed < 25
    assert not (out / "manifest.json").exists()
    # What that left does not stand in the way of two others, which end it.
    finished = run(long_work, out, 2)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("label set:") == 1
    assert content(out) == long_undisturbed


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """Seeded; `tests/dump/killing.py` counts more of them."""
    line = [sys.executable, "-m", "tests.dump.killing", "--kills", "4", "--seed", "1", "--out", str(tmp_path / "kills")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "kills: 4\n" in done.stdout
    shutil.rmtree(tmp_path / "kills")


# Without the labeler: what the processes of training tell each other.

_TALK = """
import sys
import torch
from stl_offline.distributed import agree, join_world, leaving_world, sum_over_world, told_by_first, long_barrier
with leaving_world():
    world = join_world(torch.device("cpu"))
    text = told_by_first(["größe", 3] if world.is_first else None, world)
    assert text == ["größe", 3], text
    assert int(sum_over_world(torch.tensor([world.rank + 1]), world)) == 3
    assert agree(torch.tensor([2.0, -1.0]), world)
    assert not agree(torch.tensor([2.0, -float(world.rank)]), world)
    if not world.is_first:
        raise SystemExit("the second has failed")
    long_barrier(world)
"""


def test_processes_talk_and_do_not_wait_for_the_dead(tmp_path):
    script = tmp_path / "talk.py"
    script.write_text(_TALK)
    started = time.monotonic()
    done = Fork(script, processes=2)
    assert "the second has failed" in done.communicate()[1]
    assert done.returncode != 0
    # Far from torch's half an hour, and from torchrun's 30 seconds until it kills.
    assert time.monotonic() - started < 60
