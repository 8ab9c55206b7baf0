"""What a step learns from: pixels, classes and token labels are mixed together, with the same shares."""

from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.functional import normalize

from stl_offline.config import LabelerConfig, StudentConfig
from stl_offline.training import label_sources
from stl_offline.training import train_labeler as labeler_module
from stl_offline.training import train_student as student_module


@pytest.fixture
def seen(monkeypatch):
    """Of every step: the images before they are mixed, their classes, and the inputs."""
    steps = []
    for kind in (labeler_module.LabelerObjective, student_module.StudentObjective):

        def inputs(self, batch, random, original=kind.inputs):
            found = original(self, batch, random)
            steps.append((self.stage.augment(batch), batch.class_ids, found))
            return found

        monkeypatch.setattr(kind, "inputs", inputs)
    return steps


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("stage", ["labeler", "student"])
def test_pixels_are_mixed_as_their_classes_and_tokens_are(quick, make_set, seen, stage, mode):
    """Each image's share is read from its class target; where its partner has the same class, nothing can be read."""
    settings = quick | {"mixup": 1.0, "mix_mode": mode, "smoothing": 0.0, "epochs": 1, "val": ""}
    if stage == "labeler":
        labeler_module.train_labeler(LabelerConfig(**settings))
    else:
        student_module.train_student(StudentConfig(**settings, labels=make_set()[0]))
    checked, shares = 0, set()
    for images, classes, found in seen:
        own = found.class_targets[torch.arange(len(classes)), classes]
        for row, target in enumerate(found.class_targets):
            assert target.sum() == pytest.approx(1)
            share = own[row].item()
            if share > 0.98:
                continue
            other = int((target * (torch.arange(len(target)) != classes[row])).argmax())
            partners = torch.nonzero(classes == other).flatten()
            mixed = share * images[row] + (1 - share) * images[partners]
            distances = (mixed - found.images[row]).abs().flatten(1).amax(1)
            assert distances.min() < 1e-4
            checked += 1
            shares.add(round(share, 4))
            partner = partners[distances.argmin()]
            if stage == "student" and share > 0.02 and 0.02 < own[partner] < 0.98:
                # Its second target is the first one of its partner, each with the weight of its image's share.
                assert torch.equal(found.token_ids[row, :, 1], found.token_ids[partner, :, 0])
                before = found.token_weights[partner, :, 0] / own[partner]
                assert torch.allclose(found.token_weights[row, :, 1], (1 - share) * before, atol=1e-4)
    assert checked > 10 and len(shares) > 1 + 5 * (mode == "elem")


def test_a_labeler_sees_its_own_normalisation():
    """Online, the labeler sees the student's crop: the same bytes, by its own mean and standard deviation."""
    pixels = torch.randint(0, 256, (2, 3, 5, 7)) / 255
    ours, theirs = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1, 0.2, 0.3), (1.0, 0.5, 0.25))
    student, labeler = (SimpleNamespace(mean=mean, std=std) for mean, std in (ours, theirs))
    normalised = [normalize(pixels, mean, std) for mean, std in (ours, theirs)]
    found = label_sources._renormalise(normalised[0], student, labeler)
    torch.testing.assert_close(found, normalised[1], atol=1e-5, rtol=0)
    assert label_sources._renormalise(normalised[0], student, student) is normalised[0]
