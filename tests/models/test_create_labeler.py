"""Labelers by name: runs, timm models with a file, with timm's own weights, with class names of their own."""

import pytest
import timm
import timm.data
import torch
from safetensors.torch import save_file

from stl_offline.errors import FormatError, InputError
from stl_offline.models import WEIGHTS_NAME, ModelDescription, build_model, create_labeler, save_model
from tests.models.fan_fill import fill_model, random_image

NAMES = ("ant", "bee", "cat", "dog", "elk")


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs).eval()


def test_from_a_file(tmp_path):
    model = build("test_efficientnet")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({f"t{i}": v for i, v in enumerate(model.state_dict().values()) if v.ndim}, tmp_path / "w.bin")
    images = random_image(2, 64, 96)
    labeler = create_labeler(
        "timm:test_efficientnet", labeler_checkpoint=tmp_path / "w.safetensors", labeler_mean=(0.5, 0.5, 0.5)
    )
    assert labeler.num_classes == 5
    assert labeler.mean == (0.5, 0.5, 0.5)
    assert labeler.class_names is None
    assert labeler.img_size == (160, 160)
    assert len(labeler.weights_sha256) == 64
    torch.testing.assert_close(labeler(images)[0], model(images))
    renamed = create_labeler(
        "timm:test_efficientnet", labeler_checkpoint=tmp_path / "w.bin", labeler_by_order=True, labeler_classes=NAMES
    )
    torch.testing.assert_close(renamed(images)[0], model(images))
    assert renamed.class_names == NAMES
    with pytest.raises(InputError, match="does not fit test_efficientnet .* by order .`labeler_by_order`"):
        create_labeler("timm:test_efficientnet", labeler_checkpoint=tmp_path / "w.bin")
    # Which is not advised of a file that has no order.
    save_file(torch.load(tmp_path / "w.bin"), tmp_path / "renamed.safetensors")
    with pytest.raises(InputError, match="does not fit test_efficientnet") as raised:
        create_labeler("timm:test_efficientnet", labeler_checkpoint=tmp_path / "renamed.safetensors")
    assert "order" not in str(raised.value)


def test_position_embeddings_are_resized(tmp_path):
    save_file(build("test_vit").state_dict(), tmp_path / "w.safetensors")
    labeler = create_labeler("timm:test_vit", labeler_checkpoint=tmp_path / "w.safetensors", img_size=(64, 96))
    assert labeler.grid_size(64, 96) == (4, 6)
    assert labeler(random_image(1, 64, 96))[1].shape == (1, 24, 5)


def test_a_run_at_another_size(tmp_path):
    model = fill_model(build("fan_micro_4_p8_token", img_size=32))
    description = ModelDescription("fan_micro_4_p8_token", NAMES, 32, "labeler", interpolation="bicubic")
    save_model(tmp_path / WEIGHTS_NAME, model.state_dict(), description)
    labeler = create_labeler(tmp_path)
    assert (labeler.img_size, labeler.class_names, labeler.interpolation) == ((32, 32), NAMES, "bicubic")
    assert create_labeler(tmp_path, img_size=64).grid_size(64, 64) == (8, 8)
    with pytest.raises(InputError, match="36×36.*multiples of 8; the nearest sizes that work: 32 and 40"):
        create_labeler(tmp_path, img_size=36)
    for extra in ({"labeler_checkpoint": "x"}, {"labeler_classes": NAMES}, {"labeler_pretrained": True}):
        with pytest.raises(InputError, match="go with a labeler timm:NAME or hf-hub:ORG/NAME"):
            create_labeler(tmp_path, **extra)


@pytest.mark.parametrize(
    ("name", "token_head", "is_refused"),
    [("fan_micro_4_p8_token", "", True), ("test_vit", "own", True), ("test_vit", "shared", False)],
)
def test_a_token_head_that_was_not_trained_labels_nothing(tmp_path, name, token_head, is_refused):
    """A student without token labels; where the heads are one, that was trained with the classes."""
    description = ModelDescription(name, NAMES, 64, "student", token_head_trained=False, token_head=token_head)
    model = build_model(name, 5, 64, token_head=token_head)
    save_model(tmp_path / WEIGHTS_NAME, model.state_dict(), description)
    if is_refused:
        with pytest.raises(InputError, match="the token head of .* was not trained, .* give a labeler, or a student"):
            create_labeler(tmp_path)
    else:
        assert create_labeler(tmp_path).pooling == "class token"


def test_sizes_that_a_run_cannot_take_are_not_advised(tmp_path):
    """A model whose family cannot change its size: what an untrained one of another size takes does not matter."""
    model = build_model("levit_128s", 5, 224, token_head="own")
    description = ModelDescription("levit_128s", NAMES, 224, "student", token_head="own")
    save_model(tmp_path / WEIGHTS_NAME, model.state_dict(), description)
    assert create_labeler(tmp_path).grid_size(224, 224) == (4, 4)
    with pytest.raises(InputError, match="levit_128s .*256×256.*the nearest sizes that work: 224$"):
        create_labeler(tmp_path, img_size=256)


