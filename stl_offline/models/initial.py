"""Where training starts: weights of another run, of a file, or timm's own; and which of them are trained."""

from dataclasses import dataclass
from pathlib import Path

import timm
from timm.layers import freeze_batch_norm_2d
from timm.models import get_arch_name
from torch import Tensor, nn

from stl_offline.errors import FormatError, InputError, StlError
from stl_offline.files import sha256_file
from stl_offline.models.artifact import ModelDescription, check_digest, read_description, weights_path
from stl_offline.models.build import build_timm, size_argument
from stl_offline.models.checkpoints import classifier_names, load_checkpoint, read_state_dict
from stl_offline.models.token_model import TOKEN_HEAD, TRUNK, TokenModel

TIMM_WEIGHTS = "timm"


@dataclass(frozen=True)
class InitialWeights:
    """What `load_initial` loaded. sha256: of the file, or timm's name of its own weights; new_heads: the heads that
    keep their untrained weights."""

    source: str
    sha256: str
    new_heads: tuple[str, ...]

    def __str__(self) -> str:
        new = f"; untrained: the {' and the '.join(self.new_heads)}" if self.new_heads else ""
        return f"initial weights from {self.source}{new}"


def check_initial(init: str, description: ModelDescription) -> None:
    """Check what can be checked before images are packed.

    Raises:
        InputError: nothing is at ``init``, it is of another architecture, or timm has no weights of this model.
        FormatError: the run's file is damaged.
    """
    if init == TIMM_WEIGHTS:
        cfg = timm.get_pretrained_cfg(description.model)
        if not description.token_head or cfg is None or not cfg.has_weights:
            raise InputError(f"timm has no pretrained weights of {description.model}; give a run or a weights file")
        return
    path = weights_path(init)
    if theirs := _description_of(path):
        _check_architecture(path, theirs, description)


def load_initial(model: nn.Module, init: str, description: ModelDescription) -> InitialWeights:
    """Load initial weights into a new model. Heads of other classes are left as they are.

    Args:
        model: as `stl_offline.models.build.build_model` gives it for ``description``.
        init: a run's folder, a weights file (`.safetensors`, or a pickle of `torch.save`), or "timm".

    Raises:
        InputError: as `check_initial`; or weights that do not fit the model.
        FormatError: a file is damaged, or no weights file at all.
    """
    check_initial(init, description)
    if init == TIMM_WEIGHTS:
        name = description.model
        donor = _from_hub(name, description.img_size)
        return InitialWeights(f"timm ({name})", f"timm:{donor.pretrained_cfg.get('tag', '')}", _copy(donor, model))
    path = weights_path(init)
    theirs = _description_of(path)
    if theirs is not None:
        check_digest(path)
    if not isinstance(model, TokenModel):
        new = _load_fan(model, path, theirs, description)
    else:
        new = _load_trunk(model, path, theirs, description)
    return InitialWeights(str(init), sha256_file(path), new)


def freeze_trunk(model: nn.Module) -> None:
    """Leave only the heads to be trained: no gradients before them, and batch norms with fixed statistics.

    Raises:
        InputError: the trunk has batch norms whose statistics cannot be fixed.
    """
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    trained = {id(parameter) for head in heads for parameter in head.parameters()}
    if isinstance(model, TokenModel):
        model.trunk = freeze_batch_norm_2d(model.trunk)
    else:
        freeze_batch_norm_2d(model)
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    inside = {id(module) for head in heads for module in head.modules()}
    left = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in inside
    ]
    if left:
        raise InputError(f"`freeze` cannot fix the statistics of {len(left)} batch norms, such as {left[0]}")


def _description_of(path: Path) -> ModelDescription | None:
    """The description in a file of this package; None for any other weights file."""
    if path.suffix != ".safetensors":
        return None
    try:
        return read_description(path)
    except FormatError as error:
        if "was not written by stl-offline" in str(error):
            return None
        raise


def _check_architecture(path: Path, theirs: ModelDescription, ours: ModelDescription) -> None:
    if get_arch_name(theirs.model) != get_arch_name(ours.model):
        raise InputError(f"{path} holds weights of a {theirs.model}, which do not fit a {ours.model}")


def _from_hub(name: str, img_size: int) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, **size_argument(name, img_size))
    except Exception as error:  # timm, the hub's client and the network raise many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"timm could not get weights for {name} from the Hugging Face Hub or its cache ({reason}); without a "
            "network, give a weights file as `init`"
        ) from error


