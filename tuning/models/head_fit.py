"""The head as a logistic regression on features computed once: converged in seconds, before any layer is opened.

A head that starts at its optimum doesn't push large gradients into the layers below when they are opened (linear
probing then fine-tuning, Kumar et al. 2022).
"""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.nn import functional as F

from tuning.errors import UserError
from tuning.features import EveryImage, pooled_features

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01)  # strong to weak: each fit starts from the one before
FOLDS = 3
FOLD_ITERATIONS, FINAL_ITERATIONS = 25, 100
TIMED_ROWS = 2048


def fit_logistic(features: Tensor, labels: Tensor, class_weights: Tensor, seed: int) -> tuple[Tensor, Tensor, float]:
    """Multinomial logistic regression with an L2 penalty chosen by cross-validation on these images.

    Minimises ``mean(weight[y] * cross_entropy) + penalty / 2 * |W|^2`` on standardised features by L-BFGS; the
    standardisation is folded into the result. The penalty has the lowest cross-validated loss.

    Args:
        features: ``(N, C)``.
        labels: ``(N,)`` int64.
        class_weights: ``(K,)``, weight of each class in the loss.
        seed: of the folds.

    Returns:
        weights ``(K, C)``, biases ``(K,)``, and the penalty.
    """
    mean, spread = features.mean(0), features.std(0, correction=0)
    # A feature that is constant up to rounding gets weight 0: on new images it may move by many such spreads.
    spread = torch.where(spread > 1e-5 * mean.abs(), spread, torch.inf)
    inputs = (features - mean) / spread
    losses = _cross_validate(inputs, labels, class_weights, seed)
    best = min(range(len(PENALTIES)), key=lambda n: losses[n])
    start = torch.zeros(len(class_weights), features.shape[1] + 1, device=features.device)
    solution = _minimise(inputs, labels, class_weights, PENALTIES[best], start, FINAL_ITERATIONS)
    slope = solution[:, :-1] / spread
    return slope, solution[:, -1] - slope @ mean, PENALTIES[best]


def _cross_validate(inputs: Tensor, labels: Tensor, weights: Tensor, seed: int) -> list[float]:
    """Mean held-out loss of every penalty; all at infinity but the first where there are too few images for folds."""
    fold = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device) % FOLDS
    losses = [0.0] * len(PENALTIES)
    for held in range(FOLDS):
        train, test = fold != held, fold == held
        if not train.any() or not test.any():
            return [0.0] + [float("inf")] * (len(PENALTIES) - 1)
        solution = torch.zeros(len(weights), inputs.shape[1] + 1, device=inputs.device)
        for number, penalty in enumerate(PENALTIES):
            solution = _minimise(inputs[train], labels[train], weights, penalty, solution, FOLD_ITERATIONS)
            losses[number] += float(_loss(inputs[test], labels[test], weights, solution))
    return losses


def _loss(inputs: Tensor, labels: Tensor, weights: Tensor, solution: Tensor) -> Tensor:
    logits = inputs @ solution[:, :-1].T + solution[:, -1]
    return (F.cross_entropy(logits, labels, reduction="none") * weights[labels]).mean()


def _minimise(
    inputs: Tensor, labels: Tensor, weights: Tensor, penalty: float, start: Tensor, iterations: int
) -> Tensor:
    """The solution ``(K, C + 1)``, bias last, of the penalised problem from *start*."""
    solution = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([solution], max_iter=iterations, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        penalised = penalty / 2 * solution[:, :-1].square().sum()
        value = _loss(inputs, labels, weights, solution) + penalised
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(objective)  # type: ignore[arg-type,no-untyped-call]
    return solution.detach()


def fit_head(
    accelerator: Accelerator,
    model: nn.Module,
    feed: EveryImage,
    part: nn.Module,
    class_weights: Tensor | None,
    classes: int,
    seed: int,
) -> float:
    """Compute the features of all images of *feed* and write the fitted head into the model. All processes take part.

    Rank 0 fits and the others copy, so that all hold the same bits.

    Args:
        part: of the model, that takes what *feed* gives; or the model, where that is pictures.

    Returns:
        the chosen penalty.

    Raises:
        UserError: the model's head is more than one linear layer on pooled features.
    """
    classifier = linear_classifier(model)
    features, labels, _ = pooled_features(accelerator, model, feed, part)
    weights = torch.ones(classes) if class_weights is None else class_weights
    penalty = 0.0
    if accelerator.is_main_process:
        slope, intercept, penalty = fit_logistic(features, labels, weights.to(features.device), seed)
        with torch.no_grad():
            classifier.weight.copy_(slope)
            classifier.bias.copy_(intercept)
    for parameter in classifier.parameters():
        broadcast(parameter.data)
    return float(broadcast_object_list([penalty])[0])


def fit_seconds(model: nn.Module, images: int) -> float:
    """About what `fit_logistic` takes on the features of *images* images: one evaluation of its loss is timed."""
    classifier = linear_classifier(model)
    rows, device = min(images, TIMED_ROWS), classifier.weight.device
    inputs = torch.randn(rows, classifier.in_features, device=device)
    labels, weights = torch.arange(rows, device=device) % classifier.out_features, torch.ones(classifier.out_features)
    seconds = list[float]()
    for _ in range(2):  # the first warms up
        started = time.perf_counter()
        start = torch.zeros(classifier.out_features, classifier.in_features + 1, device=device)
        _minimise(inputs, labels, weights.to(device), PENALTIES[0], start, 2)
        seconds.append(time.perf_counter() - started)
    iterations = len(PENALTIES) * FOLD_ITERATIONS * (FOLDS - 1) + FINAL_ITERATIONS  # folds hold back one image in FOLDS
    return seconds[-1] / 2 * iterations * images / rows


def linear_classifier(model: nn.Module) -> nn.Linear:
    """The model's head, when it is one that can be fitted.

    Raises:
        UserError: it is not a single linear layer with a bias.
    """
    classifier: object = model.get_classifier()  # type: ignore[operator]
    if not isinstance(classifier, nn.Linear) or classifier.bias is None:
        raise UserError(
            f"the head of {type(model).__name__} is no single linear layer with a bias, so it can't be fitted. Leave "
            "--head-init fitted out, or give --head-init default."
        )
    return classifier


def can_be_fitted(model: nn.Module) -> bool:
    """Whether `linear_classifier` has an answer."""
    try:
        linear_classifier(model)
    except UserError:
        return False
    return True
