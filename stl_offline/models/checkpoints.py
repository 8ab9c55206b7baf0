"""Loading weights: our own checkpoints (safetensors) and published pickles, without running what a pickle holds."""

import argparse
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from stl_offline.errors import FormatError, InputError

_PREFIXES = ("module.", "_orig_mod.")
_EMA_KEYS = ("state_dict_ema", "model_ema")
_PLAIN_KEYS = ("state_dict", "model")
# What buffers of models may hold: counters, indexes of relative positions, masks.
_COUNTS = (torch.int64, torch.int32, torch.bool)
_SHOWN = 8  # names in a message


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did: names that the file lacked, names it had too many, heads left as they were."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    adapted: tuple[str, ...]
    from_ema: bool


def read_state_dict(path: str | Path, *, use_ema: bool = True) -> tuple[dict[str, torch.Tensor], bool]:
    """Tensors of a checkpoint file by name, and whether they are its moving average.

    Args:
        path: a `.safetensors` file, or a pickle of `torch.save` (a state dict, or a dict that holds one).
        use_ema: prefer `state_dict_ema` over `state_dict` where a pickle has both.

    Raises:
        InputError: no such file.
        FormatError: not a checkpoint, or one that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        try:
            return _strip_prefixes(load_file(path), path), False
        except SafetensorError as error:
            raise FormatError(f"{path} is not a readable safetensors file ({error})") from error
    content = _unpickle_weights(path)
    if not isinstance(content, Mapping):
        raise FormatError(f"{path} holds a {type(content).__name__}, not a dict with a state dict")
    for keys, is_ema in ((_EMA_KEYS if use_ema else (), True), (_PLAIN_KEYS, False)):
        for key in keys:
            if isinstance(content.get(key), Mapping):
                return _strip_prefixes(content[key], path), is_ema
    return _strip_prefixes(content, path), False


def _unpickle_weights(path: Path):
    try:
        # timm's training script puts its arguments into the file; a Namespace is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"{path} was refused: it is no checkpoint of torch.save, or its pickle holds more than tensors and plain "
            f"values, which could run code when loaded; save its state dict alone ({_first_line(error)})"
        ) from error
    except Exception as error:  # on bytes that are no checkpoint, torch's readers raise whatever they stumble over
        raise FormatError(f"{path} is not a readable checkpoint ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200] or type(error).__name__


def _strip_prefixes(state_dict: Mapping, path: Path | None = None) -> dict[str, torch.Tensor]:
    cleaned = {}
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise FormatError(f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor: no state dict found")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            kind = "quantized" if value.is_quantized else f"{value.layout} on {value.device.type}"
            raise FormatError(f"{path}: {name} is {kind}; save the weights as dense tensors of floating-point numbers")
        if not value.is_floating_point() and value.dtype not in _COUNTS:
            raise FormatError(f"{path}: {name} is of type {value.dtype}; save the weights as floating-point numbers")
        while name.startswith(_PREFIXES):
            name = name.split(".", 1)[1]
        cleaned[name] = value
    if not cleaned:
        raise FormatError(f"{path} holds no tensors")
    return cleaned


def adapt_names(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Old names of released FAN checkpoints → today's: `pos_embeder.`, joined class attention `qkv`.

    timm calls this, too, for `pretrained_cfg_overlay={"file": …}`. `model` is there for its signature.
    """
    adapted = {}
    for name, value in _strip_prefixes(state_dict).items():
        name = name.replace("pos_embeder.", "pos_embed.")
        stem, joined, kind = name.partition(".attn.qkv.")
        if joined and stem.startswith("cls_attn_blocks."):
            if not value.ndim or value.shape[0] % 3:
                raise FormatError(
                    f"{name} has the shape {tuple(value.shape)}, whose rows cannot be query, key and value joined"
                )
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                adapted[f"{stem}.attn.{letter}.{kind}"] = part
        else:
            adapted[name] = value
    return adapted


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of a timm model's heads, as its configuration lists them."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def load_checkpoint(
    model: nn.Module,
    path: str | Path,
    *,
    use_ema: bool = True,
    strict: bool = True,
    adapt_head: bool = False,
    by_order: bool = False,
) -> LoadReport:
    """Load weights into `model`, from our own checkpoints (safetensors) or from published pickles (weights only).

    Args:
        model: a FAN, or any timm model with the file's names.
        path: the file.
        use_ema: prefer a pickle's `state_dict_ema`.
        strict: every name must be in the file and in the model. Otherwise both kinds of difference are reported.
        adapt_head: leave heads (class and token) as they are where the file's have another class count or are missing.
        by_order: the file has other names, but the same tensors in the same order (shapes are checked one by one). Not
            for safetensors, which keep no order.

    Raises:
        InputError: no such file, or a file that does not fit the model; the message names missing and unexpected
            names and differing shapes. The model is unchanged then.
        FormatError: the file is no checkpoint, or not a safe one.
    """
    if by_order and Path(path).suffix == ".safetensors":
        raise InputError(
            f"{path} cannot be matched by order: safetensors keep their tensors sorted by name; give a .pth or .bin"
        )
    state_dict, from_ema = read_state_dict(path, use_ema=use_ema)
    own = model.state_dict()
    state_dict = _match_by_order(state_dict, own, path) if by_order else adapt_names(state_dict, model)
    adapted = _drop_other_heads(state_dict, own, model, path, adapt_head)

    whole = [
        name
        for name in own
        if name in state_dict and own[name].is_floating_point() and not state_dict[name].is_floating_point()
    ]
    if whole:
        raise InputError(
            f"{path} does not fit {_name(model)}: {whole[0]} is of type {state_dict[whole[0]].dtype}, not of "
            "floating-point numbers"
        )
    wrong = [name for name in own if name in state_dict and own[name].shape != state_dict[name].shape]
    if wrong:
        first = wrong[0]
        raise InputError(
            f"{path} does not fit {_name(model)}: {len(wrong)} shapes differ, e.g. {first} is "
            f"{tuple(state_dict[first].shape)} in the file and {tuple(own[first].shape)} in the model"
        )
    missing = tuple(name for name in own if name not in state_dict and name not in adapted)
    unexpected = tuple(name for name in state_dict if name not in own)
    # BatchNorm's counter came after the first releases; nothing computes with it here.
    really_missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if strict and (really_missing or unexpected):
        raise InputError(_mismatch_message(model, path, really_missing, list(unexpected)))
    model.load_state_dict(state_dict, strict=False)
    return LoadReport(missing, unexpected, tuple(adapted), from_ema)


