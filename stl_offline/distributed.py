"""One process or many: what training and dumping need of torch.distributed.

Under ``torchrun`` every process finds its rank in the environment; without it there is one process. Over gloo nothing
here waits forever: a process that dies closes its connections, which ends the waiting of the others with an error; so
does a signal to a process that waits. Over nccl a process that waits for a dead one hears neither, and it is torchrun
that ends it.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from stl_offline.errors import InputError, TrainingError

_POLL_SECONDS = 0.02
# A process with little to do may wait for the others as long as the work takes.
_LONG = timedelta(days=30)
# Beside nccl, whose time limit is minutes: the gloo group of `long_barrier`.
_gloo_groups: list[dist.ProcessGroup] = []


@dataclass(frozen=True)
class World:
    """This process's place among ``size`` of them."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def join_world(device: torch.device, backend: str | None = None) -> World:
    """Join the processes that torchrun started; alone, do nothing.

    Args:
        device: where tensors that are exchanged lie.
        backend: torch's name for the way they go; default: nccl on GPUs, gloo on CPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        backend = backend or ("nccl" if device.type == "cuda" else "gloo")
        with _plain_signals():
            try:
                # nccl has no other sign of a dead process than its time limit, so that one stays as it is.
                dist.init_process_group(backend, timeout=_LONG if backend == "gloo" else None)
            except ValueError as error:
                raise InputError(
                    f"WORLD_SIZE is {size}, but this process cannot find the others ({error}); start the command with "
                    "torchrun, or unset WORLD_SIZE"
                ) from error
            if backend != "gloo":
                _gloo_groups.append(dist.new_group(backend="gloo", timeout=_LONG))
    return World(dist.get_rank(), size)


@contextlib.contextmanager
def leaving_world() -> Iterator[None]:
    """Leave the group at the block's end, so that the processes end without a warning.

    After a failure over nccl there is no leaving: that waits for the other processes, and they for this one. Then the
    process has to end without it (`must_end_hard`).
    """
    try:
        yield
    except BaseException:
        if dist.is_initialized() and dist.get_backend() != "nccl":
            dist.destroy_process_group()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
        _gloo_groups.clear()


def must_end_hard() -> bool:
    """Whether this process failed in a group that it could not leave, whose threads would hold up its end."""
    return dist.is_available() and dist.is_initialized()


def agree(values: torch.Tensor, world: World) -> bool:
    """Whether these numbers are the same in every process of the job."""
    if world.size == 1:
        return True
    both = torch.cat([values, -values])
    _wait(dist.all_reduce(both, dist.ReduceOp.MAX, async_op=True))
    return torch.equal(both, torch.cat([values, -values]))


def sum_over_world(values: torch.Tensor, world: World) -> torch.Tensor:
    """Element-wise sum over all processes, in place. Signals are handled while it waits, at a cost of some 20 ms."""
    if world.size > 1:
        _wait(dist.all_reduce(values, async_op=True))
    return values


def sum_over_world_blocking(values: torch.Tensor, world: World) -> torch.Tensor:
    """`sum_over_world` for the sums of every training step: it waits inside torch, where signals are not handled."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


