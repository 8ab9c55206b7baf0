"""Where tensors live and in which precision the network runs."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stl_offline.errors import InputError

# mallopt's names for its settings (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of a name: "auto" (a GPU if there is one), "cpu", "cuda", or "cuda:1" for a single process.

    Under torchrun each process takes the GPU of its local rank. A GPU becomes torch's current device, which streams
    and events belong to.

    Raises:
        InputError: no such device here, or one GPU for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        # A launcher may show each process its own GPU alone, whatever its rank.
        has_own = torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
        name = f"cuda:{0 if has_own else os.environ.get('LOCAL_RANK', 0)}"
    elif name.startswith("cuda") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"all processes of this machine would use {name}; leave `device` out: each takes the GPU of its local rank"
        )
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # takes memory and runs a kernel, which a GPU that is full or too old cannot
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the device {name!r} cannot be used here ({reason}); try `device=auto` or cpu") from error
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next batch instead of giving it back to the system.

    Every step on a CPU frees and asks for the same hundreds of megabytes; the kernel clears each page of them anew.
    Labelling 448-pixel images took three times as long without this (docs/benchmarks.md). glibc only.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        # Without a limit: one forward pass may free any number of gigabytes.
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type, or None for float32. "auto" takes bf16 where the hardware multiplies it faster."""
    if name == "auto":
        return torch.bfloat16 if _bf16_is_fast(device) else None
    return AMP_TYPES.get(name)


def amp_name(dtype: torch.dtype | None) -> str:
    """The name of an autocast type, as `pick_amp` takes it."""
    return next((name for name, kind in AMP_TYPES.items() if kind is dtype), "none")


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """torch's autocast on ``device``, or nothing."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Convolutions on a GPU with all of float32's 24 bits of mantissa; torch's default for them there is TF32's 11."""
    if device.type != "cuda":
        yield
        return
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def avoid_slow_attention(model: nn.Module, device: torch.device, amp: torch.dtype | None) -> Iterator[None]:
    """Without torch's fused attention in a model whose gradient is asked for on a CPU in half precision.

    That is slow: with few tokens a step in bf16 takes longer than in float32 (docs/benchmarks.md). timm's `fused_attn`,
    which FAN's blocks have too, chooses between it and the same in three operations, which round otherwise: without a
    gradient, a model that is being trained computes what it computes anywhere else.
    """
    slow = device.type == "cpu" and amp is not None
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)] if slow else []
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def upload(array: np.ndarray | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """An array of the host, on ``device``; the host does not wait for the copy, nor for what the GPU works on.

    On the CPU the result may share the array's memory. From ordinary memory CUDA may copy only once the GPU is idle, so
    the copy starts from pinned memory, which torch keeps until the copy is done.
    """
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if device.type == "cuda" and tensor.numel() and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True).to(dtype or tensor.dtype)


class Readback:
    """A copy of a tensor on its way to the host. `array` waits for it, and for nothing that was started after it."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._copied = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def array(self) -> np.ndarray:
        """The tensor's values."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.cpu().numpy()


def _bf16_is_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        # Without these instructions the CPU emulates bf16, which is slower than float32.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        if any(capabilities.get(name, False) for name in ("amx_bf16", "amx_bf16_tile", "sve_bf16")):
            return True
        # Intel's AVX-512 units do these products at half the rate of float32's (a training step of fan_micro_4_p8 takes
        # 1.6 times as long); AMD's at twice the rate.
        return capabilities.get("avx512_bf16", False) and "AuthenticAMD" in _cpu_vendor()
    return False


def _cpu_vendor() -> str:
    """What Linux lists of the CPU's maker, or nothing."""
    with contextlib.suppress(OSError):
        return next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "vendor_id" in line), "")
    return ""


def pick_workers(asked: int) -> int:
    """Loading threads of this process; 0 takes one per core, divided among torchrun's processes on this machine."""
    if asked < 0:
        raise InputError(f"`workers` must not be negative, got {asked}; 0 takes one per core")
    return asked or max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
