"""What the demo has to beat: logistic regression on frozen features of the same photos and the same split.

    python -m tests.benchmarks.linear_probe --seeds 0 1 2 --image-size 128

Prints balanced accuracy and accuracy on the held-out part for scikit-learn's LogisticRegression on standardised pooled
features of tf_efficientnet_lite0 (full image, bicubic), its C chosen by cross-validated balanced accuracy.
"""

from __future__ import annotations

import argparse

import numpy as np
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tuning import session
from tuning.data.loader import EvalFeed
from tuning.data.sampling import EvalOrder
from tuning.data.sources import Data, open_data
from tuning.data.tables import label_array
from tuning.data.transforms import Crop, Normalise
from tuning.features import compute_features
from tuning.models.build import build

CHOICES_OF_C = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def main() -> None:
    """Print one line a seed and kind of class weighting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--image-size", type=int, default=128)
    options = parser.parse_args()
    session.keep_freed_memory()
    features = features_by_path(demo(0), options.image_size)
    for weighting in (None, "balanced"):
        scores = np.array([probe(demo(seed), features, weighting) for seed in options.seeds])
        for seed, (balanced, plain) in zip(options.seeds, scores, strict=True):
            print(f"class weights {weighting}: seed {seed}: balanced accuracy {balanced:.4f}, accuracy {plain:.4f}")
        print(
            f"class weights {weighting}: mean: balanced accuracy {scores[:, 0].mean():.4f}, {scores[:, 1].mean():.4f}"
        )


def demo(seed: int) -> Data:
    """The demo's split for a seed."""
    none = {"image_column": None, "label_column": None, "train_split": None, "eval_split": None}
    return open_data("demo", **none, val_fraction=0.25, seed=seed, limit_train=None, limit_eval=None)


def features_by_path(data: Data, image_size: int) -> dict[str, np.ndarray]:
    """Pooled features ``(C,)`` of every photo."""
    accelerator = session.start("fp32", "auto")
    model, info = build("tf_efficientnet_lite0", classes=data.classes)
    found = {}
    for rows in (data.train, data.eval):
        crop, normalise = Crop(image_size, info.interpolation, 1.0), Normalise(info.mean, info.std)
        order = EvalOrder(len(rows), 32, 0, 1)
        feed = EvalFeed(rows, order, crop, normalise, workers=1, device=accelerator.device)
        values = _features(accelerator, model, feed)
        found.update({row["image"]["path"]: value for row, value in zip(rows, values, strict=True)})
    return found


def _features(accelerator: Accelerator, model: object, feed: EvalFeed) -> np.ndarray:
    return compute_features(accelerator, model, feed)[0].numpy()  # type: ignore[arg-type]


def probe(data: Data, features: dict[str, np.ndarray], weighting: str | None) -> tuple[float, float]:
    """Balanced accuracy and accuracy on the held-out part."""
    inputs = [np.stack([features[row["image"]["path"]] for row in rows]) for rows in (data.train, data.eval)]
    regression = LogisticRegression(class_weight=weighting, max_iter=500)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), regression),
        {"logisticregression__C": CHOICES_OF_C},
        scoring="balanced_accuracy",
        cv=StratifiedKFold(5, shuffle=True, random_state=0),  # the photos are ordered by the module they show
    )
    fitted = search.fit(inputs[0], label_array(data.train))
    guessed, labels = fitted.predict(inputs[1]), label_array(data.eval)
    return balanced_accuracy_score(labels, guessed), accuracy_score(labels, guessed)


if __name__ == "__main__":
    main()
