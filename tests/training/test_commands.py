"""The whole way from images to a student, from the command line; and what a user's mistakes give."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from stl_offline.cli.main import main
from stl_offline.images.beton import open_beton
from stl_offline.labels.label_set import open_label_set
from tests.forks import COMMAND_LINE, Fork

SMALL = ["--img-size", "32", "--epochs", "1", "--batch-size", "15", "--workers", "1", "--device", "cpu", "--seed", "1"]
MACHINE = ["--workers", "1", "--device", "cpu"]


def call(capsys, *arguments):
    """Exit code, standard output and standard error of one command."""
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys, *arguments):
    """The one line that a command which cannot work prints."""
    code, _, error = call(capsys, *arguments)
    lines = [line for line in error.splitlines() if not line.startswith(("packed ", "using packed"))]
    assert code == 1, error
    assert len(lines) == 1, error
    assert lines[0].startswith("error: ")
    return lines[0]


def test_what_is_wrong_is_said_before_images_are_packed(stripes, tmp_path, capsys, monkeypatch):
    """Packing may take hours."""
    monkeypatch.setattr("stl_offline.training.setup.ensure_beton", None)
    nowhere = tmp_path / "nowhere"
    labeler = ["--labels", "online", "--labeler", nowhere]
    for command, *wrong in (["train-labeler", "--val", nowhere], ["train-student", *labeler]):
        line = fails(capsys, command, "--data", stripes[0], "--out", tmp_path / "run", *wrong, *SMALL)
        assert f"at {nowhere}" in line and not (tmp_path / "run").exists()


def test_from_images_to_a_student(stripes, tmp_path, capsys):
    data, val = stripes
    packed, labeler, labels, student = (tmp_path / name for name in ("train.beton", "labeler", "labels", "student"))
    assert call(capsys, "pack", data, packed)[0] == 0
    code, out, _ = call(capsys, "train-labeler", "--data", packed, "--val", val, "--out", labeler, *SMALL)
    assert code == 0
    assert "top-1" in out and "already complete" not in out
    dump = ["--data", packed, "--labeler", labeler, "--shards", "2", "--top-k", "2", "--format", "zarr"]
    for end in (" s)\n", "; already complete, nothing was done\n"):
        code, out, _ = call(capsys, "dump-labels", *dump, "--out", labels, *MACHINE)
        assert code == 0 and out.endswith(end)
    assert len(open_label_set(labels)) == 45
    train = ["train-student", "--data", packed, "--val", val, "--labels", labels, "--out", student, *SMALL]
    assert call(capsys, *train)[0] == 0
    code, out, _ = call(capsys, "evaluate", "--data", val, "--checkpoint", student, "--json", *MACHINE)
    assert code == 0
    scores = json.loads(out)
    assert scores["samples"] == 18
    assert 0 <= scores["top1"] <= scores["top5"] == 1

    # Images of some of the label set's classes.
    some = shutil.copytree(data, tmp_path / "some", ignore=shutil.ignore_patterns("horizontal"))
    train = ["train-student", "--labels", labels, *SMALL]
    error = fails(capsys, *train, "--data", some, "--out", tmp_path / "refused")
    assert "1 of its classes are not among the images' (" in error and "horizontal" in error
    assert "'stl-offline pack --classes'" in error
    assert call(capsys, "pack", some, tmp_path / "some.beton", "--classes", labels)[0] == 0
    assert call(capsys, *train, "--data", tmp_path / "some.beton", "--out", tmp_path / "of-some")[0] == 0
    (tmp_path / "names.txt").write_text("vertical\nsideways\n\ndiagonal\n")
    assert call(capsys, "pack", some, tmp_path / "named.beton", "--classes", tmp_path / "names.txt")[0] == 0
    assert open_beton(tmp_path / "named.beton").class_names == ("vertical", "sideways", "diagonal")
    assert "nowhere; --classes takes" in fails(capsys, "pack", some, tmp_path / "x.beton", "--classes", "nowhere")
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in fails(capsys, "pack", some, tmp_path / "x.beton", "--classes", tmp_path / "names.txt")


@pytest.fixture(scope="module")
def trained(stripes, tmp_path_factory):
    """A labeler's run of one epoch."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main([str(word) for word in ("train-labeler", "--data", stripes[0], "--out", out, *SMALL)]) == 0
    return out


