"""How a process leaves its group, and what it says of the others. No group is made: torch's answers are given."""

import os

import pytest
import torch
import torch.distributed as dist

from stl_offline import distributed
from stl_offline.cli.failures import end_process
from stl_offline.distributed import (
    World,
    failure_of_another,
    join_world,
    leaving_world,
    long_barrier,
    must_end_hard,
    told_by_first,
)
from stl_offline.errors import InputError, TrainingError


class Ended(Exception):
    """Instead of `os._exit`."""


@pytest.fixture
def group(monkeypatch):
    """A group that can be left; gives what happened to it. ``group("nccl")`` says how its processes talk."""
    happened = []

    def exit_at_once(code):
        happened.append(("ended at once", code))
        raise Ended

    def make(backend):
        monkeypatch.setattr(dist, "is_initialized", lambda: "left" not in happened)
        monkeypatch.setattr(dist, "get_backend", lambda: backend)
        monkeypatch.setattr(dist, "destroy_process_group", lambda: happened.append("left"))
        monkeypatch.setattr(os, "_exit", exit_at_once)
        return happened

    return make


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_a_process_that_is_done_leaves(group, backend):
    happened = group(backend)
    with leaving_world():
        assert not happened
    assert happened == ["left"]
    with pytest.raises(SystemExit) as ending:
        end_process(0)
    assert ending.value.code == 0


@pytest.mark.parametrize("failure", [InputError("no such file"), KeyboardInterrupt()])
def test_a_process_that_failed_leaves_over_gloo_so_that_the_others_hear_of_it(group, failure):
    happened = group("gloo")
    with pytest.raises(type(failure)), leaving_world():
        raise failure
    assert happened == ["left"]
    with pytest.raises(SystemExit) as ending:
        end_process(130)
    assert ending.value.code == 130


def test_a_process_that_failed_over_nccl_ends_without_leaving(group):
    """Leaving would wait for the other processes, and they wait for this one."""
    happened = group("nccl")
    with pytest.raises(InputError), leaving_world():
        raise InputError("no such file")
    assert must_end_hard()
    with pytest.raises(Ended):
        end_process(1)
    assert happened == [("ended at once", 1)]


def test_a_job_without_the_others_addresses_says_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="WORLD_SIZE is 4, .*torchrun, or unset WORLD_SIZE"):
        join_world(torch.device("cpu"))


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_processes_meet_over_gloo_whatever_they_train_over(monkeypatch, backend):
    """Nccl's own waiting ends after minutes, and one process may have hours of packing to do before it comes."""
    made, waited = [], []

    def new_group(*, backend, timeout):
        made.append((backend, timeout.days))
        return "the gloo group"

    class Done:
        def is_completed(self):
            return True

        def wait(self):
            pass

    def barrier(*, group, async_op):
        waited.append(group)
        return Done()

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "_gloo_groups", [])
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "barrier", barrier)

    def broadcast(tensor, source, *, group, async_op):
        assert tensor.device.type == "cpu", "nccl cannot send it"
        waited.append(group)
        tensor.copy_(torch.tensor([7]) if len(waited) == 2 else torch.tensor(list(b"[1, 22]")))
        return Done()

    monkeypatch.setattr(dist, "broadcast", broadcast)
    world = join_world(torch.device("cpu"), backend)
    long_barrier(world)
    assert told_by_first(None, world) == [1, 22]
    assert made == ([] if backend == "gloo" else [("gloo", 30)])
    assert waited == 3 * ([None] if backend == "gloo" else ["the gloo group"])


def test_what_torch_says_of_a_lost_connection_is_passed_on():
    """Where no process reaches another, none of them has anything else to say."""
    said = "NCCL error in: x.cpp:1, invalid usage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0"
    expected = "another process of this job has failed.*usage Last error: Duplicate GPU"
    with pytest.raises(TrainingError, match=expected), failure_of_another(World(0, 2)):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="shapes"), failure_of_another(World(0, 2)):
        raise RuntimeError("shapes do not fit")
