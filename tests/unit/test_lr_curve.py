"""Suggestions agree with fastai's on the same curves, find what was built in, and stay silent where nothing is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning import lr_curve
from tuning.lr_curve import Curve, band, smoothed, smoothing, suggest
from tuning.lr_search.ranges import clamped, kind_of

RULES = ("valley", "steep", "slide", "minimum")
# fastai 2.8.12, fastai/callback/schedule.py, on float64 tensors of `curve(kind, n)`.
FASTAI = {
    ("step", 60): (0.00024537511066398166, 0.0008554672535565685, 4.763938010401341e-07, 0.00495353520895917),
    ("step", 100): (0.00043287612810830614, 0.0009111627561154896, 0.00029836472402833405, 0.004534878508128591),
    ("stairs", 60): (0.00024537511066398166, 0.007609496685459884, 0.0008554672535565685, 0.006768750009458528),
    ("stairs", 100): (0.00035938136638046295, 0.008497534359086456, 0.00020565123083486536, 0.005462277217684349),
    ("slope", 60): (7.038135554931547e-05, 0.026529484644318944, 0.0008554672535565685, 0.009249147277217335),
    ("slope", 100): (8.111308307896872e-05, 0.025950242113997372, 0.0033516026509388475, 0.009545484566618346),
}


def curve(kind: str, points: int) -> tuple[np.ndarray, np.ndarray]:
    """A loss with a ripple that falls around a known learning rate and rises steeply from about 0.5 on."""
    lrs = np.geomspace(1e-7, 10, points)
    t = np.log10(lrs)
    up_to = np.minimum(t + 7, 6)
    fall = {
        "step": 1.6 / (1 + np.exp(-3 * (t + 3))),
        "stairs": 0.6 / (1 + np.exp(-4 * (t + 4.5))) + 0.9 / (1 + np.exp(-5 * (t + 2))),
        "slope": 0.2 * up_to + 0.02 * up_to**2,
    }[kind]
    return lrs, 2.5 - fall + np.exp(4 * (t + 0.2)) + 0.01 * np.sin(0.7 * np.arange(points))


def swept(noise: float, seed: int, points: int = 100, shift: float = 0.0, drop: float = 1.6) -> Curve:
    """One sweep as measured: the fall is steepest at 1e-3 * 10**shift."""
    lrs = np.geomspace(1e-6, 10, points)
    t = np.log10(lrs) - shift
    rng = np.random.default_rng(seed)
    losses = 2.3 - drop / (1 + np.exp(-3 * (t + 3))) + np.exp(4 * (t + 0.2)) + noise * rng.standard_normal(points)
    return list(lrs), list(losses)


@pytest.mark.parametrize(("kind", "points"), FASTAI)
def test_rules_agree_with_frozen_values_of_fastai(kind: str, points: int) -> None:
    said = suggest(*curve(kind, points))  # type: ignore[arg-type]
    assert [getattr(said, rule) for rule in RULES] == pytest.approx(list(FASTAI[kind, points]), rel=1e-12)
    assert said.chosen == sorted((said.valley or 0, said.steep or 0, said.minimum or 0))[1]
    assert said.reason == ""


@pytest.mark.parametrize("points", [17, 30, 100])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
def test_rules_agree_with_fastai_itself(points: int, noise: float) -> None:
    schedule = pytest.importorskip("fastai.callback.schedule")
    import torch

    for seed in range(5):
        lrs, losses = (np.array(values) for values in swept(noise, seed, points))
        for rule in RULES:
            theirs = getattr(schedule, rule)(torch.tensor(lrs), torch.tensor(losses), points)[0]
            assert getattr(lr_curve, rule)(lrs, losses) == pytest.approx(theirs, rel=1e-12), rule


@pytest.mark.parametrize("shift", [-2.0, -1.0, 0.0])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("points", [40, 100])
def test_a_known_answer_is_found_and_moves_with_the_curve(shift: float, noise: float, points: int) -> None:
    found = band([swept(noise, seed, points, shift) for seed in range(3)])
    known = 1e-3 * 10**shift
    assert found.chosen is not None, found.reason
    assert known / 5 < found.chosen < known * 10
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.chosen <= found.high


def test_noise_alone_is_never_an_answer() -> None:
    for seed in range(60):
        for points in (30, 100):
            flat = [swept(0.05 * (1 + seed % 10), 1000 * seed + n, points, shift=9.0, drop=0.0) for n in range(3)]
            assert band(flat).chosen is None
            assert suggest(*flat[0]).chosen is None


NAMED = {
    "flat": ([2.3] * 100, "flat"),
    "noisy": (list(2.3 + 0.5 * np.random.default_rng(0).standard_normal(100)), "noisy"),
    "rises from the start": (list(2.3 + np.exp(np.linspace(-2, 3, 100))), "diverges at once"),
    "NaN at once": ([2.3, 2.4, math.nan] + [9.0] * 97, "diverges at once"),
    "infinite at once": ([2.3, 2.4, math.inf] + [9.0] * 97, "diverges at once"),
    "flat, then NaN": ([2.3] * 80 + [math.nan] * 20, "flat"),
    "still falling": (list(np.linspace(2.3, 0.5, 100)), "minimum at the edge"),
    "short": ([2.3, 1.2, 0.6, 0.3], "too few points"),
    "empty": ([], "too few points"),
}


@pytest.mark.parametrize("name", NAMED)
def test_why_there_is_no_confident_answer(name: str) -> None:
    losses, reason = NAMED[name]
    lrs = list(np.geomspace(1e-6, 10, max(100, len(losses)))[: len(losses)])
    said = suggest(lrs, losses)
    assert (said.chosen, said.reason) == (None, reason)
    together = band([(lrs, losses)])
    assert together.chosen is None
    assert together.reason.startswith(reason)
    rules = (said.valley, said.steep, said.minimum)
    assert (None in rules) == (reason != "minimum at the edge")


def test_sweeps_that_disagree_are_no_answer() -> None:
    found = band([swept(0.02, 0, shift=-2), swept(0.02, 1, shift=-2), swept(0.02, 2, shift=0)])
    assert found.chosen is None
    assert found.reason.startswith("sweeps disagree")
    assert found.low is not None
    assert found.high is not None
    assert found.high > 10 * found.low


def test_most_sweeps_must_have_an_answer() -> None:
    clear, nothing = swept(0.05, 0), swept(0.3, 1, shift=9, drop=0.0)
    assert band([clear, swept(0.05, 2), nothing]).chosen is not None
    assert band([clear, nothing]).chosen is None
    reason = band([clear, nothing, nothing]).reason
    assert reason.startswith("noisy")
    assert reason.endswith("(2 of 3 sweeps)")


def test_what_follows_the_first_nan_counts_for_nothing() -> None:
    lrs, losses = curve("step", 100)
    broken = losses.copy()
    broken[90:] = [math.nan, *np.zeros(9)]
    assert suggest(list(lrs), list(broken)) == suggest(list(lrs[:90]), list(losses[:90]))
    assert suggest(list(lrs), list(broken)).chosen is not None


def test_a_loss_that_ends_in_nan_at_its_lowest_is_no_edge() -> None:
    """Divergence within one step: there was nothing lower to be had."""
    lrs, losses = np.geomspace(1e-6, 1, 100), np.linspace(2.3, 0.5, 100)
    losses[80:] = math.nan
    assert suggest(list(lrs), list(losses)).chosen is not None
    losses[80] = 20.0
    assert suggest(list(lrs[:81]), list(losses[:81])).chosen is not None


def test_a_loss_that_has_come_to_its_floor_is_no_edge() -> None:
    """Easy data: everything is learned long before the highest learning rate, and nothing breaks."""
    lrs = np.geomspace(1e-6, 1, 100)
    losses = 1.1 / (1 + np.exp(3 * (np.log10(lrs) + 3.5)))
    found = band([(list(lrs), list(losses))])
    assert found.chosen is not None, found.reason
    assert 1e-4 < found.chosen < 1e-2


def test_smoothing_is_the_moving_average_with_bias_correction() -> None:
    assert smoothed([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)
    assert smoothed([1.0, 2.0, 4.0], 0.5) == pytest.approx([1, (0.25 + 1) / 0.75, (0.125 + 0.5 + 2) / 0.875])
    assert list(smoothed([1.0, 5.0, 2.0], 0.0)) == [1, 5, 2]
    after = smoothed([1.0, math.nan, 1.0], 0.5)
    assert after[0] == 1
    assert np.isnan(after[1:]).all()


def test_smoothing_forgets_over_the_same_span_of_learning_rates() -> None:
    assert smoothing(np.geomspace(1e-6, 1, 101)) == pytest.approx(0.9)
    assert smoothing(np.geomspace(1e-6, 1, 201)) == pytest.approx(0.95)
    assert smoothing(np.geomspace(1e-6, 1, 5)) == 0
    assert smoothing([1e-3]) == 0


@pytest.mark.parametrize(
    ("lrs", "losses"), [([1e-3, 1e-2], [1.0]), ([1e-2, 1e-3], [1.0, 1.0]), ([0.0, 1.0], [1.0, 1.0])]
)
def test_what_is_no_sweep_is_refused(lrs: Sequence[float], losses: Sequence[float]) -> None:
    with pytest.raises(ValueError, match=r"sweep|many"):
        suggest(lrs, losses)
    with pytest.raises(ValueError, match=r"sweep|many"):
        band([(lrs, losses)])


def test_no_sweep_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        band([])


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=120))
@settings(deadline=None, max_examples=200)
def test_whatever_the_losses_the_answer_lies_in_reach(losses: list[float]) -> None:
    lrs = list(np.geomspace(1e-6, 10, 120)[: len(losses)])
    for said in (suggest(lrs, losses), *band([(lrs, losses)]).suggestions):
        assert (said.chosen is None) == bool(said.reason)
        for value in (said.valley, said.steep, said.chosen):
            assert value is None or 1e-7 <= value <= 10


@pytest.mark.parametrize(
    ("optimizer", "part", "lr", "taken"),
    [
        ("adamw", "transformer", 3e-2, 1e-3),
        ("adamw", "transformer", 1e-4, 1e-4),
        ("adamw", "other", 3e-2, 1e-2),
        ("adamw", "head", 3e-2, 3e-2),
        ("SGD", "transformer", 1.0, 0.1),
        ("sgd", "other", 1e-5, 1e-3),
        ("lion", "transformer", 1e-3, 1e-4),
    ],
)
def test_clamps_by_optimizer_and_family(optimizer: str, part: str, lr: float, taken: float) -> None:
    assert clamped(lr, optimizer, part) == taken  # type: ignore[arg-type]


def test_every_optimizer_has_a_kind() -> None:
    kinds = {name: kind_of(name) for name in ("sgd", "csgdw", "momentum", "nlars", "adamw", "lamb", "clion", "rmsprop")}
    assert list(kinds.values()) == ["plain"] * 4 + ["adaptive"] * 2 + ["sign", "adaptive"]
