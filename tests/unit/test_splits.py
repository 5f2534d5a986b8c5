from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning.data.splits import choose_splits, judged_by_test, stratified_split, stratified_subset
from tuning.errors import UserError


def test_a_known_split_stays() -> None:
    labels = np.repeat([0, 1, 2], [5, 4, 1])
    kept, held = stratified_split(labels, 0.4, seed=3)
    assert (kept.tolist(), held.tolist()) == ([0, 3, 4, 5, 7, 9], [1, 2, 6, 8])
    assert stratified_subset(labels, 4, seed=3).tolist() == [1, 6, 8, 9]


def test_a_subset_follows_the_proportions() -> None:
    labels = np.repeat([0, 1, 2], [700, 200, 100])
    assert np.bincount(labels[stratified_subset(labels, 50, seed=0)]).tolist() == [35, 10, 5]


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["train", "test"], ("train", "test")), (["test", "validation", "train"], ("train", "validation")),
     (["all"], ("all", None)), (["Train", "Valid"], ("Train", "Valid")), (["train", "extra"], ("train", None))],
)  # fmt: skip
def test_splits_are_chosen_by_name(names: list[str], expected: tuple[str, str | None]) -> None:
    assert choose_splits(names, None, None, "it") == expected


def test_requested_splits_win_or_are_refused() -> None:
    assert choose_splits(["a", "train", "b"], "a", "b", "it") == ("a", "b")
    with pytest.raises(UserError, match="several splits"):
        choose_splits(["train", "val", "valid"], None, None, "it")
    with pytest.raises(UserError, match="--train-split"):
        choose_splits(["a", "b"], None, None, "it")
    with pytest.raises(UserError, match=r"--eval-split 'vall'.*Perhaps you meant 'val'"):
        choose_splits(["train", "val"], None, "vall", "it")


LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=80).map(lambda x: np.array(x, dtype=np.int64))


def test_a_test_split_that_chooses_is_told_of_unless_it_was_asked_for() -> None:
    (note,) = judged_by_test("Test", None)
    assert "'Test' chooses the best weights" in note
    assert judged_by_test("Test", "Test") == judged_by_test("val", None) == judged_by_test(None, None) == []


@settings(max_examples=100, deadline=None)
@given(LABELS, st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_a_stratified_split_keeps_every_class_on_both_sides(labels: np.ndarray, fraction: float, seed: int) -> None:
    kept, held = stratified_split(labels, fraction, seed)
    assert sorted([*kept, *held]) == list(range(len(labels)))
    assert sorted(kept) == list(kept)
    for label, count in enumerate(np.bincount(labels)):
        out = int((labels[held] == label).sum())
        assert out == 0 if count < 2 else 1 <= out <= count - 1
        assert abs(out - count * fraction) <= 1


@settings(max_examples=100, deadline=None)
@given(LABELS, st.integers(1, 100), st.integers(0, 2**31))
def test_a_stratified_subset_has_the_right_size_and_classes(labels: np.ndarray, limit: int, seed: int) -> None:
    chosen = stratified_subset(labels, limit, seed)
    assert len(chosen) == len(set(chosen.tolist())) == min(limit, len(labels))
    present = set(labels.tolist())
    if limit >= len(present):
        assert set(labels[chosen].tolist()) == present
