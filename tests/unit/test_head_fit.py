"""The fitted head: scikit-learn's logistic regression, with a penalty that suits the features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from tuning.losses import balanced_weights
from tuning.models import head_fit
from tuning.models.head_fit import PENALTIES, fit_logistic


def draw(images: int, width: int, classes: int, signal: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features around one centre a class, *signal* apart in units of the noise; classes of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(images, generator=generator) ** 2 * classes).long()
    centres = torch.randn(classes, width, generator=generator) * signal
    return centres[labels] + torch.randn(images, width, generator=generator), labels


def probabilities(features: Tensor, fitted: tuple[Tensor, Tensor, float]) -> Tensor:
    return (features @ fitted[0].T + fitted[1]).softmax(1)


def reference(features: Tensor, labels: Tensor, weights: Tensor, penalty: float) -> np.ndarray:
    """The same objective in scikit-learn, which sums the loss over images: C = 1 / (N * penalty)."""
    inputs = ((features - features.mean(0)) / features.std(0, correction=0)).double().numpy()
    model = LogisticRegression(C=1 / (len(labels) * penalty), tol=1e-8, max_iter=5000)
    return model.fit(inputs, labels.numpy(), sample_weight=weights[labels].numpy()).predict_proba(inputs)


@pytest.mark.parametrize("penalty", [1.0, 0.01])
@pytest.mark.parametrize("balanced", [False, True])
def test_four_classes_as_in_scikit_learn(monkeypatch: pytest.MonkeyPatch, balanced: bool, penalty: float) -> None:
    monkeypatch.setattr(head_fit, "PENALTIES", (penalty,))
    features, labels = draw(200, 12, 4, 0.7)
    weights = balanced_weights(labels.numpy(), 4) if balanced else torch.ones(4)
    fitted = fit_logistic(features, labels, weights, 0)
    expected = reference(features, labels, weights, penalty)
    assert probabilities(features, fitted).numpy() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("balanced", [False, True])
def test_two_classes_as_in_scikit_learn(monkeypatch: pytest.MonkeyPatch, balanced: bool) -> None:
    """scikit-learn has one weight vector w for two classes, ours are w/2 and -w/2: half the penalty on w."""
    monkeypatch.setattr(head_fit, "PENALTIES", (0.1,))
    features, labels = draw(120, 8, 2, 0.5)
    weights = balanced_weights(labels.numpy(), 2) if balanced else torch.ones(2)
    slope, intercept, _ = fit_logistic(features, labels, weights, 0)
    assert slope[0].numpy() == pytest.approx(-slope[1].numpy(), abs=1e-4)
    expected = reference(features, labels, weights, 0.05)
    assert probabilities(features, (slope, intercept, 0.1)).numpy() == pytest.approx(expected, abs=1e-3)


def test_class_weights_move_the_boundary() -> None:
    features, labels = draw(300, 6, 2, 0.3)
    plain = probabilities(features, fit_logistic(features, labels, torch.ones(2), 0)).argmax(1)
    weights = balanced_weights(labels.numpy(), 2)
    balanced = probabilities(features, fit_logistic(features, labels, weights, 0)).argmax(1)
    assert (labels == 1).float().mean() < 0.4
    assert balanced.sum() > plain.sum()


def test_scale_and_offset_of_the_features_do_not_matter() -> None:
    features, labels = draw(150, 10, 3, 0.8)
    scale, offset = torch.logspace(-3, 3, 10), torch.linspace(-2, 2, 10) * torch.logspace(-3, 3, 10)
    plain = fit_logistic(features, labels, torch.ones(3), 0)
    moved = fit_logistic(features * scale + offset, labels, torch.ones(3), 0)
    assert moved[2] == plain[2]
    assert torch.allclose(probabilities(features * scale + offset, moved), probabilities(features, plain), atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, 100.0, -3e4])
def test_a_constant_feature_changes_nothing(value: float) -> None:
    """A dead channel; on new images it may move a little, which must not decide the class."""
    features, labels = draw(97, 6, 3, 0.8)
    plain = probabilities(features, fit_logistic(features, labels, torch.ones(3), 0))
    wider = torch.cat((features, torch.full((97, 1), value)), 1)
    fitted = fit_logistic(wider, labels, torch.ones(3), 0)
    assert torch.allclose(probabilities(wider, fitted), plain, atol=2e-3)
    wider[:, -1] += 1e-3
    assert torch.allclose(probabilities(wider, fitted), plain, atol=2e-3)


def test_noise_gets_the_strongest_penalty_and_signal_a_weaker_one() -> None:
    for seed in range(3):
        features, labels = draw(150, 40, 3, 0.0, seed)
        assert fit_logistic(features, labels, torch.ones(3), seed)[2] == PENALTIES[0]
        features, labels = draw(150, 40, 3, 2.0, seed)
        fitted = fit_logistic(features, labels, torch.ones(3), seed)
        assert fitted[2] == PENALTIES[-1]
        assert (probabilities(features, fitted).argmax(1) == labels).all()


@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_few_images(images: int) -> None:
    """Without images for every fold the strongest penalty is taken; classes without images get a weight too."""
    features, _ = draw(images, 4, 5, 1.0)
    slope, intercept, penalty = fit_logistic(features, torch.arange(images) % 5, torch.ones(5), 0)
    assert slope.shape == (5, 4)
    assert slope.isfinite().all()
    assert intercept.isfinite().all()
    assert penalty in PENALTIES
    if images < head_fit.FOLDS:
        assert penalty == PENALTIES[0]


def test_the_same_bits_for_the_same_seed() -> None:
    features, labels = draw(100, 20, 3, 0.5)
    first, second = (fit_logistic(features, labels, torch.ones(3), 7) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2]


def test_the_global_random_state_rests() -> None:
    features, labels = draw(30, 5, 2, 0.5)
    before = torch.random.get_rng_state()
    fit_logistic(features, labels, torch.ones(2), 3)
    assert torch.equal(before, torch.random.get_rng_state())
