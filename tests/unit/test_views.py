"""Test-time augmentation against views made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tuning.judging.views import Views, averaged, views

BY_HAND = {
    "none": [lambda a: a],
    "flip": [lambda a: a, np.fliplr],
    "flips": [lambda a: a, np.fliplr, np.flipud, lambda a: np.rot90(a, 2)],
    "dihedral": [(lambda a, k=k, f=f: np.rot90(f(a), k)) for k in range(4) for f in (np.asarray, np.fliplr)],
}


class Net(nn.Module):
    """Sees every pixel with a weight of its own, and notes that it is in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 5 * 5, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1))


@pytest.mark.parametrize("name", list(BY_HAND))
def test_the_views_are_those_made_by_hand(name: Views) -> None:
    picture = torch.arange(75.0).view(1, 3, 5, 5)
    found = {view.numpy().tobytes() for view in (v.contiguous() for v in views(picture, name))}
    pixels = picture[0].permute(1, 2, 0).numpy()
    by_hand = [np.ascontiguousarray(make(pixels).transpose(2, 0, 1)) for make in BY_HAND[name]]
    assert found == {one.tobytes() for one in by_hand}
    assert len(found) == len(views(picture, name)) == len(BY_HAND[name])


@pytest.mark.parametrize("name", list(BY_HAND))
def test_probabilities_are_averaged(name: Views) -> None:
    torch.manual_seed(0)
    net, pictures = Net().eval(), torch.randn(6, 3, 5, 5)
    with torch.inference_mode():
        expected = []
        for picture in pictures:
            arrays = [make(picture.permute(1, 2, 0).numpy()) for make in BY_HAND[name]]
            batch = torch.stack([torch.from_numpy(np.ascontiguousarray(a.transpose(2, 0, 1))) for a in arrays])
            expected.append(net(batch).softmax(1).mean(0))
        torch.testing.assert_close(averaged(net, name)(pictures).softmax(1), torch.stack(expected))
