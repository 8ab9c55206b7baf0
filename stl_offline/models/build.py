"""From a model's name to a model with a token head: a FAN of this package, or any timm classifier as a `TokenModel`."""

import contextlib
import difflib
from typing import Any

import timm
import torch
from torch import nn

from stl_offline.errors import InputError
from stl_offline.models.input_size import InputSizeError, cell_size, nearest_sizes
from stl_offline.models.token_model import TokenModel
from stl_offline.models.variants import VARIANTS

_SUFFIX = "_token"


def resolve_model(name: str, token_head: str = "own") -> tuple[str, str]:
    """The name in timm's registry of what ``--model`` names, and its kind of token head.

    Args:
        name: a FAN, with or without ``_token``, or any other name that `timm.create_model` takes.
        token_head: "own" or "shared", as of `TokenModel`.

    Returns:
        (``fan_…_token``, "") for a FAN, which has a token head by itself; else (name, token_head).

    Raises:
        InputError: there is no such model, or a FAN is asked for a shared head.
    """
    plain = name.removesuffix(_SUFFIX)
    if plain in VARIANTS:
        if token_head != "own":
            raise InputError(f"the FAN {plain} has a token head of its own; `token_head` must be own")
        return plain + _SUFFIX, ""
    if timm.is_model(name) and not name.startswith("fan_"):
        return name, token_head
    near = difflib.get_close_matches(name, timm.list_models(exclude_filters=f"fan_*{_SUFFIX}"), 3, 0.6)
    hint = f"the nearest names are {', '.join(near)}" if near else "timm.list_models() lists timm's"
    raise InputError(f"there is no model {plain!r}; there are {', '.join(VARIANTS)}, and timm's classifiers: {hint}")


def size_argument(architecture: str, size: int | tuple[int, int]) -> dict[str, Any]:
    """What timm's models of fixed input size are built with; the others take any size as they are."""
    cfg = timm.get_pretrained_cfg(architecture)
    fixed = bool(cfg and cfg.fixed_input_size) or architecture.startswith("fan_")
    return {"img_size": size} if fixed else {}


def build_timm(name: str, num_classes: int, img_size: int, drop_path: float = 0.0, **weights: Any) -> nn.Module:
    """``timm.create_model`` with this package's errors.

    Args:
        weights: ``pretrained`` and ``pretrained_cfg_overlay`` of `timm.create_model`.

    Raises:
        InputError: the model has no stochastic depth.
        InputSizeError: it takes no such size.
    """
    arguments = {"num_classes": num_classes, **size_argument(name, img_size), **weights}
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    try:
        return timm.create_model(name, **arguments)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise InputError(f"{name} has no stochastic depth; set `drop_path` to 0, not {drop_path}") from error
    except (ArithmeticError, AssertionError, IndexError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputSizeError(f"timm cannot build {name} for images of {img_size} pixels: {reason}") from error


def build_model(
    name: str,
    num_classes: int,
    img_size: int,
    *,
    token_head: str,
    drop_path: float = 0.0,
) -> nn.Module:
    """A model with class and token logits, with untrained weights.

    Args:
        name, token_head: as `resolve_model` gives them.
        num_classes: K; img_size: side of the images in pixels; drop_path: rate of stochastic depth.

    Raises:
        InputError: the model cannot be built so, or cannot have a token head (the message names the reason).
    """
    if not token_head:
        return timm.create_model(name, num_classes=num_classes, img_size=img_size, drop_path_rate=drop_path)
    trunk = build_timm(name, num_classes, img_size, drop_path)
    model = TokenModel(trunk, token_head=token_head, img_size=img_size, name=name)
    if model.positions is not None and model.positions.has_batch_norm:
        raise InputError(
            f"{name} cannot share its class head with its tokens: the head has a batch norm, whose statistics over "
            'tokens are not those over images; use `token_head="own"`'
        )
    return model


def check_model(name: str, img_size: int, token_head: str, drop_path: float) -> None:
    """Check that a model can be built, and that its tokens see the whole of images of this size.

    Raises:
        InputError: as `resolve_model` and `build_model`.
        InputSizeError: the size; the message gives the nearest that work.
    """
    name, token_head = resolve_model(name, token_head)
    if not token_head:
        with torch.device("meta"):  # without memory for weights; a FAN's stem refuses what it does not see
            build_model(name, 2, img_size, token_head="", drop_path=drop_path)
        return

    def check(size: int) -> TokenModel:
        model = build_model(name, 2, size, token_head=token_head, drop_path=drop_path)
        model.check_view(size, size)
        return model

    def works(size: tuple[int, int]) -> bool:
        with contextlib.suppress(InputSizeError):
            return bool(check(size[0]))
        return False

    try:
        check(img_size)
    except InputSizeError as error:
        cell = cell_size(timm.create_model(name)) or 32
        sizes = [str(near[0]) for near in nearest_sizes(works, (img_size, img_size), cell)]
        near = " and ".join(sizes) or "none was found"
        raise InputSizeError(f"{error}; the nearest sizes that work: {near}") from error
