"""The block that a network repeats: the unit in which a sharded model is gathered, layer after layer."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList)
INNER_SHARE = 0.8  # of a stage's parameters in its inner blocks: then those are the unit


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of the class that *model* is built from, such as ``Block`` of a ViT, in the order of the network.

    A candidate is a class with two or more instances that lie directly in a list of modules, have modules of their own
    and hold parameters. Of nested ones (a stage of blocks) the inner counts when it holds `INNER_SHARE` of the outer;
    of those side by side the one with most parameters.

    Returns:
        no module where nothing repeats.
    """
    blocks: list[nn.Module] = []
    level = [model]
    while level:
        listed = [module for outer in level for module in _listed(outer)]
        found = _largest_kind(listed)
        if blocks and _parameters(found) < INNER_SHARE * _parameters(blocks):
            break
        blocks, level = found or blocks, found or listed
    return blocks


def _listed(model: nn.Module) -> list[nn.Module]:
    """Modules in lists of modules that lie in no other such module; lists in lists are looked through."""
    found: list[nn.Module] = []
    for child in model.children():
        if not isinstance(child, CONTAINERS):
            found += _listed(child)
            continue
        for item in child.children():
            found += _listed(nn.ModuleList([item])) if isinstance(item, CONTAINERS) else [item]
    return found


def _largest_kind(modules: Iterable[nn.Module]) -> list[nn.Module]:
    kinds: dict[type, list[nn.Module]] = {}
    for module in modules:
        if any(True for _ in module.children()) and any(True for _ in module.parameters()):
            kinds.setdefault(type(module), []).append(module)
    repeated = [kind for kind in kinds.values() if len(kind) > 1]
    return max(repeated, key=_parameters, default=[])


def _parameters(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())