@pytest.mark.parametrize(
    ("name", "tensor", "value"),
    [
        ("test_vit", "head.weight", torch.tensor(1.0)),
        ("test_vit", "pos_embed", torch.tensor(1.0)),
        ("test_vit", "patch_embed.proj.weight", torch.zeros(2, 2)),
    ],
)
def test_tensors_of_another_shape(tmp_path, name, tensor, value):
    torch.save(build(name).state_dict() | {tensor: value}, tmp_path / "w.bin")
    with pytest.raises(InputError, match=f"w.bin does not fit {name}"):
        create_labeler(f"timm:{name}", labeler_checkpoint=tmp_path / "w.bin")


@pytest.mark.parametrize("text", ["ant\nbee\ncat\ndog\nelk\n", "\ufeffant\r\nbee\r\n\r\n  cat\r\ndog\r\nelk"])
def test_class_names_from_a_file(tmp_path, text):
    save_file(build("test_resnet").state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "names.txt").write_bytes(text.encode())
    labeler = create_labeler(
        "timm:test_resnet",
        labeler_checkpoint=tmp_path / "w.safetensors",
        labeler_classes=str(tmp_path / "names.txt"),
    )
    assert labeler.class_names == NAMES


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"ant\nbee\n", "test_resnet has 5 classes, but 2 class names are given"),
        (b"ant\nbee\nant\n", "names the class 'ant' twice"),
        (b"\n\n", "names no class"),
        (b"\xff\xfea\0n\0t\0", "is not UTF-8 text"),
        (None, "there is no .*names.txt; `labeler_classes` takes a label set, or a text file"),
    ],
)
def test_class_names_that_do_not_fit(tmp_path, content, reason):
    save_file(build("test_resnet").state_dict(), tmp_path / "w.safetensors")
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(InputError, match=reason):
        create_labeler(
            "timm:test_resnet",
            labeler_checkpoint=tmp_path / "w.safetensors",
            labeler_classes=str(tmp_path / "names.txt"),
        )


def test_imagenet_classes_have_timms_names(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    labeler = create_labeler("timm:test_resnet", labeler_checkpoint=tmp_path / "w.safetensors")
    assert labeler.class_names == tuple(timm.data.ImageNetInfo().label_names())


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("no_network")
def test_hub_weights_that_cannot_be_had():
    reason = (
        "could not get weights for test_resnet.r160_in1k from the Hugging Face Hub or its cache .*labeler_checkpoint"
    )
    with pytest.raises(InputError, match=reason):
        create_labeler("timm:test_resnet.r160_in1k", labeler_pretrained=True)
    with pytest.raises(InputError, match="cannot get hf-hub:timm/test_resnet.r160_in1k from the Hugging Face Hub"):
        create_labeler("hf-hub:timm/test_resnet.r160_in1k")
    with pytest.raises(InputError, match="fan_micro_4_p8 .*No pretrained weights"):
        create_labeler("timm:fan_micro_4_p8", labeler_pretrained=True)


def test_hub_weights(monkeypatch):
    """What timm fetches is taken as it is, and named by a hash of its tensors."""
    model, real = build("test_resnet"), timm.create_model
    calls = []

    def fetch(name, pretrained=False, **arguments):
        calls.append((name, pretrained))
        return model if pretrained else real(name, **arguments)

    monkeypatch.setattr(timm, "create_model", fetch)
    monkeypatch.setattr(
        "stl_offline.models.labeler_by_name.load_model_config_from_hf", lambda name: ({}, "test_resnet", {})
    )
    labelers = [
        create_labeler("timm:test_resnet", labeler_pretrained=True, labeler_classes=NAMES),
        create_labeler("hf-hub:timm/test_resnet.r160_in1k", labeler_classes=NAMES),
    ]
    assert calls == [("test_resnet", True), ("hf-hub:timm/test_resnet.r160_in1k", True)]
    assert labelers[0].weights_sha256 == labelers[1].weights_sha256
    with torch.no_grad():
        model.fc.bias += 1
    again = create_labeler("timm:test_resnet", labeler_pretrained=True, labeler_classes=NAMES)
    assert again.weights_sha256 != labelers[0].weights_sha256


@pytest.mark.parametrize(
    ("spec", "options", "reason"),
    [
        ("timm:no_such_model", {"labeler_checkpoint": "x"}, "not timm:NAME"),
        ("timm:hf-hub:org/name", {"labeler_pretrained": True}, "not timm:NAME"),
        ("timm:local-dir:/tmp", {"labeler_pretrained": True}, "not timm:NAME"),
        ("local-dir:/tmp", {}, "no run and no checkpoint"),
        ("timm:test_vit", {}, "needs weights.*`labeler_checkpoint`.*`labeler_pretrained`"),
        ("timm:test_vit", {"labeler_checkpoint": "x", "labeler_pretrained": True}, "give one of them"),
        ("timm:test_vit", {"labeler_pretrained": True, "labeler_by_order": True}, "`labeler_by_order` matches"),
        ("timm:test_vit", {"labeler_checkpoint": "no.pth"}, "no weights file at no.pth"),
    ],
)
def test_bad_names_and_options(spec, options, reason):
    with pytest.raises(InputError, match=reason):
        create_labeler(spec, **options)


def test_a_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"nonsense")
    with pytest.raises(FormatError, match=r"x\.pth"):
        create_labeler("timm:test_vit", labeler_checkpoint=tmp_path / "x.pth")
