"""Learning rate and weight decay that are taken where none is given, by the optimizer's name. Imports no torch.

For fine-tuning; `docs/optimizers.md` has them as a table, with sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tuning.cli.coerce import as_key
from tuning.flags import Flags
from tuning.flags.names import RISES_FIRST
from tuning.lr_search.ranges import DEFAULT_LRS, kind_of

LONGEST_WARMUP = 1.0  # epochs
SHARE_OF_STAGE = 0.1
# An L2 penalty that passes through Adam's division decays nothing (Loshchilov and Hutter 2019, arXiv:1711.05101).
UNDECAYED = (
    *("adam", "adamax", "nadam", "nadamlegacy", "radam", "radamlegacy", "adagrad", "adadelta", "adopt", "cadopt"),
    *("madgrad", "kron", "bnbadam", "bnbadam8bit", "fusedadam"),
)
# Words in timm's names of optimizers that have a number called momentum; others ignore it.
WITH_MOMENTUM = ("sgd", "momentum", "nesterov", "lars", "larc", "rmsprop", "muon", "kron", "madgrad", "adafactorbv")


@dataclass(frozen=True)
class Defaults:
    """What an optimizer is given where the user gives nothing.

    Attributes:
        lr: peak learning rate of the head when more than the head is open.
        head_lr: the same while all else is closed.
        weight_decay: of weight matrices.
    """

    lr: float
    head_lr: float
    weight_decay: float


OWN = {  # names that hold the word; the first counts
    "lars": Defaults(1.0, 3.0, 1e-4),  # steps are relative to the weights, times 0.001: arXiv:1708.03888
    "larc": Defaults(1.0, 3.0, 1e-4),
    "lamb": Defaults(1e-3, 3e-3, 0.02),  # relative to the weights; decay of arXiv:2110.00476
    "novograd": Defaults(1e-2, 3e-2, 1e-3),  # relative to the gradient's norm: arXiv:1905.11286
    "adadelta": Defaults(1.0, 1.0, 0.0),  # finds its own rate: arXiv:1212.5701
    "adan": Defaults(3e-4, 1e-3, 0.02),  # decay of arXiv:2208.06677
    "rmsprop": Defaults(3e-4, 1e-3, 1e-5),  # decay of arXiv:1905.11946
}
DECAY = {
    "plain": 1e-4,
    "sign": 0.5,
    "adaptive": 0.05,
}  # arXiv:1512.03385; arXiv:2302.06675; arXiv:2010.11929, 2111.06377


def defaults_of(optimizer: str) -> Defaults:
    """For a name of timm's factory; for a name that it doesn't know those of AdamW."""
    name = optimizer.lower()
    for word, own in OWN.items():
        if word in name:
            return own
    kind = kind_of(name)
    lrs = DEFAULT_LRS[kind]
    return Defaults(lrs["other"], lrs["head"], 0.0 if name in UNDECAYED else DECAY[kind])


def resolved(flags: Flags) -> Flags:
    """*flags* with every value that follows from the optimizer filled in."""
    found, now = defaults_of(flags.optimisation.optimizer), flags.optimisation
    optimisation = dataclasses.replace(
        now,
        lr=found.lr if now.lr is None else now.lr,
        weight_decay=found.weight_decay if now.weight_decay is None else now.weight_decay,
        warmup_epochs=0.0 if now.warmup_epochs is None else now.warmup_epochs,
    )
    staging = flags.staging
    if staging.freeze_lr is None:
        # Where the head alone is trained, the one rate that is given is its own.
        given = now.lr if isinstance(now.lr, float) and not staging.epochs else None
        staging = dataclasses.replace(staging, freeze_lr=found.head_lr if given is None else given)
    return dataclasses.replace(flags, optimisation=optimisation, staging=staging)


def resolved_stages(listed: list[Any] | None, flags: Flags) -> list[Any] | None:
    """The list under ``stages:`` with what follows from another optimizer written into the stages that name one.

    Learning rate and weight decay are its defaults unless *flags* give one for all; a warm-up is added where the
    optimizer changes. What is no stage stays as it is, for `stage_lists.read_stages` to refuse.

    Args:
        flags: before `resolved`: None is what nobody gave.
    """
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        return listed
    first, filled = flags.optimisation.optimizer, list[Any]()
    for number, entry in enumerate(listed):
        keys = {as_key(key): value for key, value in entry.items()}
        own = str(keys.get("optimizer", first))
        before = str(_keys(listed[number - 1]).get("optimizer", first)) if number else own
        more = {} if same_kind(own, first) else _missing(keys, own, flags)
        if not same_kind(own, before) and flags.optimisation.warmup_epochs is None:
            more |= _warm_up(keys, flags)
        filled.append({**entry, **more})
    return filled


def takes_momentum(optimizer: str) -> bool:
    """Whether a flag ``--momentum`` reaches an optimizer of timm's factory."""
    return any(word in optimizer.lower() for word in WITH_MOMENTUM)


def same_kind(one: str, other: str) -> bool:
    """Whether two names mean the same optimizer."""
    return one.lower() == other.lower()


def _keys(entry: Mapping[Any, Any]) -> dict[str, Any]:
    return {as_key(key): value for key, value in entry.items()}


def _missing(keys: Mapping[str, Any], optimizer: str, flags: Flags) -> dict[str, float]:
    found, more = defaults_of(optimizer), dict[str, float]()
    if "lr" not in keys and flags.optimisation.lr is None:
        more["lr"] = found.head_lr if keys.get("open") == "head" else found.lr
    if "weight_decay" not in keys and flags.optimisation.weight_decay is None:
        more["weight_decay"] = found.weight_decay
    return more


def _warm_up(keys: Mapping[str, Any], flags: Flags) -> dict[str, float]:
    """A tenth of the stage, an epoch at most; none where the schedule begins low anyway."""
    epochs = keys.get("epochs", flags.staging.epochs)
    shape = keys.get("schedule", flags.optimisation.schedule)
    if "warmup_epochs" in keys or shape in RISES_FIRST or not isinstance(epochs, int) or isinstance(epochs, bool):
        return {}
    return {"warmup_epochs": min(LONGEST_WARMUP, SHARE_OF_STAGE * max(0, epochs))}
