"""Mixup and CutMix: timm's pictures and targets for the same draws, and draws that are functions of counters alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from pictures import encode, noise
from timm.data import mixup as timm_mixup
from torch import Tensor

from tuning.data.loader import Micro, TrainFeed
from tuning.data.mixing import Mix, Mixing, betas, clipped_boxes, mixed
from tuning.data.sampling import TrainOrder
from tuning.data.transforms import Crop, Normalise
from tuning.sizes import BatchPlan

IMAGES, SIZE = 23, 16
CPU = torch.device("cpu")


def batch(images: int = 6, size: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)


def mix(partners: list[int], blend: list[float], boxes: list[tuple[int, int, int, int]]) -> Mix:
    return Mix(torch.tensor(partners), torch.tensor(blend), torch.tensor(boxes), torch.tensor(blend))


NO_BOX = (0, 0, 0, 0)


def test_mixup_is_timms() -> None:
    """timm mixes with the batch turned round; a share per image, as in its mode elem."""
    pictures = batch()
    shares = [0.0, 1.0, 0.5, 0.25, 0.9, 0.1]
    ours = mixed(pictures, mix([5, 4, 3, 2, 1, 0], shares, [NO_BOX] * 6))
    theirs = pictures.clone()
    reference = timm_mixup.Mixup(mixup_alpha=1.0, mode="elem", num_classes=3)
    reference._params_per_elem = lambda count: (np.array(shares, dtype=np.float32), np.zeros(count, dtype=bool))
    reference._mix_elem(theirs)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.equal(ours[1], pictures[1])
    assert torch.equal(ours[0], pictures[5])
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("own", [0.0, 0.2, 0.75, 1.0])
@pytest.mark.parametrize("centre", [(0, 0), (3, 15), (8, 8), (15, 1)])
def test_cutmix_is_timms(monkeypatch: pytest.MonkeyPatch, own: float, centre: tuple[int, int]) -> None:
    """The same centre and share: the same box, the same pixels to the bit, the same corrected share."""
    pictures = batch()
    draws = iter(centre)
    monkeypatch.setattr(np.random, "randint", lambda *_, size=None: next(draws))
    # Even sides: versions of timm differ in how they halve odd ones.
    side = int(SIZE * np.sqrt(1 - own)) // 2 * 2
    own = 1 - (side / SIZE) ** 2
    (top, bottom, left, right), share = timm_mixup.cutmix_bbox_and_lam(pictures.shape, own, correct_lam=True)
    at = [np.array([(place + 0.5) / SIZE]) for place in centre]
    (ours,) = clipped_boxes(np.array([own]), SIZE, *at)
    assert ours.tolist() == [top, bottom, left, right]
    theirs = pictures.clone()
    theirs[:, :, top:bottom, left:right] = pictures.flip(0)[:, :, top:bottom, left:right]
    assert torch.equal(mixed(pictures, mix([5, 4, 3, 2, 1, 0], [1.0] * 6, [tuple(ours.tolist())] * 6)), theirs)
    assert share == pytest.approx(1 - (bottom - top) * (right - left) / SIZE**2)


def drawn(mixup: float, cutmix: float, epoch: int = 0, seed: int = 0, images: int = 4096, size: int = 24) -> Mix:
    return Mixing(mixup, cutmix, seed, images).draw(epoch, np.arange(images), np.ones(images, dtype=bool), size)


def test_the_share_of_the_label_is_the_share_of_the_pixels() -> None:
    """Counted in the result: own pixels are 1, the partner's 0."""
    for mixup, cutmix in ((0.4, 0.0), (0.0, 1.0), (0.4, 1.0)):
        made = drawn(mixup, cutmix, images=64)
        for place in range(64):
            one = Mix(torch.tensor([1, 1]), *(part[[place, place]] for part in made[1:]))
            pixels = torch.stack((torch.ones(3, 24, 24), torch.zeros(3, 24, 24)))
            own = mixed(pixels, one)[0]
            assert own.double().mean().item() == pytest.approx(made.shares[place].item(), abs=1e-6)
            if not mixup:
                assert own[0].sum().item() == round(made.shares[place].item() * 24**2)


def test_boxes_have_the_area_drawn_and_lie_anywhere() -> None:
    made = drawn(0.0, 1.0)
    top, bottom, left, right = made.boxes.unbind(1)
    assert int(made.boxes.min()) == 0
    assert int(made.boxes.max()) == 24
    own = betas(4096, 0, 0, 1.0, 2)
    sides = np.floor(24 * np.sqrt(1 - own))
    whole = ((bottom - top).numpy() == sides) & ((right - left).numpy() == sides)
    assert 0.2 < whole.mean() < 0.9, "boxes at the rim are clipped, the others are not"
    assert ((bottom - top).numpy() <= sides).all()
    assert (made.shares.numpy() >= own - 1e-6).all()
    assert top[whole].float().std() > 3


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_shares_are_of_the_beta_distribution(alpha: float) -> None:
    shares = drawn(alpha, 0.0).shares.double()
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


