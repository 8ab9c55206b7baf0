"""torch.compile and ONNX (by way of torch.export) take the models and their inference forms."""

import pytest
import timm
import torch

from stl_offline.models import inference_form
from tests.models.fan_fill import picture
from tests.models.test_fan_numbers import randomise


def build(name, form):
    model = randomise(timm.create_model(name, num_classes=5), seed=2)
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
    images = picture(2, 32, 48)
    with torch.inference_mode():
        expected = model(images)
        compare(torch.compile(model, backend="aot_eager", fullgraph=True)(images), expected)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("form", [False, True])
def test_onnx(form, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build("fan_micro_4_p8_token", form)
    images = picture(2, 16, 24)
    with torch.no_grad():
        torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(tmp_path / "fan.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "fan.onnx")
        compare(session.run(None, {session.get_inputs()[0].name: images.numpy()}), model(images))
