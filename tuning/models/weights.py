"""Where the initial weights of a model come from, and whether they fit it."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import huggingface_hub
import timm
import torch
from huggingface_hub import constants as hub
from timm.models import load_state_dict
from torch import Tensor, nn

from tuning.depth import head_modules
from tuning.errors import UserError

StateDict = dict[str, Tensor]
REMEDIES = "Use --weights none, --weights PATH (a .safetensors or .pth file), or --model local-dir:PATH."
_PROBE_SECONDS = 5.0


def read(path: Path) -> StateDict:
    """The state dict in a .safetensors or .pth file (also under 'state_dict' or 'model', or behind a 'module.' prefix).

    Nothing in the file is executed. Raises UserError when it is missing or holds no weights.
    """
    if path.is_dir():
        path = next(
            (path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()), path
        )
    if not path.is_file():
        raise UserError(f"There is no weight file {str(path)!r}. Give --weights a .safetensors or .pth file.")
    try:
        content: Mapping[str, Any] = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors each have their own
        raise UserError(f"{str(path)!r} cannot be read as weights: {first_line(error)}") from error
    state = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(
            f"{str(path)!r} holds no weights. Give --weights a .safetensors or .pth file with a state dict."
        )
    return state


def fill(model: nn.Module, state: StateDict, source: str, convert: Callable[[StateDict], nn.Module]) -> bool:
    """Load *state* into *model* in place; True when its head was taken over, False when the head stays as it was drawn.

    A head with other shapes is replaced; every other tensor must fit by name and shape. Where it does not,
    ``convert(state)`` must return a second model with the weights adapted by timm (position embeddings at another
    image size, foreign names).

    Raises UserError with the number of tensors that fit, and names *source*, when neither succeeds.
    """
    own = model.state_dict()
    # Counters are absent from old files and from those of other frameworks, and do not change what a model computes.
    state = {n: v for n, v in own.items() if n.endswith("num_batches_tracked")} | state
    inside_head = tuple(f"{path}." for path in head_modules(model))
    head = {name for name in own if name.startswith(inside_head)}
    keeps_head = all(_fits(state, own, name) for name in head)
    if not keeps_head:
        state = {n: v for n, v in state.items() if n not in head} | {n: own[n] for n in head}
    misfits = [name for name in own if not _fits(state, own, name)] + sorted(state.keys() - own.keys())
    if misfits:
        state = _converted(model, state, convert)
        if not state:
            raise UserError(_misfit(own.keys() - head, misfits, source))
    model.load_state_dict(state)
    return keeps_head


def require_pretrained(name: str) -> None:
    """Raises UserError when timm knows no pretrained weights for the registry model *name*."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise UserError(f"There are no pretrained weights for {name}. Choose another model, or: {REMEDIES}")


def hub_overlay(name: str) -> dict[str, Any]:
    """What to tell timm so that weights in the local cache load without a network; empty when they must be fetched.

    Raises UserError within seconds, and not after the hub client's minute of retries, when they must be fetched and
    nothing answers.
    """
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return {}
    repository, _, revision = cfg.hf_hub_id.partition("@")
    for file in (cfg.hf_hub_filename,) if cfg.hf_hub_filename else ("model.safetensors", "pytorch_model.bin"):
        cached = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(cached, str):
            return {"file": cached, "custom_load": False}  # custom formats are those of other hosts
    if hub.HF_HUB_OFFLINE or not _answers(hub.ENDPOINT):
        raise unreachable(name, "the machine is offline or HF_HUB_OFFLINE is set")
    return {}


def unreachable(name: str, reason: object) -> UserError:
    """The error for weights that could not be fetched."""
    detail = (first_line(reason) if isinstance(reason, BaseException) else str(reason)).rstrip(".")
    return UserError(
        f"The pretrained weights of {name} aren't on this machine and can't be fetched ({detail}). {REMEDIES}"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error message, or the name of its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _answers(address: str) -> bool:
    """Whether anything answers at *address*, also through a proxy; only a dead line counts as no."""
    try:
        urlopen(Request(address, method="HEAD"), timeout=_PROBE_SECONDS).close()
    except HTTPError:
        return True
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the hub client has its own certificates
    except OSError:
        return False
    return True


def _fits(state: StateDict, own: Mapping[str, Tensor], name: str) -> bool:
    return name in state and state[name].shape == own[name].shape


def _converted(model: nn.Module, state: StateDict, convert: Callable[[StateDict], nn.Module]) -> StateDict:
    """The state dict after timm adapted it to *model*; empty when timm could not, or left random values standing."""
    try:
        adapted: StateDict = convert(dict(state)).state_dict()
    except Exception:  # a filter meant for other files may stumble anywhere; the caller reports what does not fit
        return {}
    for name, value in model.named_parameters():
        drawn = value.ndim > 1 and value.numel() > 1 and bool((value != value.flatten()[0]).any())
        if drawn and name not in state and torch.equal(adapted[name], value):
            return {}
    return adapted


def _misfit(backbone: set[str], misfits: list[str], source: str) -> str:
    fitting = len(backbone - set(misfits))
    return (
        f"The weights in {source} do not fit this model: {fitting} of its {len(backbone)} tensors "
        f"match by name and shape (the first that does not: {misfits[0]!r}). Choose the --model they were made for."
    )
