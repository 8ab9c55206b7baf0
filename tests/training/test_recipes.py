"""Recipes: the published settings, what wins over what, and mistakes in one line."""

import re

import pytest
from torch import nn

from stl_offline.cli import stages
from stl_offline.cli.main import main
from stl_offline.config import LabelerConfig, StudentConfig, TrainConfig
from stl_offline.config_transfer import DetectConfig, SegmentConfig
from stl_offline.errors import InputError
from stl_offline.models import VARIANTS
from stl_offline.recipes import recipe_names, resolve
from stl_offline.recipes.reading import read_recipe
from stl_offline.training import train_student as student
from stl_offline.training.optimization import learning_rate, make_average

PLACES = {"data": "images", "out": "run"}

# The STL recipe: learning rate, global batch, warm-up epochs, drop path.
PUBLISHED = {
    "fan-tiny": (2e-3, 1024, 5, 0.05),
    "fan-small": (2e-3, 1024, 5, 0.25),
    "fan-base": (4e-3, 2048, 10, 0.35),
    "fan-large": (4e-3, 2048, 10, 0.45),
}


@pytest.mark.parametrize("kind", [LabelerConfig, StudentConfig])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings(name, kind):
    config = resolve(kind, name, PLACES)
    assert (config.lr, config.lr_batch, config.warmup_epochs, config.drop_path) == PUBLISHED[name]
    assert (config.epochs, config.weight_decay, config.ema_decay, config.smoothing) == (350, 0.05, 0.99992, 0.1)
    assert (config.mixup, config.cutmix, config.random_erase, config.erase_mode) == (0.8, 1.0, 0.3, "pixel")
    assert (config.auto_augment, config.img_size, config.token_weight) == ("rand-m9-mstd0.5-inc1", 224, 1.0)
    assert config.model in VARIANTS
    assert config.model.startswith(name.replace("-", "_"))


def test_every_recipe_is_listed():
    assert recipe_names() == ("fan-base", "fan-large", "fan-micro", "fan-small", "fan-tiny")
    micro = resolve(StudentConfig, "fan-micro", PLACES)
    assert (micro.model, micro.img_size, micro.mixup, micro.lr_batch) == ("fan_micro_4_p8", 64, 0.0, 0)


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["train-student"], TrainConfig),
        (["transfer", "segment"], SegmentConfig),
        (["transfer", "detect"], DetectConfig),
    ],
)
def test_the_help_names_every_recipe(capsys, words, kind):
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out.partition("--recipe")[2].partition("YAML file")[0]
    assert set(re.findall(r"(?:segment-|detect-)?fan-[a-z]+", text)) == set(recipe_names(kind))


def test_the_learning_rate_follows_the_images_of_a_step():
    def rate(processes, **given):
        return learning_rate(resolve(LabelerConfig, "fan-base", PLACES | given), processes)

    assert rate(16) == pytest.approx(4e-3)  # 16 × 128 = 2048
    assert rate(8) == pytest.approx(2e-3)
    assert rate(4, accumulate=4) == pytest.approx(4e-3)
    assert rate(4, batch_size=64) == pytest.approx(5e-4)
    assert rate(4, lr=1e-3) == 1e-3  # said by the user: as it is
    assert rate(4, lr=1e-3, lr_batch=512) == pytest.approx(1e-3)


def test_what_is_said_wins_over_the_recipe_and_that_over_the_defaults():
    config = resolve(StudentConfig, "fan-small", PLACES | {"epochs": 3, "mixup": 0.0})
    assert (config.epochs, config.mixup, config.cutmix) == (3, 0.0, 1.0)
    assert config.flip == StudentConfig.flip
    assert resolve(StudentConfig, None, PLACES) == StudentConfig(**PLACES)


