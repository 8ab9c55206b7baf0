"""From what names a labeler (a run, a weights file, a timm model, a model of the Hugging Face Hub) to the labeler."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import timm
import timm.data
import torch
from timm.models import load_model_config_from_hf
from torch import Tensor, nn

from stl_offline.errors import FormatError, InputError, StlError
from stl_offline.files import sha256_file
from stl_offline.labels.class_names import read_class_names
from stl_offline.models.artifact import load_model, read_description, weights_sha256
from stl_offline.models.build import size_argument
from stl_offline.models.checkpoints import load_checkpoint, read_state_dict
from stl_offline.models.input_size import InputSizeError, cell_size, nearest_sizes
from stl_offline.models.token_labeler import TokenLabeler

TIMM_PREFIX, HUB_PREFIX = "timm:", "hf-hub:"
_DEFAULT_SIDE = 224
# What timm's models raise, when they are built or run, for a size that they cannot take.
SIZE_ERRORS = (ArithmeticError, AssertionError, IndexError, RuntimeError, TypeError, ValueError)


def create_labeler(
    labeler: str | Path,
    *,
    labeler_checkpoint: str | Path | None = None,
    labeler_pretrained: bool = False,
    labeler_classes: str | Path | Sequence[str] | None = None,
    labeler_by_order: bool = False,
    labeler_mean: Sequence[float] | None = None,
    labeler_std: Sequence[float] | None = None,
    img_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
) -> TokenLabeler:
    """Build a labeler and load its weights.

    Args:
        labeler: a run's folder, a `.safetensors` file that a run wrote, ``timm:NAME`` with a name of timm's registry,
            or ``hf-hub:ORG/NAME`` for a timm model of the Hugging Face Hub with its weights.
        labeler_checkpoint: weights of a ``timm:`` model: `.safetensors`, or a pickle of `torch.save` (nothing but
            tensors is loaded from it).
        labeler_pretrained: take timm's own weights of a ``timm:`` model, from the Hub or its cache on this machine.
        labeler_classes: class names of a ``timm:`` or ``hf-hub:`` model: a sequence, a text file with one name per
            line, or a label set. Default: ImageNet's names where timm knows the model's classes, else None.
        labeler_by_order: the checkpoint has other names but the same tensors in the same order.
        labeler_mean, labeler_std: normalisation, where the weights were trained with another one than timm notes.
        img_size: side or (height, width) of the images, in pixels; default (None or 0): what the model was trained
            with. Models of fixed size are built for it.
        device: where the labeler runs.

    Raises:
        InputError: unknown name, no weights, weights that do not fit, a head that cannot be applied per position, or a
            size of which the model does not see every pixel (the message gives the nearest that work).
        FormatError: a weights file is damaged, or no weights file at all.
    """
    spec = str(labeler)
    if not spec.startswith((TIMM_PREFIX, HUB_PREFIX)):
        if any((labeler_checkpoint, labeler_pretrained, labeler_classes, labeler_by_order, labeler_mean, labeler_std)):
            raise InputError(
                "`labeler_checkpoint`, `labeler_pretrained`, `labeler_classes`, `labeler_by_order`, `labeler_mean` and "
                f"`labeler_std` go with a labeler timm:NAME or hf-hub:ORG/NAME; {spec} has its own weights and classes"
            )
        return _labeler_of_run(spec, img_size or None).to(device)
    name, architecture = timm_name(spec)
    _check_weights(spec, labeler_checkpoint, labeler_pretrained, labeler_by_order)
    names = labeler_classes
    if isinstance(names, str | Path):
        names = read_class_names(names, "`labeler_classes`")

    def make(size: int | tuple[int, int]) -> TokenLabeler:
        arguments = size_argument(architecture, size)
        if labeler_checkpoint is None:
            model = pretrained_model(name, arguments)
            sha256 = state_sha256(model)
        else:
            if labeler_by_order:
                model = timm.create_model(name, **arguments, **({} if names is None else {"num_classes": len(names)}))
                load_checkpoint(model, labeler_checkpoint, by_order=True)
            else:
                model = with_checkpoint(name, labeler_checkpoint, arguments)
            sha256 = sha256_file(labeler_checkpoint)
        return TokenLabeler(
            model,
            mean=labeler_mean,
            std=labeler_std,
            img_size=size,
            class_names=imagenet_names(model) if names is None else names,
            weights_sha256=sha256,
        )

    return _at_size(make, architecture, img_size or _own_size(architecture)).to(device)


def _labeler_of_run(run: str, img_size: int | tuple[int, int] | None) -> TokenLabeler:
    description = read_description(run)
    if not description.has_trained_tokens:
        raise InputError(
            f"the token head of {run} was not trained, so its token labels would mean nothing; give a labeler, or a "
            "student that was trained with token labels"
        )

    def make(size: int | tuple[int, int]) -> TokenLabeler:
        model, _ = load_model(run)
        if size != description.img_size and hasattr(model, "set_input_size"):
            model.set_input_size(img_size=size)
        return TokenLabeler(
            model,
            name=description.model,
            img_size=size,
            class_names=description.class_names,
            weights_sha256=weights_sha256(run),
            interpolation=description.interpolation,
        )

    return _at_size(make, description.model, img_size or description.img_size, trained_at=description.img_size)


def _at_size(
    make: Callable[[int | tuple[int, int]], TokenLabeler],
    architecture: str,
    size: int | tuple[int, int],
    trained_at: int | None = None,
) -> TokenLabeler:
    """``make(size)``; where the model cannot take the size or does not see all of it, the error gives the nearest.

    trained_at: the size of a run's model, which may not be changed in all families; None: it is built for each size.
    """

    def build_untrained(size: int | tuple[int, int]) -> None:
        model = timm.create_model(architecture, num_classes=2, **size_argument(architecture, size))
        TokenLabeler(model, name=architecture, img_size=size)

    build = build_untrained if trained_at is None else make
    try:
        return make(size)
    except FormatError:
        raise
    except SIZE_ERRORS as error:
        # The size's errors have no common form, and loading weights hides some: an untrained copy shows the reason.
        fault = str(error) if isinstance(error, InputSizeError) else _size_fault(build, architecture, size)
        if fault is None:
            raise
        cause = error
    height, width = (size, size) if isinstance(size, int) else size
    cell = cell_size(timm.create_model(architecture, num_classes=2)) or 32
    found = nearest_sizes(lambda near: _size_fault(build, architecture, near) is None, (height, width), cell)
    found = found or [(trained_at, trained_at)] * (trained_at is not None)
    sizes = " and ".join(str(h) if h == w and height == width else f"{h}×{w}" for h, w in found)
    raise InputSizeError(f"{fault}; the nearest sizes that work: {sizes or 'none was found'}") from cause


def _size_fault(
    build: Callable[[int | tuple[int, int]], object], architecture: str, size: int | tuple[int, int]
) -> str | None:
    """Why the model cannot take images of this size or does not see all of them; None where it does."""
    try:
        build(size)
    except InputSizeError as error:
        return str(error)
    except InputError:  # it cannot label at any size
        return None
    except SIZE_ERRORS as error:
        height, width = (size, size) if isinstance(size, int) else size
        return f"{architecture} cannot take images of {height}×{width} pixels: {_one_line(error)}"
    return None


def timm_name(spec: str) -> tuple[str, str]:
    """What `timm.create_model` is to be called with, and the name in timm's registry of what that builds."""
    if spec.startswith(HUB_PREFIX):
        try:
            _, architecture, _ = load_model_config_from_hf(spec.removeprefix(HUB_PREFIX))
        except Exception as error:  # the hub's client and the network raise many kinds
            raise InputError(
                f"cannot get {spec} from the Hugging Face Hub or its cache ({_one_line(error)})"
            ) from error
        if not timm.is_model(architecture):
            raise InputError(f"{spec} is a {architecture!r}, which timm {timm.__version__} does not have")
        return spec, architecture
    name = spec.removeprefix(TIMM_PREFIX)
    if ":" in name or not timm.is_model(name):
        raise InputError(f"{spec!r} is not {TIMM_PREFIX}NAME with a name of timm's registry (timm.list_models())")
    return name, name


