"""Which part trains and which part judges: choosing among named splits, and seeded stratified selections.

Every draw is an ordering by raw Philox words, whose stream NumPy guarantees for all versions and machines, so that
the same labels in the same order and the same seed give the same images everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tuning.errors import UserError, did_you_mean

Indices = npt.NDArray[np.int64]

TRAIN_NAMES = ("train",)
VAL_NAMES = ("val", "valid", "validation")
TEST_NAMES = ("test",)
SPLIT_NAMES = TRAIN_NAMES + VAL_NAMES + TEST_NAMES


def choose_splits(
    names: Sequence[str], train_split: str | None, eval_split: str | None, where: str
) -> tuple[str, str | None]:
    """Name the split to train on and the one to evaluate on (None: there is none, hold out a part of train).

    Without a request, train is `train` or the only split; evaluation is the one of `val`, `valid`, `validation`
    or, failing these, `test`, in any case.

    Raises:
        UserError: for a requested split that is not there, no train split, or several validation splits.
    """
    train = _requested(names, train_split, "--train-split", where) or _default_train(names, where)
    requested = _requested(names, eval_split, "--eval-split", where)
    return train, requested or _default_eval([name for name in names if name != train], where)


def judged_by_test(judge: str | None, eval_split: str | None) -> list[str]:
    """A note where the pictures that choose the best weights are called test, and nobody asked for that."""
    if eval_split is not None or judge is None or judge.lower() not in TEST_NAMES:
        return []
    return [
        f"There is no validation split, so {judge!r} chooses the best weights, and what is measured on it is a little "
        f"too good. Keep other pictures for the last judgement, or say --eval-split {judge}."
    ]


def _requested(names: Sequence[str], wanted: str | None, flag: str, where: str) -> str | None:
    if wanted is None or wanted in names:
        return wanted
    raise UserError(f"{flag} {wanted!r} is not in {where}, which has {', '.join(names)}.{did_you_mean(wanted, names)}")


def _default_train(names: Sequence[str], where: str) -> str:
    named = _among(names, TRAIN_NAMES)
    if len(named) == 1:
        return named[0]
    if len(names) == 1:
        return names[0]
    raise UserError(f"{where} has no split called train, but {', '.join(names)}; name one with --train-split.")


def _default_eval(others: Sequence[str], where: str) -> str | None:
    found = _among(others, VAL_NAMES) or _among(others, TEST_NAMES)
    if len(found) > 1:
        raise UserError(f"{where} has several splits to evaluate on, {', '.join(found)}; name one with --eval-split.")
    return found[0] if found else None


def _among(names: Sequence[str], known: Sequence[str]) -> list[str]:
    return [name for name in names if name.lower() in known]


def stratified_split(labels: Indices, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Split rows into (train, held out), both ascending, with `round(count * fraction)` of every class held out.

    A class of two or more images has at least one on either side; a class of one image stays in train.
    """
    counts = np.bincount(labels)
    held = np.clip(np.rint(counts * fraction), 1, np.maximum(counts - 1, 1))
    held = np.where(counts < 2, 0, held).astype(np.int64)
    return _pick(labels, held, seed)


def stratified_subset(labels: Indices, limit: int, seed: int) -> Indices:
    """Choose *limit* rows, ascending, in the proportions of the classes; each class is kept if *limit* allows it."""
    if limit >= len(labels):
        return np.arange(len(labels), dtype=np.int64)
    counts = np.bincount(labels)
    shares = _apportion(counts, limit)
    if limit >= np.count_nonzero(counts):
        for starved in np.flatnonzero((counts > 0) & (shares == 0)):
            shares[np.argmax(shares)] -= 1
            shares[starved] = 1
    return _pick(labels, shares, seed)[1]


def _apportion(counts: Indices, total: int) -> Indices:
    """Share *total* out in proportion to *counts* by largest remainder; never more than a count."""
    products = counts * total  # exact integers: a rounded quota could differ between machines
    shares, remainders = np.divmod(products, counts.sum())
    left = total - int(shares.sum())
    shares[np.argsort(-remainders, kind="stable")[:left]] += 1
    return shares


def _pick(labels: Indices, shares: Indices, seed: int) -> tuple[Indices, Indices]:
    """(rows left, rows picked): `shares[c]` rows of class c, drawn by *seed*."""
    order = np.argsort(np.random.Philox(key=seed % 2**64).random_raw(len(labels)), kind="stable")
    order = order[np.argsort(labels[order], kind="stable")]  # by class, shuffled within
    starts = np.cumsum(np.bincount(labels)) - np.bincount(labels)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - starts[labels[order]]
    picked = rank < shares[labels]
    return np.flatnonzero(~picked), np.flatnonzero(picked)
