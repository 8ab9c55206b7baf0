"""torch.compile, torch.export (with dynamic shapes) and ONNX take the models and their inference forms."""

import pytest
import timm
import torch

from stl_offline.models import inference_form
from stl_offline.models.layers import FullPrecisionLinear
from tests.models.fan_fill import random_image
from tests.models.test_fan_numbers import randomise


def build(name, form):
    """A model of one block (and one in each stage of a hybrid's stem), which is enough for every kind of layer."""
    stem = {"hybrid_depths": (1, 1)} if "hybrid" in name else {}
    model = randomise(timm.create_model(name, num_classes=5, depth=1, **stem), seed=2)
    return inference_form(model) if form else model


def compare(outputs, expected):
    assert isinstance(expected, tuple)
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(output), wanted.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "form"),
    [("fan_micro_4_p8_token", False), ("fan_micro_4_p8_token", True), ("fan_tiny_8_p4_hybrid_token", True)],
)
def test_compile_without_graph_breaks(name, form):
    torch.compiler.reset()
    model = build(name, form)
    images = random_image(2, 32, 48)
    with torch.inference_mode():
        expected = model(images)
        compare(torch.compile(model, backend="aot_eager", fullgraph=True)(images), expected)


def test_a_head_on_the_meta_device_is_exported_and_compiled():
    """Autocast does not know that device, and says so with an error."""
    with torch.device("meta"):
        head, tokens = FullPrecisionLinear(3, 2), torch.empty(1, 4, 3)
    for traced in (torch.export.export(head, (tokens,)).module(), torch.compile(head, backend="eager", fullgraph=True)):
        assert traced(tokens).shape == (1, 4, 2)


def test_compile_without_graph_breaks_under_autocast():
    """As a step does: the trunk in bf16, heads in float32, with gradients."""
    torch.compiler.reset()
    model = build("fan_micro_4_p8_token", False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = random_image(2, 32, 48)
    gradients = []
    for each in (model, compiled):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = each(images)
        assert [output.dtype for output in outputs] == [torch.float32] * 2
        model.zero_grad()
        sum(output.square().mean() for output in outputs).backward()
        gradients.append(model.aux_head.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "stride", "form"),
    [
        ("fan_micro_4_p8_token", 8, False),
        ("fan_micro_4_p8_token", 8, True),
        ("fan_tiny_8_p4_hybrid_token", 16, True),
    ],
)
def test_export_with_dynamic_shapes(name, stride, form):
    model = build(name, form)
    rows, columns = torch.export.Dim("rows", min=2, max=32), torch.export.Dim("columns", min=2, max=32)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64), 2: stride * rows, 3: stride * columns},)
    with torch.no_grad():
        example = (random_image(2, 2 * stride, 3 * stride),)
        program = torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
        # Other programs read what is exported: it may hold no operator that only this package knows.
        assert not any("stl_offline" in str(node.target) for node in program.graph.nodes)
        images = random_image(3, 5 * stride, 4 * stride)
        compare(program.module()(images), model(images))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("form", [False, True])
def test_onnx(form, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build("fan_micro_4_p8_token", form)
    images = random_image(2, 16, 24)
    with torch.no_grad():
        torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(tmp_path / "fan.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "fan.onnx")
        compare(session.run(None, {session.get_inputs()[0].name: images.numpy()}), model(images))
