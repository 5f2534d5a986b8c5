"""``timm.create_model`` without its global random state, its log lines and its raw errors."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import nn

from tuning.errors import UserError
from tuning.models.weights import first_line


def create(
    name: str,
    wanted: dict[str, Any],
    cfg: Mapping[str, Any],
    seed: int,
    pretrained: bool,
    overlay: dict[str, Any] | None,
) -> nn.Module:
    """``timm.create_model(name, **wanted)``, with initial values that depend on *seed* alone.

    Drops from *wanted*, in place, what the model neither takes nor needs. Raises UserError when it does not take the
    rest, and lets errors of the network and of files pass.
    """
    while True:
        try:
            with _quiet(), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                model: nn.Module = timm.create_model(name, pretrained, pretrained_cfg_overlay=overlay, **wanted)
            return model
        except TypeError as error:
            refused = next((key for key in wanted if f"'{key}'" in str(error)), None)
            if refused is None:
                raise
            if refused in ("img_size", "dynamic_img_size") or wanted[refused] == 0:
                del wanted[refused]  # such a network takes any size or none but its own, or drops nothing anyway
            else:
                flag = refused.replace("_", "-")
                raise UserError(f"{name} takes no --{flag} (got {wanted[refused]}): leave it out.") from error
        except (AssertionError, ValueError, RuntimeError) as error:
            if "img_size" not in wanted:
                raise
            raise wrong_size(name, wanted["img_size"], cfg, error) from error


def wrong_size(
    name: str,
    image_size: int,
    cfg: Mapping[str, Any],
    error: BaseException,
    multiple: int | None = None,
    flag: str = "--image-size",
) -> UserError:
    """The error for an image size that *name* cannot work at; *cfg* holds its own size."""
    own = (cfg.get("input_size") or (3, 224, 224))[-1]
    patch = re.search(r"patch(\d+)", name)
    multiple = multiple or (int(patch[1]) if patch else None)
    hint = f"; choose a multiple of {multiple}" if multiple else ""
    return UserError(
        f"{flag} {image_size} does not work with {name} ({first_line(error)}). Its own size is {own}{hint}."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines or warnings of timm and the hub client: what matters becomes an error or a sentence in ModelInfo."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
