"""Two class maps that must mean the same: that of the data and that of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tuning.errors import UserError, did_you_mean

SHOWN = 8


def outputs_for(data: Sequence[str], model: Sequence[str], what: str) -> Tensor:
    """The output of the model for every class of the data, by name: ``(classes of the data,)`` int64.

    The data may have its classes in another order, or fewer of them.

    Args:
        data: names of the classes of the data.
        model: names of the model's outputs.
        what: the data, for the message.

    Raises:
        UserError: names that the model doesn't know, with what it has instead.
    """
    place = {name: number for number, name in enumerate(model)}
    foreign = [name for name in data if name not in place]
    if foreign:
        missing = [name for name in model if name not in set(data)]
        raise UserError(
            f"{what} has classes that the model doesn't know: {_listed(foreign)}.{did_you_mean(foreign[0], missing)} "
            f"Classes of the model that the data lacks: {_listed(missing) or 'none'}. Rename those of the data, or "
            "take the data that the model was trained for."
        )
    return torch.tensor([place[name] for name in data])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, names[:SHOWN])) + more