def test_a_file_with_parts_for_each_stage(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 7\nlr: 2e-3\nlabeler: {drop_path: 0.2}\nstudent:\n  residual: uniform\n")
    assert resolve(LabelerConfig, str(path), PLACES).drop_path == 0.2
    student = resolve(StudentConfig, str(path), PLACES | {"labels": "set"})
    assert (student.epochs, student.lr, student.drop_path, student.residual) == (7, 0.002, 0.0, "uniform")


# Each list holds the one before it nine times: 59,049 words in the end.
_LISTS = [
    f"&{name} [{', '.join([inner] * 9)}]" for name, inner in zip("abcde", ["x", "*a", "*b", "*c", "*d"], strict=True)
]
NESTED = f"[{', '.join(_LISTS)}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "no setting 'epoch'; the nearest is 'epochs'"),
        ("labeler: {dropout_path: 0.1}", "labeler: there is no setting 'dropout_path'; the nearest is 'drop_path'"),
        ("student: {token_targets: soft}", "the nearest is 'token_target'"),
        ("residual: uniform", "there is no setting 'residual'"),  # a student's, said for both
        ("epochs: many", "epochs takes a whole number, got 'many'"),
        ("epochs: 2.5", "epochs takes a whole number, got 2.5"),
        ("compile: 1", "compile takes true or false, got 1"),
        ("lr: fast", "lr takes a number, got 'fast'"),
        ("epochs: 0", "`epochs` must be at least 1, got 0"),
        ("out: runs/x", "'out' is not for recipes"),
        ("- epochs", "no list of settings"),
        ("epochs: [", "is not YAML"),
        ("lr: 0.1\nepochs: 3\nlr: 0.2", "lr stands there twice"),
        ("student: {columns: 2, columns: 3}", "columns stands there twice"),
        ("student: 3", "student holds settings of that stage"),
        # What YAML 1.1 reads as something else.
        ("epochs: 1_000", "epochs takes a whole number, got '1_000'"),
        ("epochs: 010", "epochs takes a whole number, got '010'"),
        ("epochs: 0x10", "epochs takes a whole number, got '0x10'"),
        ("lr: 1:30", "lr takes a number, got '1:30'"),
        ("compile: yes", "compile takes true or false, got 'yes'"),
        ("lr: .inf", "`lr` must be a finite number, got inf"),
        (f"epochs: {10**400}", "`epochs` must be a finite number, got 1000000"),
        (f"epochs: {NESTED}", "epochs takes a whole number, got [['x', 'x',"),
        ("epochs: &a [*a]", "epochs takes a whole number, got [[[...]]]"),
        (f"epochs: {'[' * 3000}", "nests lists or settings too deeply"),
        (f"epochs: {'x' * 5000}", "epochs takes a whole number, got 'xxxx"),
        ("student: false", "student holds settings of that stage, got False"),
        ("student: {views: replay, crops: random}", "views and crops are names of one setting; give one"),
        # What the parser itself fails on.
        ("epochs: !!int abc", "holds a value that cannot be read (invalid literal"),
        (f"epochs: {'1' * 5000}", "holds a value that cannot be read (Exceeds the limit"),
        ("lr: !!timestamp foo", "holds a value that cannot be read"),
        ("lr: !!binary é", "is not YAML"),
        # Merges of merges, which take ten times the memory with each line.
        ("a: &a {x: 1}\nb: &b\n  <<: [*a, *a]", "has no << merges; write the settings out"),
        ("a: &a {x: 1}\nb: {!!merge whatever: *a}", "has no << merges"),
    ],
)
def test_mistakes(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        resolve(StudentConfig, str(path), PLACES)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600 + len(str(path))


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (SegmentConfig, "student: {residual: uniform}", "there is no setting 'student'; the nearest is 's"),
        (SegmentConfig, "backbone: runs/x", "'backbone' is not for recipes; give `backbone` beside the recipe"),
        (DetectConfig, "lr: fast", "lr takes a number"),
        (DetectConfig, None, "there is no recipe 'none' (recipes here are files, by their path)"),
    ],
)
def test_mistakes_of_transfer(tmp_path, monkeypatch, kind, text, message):
    monkeypatch.chdir(tmp_path)
    if text:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        read_recipe(kind, "mine.yaml" if text else "none")
    assert message in str(error.value) and "nearest is 'student'" not in str(error.value)