def check_labeler(labeler: str | Path, checkpoint: str | Path | None = None, pretrained: bool = False) -> None:
    """Raise as `create_labeler` where there is no such labeler, without loading it."""
    spec = str(labeler)
    if spec.startswith((TIMM_PREFIX, HUB_PREFIX)):
        timm_name(spec)
        _check_weights(spec, checkpoint, pretrained, by_order=False)
    else:
        read_description(spec)


def _check_weights(spec: str, checkpoint: str | Path | None, pretrained: bool, by_order: bool) -> None:
    """Raise `InputError` unless exactly one place is given for the weights, and a file is there."""
    from_hub = pretrained or spec.startswith(HUB_PREFIX)
    if checkpoint is None and not from_hub:
        raise InputError(
            f"{spec} needs weights (untrained labels mean nothing): give `labeler_checkpoint`, a .safetensors, .pth or "
            ".bin file, or `labeler_pretrained` for timm's own"
        )
    if checkpoint is not None and from_hub:
        raise InputError(f"{spec} is to take its weights from the Hub and from {checkpoint}; give one of them")
    if checkpoint is None and by_order:
        raise InputError("`labeler_by_order` matches the tensors of a `labeler_checkpoint`; give one")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise InputError(f"there is no weights file at {checkpoint} (`labeler_checkpoint`)")


