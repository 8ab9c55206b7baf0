"""Which device, and how many threads, a process takes: alone, and among others of torchrun's."""

import os

import pytest
import torch

from stl_offline.device import pick_device, pick_workers
from stl_offline.errors import InputError


def test_each_process_takes_its_own_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name in ("auto", "cuda"):
        assert pick_device(name) == torch.device("cuda:3")
    with pytest.raises(InputError, match="all processes of this machine would use cuda:1; leave `device` out"):
        pick_device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert asked == [torch.device("cuda:3")] * 2 + [torch.device("cuda:1")]


def test_a_device_that_is_not_there():
    with pytest.raises(InputError, match="toaster"):
        pick_device("toaster")


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert pick_workers(0) == 12
    assert pick_workers(5) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert pick_workers(0) == 1
    assert pick_workers(5) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert pick_workers(0) == 1
