"""Training loops that people run, each as its own documentation has it, for `tests.benchmarks.peers`. One a process.

    python -m tests.benchmarks.peer_loops timm --data photos --image-size 128

Prints the seconds of an optimizer step in the last epoch: loading and training, no evaluation. They have the model, the
pictures, the batch and the augmentation in common (a random part of the picture, resized, and a flip), and AdamW. What
nobody sets is left as it comes: allocator, threads, precision. Nothing of `tuning` is used here.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.data
import timm.optim
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

AREA = (0.7, 1.0)  # of a random crop, as a share of the picture
RATE = 1e-4


@dataclass(frozen=True)
class Work:
    """What all of them do.

    Attributes:
        data: folder with ``train/<class>/*.jpg``.
        workers: loader processes.
    """

    data: Path
    model: str
    image_size: int
    batch_size: int
    epochs: int
    workers: int

    @property
    def train(self) -> Path:
        """The folder of classes."""
        return self.data / "train"

    @property
    def classes(self) -> list[str]:
        """By name."""
        return sorted(path.name for path in self.train.iterdir())

    def build(self) -> nn.Module:
        """With random weights: they change no speed."""
        return timm.create_model(self.model, num_classes=len(self.classes))


def last_epoch(epochs: int, batches: Iterable[Any], step: Callable[[Any], None]) -> float:
    """Seconds of a step in the last epoch."""
    for _ in range(epochs):
        began, count = time.perf_counter(), 0
        for batch in batches:
            step(batch)
            count += 1
    return (time.perf_counter() - began) / count


def of_timm(work: Work) -> float:
    """timm's loader with its prefetcher (a batch is normalised at once), no colour jitter, channels-last throughout."""
    data = timm.data.create_dataset("", root=str(work.train))
    model = work.build().to(memory_format=torch.channels_last).train()
    config = timm.data.resolve_model_data_config(model)
    loader = timm.data.create_loader(
        data,
        input_size=(3, work.image_size, work.image_size),
        batch_size=work.batch_size,
        is_training=True,
        scale=AREA,
        color_jitter=0.0,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=work.workers,
        persistent_workers=work.workers > 0,
        device=torch.device("cpu"),
    )
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=RATE)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch[0].contiguous(memory_format=torch.channels_last), batch[1]
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return last_epoch(work.epochs, loader, step)


def transform(work: Work, normalises: bool = True) -> Callable[[Image.Image], Tensor]:
    """What torchvision's references do to a PIL picture."""
    from torchvision import transforms as T

    crop = T.RandomResizedCrop(work.image_size, scale=AREA, interpolation=T.InterpolationMode.BICUBIC)
    normalise = [T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))] if normalises else []
    return T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), *normalise])  # type: ignore[no-any-return]


def of_pytorch(work: Work) -> float:
    """A plain loop: `ImageFolder`, PIL, torchvision's transforms, `DataLoader`, torch's AdamW."""
    from torchvision.datasets import ImageFolder

    data = ImageFolder(str(work.train), transform(work))
    loader = DataLoader(data, work.batch_size, shuffle=True, num_workers=work.workers, drop_last=True)
    model = work.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return last_epoch(work.epochs, loader, step)


def of_hugging_face(work: Work) -> float:
    """`datasets` with a transform on the fly, a collate function, Accelerate, a scheduler at every step."""
    from accelerate import Accelerator
    from datasets import load_dataset

    accelerator, prepare = Accelerator(), transform(work)
    data = load_dataset("imagefolder", data_dir=str(work.train), split="train", cache_dir=str(work.data / "cache"))

    def transformed(examples: dict[str, Any]) -> dict[str, Any]:
        return {"pixels": [prepare(image.convert("RGB")) for image in examples["image"]], "label": examples["label"]}

    def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = torch.stack([example["pixels"] for example in examples])
        return {"pixels": pixels, "labels": torch.tensor([example["label"] for example in examples])}

    loader = DataLoader(
        data.with_transform(transformed),
        shuffle=True,
        collate_fn=collate,
        batch_size=work.batch_size,
        num_workers=work.workers,
    )
    model = work.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=work.epochs * len(loader))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()

    def step(batch: dict[str, Tensor]) -> None:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(batch["pixels"]), batch["labels"]))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    return last_epoch(work.epochs, loader, step)


class Files(Dataset[dict[str, Any]]):
    """Pictures and labels of a folder, as examples for Accelerate write them."""

    def __init__(self, work: Work) -> None:
        self._files, self._prepare = sorted(work.train.glob("*/*.jpg")), transform(work, normalises=False)
        self._labels = {name: number for number, name in enumerate(work.classes)}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> dict[str, Any]:
        file = self._files[number]
        return {"image": self._prepare(Image.open(file).convert("RGB")), "label": self._labels[file.parent.name]}


def of_frozen_accelerate(work: Work) -> float:
    """Accelerate with a closed backbone: only the classifier has gradients, pictures are normalised on the device."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    loader = DataLoader(Files(work), shuffle=True, batch_size=work.batch_size, num_workers=work.workers)
    model = work.build()
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parameter in model.get_classifier().parameters():
        parameter.requires_grad = True
    mean = torch.tensor(model.default_cfg["mean"])[None, :, None, None]
    std = torch.tensor(model.default_cfg["std"])[None, :, None, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=RATE, epochs=work.epochs, steps_per_epoch=len(loader)
    )
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()

    def step(batch: dict[str, Tensor]) -> None:
        loss = F.cross_entropy(model((batch["image"] - mean) / std), batch["label"])
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    return last_epoch(work.epochs, loader, step)


def of_fastai(work: Work) -> float:
    """A `Learner` on the same network, everything open."""
    return _fastai(work, frozen=False)


def of_frozen_fastai(work: Work) -> float:
    """`vision_learner` in its first stage: fastai's own head is trained on a frozen body, whose norms stay open."""
    return _fastai(work, frozen=True)


def _fastai(work: Work, frozen: bool) -> float:
    from fastai.vision import all as fastai

    class Clock(fastai.Callback):  # type: ignore[misc, name-defined]
        """Seconds of the training part of the last epoch."""

        def before_train(self) -> None:
            self.began = time.perf_counter()

        def after_train(self) -> None:
            self.seconds = (time.perf_counter() - self.began) / len(self.dls.train)

    data = fastai.ImageDataLoaders.from_folder(
        work.data,
        train="train",
        valid="val",
        item_tfms=fastai.RandomResizedCrop(work.image_size, min_scale=AREA[0]),
        batch_tfms=[fastai.Flip(), fastai.Normalize.from_stats(*fastai.imagenet_stats)],
        bs=work.batch_size,
        num_workers=work.workers,
    )
    if frozen:
        learner = fastai.vision_learner(data, work.model, pretrained=False, normalize=False)
        learner.freeze()
    else:
        learner = fastai.Learner(data, work.build(), loss_func=fastai.CrossEntropyLossFlat())
    clock = Clock()
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(work.epochs, RATE, cbs=clock)
    return clock.seconds


LOOPS: dict[str, Callable[[Work], float]] = {
    "timm": of_timm,
    "pytorch": of_pytorch,
    "hugging-face": of_hugging_face,
    "fastai": of_fastai,
    "frozen-accelerate": of_frozen_accelerate,
    "frozen-fastai": of_frozen_fastai,
}


def main() -> None:
    """Run one and print its seconds a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/ class folders")
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="loader processes")
    given = vars(parser.parse_args())
    loop = given.pop("loop")
    print(json.dumps({"seconds": LOOPS[loop](Work(**given))}))


if __name__ == "__main__":
    main()
