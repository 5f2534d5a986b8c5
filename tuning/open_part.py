"""The open part of a model by itself: what a stage trains whose closed part has been computed once for every image.

It begins at the lowest open layer. A timm model runs most of its layers one after the other, each on the output of the
one before; that is watched on a blank image, not assumed, so any model has the parts that it shows to have.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from tuning.errors import UserError


class HeadOnly(nn.Module):
    """The classifier of a timm model alone: pooled features ``(B, C)`` -> logits ``(B, K)``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.drop_rate = _head_dropout(model)
        self.classifier: Any = model.get_classifier()  # type: ignore[operator]

    def forward(self, features: Tensor) -> Tensor:
        """Dropout as in the whole model, then the classifier."""
        dropped = nn.functional.dropout(features, self.drop_rate, self.training)
        return self.classifier(dropped)  # type: ignore[no-any-return]

    def of(self, model: nn.Module) -> HeadOnly:
        """The same part of another model of this architecture."""
        return HeadOnly(model)

    def below(self, model: nn.Module, images: Tensor) -> Tensor:
        """What *model* hands to its classifier, ``(B, C)``, for *images* ``(B, 3, H, W)``."""
        return pooled(model, images)

    def pooled(self, features: Tensor) -> Tensor:
        """What the classifier gets: *features* themselves."""
        return features

    def get_classifier(self) -> nn.Module:
        """As timm's models have it."""
        return self.classifier  # type: ignore[no-any-return]


class Upper(nn.Module):
    """Some layers below the classifier and all above them: what enters there, ``(B, ...)`` -> logits ``(B, K)``.

    Args:
        model: the raw model, shared, not copied.
        layers: paths of the modules that run one after the other up to the pooling, as `open_part` finds them.
        numbers: that an image has where the lowest of them takes it.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], numbers: int) -> None:
        super().__init__()
        self.model, self.layers, self.numbers = model, tuple(layers), numbers

    def forward(self, features: Tensor) -> Tensor:
        """The open layers, then pooling and classifier as in the whole model."""
        return self.model.forward_head(self._trunk(features))  # type: ignore[operator,no-any-return]

    def of(self, model: nn.Module) -> Self:
        """The same part of another model of this architecture."""
        return type(self)(model, self.layers, self.numbers)

    def below(self, model: nn.Module, images: Tensor) -> Tensor:
        """What enters the lowest of these layers, for *images* ``(B, 3, H, W)``."""
        with _left_out([model.get_submodule(path) for path in self.layers]):
            return model.forward_features(images)  # type: ignore[operator,no-any-return]

    def pooled(self, features: Tensor) -> Tensor:
        """What the classifier gets, ``(B, C)``."""
        return self.model.forward_head(self._trunk(features), pre_logits=True)  # type: ignore[operator,no-any-return]

    def _trunk(self, features: Tensor) -> Tensor:
        for path in self.layers:
            features = self.model.get_submodule(path)(features)
        return features

    def get_classifier(self) -> nn.Module:
        """As timm's models have it."""
        return self.model.get_classifier()  # type: ignore[operator,no-any-return]


Part = HeadOnly | Upper


def pooled(model: nn.Module, images: Tensor) -> Tensor:
    """What the classifier of a timm model gets, ``(B, C)``, for *images* ``(B, 3, H, W)``."""
    return model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator,no-any-return]


class _Call(NamedTuple):
    """A module that ran: its path, what it took (None = not one tensor alone) and what it gave."""

    path: str
    module: nn.Module
    taken: Tensor | None
    given: Any


def open_part(model: nn.Module, opened: Collection[str], image_size: int) -> Upper:
    """The part of *model* from its lowest open layer up.

    Args:
        model: the raw model; a blank image goes through it in evaluation mode, and it is left as it was.
        opened: names of the open parameters.
        image_size: side of that image, in pixels.

    Raises:
        UserError: nothing is closed below that layer, or what comes after it isn't a chain of modules.
    """
    ways, result = _watched(model, image_size)
    first = next((n for n, call in enumerate(ways) if not _names(call).isdisjoint(opened)), len(ways))
    direct = {name for name, _ in model.named_parameters(recurse=False)}
    if first == 0 or not direct.isdisjoint(opened):
        raise UserError(f"cache_features: no layers of {type(model).__name__} are closed below the lowest open one.")
    upper, lowest = ways[first:], ways[first - 1].given
    handed = [*(call.taken for call in upper), result]
    chained = all(call.given is after for call, after in zip(ways[first - 1 :], handed, strict=True))
    once = len({call.path for call in ways}) == len(ways)
    if not (chained and once and isinstance(lowest, Tensor)):
        raise UserError(
            f"cache_features: the layers of {type(model).__name__} from {upper[0].path if upper else 'the last'} on do "
            "not run one after the other, so they can't be run by themselves. Leave cache_features out."
        )
    return Upper(model, [call.path for call in upper], lowest.numel())


def _watched(model: nn.Module, image_size: int) -> tuple[list[_Call], Any]:
    """The modules that ``forward_features`` runs, in their order, and what it returns."""
    calls: list[_Call] = []
    modes = {module: module.training for module in model.modules()}
    weight = next(model.parameters())
    hooks = [module.register_forward_hook(_noting(calls, path), with_kwargs=True) for path, module in _pieces(model)]
    try:
        model.eval()
        with torch.inference_mode():
            blank = torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype)
            return calls, model.forward_features(blank)  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training


def _noting(calls: list[_Call], path: str) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        alone = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        calls.append(_Call(path, module, args[0] if alone else None, output))

    return note


def _pieces(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts of a model; of what only runs or holds its parts in order, those."""
    for name, child in module.named_children():
        holds = type(child).forward is nn.Sequential.forward or isinstance(child, nn.ModuleList)
        if holds and len(list(child.children())):
            yield from _pieces(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _names(call: _Call) -> set[str]:
    return {f"{call.path}.{name}" for name, _ in call.module.named_parameters()}


@contextmanager
def _left_out(layers: Sequence[nn.Module]) -> Iterator[None]:
    """In the body each of *layers* gives what it takes."""
    for layer in layers:
        layer.forward = lambda taken: taken
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _head_dropout(model: nn.Module) -> float:
    """Probability of the dropout right before the classifier: a module in ViT-like models, an attribute in others."""
    modules = dict(model.named_modules())
    found = [modules[name] for name in ("head_drop", "head.drop") if name in modules]
    if found:
        return float(getattr(found[0], "p", 0.0))
    return float(getattr(model, "drop_rate", 0.0))