def _own_size(architecture: str) -> int | tuple[int, int]:
    cfg = timm.get_pretrained_cfg(architecture)
    height, width = cfg.input_size[-2:] if cfg is not None else (_DEFAULT_SIDE, _DEFAULT_SIDE)
    return height if height == width else (height, width)


def pretrained_model(name: str, arguments: dict[str, object], checkpoint: str = "labeler_checkpoint") -> nn.Module:
    """A model with timm's own weights, from the Hub or its cache.

    Args:
        checkpoint: the parameter that a weights file can be given as, for the message.

    Raises:
        InputError: the weights cannot be had.
    """
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # timm, the hub's client and the network raise many kinds
        raise InputError(
            f"timm could not get weights for {name} from the Hugging Face Hub or its cache ({_one_line(error)}); "
            f"without a network, give a `{checkpoint}`"
        ) from error


def with_checkpoint(
    name: str, checkpoint: str | Path, arguments: dict[str, object], by_order: str = "labeler_by_order"
) -> nn.Module:
    """Build and load through timm, so that its per-model filters (names, position embeddings) apply.

    Args:
        by_order: the parameter that matches tensors by their order, for the message.

    Raises:
        InputError: the checkpoint does not fit.
    """
    state_dict, _ = read_state_dict(checkpoint)
    classes = _class_count(name, state_dict)
    if classes is not None:
        arguments = {**arguments, "num_classes": classes}
    overlay = {"state_dict": state_dict, "num_classes": classes or 1000}
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    except StlError:
        raise
    except (RuntimeError, KeyError, IndexError, ValueError, TypeError) as error:
        # safetensors keep no order.
        advice = f"; if only its names differ, match the tensors by order (`{by_order}`)"
        advice = "" if Path(checkpoint).suffix == ".safetensors" else advice
        raise InputError(f"{checkpoint} does not fit {name} ({_one_line(error, 400)}){advice}") from error


def _class_count(name: str, state_dict: Mapping[str, Tensor]) -> int | None:
    """How many classes a checkpoint's classifier has; None where it is not found under timm's name."""
    cfg = timm.get_pretrained_cfg(name)
    classifier = cfg.classifier if cfg else None
    classifier = classifier[0] if isinstance(classifier, list | tuple) else classifier
    weight = state_dict.get(f"{classifier}.weight")
    return None if weight is None or not weight.ndim else int(weight.shape[0])


def imagenet_names(model: nn.Module) -> tuple[str, ...] | None:
    """ImageNet's class names (WordNet ids) where timm knows the model's classes, else None."""
    subset = timm.data.infer_imagenet_subset(model)
    return None if subset is None else tuple(timm.data.ImageNetInfo(subset).label_names())


def state_sha256(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and bytes of the tensors, for weights that did not come as one file."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _one_line(error: Exception, longest: int = 200) -> str:
    return " ".join(str(error).split())[:longest] or type(error).__name__