@pytest.mark.parametrize("alpha", [0.01, 100.0])
def test_the_ends_of_alpha_are_finite(alpha: float) -> None:
    shares = drawn(alpha, alpha).shares
    assert ((shares >= 0) & (shares <= 1)).all()


def test_with_both_each_picture_gets_one_of_them() -> None:
    made = drawn(1.0, 1.0)
    cut = made.boxes[:, 1] > made.boxes[:, 0]
    assert ((made.blend == 1) | ~cut).all()
    assert 0.4 < cut.double().mean() < 0.55


def test_draws_are_independent_of_one_another() -> None:
    """Between epochs, seeds, methods and neighbours."""
    base = drawn(1.0, 0.0).shares.numpy()
    others = [drawn(1.0, 0.0, epoch=1), drawn(1.0, 0.0, seed=1)]
    columns = [other.shares.numpy() for other in others] + [betas(4096, 0, 0, 1.0, 2), np.roll(base, 1)]
    assert all(abs(np.corrcoef(base, column)[0, 1]) < 0.06 for column in columns)


def test_no_generator_is_moved() -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    betas.cache_clear()
    mixed(batch(), Mixing(0.4, 1.0, 0, 6).draw(0, np.arange(6), np.ones(6, dtype=bool), SIZE))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize("real", [[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]])
def test_filler_is_neither_a_partner_nor_mixed(real: list[int]) -> None:
    pictures, counted = batch(), np.array(real, dtype=bool)
    made = Mixing(1.0, 1.0, 0, 6).draw(0, np.arange(6), counted, SIZE)
    result = mixed(pictures, made)
    resting = ~counted if counted.sum() > 1 else np.ones(6, dtype=bool)
    assert torch.equal(result[resting], pictures[resting])
    assert (made.shares[resting] == 1).all()
    mixing = np.flatnonzero(~resting)
    assert sorted(made.partners[mixing].tolist()) == mixing.tolist()
    assert (made.partners[mixing] != torch.from_numpy(mixing)).all()


def rows() -> Dataset:
    pictures = [{"bytes": encode(noise(20, 20, seed=n)), "path": None} for n in range(IMAGES)]
    return Dataset.from_dict({"image": pictures, "label": [n % 3 for n in range(IMAGES)]})


def feed(data: Dataset, mixing: Mixing | None, *, workers: int = 0, rank: int = 0, world: int = 1) -> TrainFeed:
    order = TrainOrder(IMAGES, 7, BatchPlan(8, 4, world), rank)
    crop, normalise = Crop(SIZE, "bilinear", 1.0), Normalise((0.5,) * 3, (0.5,) * 3)
    return TrainFeed(
        data, order, crop, normalise, augment="light", flip="both", workers=workers, device=CPU, mixing=mixing
    )


MIXING = Mixing(0.4, 1.0, 7, IMAGES)


def equal(one: list[Micro], other: list[Micro]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_a_feed_mixes_what_it_would_deal_out_without() -> None:
    data = rows()
    plain, made = list(feed(data, None).epoch(1)), list(feed(data, MIXING).epoch(1))
    assert len(plain) == len(made) == 6
    for before, after in zip(plain, made, strict=True):
        assert before.others is None
        assert before.shares is None
        drawing = MIXING.draw(1, before.rows.numpy(), before.weights.numpy() > 0, SIZE)
        assert torch.equal(after.inputs, mixed(before.inputs, drawing))
        assert not torch.equal(after.inputs, before.inputs)
        assert torch.equal(after.labels, before.labels)
        assert torch.equal(after.others, before.labels[drawing.partners])
        assert torch.equal(after.shares, drawing.shares)
        filler = before.weights == 0
        assert torch.equal(after.inputs[filler], before.inputs[filler])
    assert (made[-1].weights == 0).sum() == 1


def test_draws_depend_on_no_worker_no_generator_and_no_history() -> None:
    data = rows()
    reference = [list(feed(data, MIXING).epoch(epoch)) for epoch in (0, 1)]
    torch.manual_seed(5)
    np.random.seed(5)
    again = feed(data, MIXING, workers=2)
    assert equal(list(again.epoch(1)), reference[1]), "another worker count, another epoch first, other generators"
    betas.cache_clear()
    assert equal(list(feed(data, MIXING).epoch(1, first_step=2)), reference[1][4:]), "restarted at the third step"
    assert not torch.equal(reference[0][0].shares, reference[1][0].shares)


def test_two_processes_deal_out_the_micro_batches_of_one() -> None:
    """With the same micro-batch: partners are of the same one, and shares belong to the picture."""
    data = rows()
    alone = list(feed(data, MIXING).epoch(0))
    ranks = [list(feed(data, MIXING, rank=rank, world=2).epoch(0)) for rank in (0, 1)]
    assert equal(alone, [micro for pair in zip(*ranks, strict=True) for micro in pair])