def _copy(donor: nn.Module, model: TokenModel, same_classes: bool | None = None) -> tuple[str, ...]:
    """Copy a timm model's weights into the trunk; gives the heads that are left as they were.

    same_classes: whether the class head is copied; None: where the class counts are equal.
    """
    if same_classes is None:
        same_classes = donor.num_classes == model.num_classes
    weights = donor.state_dict()
    if not same_classes:
        weights = _without_heads(weights, model.trunk)
    found = model.trunk.load_state_dict(weights, strict=False)
    heads = classifier_names(model.trunk)
    missing = [name for name in found.missing_keys if not name.startswith(heads)]
    if missing or found.unexpected_keys:  # not of one architecture, or one that num_classes changes elsewhere
        wrong = [*missing, *found.unexpected_keys]
        raise InputError(f"the weights do not fit {model.name}: {len(wrong)} names differ, such as {wrong[0]}")
    new = () if same_classes else ("class head",)
    return new if model.positions is not None else (*new, "token head")


def _without_heads(weights: dict[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    heads = tuple(f"{name}." for name in classifier_names(trunk))
    return {name: value for name, value in weights.items() if not name.startswith(heads)}


def _load_trunk(
    model: TokenModel, path: Path, theirs: ModelDescription | None, ours: ModelDescription
) -> tuple[str, ...]:
    """Load a file through timm, so that its filters apply: names of other projects, sizes of position embeddings."""
    state_dict, _ = read_state_dict(path)
    token_head = {}
    # A run's, or a `TokenModel`'s that a loop of one's own saved.
    if all(name.startswith((TRUNK, TOKEN_HEAD)) for name in state_dict):
        token_head = {name: value for name, value in state_dict.items() if name.startswith(TOKEN_HEAD)}
        state_dict = {name.removeprefix(TRUNK): value for name, value in state_dict.items() if name.startswith(TRUNK)}
    classes = _classes_in(state_dict, model.trunk)
    # With the file's own class count everything must fit; with another one timm would ignore whatever does not.
    overlay = {"state_dict": state_dict, "num_classes": classes, "label_offset": 0}
    try:
        donor = build_timm(ours.model, classes, ours.img_size, pretrained=True, pretrained_cfg_overlay=overlay)
    except StlError:
        raise
    except (RuntimeError, KeyError, IndexError, ValueError, TypeError) as error:
        raise _unfit(path, ours, error) from error
    same_classes = classes == model.num_classes if theirs is None else theirs.class_names == ours.class_names
    new = _copy(donor, model, same_classes)
    trained = theirs is None or theirs.token_head_trained
    if same_classes and token_head and model.positions is None and trained:
        try:
            model.token_head.load_state_dict({name.removeprefix(TOKEN_HEAD): each for name, each in token_head.items()})
        except RuntimeError as error:
            raise _unfit(path, ours, error) from error
        new = tuple(head for head in new if head != "token head")
    return new


def _unfit(path: Path, ours: ModelDescription, error: Exception) -> InputError:
    return InputError(f"{path} does not fit {ours.model} ({' '.join(str(error).split())[:400]})")


def _classes_in(state_dict: dict[str, Tensor], trunk: nn.Module) -> int:
    """K of a file's class head; 0 where it has none."""
    for name in classifier_names(trunk):
        weight = state_dict.get(f"{name}.weight")
        if weight is not None and weight.ndim:
            return int(weight.shape[0])
    return 0


def _load_fan(model: nn.Module, path: Path, theirs: ModelDescription | None, ours: ModelDescription) -> tuple[str, ...]:
    heads = {"head": "class head", "aux_head": "token head"}
    kept = [name for name, _ in model.named_parameters() if name.partition(".")[0] in heads]
    before = {name: value.detach().clone() for name, value in model.state_dict().items() if name in kept}
    report = load_checkpoint(model, path, adapt_head=True)
    new = {heads[name.partition(".")[0]] for name in report.adapted}
    if theirs is not None:
        if theirs.class_names != ours.class_names:
            new = set(heads.values())
        elif not theirs.token_head_trained:
            new.add("token head")
    model.load_state_dict(
        {name: value for name, value in before.items() if heads[name.partition(".")[0]] in new}, strict=False
    )
    return tuple(sorted(new))
