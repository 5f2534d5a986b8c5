"""Classes by the numbers asked for, images by turns: an order that depends on (seed, epoch) alone."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from pictures import encode, noise
from scipy.stats import chi2
from torch.utils.data import WeightedRandomSampler

from tuning.cli.command_line import resolve_stages
from tuning.data.class_sampling import (
    EXPONENTS,
    PERIOD,
    Classes,
    drawn,
    drawn_before,
    sampled,
    sampled_order,
    times_drawn,
)
from tuning.data.loader import FeatureFeed, Micro, TrainFeed
from tuning.data.mixing import Mixing
from tuning.data.sampling import Item, TrainOrder
from tuning.data.transforms import Crop, Normalise
from tuning.errors import UserError
from tuning.flags import DataFlags, Flags, RegularisationFlags, SamplingName
from tuning.sizes import BatchPlan
from tuning.stage_lists import read_stages
from tuning.tracking.imbalance import class_sentence, sampling_sentences

COUNTS = st.lists(st.integers(1, 60), min_size=1, max_size=12).map(np.array)
NAMES = st.sampled_from(["sqrt", "balanced"])


def labels_of(counts: list[int]) -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


def test_a_case_by_hand() -> None:
    """Ten images of 6, 3 and 1: thirds of ten lie at 3 1/3 and 6 2/3, moved on by 0, 1/2, 1/4, 3/4."""
    counts = np.array([6, 3, 1])
    assert [drawn(counts, 0.0, epoch).tolist() for epoch in range(4)] == [[3, 3, 4], [3, 4, 3], [3, 3, 4], [4, 3, 3]]
    assert drawn_before(counts, 0.0, 4).tolist() == [13, 13, 14]
    # Roots 3, 2, 1 of 9, 4, 1: 14 images at 7, 4 2/3, 2 1/3.
    assert drawn(np.array([9, 4, 1]), 0.5, 0).tolist() == [7, 4, 3]
    assert drawn(np.array([9, 4, 1]), 0.5, 1).tolist() == [7, 5, 2]
    assert drawn(np.array([50, 30, 20]), 1.0, 7).tolist() == [50, 30, 20]


@given(COUNTS, NAMES, st.integers(0, 10**9))
def test_a_class_gets_its_share_rounded(counts: np.ndarray, name: SamplingName, epoch: int) -> None:
    share = counts.sum() * counts ** EXPONENTS[name] / (counts ** EXPONENTS[name]).sum()
    taken = drawn(counts, EXPONENTS[name], epoch)
    assert taken.sum() == counts.sum()
    assert (taken >= np.floor(share - 1e-9)).all()
    assert (taken <= np.ceil(share + 1e-9)).all()
    assert (taken >= 1).all()
    assert np.array_equal(
        drawn_before(counts, EXPONENTS[name], epoch) + taken, drawn_before(counts, EXPONENTS[name], epoch + 1)
    )
    period = drawn_before(counts, EXPONENTS[name], PERIOD) / PERIOD
    assert np.abs(period - share).max() <= 1 / PERIOD + 1e-9


@pytest.mark.parametrize("classes", [2, 7, 50])
def test_balanced_is_exact_where_it_can_be(classes: int) -> None:
    counts = np.arange(1, classes + 1)
    counts[-1] += classes - counts.sum() % classes
    assert counts.sum() % classes == 0
    assert {*drawn(counts, 0.0, 3).tolist()} == {counts.sum() // classes}


@given(COUNTS, NAMES, st.integers(0, 300))
def test_a_class_goes_round_its_images(counts: np.ndarray, name: SamplingName, first: int) -> None:
    """Over epochs that follow each other: every whole round of a class holds each of its images once."""
    labels, exponent = labels_of(counts.tolist()), EXPONENTS[name]
    epochs = [sampled(Classes.of(labels), exponent, 5, first + n) for n in range(4)]
    before = drawn_before(counts, exponent, first)
    for place, count in enumerate(counts):
        own = np.concatenate([rows[labels[rows] == place] for rows in epochs])
        rest = -before[place] % count  # of the round that was under way
        assert len(np.unique(own[:rest])) == len(own[:rest])
        whole = own[rest : rest + (len(own) - rest) // count * count].reshape(-1, count)
        assert (np.sort(whole) == np.flatnonzero(labels == place)).all()


def test_rounds_differ_and_every_order_is_as_likely() -> None:
    """Which of four images of a class comes first, over seeds and rounds: chi-square below its 99.9 % quantile."""
    labels = np.array([0] * 4 + [1] * 12)
    firsts = []
    for seed in range(500):
        rows = sampled(Classes.of(labels), 0.0, seed, 0)  # eight of each: two rounds of the first class
        firsts += [rows[0], rows[4]]
    seen = np.bincount(firsts, minlength=4)
    assert ((seen - 250) ** 2 / 250).sum() < chi2.ppf(0.999, 3)
    pairs = np.bincount(4 * np.array(firsts[::2]) + np.array(firsts[1::2]), minlength=16)
    assert ((pairs - 500 / 16) ** 2 / (500 / 16)).sum() < chi2.ppf(0.999, 15)


def test_the_mean_is_that_of_torchs_weighted_sampler() -> None:
    """Same expectation for every image; ours reaches it with less spread."""
    counts = [40, 15, 5]
    labels = labels_of(counts)
    weights = (1 / np.array(counts))[labels]
    torchs = WeightedRandomSampler(weights.tolist(), 200_000, generator=torch.Generator().manual_seed(0))
    theirs = np.bincount(list(torchs), minlength=60) / 200_000 * 60
    ours = np.bincount(np.concatenate([sampled(Classes.of(labels), 0.0, 0, n) for n in range(PERIOD)]), minlength=60)
    assert ours / PERIOD == pytest.approx(theirs, abs=0.3)
    assert ours / PERIOD == pytest.approx(times_drawn(np.array(counts), "balanced")[labels], abs=1.01 / PERIOD)
    assert times_drawn(np.array([4, 0, 1]), "sqrt").tolist() == pytest.approx([10 / 3 / 4, 0, 5 / 3])


def orders(world: int, labels: np.ndarray, name: SamplingName = "balanced", micro: int = 2) -> list[TrainOrder]:
    return [sampled_order(labels, name, 3, BatchPlan(8, micro, world), rank) for rank in range(world)]


def test_processes_accumulation_and_restarts_change_nothing() -> None:
    labels = labels_of([20, 6, 3])
    (alone,) = orders(1, labels, micro=8)
    assert (alone.steps_per_epoch, alone.images_in(3)) == (4, 5)
    whole = [item for micro in alone.micro_batches(2) for item in micro if item.weight]
    assert [item.row for item in whole] == [row for step in range(4) for row in alone.rows(2, step)]
    assert [item.place for item in whole] == list(range(29))
    assert {*np.bincount(labels[[item.row for item in whole]]).tolist()} == {9, 10}
    for world in (2, 4):
        shares = [list(order.micro_batches(2)) for order in orders(world, labels)]
        passes = zip(*shares, strict=True)
        assert [item for one in passes for micro in one for item in micro if item.weight] == whole
    later = [item for micro in alone.micro_batches(2, 2) for item in micro if item.weight]
    assert later == whole[16:]
    assert [row for rows, reals in alone.indices(2) for row in rows[reals > 0]] == [item.row for item in whole]
    assert [item.row for micro in alone.micro_batches(3) for item in micro][:29] != [item.row for item in whole]


def test_the_plain_order_is_what_it_was() -> None:
    """Every image once; its row seeds its draws."""
    items = [i for micro in TrainOrder(10, 0, BatchPlan(10, 10, 1), 0).micro_batches(0) for i in micro]
    assert [item.row for item in items] == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
    assert [item.draw for item in items] == [item.row for item in items]
    assert Item(0, 4, 1.0, place=9).draw == 9
    assert sorted(sampled(Classes.of(labels_of([5, 3])), 1.0, 0, 4).tolist()) == list(range(8))


def rows(counts: list[int]) -> Dataset:
    labels = labels_of(counts)
    pictures = [{"bytes": encode(noise(40, 40, seed=n)), "path": None} for n in range(len(labels))]
    return Dataset.from_dict({"image": pictures, "label": labels.tolist()})


def dealt(data: Dataset, workers: int, first_step: int = 0) -> list[Micro]:
    order = sampled_order(np.array(data["label"]), "balanced", 7, BatchPlan(8, 4, 1), 0)
    crop, normalise, mixing = Crop(16, "bilinear", 1.0), Normalise((0.5,) * 3, (0.5,) * 3), Mixing(1.0, 0.0, 7, 16)
    how = {"augment": "medium", "flip": "both", "workers": workers, "device": torch.device("cpu"), "mixing": mixing}
    return list(TrainFeed(data, order, crop, normalise, **how).epoch(1, first_step))  # type: ignore[arg-type]


def test_an_image_that_comes_again_is_augmented_anew() -> None:
    data = rows([15, 1])
    micros = dealt(data, workers=0)
    seen = torch.cat([micro.inputs for micro in micros])[torch.cat([micro.labels for micro in micros]) == 1]
    shares = torch.cat([micro.shares for micro in micros])  # type: ignore[misc]
    assert len(seen) == 8
    assert len({picture.numpy().tobytes() for picture in seen}) == 8
    assert len({*shares.tolist()}) == 16
    again = dealt(data, workers=2)
    assert all(torch.equal(a, b) for x, y in zip(micros, again, strict=True) for a, b in zip(x, y, strict=True))
    rest = dealt(data, workers=0, first_step=1)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(micros[2:], rest, strict=True))


def test_features_are_dealt_out_in_the_same_order() -> None:
    labels = labels_of([12, 4])
    order = sampled_order(labels, "balanced", 0, BatchPlan(8, 8, 1), 0)
    feed = FeatureFeed(torch.arange(16.0)[:, None], torch.from_numpy(labels), order)
    micros = list(feed.epoch(0))
    assert torch.cat([micro.labels for micro in micros]).bincount().tolist() == [8, 8]
    assert [int(x) for micro in micros for x in micro.inputs] == [row for n in (0, 1) for row in order.rows(0, n)]


def test_a_million_images_take_a_second_or_so() -> None:
    shares = 1 / np.arange(1, 1001)
    labels = np.random.default_rng(0).choice(1000, 10**6, p=shares / shares.sum())
    order, began = sampled_order(labels, "balanced", 0, BatchPlan(1000, 1000, 1), 0), time.process_time()
    counts = np.bincount(labels[order.sequence(100)], minlength=1000)
    assert time.process_time() - began < 4, "processor seconds; about 0.6 on an idle machine"
    assert {*counts.tolist()} == {1000}


def test_what_counts_twice_or_reads_anywhere_is_refused() -> None:
    balanced = RegularisationFlags(sampling="balanced")
    with pytest.raises(UserError, match="together they would count twice"):
        resolve_stages(Flags(regularisation=RegularisationFlags(sampling="sqrt", class_weights="balanced")))
    with pytest.raises(UserError, match="--streaming reads whole row groups"):
        resolve_stages(Flags(regularisation=balanced, data=DataFlags(streaming=True)))
    base = resolve_stages(Flags(regularisation=balanced))[-1]
    listed = [{"open": "head", "epochs": 1, "sampling": "shuffle"}, {"open": "all", "epochs": 1}]
    assert [stage.sampling for stage in read_stages(listed, base, "x")] == ["shuffle", "balanced"]
    with pytest.raises(UserError, match="sampling"):
        read_stages([{"open": "all", "sampling": "weighted"}], base, "x")


def test_what_the_plan_says() -> None:
    counts = np.array([30, 9, 1])
    assert class_sentence("abc", counts) == "3: a 30, b 9, c 1 (75, 22, 2.5 %); imbalance 30 : 1"
    many = class_sentence([f"k{n}" for n in range(1000)], np.array([5000, 1, *[40] * 997, 0]))
    told = "largest k0 5,000 (11 %), median 40, smallest k1 1 (0.0022 %); imbalance 5,000 : 1; 1 without an image"
    assert many == f"1,000: {told}"
    stages = resolve_stages(Flags(regularisation=RegularisationFlags(sampling="balanced")))
    assert sampling_sentences("abc", counts, stages) == [
        "balanced in head, all: an epoch takes each image of c 13.3 times, of a 0.444 times"
    ]
    assert sampling_sentences("abc", counts, resolve_stages(Flags())) == []