def test_what_a_recipe_sets_for_other_modes_is_left_out(tmp_path, caplog):
    """One recipe serves a student of labels and its baseline; what is given beside it must do something."""
    caplog.set_level("INFO")
    path = tmp_path / "mine.yaml"
    path.write_text("random_erase: 0.2\nerase_mode: const\nstudent: {token_target: soft, soft_classes: 3}")
    labelled = resolve(StudentConfig, str(path), PLACES | {"labels": "set"})
    assert (labelled.token_target, labelled.soft_classes, labelled.erase_mode) == ("soft", 3, "const")
    assert not caplog.records
    baseline = resolve(StudentConfig, str(path), PLACES | {"random_erase": 0.0})
    assert baseline == StudentConfig(**PLACES)
    assert "without its erase_mode, token_target, soft_classes" in caplog.text
    with pytest.raises(InputError, match=r"^`token_target` needs token labels .*, else it does nothing; leave it out$"):
        resolve(StudentConfig, str(path), PLACES | {"token_target": "soft"})


def test_earlier_names_are_taken_with_a_warning(tmp_path, caplog):
    (tmp_path / "mine.yaml").write_text("student: {columns: 2, views: random}")
    given = PLACES | {"labels": "set", "token_target": "soft"}
    config = resolve(StudentConfig, str(tmp_path / "mine.yaml"), given)
    assert (config.soft_classes, config.crops) == (2, "random")
    assert [record.getMessage().partition("mine.yaml: ")[2] for record in caplog.records] == [
        "'columns' is now called 'soft_classes'",
        "'views' is now called 'crops'",
    ]


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("2E-3", 2e-3), (".5", 0.5), ("5.", 5.0), ("+1", 1.0), ("0.5e1", 5.0)]
)
def test_numbers(tmp_path, text, value):
    (tmp_path / "mine.yaml").write_text(f"lr: {text}\nmodel: no\n")
    config = resolve(LabelerConfig, str(tmp_path / "mine.yaml"), PLACES)
    assert (config.lr, config.model) == (value, "no")


def test_a_recipes_switches_can_be_turned_off(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text("skip_broken: true\nstudent: {allow_changed: true}")
    found = []
    monkeypatch.setattr(student, "train_student", lambda config: found.append(config) or {})
    line = ["train-student", "--recipe", str(path), "--data", "x", "--out", "y", "--labels", "set"]
    monkeypatch.setattr(stages, "run_line", lambda *_: "done")
    for more in ([], ["--no-skip-broken"], ["--no-allow-changed"]):
        main([*line, *more])
    assert [(each.skip_broken, each.allow_changed) for each in found] == [(True, True), (False, True), (True, False)]


def test_an_unknown_name_on_the_command_line(capsys, tmp_path):
    code = main(["train-labeler", "--recipe", "fan-tinny", "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    assert code == 1
    error = capsys.readouterr().err
    assert "did you mean 'fan-tiny'?" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_averages_reach_the_recipes_decay(name):
    """ImageNet's 1,281,167 images; and a short run averages over a ninth of its steps."""
    config = resolve(LabelerConfig, name, PLACES)
    average = make_average(nn.Linear(1, 1), config)
    steps = config.epochs * (1_281_167 // config.lr_batch)
    assert average.get_decay(steps) == average.get_decay(112_500 * 2) == 0.99992
    assert average.get_decay(1 + 900) == pytest.approx(1 - 9 / 909)


def test_a_recipes_augmentation_can_be_left_out():
    assert resolve(LabelerConfig, "fan-tiny", PLACES | {"auto_augment": "none"}).auto_augment is None
