"""A training step reads nothing back from the device: its numbers are read when the next step has been started.

On a CPU, where a read costs nothing, so reads are counted: what a step is given is of a subclass of `torch.Tensor`,
which its results inherit, and which notes every call that needs numbers on the host; `TorchDispatchMode` notes those on
any other tensor, such as a gradient's norm. `tests/gpu` counts the same with CUDA's own debug mode.
"""

import ast
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stl_offline.config import LabelerConfig, StudentConfig
from stl_offline.loader import ToDevice
from stl_offline.training.optimization import StepResult, TrainStep
from stl_offline.training.train_labeler import train_labeler
from stl_offline.training.train_student import train_student
from tests.source_tree import modules

# Everything that a step can have.
HARD = {
    "val": None,
    "batch_size": 10,
    "accumulate": 2,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mix_mode": "elem",
    "auto_augment": "rand-m9-n3-mstd0.5-inc1",
    "color_jitter": 0.4,
    "random_erase": 0.9,
    "clip_grad": 1.0,
    "ema_decay": 0.99,
    "drop_path": 0.1,
}
READS = {"item", "tolist", "numpy", "cpu", "nonzero", "unique", "masked_select", "equal", "is_nonzero"}
READS |= {"__bool__", "__float__", "__int__", "__index__", "__array__"}
found: list[str] = []


def note(what):
    """Note where in the package something was read. A loss looks at its factor on CPUs alone."""
    frames = [frame for frame in traceback.extract_stack() if "stl_offline" in frame.filename]
    places = [(frame.filename.rsplit("/", 1)[-1], frame.name) for frame in frames]
    # `Readback.array` is how numbers are read; when, the order of events shows.
    if places[-1] not in (("losses.py", "backward"), ("device.py", "array")):
        found.append(f"{what} in {frames[-1].filename}:{frames[-1].lineno}")


class OnDevice(torch.Tensor):
    """A tensor as if it lay on a GPU."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in READS:
            note(func.__name__)
        if func.__name__ == "__getitem__" and isinstance(args[1], torch.Tensor) and args[1].dtype is torch.bool:
            note("a mask")
        return super().__torch_function__(func, types, args, kwargs or {})


class Reads(TorchDispatchMode):
    """Notes what reads single numbers of any tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero"):
            note(func._schema.name)
        return func(*args, **kwargs or {})


@pytest.fixture
def events(monkeypatch):
    """What happened, in order: steps taken, and their numbers read; `found` lists what else was read."""
    found.clear()
    events, numbers = [], {}
    for name in ("images", "copy"):
        make = getattr(ToDevice, name)
        monkeypatch.setattr(ToDevice, name, lambda *a, make=make: make(*a).as_subclass(OnDevice))
    take, read = TrainStep.__call__, StepResult.numbers

    def count_reads(self, batch, step, *more):
        events.append(f"take {step}")
        with Reads():
            result = take(self, batch, step, *more)
        numbers[id(result)] = step
        return result

    def note_read(result):
        events.append(f"read {numbers[id(result)]}")
        return read(result)

    monkeypatch.setattr(TrainStep, "__call__", count_reads)
    monkeypatch.setattr(StepResult, "numbers", note_read)
    return events


IN_TURN = ["take 0", "take 1", "read 0", "take 2", "read 1", "read 2"]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_labelers_step_reads_nothing(quick, events, amp):
    train_labeler(LabelerConfig(**quick | HARD | {"epochs": 1, "amp": amp}))
    assert found == []
    assert events == IN_TURN


@pytest.mark.parametrize(
    "changes",
    [
        {"token_target": "soft", "residual": "ghost", "erased_labels": "drop", "select": "own"},
        {"token_target": "gumbel", "class_target": "mix:0.5", "token_norm": "tokens"},
        {"labels": "online", "token_target": "gumbel", "erased_labels": "drop"},
        {"labels": "online", "token_target": "soft", "residual": "class", "min_confidence": 0.1},
    ],
    ids=["soft", "class answers", "online", "online soft"],
)
def test_a_students_step_reads_nothing(quick, make_set, events, changes, tmp_path):
    if "labels" in changes:
        labeler = LabelerConfig(**quick | {"val": None, "epochs": 1, "out": str(tmp_path / "labeler")})
        train_labeler(labeler)
        events.clear()
        changes = changes | {"labeler": labeler.out}
    else:
        changes = changes | {"labels": make_set(class_top_k=2)[0]}
    train_student(StudentConfig(**quick | HARD | {"epochs": 1} | changes))
    assert found == []
    assert events == IN_TURN


def test_a_state_that_is_stored_has_no_step_unread(quick, events):
    """Every second of three steps; what an epoch stores at its end comes after its last step."""
    train_labeler(LabelerConfig(**quick | {"val": None, "epochs": 2, "checkpoint_steps": 2}))
    assert events == [
        *("take 0", "take 1", "read 0", "read 1", "take 2", "read 2"),
        *("take 3", "read 3", "take 4", "take 5", "read 4", "read 5"),
    ]


def test_what_a_step_sends_to_the_device_starts_from_pinned_memory():
    """By `stl_offline.device.upload`: ``torch.tensor(…, device=…)`` and ``from_numpy(…).to(…)`` wait for the device."""
    wrong = []
    for name, module in modules().items():
        if not name.startswith(("stl_offline.augment", "stl_offline.training.o", "stl_offline.training.s")):
            continue
        for call in (node for node in ast.walk(module.tree) if isinstance(node, ast.Call)):
            text = ast.unparse(call)
            made = text.startswith("torch.tensor(") and any(word.arg == "device" for word in call.keywords)
            if made or (text.startswith("torch.from_numpy(") and ".to(" in text):
                wrong.append(f"{name}: {text}")
    assert not wrong
