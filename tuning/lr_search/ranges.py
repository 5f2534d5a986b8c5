"""Learning rates that are known to work, by the kind of optimizer and what it trains. Imports no torch and no NumPy."""

from __future__ import annotations

from typing import Literal

# Kinds of optimizers, by what their names in timm's factory hold; the others scale their steps as Adam does.
PLAIN, SIGN = ("sgd", "momentum", "nesterov", "lars", "larc"), ("lion",)
Range = tuple[float, float]
Part = Literal["head", "transformer", "other"]
# Learning rates of the head worth trying, and those that --lr auto may take: head alone, transformer, other network.
SWEPT: dict[str, Range] = {"plain": (1e-5, 10.0), "adaptive": (1e-6, 1.0), "sign": (1e-7, 0.1)}
TAKEN: dict[str, dict[Part, Range]] = {
    "plain": {"head": (1e-3, 10.0), "transformer": (1e-4, 0.1), "other": (1e-3, 1.0)},
    "adaptive": {"head": (1e-5, 0.1), "transformer": (1e-6, 1e-3), "other": (1e-5, 1e-2)},
    "sign": {"head": (1e-6, 1e-2), "transformer": (1e-7, 1e-4), "other": (1e-6, 1e-3)},
}
DEFAULT_LRS: dict[str, dict[Part, float]] = {  # where a search has no confident answer
    "plain": {"head": 0.1, "transformer": 1e-2, "other": 1e-2},
    "adaptive": {"head": 1e-3, "transformer": 1e-4, "other": 3e-4},
    "sign": {"head": 1e-4, "transformer": 1e-5, "other": 3e-5},
}


def kind_of(optimizer: str) -> str:
    """``plain`` (steps grow with the gradient), ``sign`` or ``adaptive``, for a name of timm's factory."""
    name = optimizer.lower()
    for kind, words in (("plain", PLAIN), ("sign", SIGN)):
        if any(word in name for word in words):
            return kind
    return "adaptive"


def taken(optimizer: str, part: Part) -> Range:
    """Lowest and highest learning rate known to work (`TAKEN`) for what a stage trains: AdamW on a whole transformer,
    for example, between 1e-6 and 1e-3."""
    return TAKEN[kind_of(optimizer)][part]


def clamped(lr: float, optimizer: str, part: Part) -> float:
    """*lr* brought into the range that is `taken`."""
    low, high = taken(optimizer, part)
    return min(max(lr, low), high)
