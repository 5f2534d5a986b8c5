"""Initial values of linear and convolution layers, drawn from an own generator: they depend on the seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tuning.depth import head_modules
from tuning.errors import UserError, did_you_mean

SCHEMES = ("default", "kaiming", "xavier", "orthogonal", "zero")


def initialise(model: nn.Module, scheme: str, seed: int = 0) -> None:
    """Draw every linear and convolution weight of *model* anew, in place; biases become 0, norms and embeddings stay.

    'default' leaves timm's values. 'kaiming': normal, variance 2 / fan_in (He et al. 2015, arXiv:1502.01852).
    'xavier': uniform, variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010). 'orthogonal': see `orthogonal`. Fans
    are those of one convolution group. Raises UserError for an unknown scheme and for 'zero': behind a layer of zeros
    nothing depends on the picture, and before one there is no gradient.
    """
    check_scheme(scheme, whole_network=True)
    _draw([model], scheme, seed)


def init_head(model: nn.Module, scheme: str, seed: int = 0) -> None:
    """Draw the classifier (all classifiers of a distilled model) anew, in place: a scheme of `initialise`, or 'zero'.

    Raises UserError for an unknown scheme.
    """
    check_scheme(scheme, whole_network=False)
    _draw(head_modules(model).values(), scheme, seed)


def check_scheme(scheme: str, whole_network: bool) -> None:
    """Raises UserError for an unknown scheme, and for 'zero' on a whole network."""
    if scheme not in SCHEMES:
        known = ", ".join(SCHEMES)
        raise UserError(f"{scheme!r} is no initialisation: choose from {known}.{did_you_mean(scheme, SCHEMES)}")
    if scheme == "zero" and whole_network:
        raise UserError(
            "--init zero: a network of zeros answers every picture alike, and no gradient changes that. Choose "
            "kaiming, xavier or orthogonal, or --head-init zero for the head alone."
        )


def orthogonal(rows: int, columns: int, count: int, generator: torch.Generator) -> Tensor:
    """Random matrices ``(count, rows, columns)`` with orthonormal rows, or columns where there are fewer of them.

    The Q of a Gaussian matrix, with the signs that make it uniform. Saxe, McClelland and Ganguli 2013, arXiv:1312.6120.
    """
    gaussian = torch.randn(count, max(rows, columns), min(rows, columns), generator=generator)
    q, r = torch.linalg.qr(gaussian)
    q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)
    matrices: Tensor = q if rows >= columns else q.mT
    return matrices


@torch.no_grad()
def _draw(roots: Iterable[nn.Module], scheme: str, seed: int) -> None:
    if scheme == "default":
        return
    generator = torch.Generator().manual_seed(seed)
    for root in roots:
        for module in root.modules():
            if isinstance(module, (nn.Linear, _ConvNd)):
                module.weight.copy_(_weight(module, scheme, generator))
                if module.bias is not None:
                    module.bias.zero_()


def _weight(module: nn.Linear | _ConvNd, scheme: str, generator: torch.Generator) -> Tensor:
    """New weight of one layer, ``(out, in / groups, ...)``, or ``(in, out / groups, ...)`` when it is transposed."""
    shape = module.weight.shape
    if scheme == "zero":
        return torch.zeros(shape)
    groups = module.groups if isinstance(module, _ConvNd) else 1
    rows, columns = shape[0] // groups, math.prod(shape[1:])
    if scheme == "orthogonal":
        return orthogonal(rows, columns, groups, generator).reshape(shape)
    area = math.prod(shape[2:])
    fans = (columns, rows * area)
    fan_in, fan_out = reversed(fans) if isinstance(module, _ConvTransposeNd) else fans
    if scheme == "kaiming":
        return torch.randn(shape, generator=generator) * math.sqrt(2 / fan_in)
    bound = math.sqrt(6 / (fan_in + fan_out))
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
