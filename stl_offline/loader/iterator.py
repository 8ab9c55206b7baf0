"""The thread that loads an epoch, and the consumer's end of it.

FFCV's own iterator waits forever when its thread raises or dies, and takes its order from a sampler of its own. Here
the order is given, every exception comes out at the consumer, and waiting looks whether the thread still lives.
"""

import abc
import queue
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from ffcv.loader import Loader, epoch_iterator
from ffcv.loader.epoch_iterator import EpochIterator
from numba.core.errors import NumbaError

from stl_offline.errors import StlError, TrainingError

BATCHES_AHEAD = 2
_POLL_SECONDS = 0.5
_CLOSE_SECONDS = 120.0


class BatchThread(threading.Thread, abc.ABC):
    """Loads given batches of sample ids, ahead of the consumer, into buffers used in turn.

    Args:
        batches: sample ids of each.
        check: ``check(ids)`` runs after each batch and raises if it must not be handed out.
    """

    def __init__(self, batches: list[np.ndarray], check: Callable[[np.ndarray], None]) -> None:
        threading.Thread.__init__(self, daemon=True, name="stl-offline-loader")
        self.batches = batches
        self.check = check
        self.slots = BATCHES_AHEAD + 2
        self.output_queue: queue.Queue = queue.Queue(BATCHES_AHEAD)
        # No Event: its lock, left behind by a signal that raises within set(), would stop the next set() for ever, and
        # that may be __del__'s.
        self.ended = False
        # Set by the consumer once its copies out of a slot are queued; waited for before the slot is filled again.
        self.copied: list[Any] = [None] * self.slots
        self.device = torch.device("cpu")  # whose memory the copies go to; set by the consumer

    @abc.abstractmethod
    def load(self, number: int, ids: np.ndarray, slot: int) -> tuple:
        """Load a batch into a slot's buffers: pixels uint8 (B, H, W, 3) and, with labels, (ids, weights)."""

    def run(self) -> None:
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # each thread has its own, which else is the first GPU
            for number, ids in enumerate(self.batches):
                slot = number % self.slots
                if self.copied[slot] is not None:
                    self.copied[slot].synchronize()
                result = self.load(number, ids, slot)
                self.check(ids)
                if not self._hand_out((slot, ids, result)):
                    return
            self._hand_out(None)
        except BaseException as error:  # whatever it is, the consumer must hear of it
            self._hand_out(error)

    def _hand_out(self, item: Any) -> bool:
        while not self.ended:
            try:
                self.output_queue.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def take(self) -> Any:
        """The next (slot, ids, results), or None after the last.

        Raises:
            StlError: what the loading thread raised, or `TrainingError` if it died without a word or was stopped.
        """
        while True:
            if self.ended:
                raise TrainingError("this epoch was ended, perhaps by a later one of the same loader: one at a time")
            try:
                item = self.output_queue.get(timeout=_POLL_SECONDS)
                break
            except queue.Empty:
                # It may have handed out its last item between the timeout and this look.
                if not self.is_alive() and self.output_queue.empty():
                    raise TrainingError("the loading thread ended without an error; run the same again") from None
        if isinstance(item, StlError | MemoryError | NumbaError):
            raise item
        if isinstance(item, BaseException):
            raise TrainingError(f"the loading thread failed: {type(item).__name__}: {item}") from item
        return item

    def close(self) -> None:
        """Stop the thread and wait until it has."""
        self.ended = True
        if self.is_alive() and self is not threading.current_thread():
            self.join(_CLOSE_SECONDS)
            if self.is_alive():
                raise TrainingError(f"the loading thread did not stop within {_CLOSE_SECONDS:.0f} seconds")

    def __del__(self) -> None:
        # FFCV's would close a thread that may never have started.
        self.ended = True


class EpochThread(BatchThread, EpochIterator):
    """Runs FFCV's pipelines. ``buffers``: what the graph allocated for ``BATCHES_AHEAD + 2`` batches."""

    # Where torch sees a GPU, FFCV's threads make streams on it, and end as users of the first GPU (half a gigabyte for
    # each process), also for a loader on the CPU. No pipeline here runs on a GPU; those of other loaders may.
    run_pipeline = types.FunctionType(
        EpochIterator.run_pipeline.__code__, vars(epoch_iterator) | {"IS_CUDA": False}, "run_pipeline"
    )

    def __init__(
        self, loader: Loader, batches: list[np.ndarray], buffers: dict, check: Callable[[np.ndarray], None]
    ) -> None:
        # Not EpochIterator.__init__: it would allocate the buffers anew for every epoch.
        BatchThread.__init__(self, batches, check)
        self.loader = loader
        self.metadata = loader.reader.metadata
        self.memory_context = loader.memory_manager.schedule_epoch(batches)
        self.memory_context.__enter__()
        self.storage_state = self.memory_context.state
        self.memory_allocations = buffers

    def load(self, number: int, ids: np.ndarray, slot: int) -> tuple:
        return self.run_pipeline(number, ids, slot, None)


class Epoch(Iterator):
    """The consumer's end of one epoch: gives batches, stops its thread when closed or no longer referred to."""

    def __init__(self, thread: BatchThread, make_batch: Callable[[Any], Any], device: torch.device) -> None:
        self._thread: BatchThread | None = thread
        thread.device = device
        self._make_batch = make_batch
        thread.start()

    def __next__(self) -> Any:
        if self._thread is None:
            raise StopIteration
        try:
            item = self._thread.take()
        except BaseException:
            self.close()
            raise
        if item is None:
            self.close()
            raise StopIteration
        slot, _, _ = item
        batch = self._make_batch(item)
        device = self._thread.device
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))  # not the current device's
            self._thread.copied[slot] = event
        return batch

    def close(self) -> None:
        """End the epoch early; nothing more comes."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.close()

    def __enter__(self) -> "Epoch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Not close(): the interpreter may be going down, and waiting here could be forever.
        if getattr(self, "_thread", None) is not None:
            self._thread.ended = True
