"""Which device, and how many threads, a process takes: alone, and among others of torchrun's."""

import os

import pytest
import torch

from stl_offline import device
from stl_offline.device import exact_float32, pick_amp, pick_device, pick_workers
from stl_offline.errors import InputError


def test_each_process_takes_its_own_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name in ("auto", "cuda"):
        assert pick_device(name) == torch.device("cuda:3")
    with pytest.raises(InputError, match="all processes of this machine would use cuda:1; leave `device` out"):
        pick_device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    # Some launchers show each process one GPU, which is the first that it sees.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert pick_device("auto") == torch.device("cuda:0")
    # More processes than GPUs: torch refuses the fourth one's.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert pick_device("auto") == torch.device("cuda:3")
    assert asked == [torch.device(f"cuda:{index}") for index in (3, 3, 1, 0, 3)]


def test_float32_is_float32(monkeypatch):
    """Convolutions on a GPU are in TF32 by default; on a CPU nothing is touched."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with exact_float32(torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32
    with pytest.raises(KeyError), exact_float32(torch.device("cuda:0")):
        assert not torch.backends.cudnn.allow_tf32
        raise KeyError
    assert torch.backends.cudnn.allow_tf32


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


@pytest.mark.parametrize(
    ("vendor", "capabilities", "expected"),
    [
        ("GenuineIntel", {"avx512_bf16": True, "amx_bf16": False}, None),
        ("GenuineIntel", {"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ("AuthenticAMD", {"avx512_bf16": True}, torch.bfloat16),
        ("AuthenticAMD", {"avx512_bf16": False}, None),
        ("", {"sve_bf16": True}, torch.bfloat16),
    ],
)
def test_auto_takes_bf16_on_cpus_that_multiply_it_faster(monkeypatch, vendor, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(device, "_cpu_vendor", lambda: f"vendor_id\t: {vendor}")
    assert pick_amp("auto", torch.device("cpu")) is expected
