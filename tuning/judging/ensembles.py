"""Several models of the same classes as one: the mean of their probabilities, or of their weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tuning.errors import UserError
from tuning.judging.final_metrics import mean_of
from tuning.judging.finished import Finished

MEAN, AVERAGED = "ensemble", "averaged weights"


def refuse_other_classes(names: Sequence[str], members: Sequence[Finished]) -> None:
    """Refuse to put models together that don't have the same classes, in whatever order.

    Raises:
        UserError: names those that only one of two has.
    """
    for name, other in zip(names[1:], members[1:], strict=True):
        apart = sorted(set(members[0].classes) ^ set(other.classes))
        if apart:
            raise UserError(
                f"--ensemble {name} was trained for other classes than --run {names[0]}: only one of the two has "
                f"{', '.join(map(repr, apart[:8]))}. Put models of the same classes together."
            )


def side_by_side(names: Sequence[str], members: Sequence[Finished], logits: Sequence[Tensor]) -> dict[str, Tensor]:
    """Logits ``(N, K)`` of each member, of their mean probabilities, and of their averaged weights if there are any.

    Args:
        logits: of the members in their own orders of classes, and last those of `averaged_weights`, where there are
            some. The result has all in the order of the first member's classes.
    """
    classes = members[0].classes
    found = {
        name: one[:, [member.classes.index(label) for label in classes]]
        for name, member, one in zip(names, members, logits, strict=False)
    }
    if len(members) > 1:
        found[MEAN] = mean_of(list(found.values()))
    if len(logits) > len(members):
        found[AVERAGED] = logits[-1]
    return found


def averaged_weights(members: Sequence[Finished]) -> nn.Module | None:
    """A model whose weights are the mean of the members' (Izmailov et al. 2018; Wortsman et al. 2022).

    None where they differ in architecture, shapes, input or the order of classes. Running statistics of norms are
    averaged too, not computed anew.
    """
    first, states = members[0], [member.model.state_dict() for member in members]
    alike = all(
        (one.info.architecture, one.info.input_size, one.info.mean, one.info.std, one.classes)
        == (first.info.architecture, first.info.input_size, first.info.mean, first.info.std, first.classes)
        and {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in states[0].items()}
        for one, state in zip(members, states, strict=True)
    )
    if not alike:
        return None
    model = copy.deepcopy(first.model)
    model.load_state_dict({name: _mean([state[name] for state in states]) for name in states[0]})
    return model.eval()


def _mean(values: Sequence[Tensor]) -> Tensor:
    if not values[0].is_floating_point():
        return values[0]  # counters and indices
    return torch.stack([value.double() for value in values]).mean(dim=0).to(values[0].dtype)