def _drop_other_heads(state_dict: dict, own: dict, model: nn.Module, path, adapt_head: bool) -> list[str]:
    """Take heads of another class count out of `state_dict`; returns the model's head names left untouched."""
    kept = []
    for head in classifier_names(model):
        names = [f"{head}.weight", f"{head}.bias"]
        # Another number of dimensions is found among the shapes.
        differs = [name for name in names if name in state_dict and name in own and state_dict[name].ndim]
        differs = [name for name in differs if state_dict[name].shape[:1] != own[name].shape[:1]]
        absent = [name for name in names if name in own and name not in state_dict]
        if differs and not adapt_head:
            raise InputError(
                f"{path}: its {head} has {state_dict[differs[0]].shape[0]} classes, the model's has "
                f"{own[differs[0]].shape[0]}; build the model with that num_classes, or pass adapt_head=True "
                f"to keep the model's own, untrained head"
            )
        if (differs or absent) and adapt_head:
            kept += [name for name in names if name in own]
            for name in names:
                state_dict.pop(name, None)
    if adapt_head and "aux_head.weight" in state_dict and "aux_head.weight" not in own:
        for name in ("aux_head.weight", "aux_head.bias"):
            state_dict.pop(name, None)
    return kept


def _mismatch_message(model: nn.Module, path, missing: list[str], unexpected: list[str]) -> str:
    if missing and not unexpected and all(name.startswith("aux_head.") for name in missing):
        return (
            f"{path} has no token head, and {_name(model)} has one: load it into the model without `_token`, "
            f"or pass adapt_head=True to start with an untrained token head"
        )
    if unexpected and not missing and all(name.startswith("aux_head.") for name in unexpected):
        return (
            f"{path} has a token head, and {_name(model)} has none: load it into {_name(model)}_token, "
            f"or pass adapt_head=True to leave the token head away"
        )
    return (
        f"{path} does not fit {_name(model)}: missing {_listing(missing)}; unexpected {_listing(unexpected)}; "
        f"check the model's name, or pass strict=False to load what fits"
    )


def _match_by_order(state_dict: dict, own: dict, path) -> dict:
    theirs = [value for name, value in state_dict.items() if not name.endswith("num_batches_tracked")]
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    if len(theirs) != len(names):
        raise InputError(f"{path} has {len(theirs)} tensors, the model {len(names)}: they cannot be matched by order")
    for position, (name, value) in enumerate(zip(names, theirs, strict=True)):
        if own[name].shape != value.shape:
            raise InputError(
                f"{path}: tensor {position} has shape {tuple(value.shape)}, the model's {name} {tuple(own[name].shape)}"
                f": they cannot be matched by order"
            )
    return dict(zip(names, theirs, strict=True))


def _name(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _listing(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} ({', '.join(names[:_SHOWN])}{more})"