@contextlib.contextmanager
def failure_of_another(world: World) -> Iterator[None]:
    """Turn what torch raises inside when another process of the job has died into an error of one line.

    Raises:
        TrainingError: likewise.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "nccl"))
        if world.size > 1 and lost and not isinstance(error, TrainingError):
            raise _another_failed(error) from error
        raise


def long_barrier(world: World) -> None:
    """Return when every process has called this, however late: packing takes one process far longer than another.

    Raises:
        TrainingError: another process has died.
    """
    if world.size > 1:
        _wait(dist.barrier(group=_gloo_group(), async_op=True))


def told_by_first(value: Any, world: World) -> Any:
    """The first process's value, in all processes; anything that JSON holds. Without a time limit, as `long_barrier`.

    Raises:
        TrainingError: another process has died.
    """
    if world.size == 1:
        return value
    data = json.dumps(value).encode() if world.is_first else b""
    length = torch.tensor([len(data)])  # on the CPU, which nccl cannot send from
    _wait(dist.broadcast(length, 0, group=_gloo_group(), async_op=True))
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(length), dtype=torch.uint8)
    _wait(dist.broadcast(text, 0, group=_gloo_group(), async_op=True))
    return json.loads(text.numpy().tobytes())


def _gloo_group() -> dist.ProcessGroup | None:
    """The group whose way is gloo; None is the default group."""
    return _gloo_groups[0] if _gloo_groups else None


class _SumOverProcesses(torch.autograd.Function):
    """Element-wise sum over all processes; the gradient of a sum is the sum of the gradients."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the batches of all processes; the same outside training and in a single process.

    torch's own SyncBatchNorm runs on GPUs only. Input and output: (B, C, H, W).
    """

    def forward(self, input: Tensor) -> Tensor:
        return _normalised(self, input) if _is_shared(self) else super().forward(input)


class SyncBatchNorm1d(nn.BatchNorm1d):
    """The same for (B, C) and (B, C, N)."""

    def forward(self, input: Tensor) -> Tensor:
        return _normalised(self, input) if _is_shared(self) else super().forward(input)


class SyncBatchNormAct2d(BatchNormAct2d):
    """The same with timm's activation behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(_normalised(self, x))) if _is_shared(self) else super().forward(x)


_SHARED = {nn.BatchNorm2d: SyncBatchNorm2d, nn.BatchNorm1d: SyncBatchNorm1d, BatchNormAct2d: SyncBatchNormAct2d}


def _is_shared(norm: nn.Module) -> bool:
    return norm.training and dist.is_initialized() and dist.get_world_size() > 1


def _normalised(norm: Any, input: Tensor) -> Tensor:
    """(B, C, …) by mean and variance over all axes but C, and over all processes."""
    values = input.float()
    count = values.new_full((1,), values.numel() / values.shape[1])  # made there, without a wait for the GPU
    axes = [axis for axis in range(values.ndim) if axis != 1]
    channels = (slice(None), *[None] * (values.ndim - 2))
    # The mean first, the variance around it second: one pass would lose digits.
    sums = _SumOverProcesses.apply(torch.cat([values.sum(dim=axes), count]))
    total = sums[-1].detach()
    mean = sums[:-1] / total
    centred = values - mean[channels]
    variance = _SumOverProcesses.apply(centred.square().sum(dim=axes)) / total
    with torch.no_grad():
        if norm.num_batches_tracked is not None:  # None while a checkpointed part is computed again
            norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (total / (total - 1)), norm.momentum)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return (centred * scale[channels] + norm.bias[channels]).to(input.dtype)


def share_batch_statistics(model: nn.Module) -> int:
    """Let a model's batch norms take statistics over all processes, in place, with their names and values.

    Returns:
        Their number.

    Raises:
        InputError: one of them is of another kind than torch's 1-D and 2-D ones with weights, and timm's with an
            activation.
    """
    found = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in found:
        values = module.weight, module.running_mean, module.momentum
        if type(module) not in _SHARED or any(each is None for each in values):
            raise InputError(
                f"`sync_bn` cannot share the statistics of this model's {type(module).__name__}; set `sync_bn` to False"
            )
    for module in found:
        module.__class__ = _SHARED[type(module)]
    return len(found)


def _wait(work: dist.Work) -> None:
    # Waiting inside torch would hold up signals until it is over.
    while not work.is_completed():
        time.sleep(_POLL_SECONDS)
    try:
        work.wait()
    except RuntimeError as error:
        raise _another_failed(error) from error


def _another_failed(error: RuntimeError) -> TrainingError:
    # Where the processes cannot talk at all, none of them has a better message than torch's.
    reason = " ".join(str(error).split())
    return TrainingError(
        f"another process of this job has failed, see its own message, or cannot be reached: {reason[:400]}"
    )


@contextlib.contextmanager
def _plain_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the process at once, while it waits where Python's own handlers cannot run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
