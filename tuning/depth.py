"""One notion of depth for freezing and layer-wise learning rates: 0 is the stem, the largest id is the head.

All names are those of the raw model, before any wrapper.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

import timm.optim._param_groups as timm_groups
from timm.models import group_parameters
from torch import nn

from tuning.errors import UserError, did_you_mean
from tuning.stages import PARTS

# By the name of the class: timm's own norms are no subclasses of torch's. Affine takes the place of a norm in ResMLP.
_NORM = re.compile(r"(Batch|Layer|Group|Instance|Rms|RMS|Evo|Response|Simple)Norm|^Affine$")


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Depth of every parameter: {name: 0 (stem) ... top (head)}, as timm's ``group_matcher(coarse=False)`` sees it.

    A model without a ``group_matcher`` is cut into runs of twelve parameter tensors, as timm does. Raises ValueError
    for a wrapped model, whose names differ from the raw ones.
    """
    names = [name for name, _ in model.named_parameters()]
    if names and all(name.startswith(("module.", "_orig_mod.")) for name in names):
        raise ValueError(
            f"depth is a property of the raw model, got a wrapped one (first parameter {names[0]!r}): unwrap it"
        )
    ids = _matched_ids(model)
    top = max(ids.values(), default=0)
    return {name: ids.get(name, top) for name in names}


def head_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters of the classifier, or of all classifiers of a distilled model.

    Raises UserError when the model has none (``num_classes=0``).
    """
    modules = head_modules(model)
    names = frozenset(f"{path}.{name}" for path, head in modules.items() for name, _ in head.named_parameters())
    if not names:
        raise UserError(f"{type(model).__name__} has no classifier: choose a model that ends in one.")
    return names


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier modules by path: those that timm's configuration names, else what ``get_classifier()`` returns."""
    known = dict(model.named_modules())
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    paths = (named,) if isinstance(named, str) else tuple(named)
    if paths and all(path in known for path in paths):
        return {path: known[path] for path in paths}
    get_classifier = getattr(model, "get_classifier", None)
    found = get_classifier() if callable(get_classifier) else ()
    parts = {id(part) for part in (found if isinstance(found, (tuple, list)) else (found,))}
    return {path: module for path, module in known.items() if id(module) in parts}


def open_names(model: nn.Module, open: str | int | float) -> frozenset[str]:
    """Names of the parameters that a stage trains.

    'head': the classifier alone. 'all': everything. A whole number n: the head, its layer, and the n layers next
    below. A fraction 0 < f <= 1: that part of the depth, ``n = ceil(f * layers below the head)``. At any depth, beside
    the head: 'norms': scales and shifts of all normalisation layers (Frankle et al. 2021, arXiv:2003.00152; the last
    stage of FixRes, Touvron et al. 2019, arXiv:1906.06423). 'norms-biases': those and all biases (BitFit, Ben Zaken et
    al. 2022, arXiv:2106.10199, opens biases alone). Raises UserError for anything else.
    """
    head = head_names(model)
    ids = layer_ids(model)
    if open == "head":
        return head
    if open == "all":
        return frozenset(ids)
    if open in PARTS:
        norms = norm_names(model)
        if not norms:
            raise UserError(f"open={open!r}: {type(model).__name__} has no normalisation layers with parameters.")
        return head | norms | (bias_names(model) if open == "norms-biases" else frozenset())
    lowest = max(ids.values()) - _layers_to_open(open, max(ids.values()))
    return head | {name for name, depth in ids.items() if depth >= lowest}


def norm_names(model: nn.Module) -> frozenset[str]:
    """Names of the scales and shifts of all normalisation layers, of whatever kind."""
    return frozenset(
        f"{path}.{name}"
        for path, module in model.named_modules()
        if _NORM.search(type(module).__name__)
        for name, _ in module.named_parameters(recurse=False)
    )


def bias_names(model: nn.Module) -> frozenset[str]:
    """Names of all parameters that are added to something: ``bias``, and ``q_bias`` and ``v_bias`` of some models."""
    return frozenset(name for name, _ in model.named_parameters() if re.search(r"(^|[._])bias$", name))


def set_open(model: nn.Module, names: Collection[str]) -> None:
    """Let exactly the parameters in *names* train, in place. Raises ValueError for a name the model lacks."""
    parameters = dict(model.named_parameters())
    unknown = sorted(set(names) - parameters.keys())
    if unknown:
        raise ValueError(f"the model has no parameter {unknown[0]!r} ({len(unknown)} unknown names)")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)


def closed_eval(model: nn.Module) -> None:
    """After ``model.train()``: put modules whose parameters are all closed into evaluation mode, with all they contain.

    Closed layers then compute what they computed in pretraining: no dropout, no drop-path, and running statistics
    that stand still (``requires_grad=False`` alone lets BatchNorm drift). A module of which a part is open trains: the
    drop-path of a block whose norms are open acts, the dropout within its closed attention rests. Modules without
    parameters follow the module that holds them.
    """
    parameters = list(model.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        model.eval()
        return
    for child in model.children():
        closed_eval(child)


def freeze_batch_norm(model: nn.Module) -> None:
    """Put every module with running statistics into evaluation mode, whether its parameters are open or not."""
    for module in model.modules():
        # By buffer, not by class: timm's EvoNorm and its like are no subclasses of BatchNorm.
        if any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False)):
            module.eval()


def _matched_ids(model: nn.Module) -> Mapping[str, int]:
    matcher = getattr(model, "group_matcher", None)
    if callable(matcher):
        ids: Mapping[str, int] = group_parameters(model, matcher(coarse=False), reverse=True)
        return ids
    # The public name is recent; older releases know the same function as _layer_map.
    fallback = getattr(timm_groups, "auto_group_layers", None) or timm_groups._layer_map
    cut: Mapping[str, int] = fallback(model)
    return cut


def _layers_to_open(open: str | int | float, below: int) -> int:
    """How many of the *below* layers under the head's own are open."""
    if isinstance(open, str):
        hint = did_you_mean(open, ("head", "all", *PARTS))
        raise UserError(
            f"open={open!r} is not a depth: say 'head', 'all', 'norms', 'norms-biases', a number of layers or a "
            f"fraction.{hint}"
        )
    if isinstance(open, float) and 0 < open <= 1:
        return math.ceil(open * below)
    if isinstance(open, int) and not isinstance(open, bool) and 1 <= open <= below:
        return open
    raise UserError(
        f"open={open!r} is not a depth of this model, which has {below} layers below its head: "
        f"say 'head', 'all', a number of layers from 1 to {below}, or a fraction above 0.0 and up to 1.0."
    )