class TestMistakes:
    def train(self, capsys, tmp_path, data, *more):
        small = dict(zip(SMALL[::2], SMALL[1::2], strict=True))
        for name in more[::2]:
            small.pop(name, None)
        settings = [word for pair in small.items() for word in pair]
        return fails(capsys, "train-labeler", "--data", data, "--out", tmp_path / "run", *settings, *more)

    def test_nothing_there(self, capsys, tmp_path):
        assert "nowhere" in self.train(capsys, tmp_path, tmp_path / "nowhere")

    def test_an_empty_folder(self, capsys, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "empty" in self.train(capsys, tmp_path, tmp_path / "empty")

    def test_one_class(self, capsys, tmp_path, make_stripes):
        folder = make_stripes(tmp_path / "one", 3, 1, classes=("vertical",))
        assert "class" in self.train(capsys, tmp_path, folder)

    def test_a_broken_image_is_named_or_left_out(self, capsys, tmp_path, make_stripes, monkeypatch):
        folder = make_stripes(tmp_path / "broken", 3, 1)
        whole = (folder / "vertical" / "001.jpg").read_bytes()
        (folder / "vertical" / "001.jpg").write_bytes(whole[: len(whole) // 2])
        (folder / "diagonal" / "000.jpg").write_text("no image at all")
        assert "diagonal/000.jpg" in self.train(capsys, tmp_path, folder)
        monkeypatch.delenv("STL_OFFLINE_QUIET")
        command = ["train-labeler", "--data", folder, "--out", tmp_path / "run", *SMALL, "--skip-broken"]
        code, _, error = call(capsys, *command)
        assert code == 0
        assert "vertical/001.jpg" in error
        assert "packed 7 images" in error
        code, out, _ = call(capsys, *command)
        assert code == 0 and out.endswith("; already complete, nothing was done\n")
        evaluate = ["evaluate", "--data", folder, "--checkpoint", tmp_path / "run", *MACHINE]
        assert "--skip-broken" in fails(capsys, *evaluate)
        code, out, _ = call(capsys, *evaluate, "--skip-broken")
        assert code == 0 and out.startswith("7 images: ")
        code, out, _ = call(capsys, "pack", folder, tmp_path / "whole.beton", "--skip-broken")
        assert code == 0
        assert re.search(r"^skipped vertical/001\.jpg: .*is cut off", out, re.MULTILINE)

    def test_an_input_size_that_the_stem_does_not_divide(self, capsys, tmp_path, stripes):
        assert "50" in self.train(capsys, tmp_path, stripes[0], "--img-size", "50")

    @pytest.mark.parametrize("side", ["1", "12", "100000"])
    def test_an_input_size_that_a_trained_model_does_not_take(self, capsys, trained, stripes, side):
        command = ["evaluate", "--data", stripes[1], "--checkpoint", trained, "--img-size", side, *MACHINE]
        line = fails(capsys, *command)
        assert f"{side}×{side}" in line or f"--img-size must be in [0, 8192], got {side}" in line

    def test_settings_that_cannot_be(self, capsys, tmp_path, stripes):
        assert "epochs" in self.train(capsys, tmp_path, stripes[0], "--epochs", "0")
        assert "device" in self.train(capsys, tmp_path, stripes[0], "--device", "toaster")
        assert "seed" in self.train(capsys, tmp_path, stripes[0], "--seed", 1 << 64)
        assert "clip-grad" in self.train(capsys, tmp_path, stripes[0], "--clip-grad", "inf")
        assert "warmup-epochs" in self.train(capsys, tmp_path, stripes[0], "--warmup-epochs", "nan")

    def test_a_target_that_cannot_be_written(self, capsys, tmp_path, stripes):
        (tmp_path / "file").write_text("")
        line = fails(capsys, "train-labeler", "--data", stripes[0], "--out", tmp_path / "file" / "run", *SMALL)
        assert str(tmp_path / "file") in line

    def test_labels_of_a_format_from_the_future(self, capsys, tmp_path, stripes):
        (tmp_path / "set").mkdir()
        manifest = {"format": "stl-offline label set", "format_version": 7}
        (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
        command = ["train-student", "--data", stripes[0], "--labels", tmp_path / "set", "--out", tmp_path / "run"]
        assert "version 7" in fails(capsys, *command, *SMALL)

    def test_a_checkpoint_that_was_cut_off(self, capsys, tmp_path, stripes):
        (tmp_path / "weights.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
        command = ["evaluate", "--data", stripes[1], "--checkpoint", tmp_path / "weights.safetensors", *MACHINE]
        assert "weights.safetensors" in fails(capsys, *command)

    def test_online_labels_need_a_labeler(self, capsys, tmp_path, stripes):
        command = ["train-student", "--data", stripes[0], "--labels", "online", "--out", tmp_path / "run", *SMALL]
        assert "--labeler" in fails(capsys, *command)


@pytest.fixture(scope="module")
def undisturbed(stripes, tmp_path_factory):
    """(a dump's words, without its ``--out``; the folder that it fills)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    data, labeler, out = map(str, (stripes[0], folder / "labeler", folder / "whole"))
    assert main(["train-labeler", "--data", data, "--out", labeler, *SMALL]) == 0
    dump = ["dump-labels", "--data", data, "--labeler", labeler, "--shards", "45", "--top-k", "1", *MACHINE]
    assert main([*dump, "--out", out]) == 0
    return dump, Path(out)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_dump_goes_on_to_the_same_bytes(undisturbed, tmp_path, capsys, number):
    """A real process, a real signal, at a moment when some shards are there and some are not."""
    dump, whole = undisturbed
    killed = tmp_path / "killed"
    process = Fork(COMMAND_LINE, *dump, "--out", killed)
    deadline = time.monotonic() + 120
    while len(list(killed.glob("labels-*"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if process.returncode:  # not so quick that it was done
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), error
        assert not (killed / "manifest.json").exists()
    assert call(capsys, *dump, "--out", killed)[0] == 0
    ours = {path.name: path.read_bytes() for path in killed.iterdir()}
    assert ours == {path.name: path.read_bytes() for path in whole.iterdir()}
    assert len(ours) == 45 + len({"manifest.json", "README.md"})
    assert all(Path(name).suffix != ".tmp" for name in ours)
