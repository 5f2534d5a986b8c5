"""What other tools do, without a word, on two processes: their own parts, run here.

    pip install lightning fastai
    torchrun --nproc_per_node 2 -m tests.benchmarks.silent_errors

Three questions, each put to the parts of the tools that answer it (gloo, CPU, tiny networks, under a minute). timm's
train.py and Accelerate's cv_example.py open no layers again, so the second one is not for them:

- how many images an evaluation of 17 counts,
- how far the parameters of two processes are apart after a stage that opened the backbone (should be 0),
- how far running statistics of a closed BatchNorm layer have moved (should be 0).

Ours are tested in `tests/distributed`. A tool that is not installed is left out.
"""

from __future__ import annotations

import logging
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

IMAGES, CLASSES = 17, 3


def main() -> None:
    """Ask every tool that is installed; rank 0 prints a row an answer."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2, "run under torchrun --nproc_per_node 2"
    say("| question | tool | answer | right |\n|---|---|---|---|")
    images = f"images counted of {IMAGES}"
    ask(images, "accelerate", evaluated_by_accelerate, IMAGES)
    ask(images, "timm", evaluated_by_timm, IMAGES)
    ask(images, "lightning", evaluated_by_lightning, IMAGES)
    ask(images, "fastai", evaluated_by_fastai, IMAGES)
    difference = "largest difference between the ranks' parameters"
    ask(difference, "lightning", lambda: finetuned_by_lightning()[0], 0.0)
    ask(difference, "fastai", lambda: finetuned_by_fastai()[0], 0.0)
    movement = "largest movement of a closed BatchNorm's mean"
    ask(movement, "accelerate", frozen_by_accelerate, 0.0)
    ask(movement, "timm", frozen_by_timm, 0.0)
    ask(movement, "lightning", lambda: finetuned_by_lightning()[1], 0.0)
    ask(movement, "fastai", lambda: finetuned_by_fastai()[1], 0.0)
    dist.destroy_process_group()


def ask(question: str, tool: str, answer: Callable[[], float], right: float) -> None:
    """Print a row; a tool that is not installed has none."""
    try:
        found = answer()
    except ImportError:
        return
    say(f"| {question} | {tool} {version(tool)} | {found:.3g} | {right:g} |")


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def pictures(count: int) -> TensorDataset:
    """Random pictures and labels, the same on both processes."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 3, 8, 8, generator=draw)
    return TensorDataset(inputs, torch.randint(CLASSES, (count,), generator=draw))


def summed(value: float) -> float:
    """Over both processes."""
    total = torch.tensor(float(value))
    dist.all_reduce(total)
    return float(total)


def apart(model: nn.Module) -> float:
    """Largest difference between the parameters of the two processes."""
    mine = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, 0)
    difference = (mine - first).abs().max()
    dist.all_reduce(difference, dist.ReduceOp.MAX)
    return float(difference)


def network() -> nn.Sequential:
    """A backbone with BatchNorm, and a head."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(backbone, nn.Linear(4, CLASSES))


def evaluated_by_accelerate() -> float:
    """As the Hugging Face examples do: `gather_for_metrics`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(pictures(IMAGES), batch_size=4))
    return sum(len(accelerator.gather_for_metrics(labels)) for _, labels in loader)


def frozen_by_accelerate() -> float:
    """As Accelerate's cv_example.py closes the body: `requires_grad`, then `model.train()`."""
    from accelerate import Accelerator

    accelerator, raw = Accelerator(cpu=True), network()
    raw[0].requires_grad_(False)
    loader = DataLoader(pictures(32), batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(raw, torch.optim.Adam(raw.parameters()), loader)
    model.train()
    for inputs, labels in loader:
        accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
        optimizer.step()
        optimizer.zero_grad()
    return float(raw[0][1].running_mean.abs().max())  # type: ignore[index,union-attr]


def frozen_by_timm() -> float:
    """`timm.utils.freeze` with its defaults, which puts a `FrozenBatchNorm2d` in place of the layer."""
    from timm.utils import freeze

    model = network()
    freeze(model, ["0"])
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped.train()
    for inputs, labels in DataLoader(pictures(32), batch_size=4):
        nn.functional.cross_entropy(wrapped(inputs), labels).backward()
    return float(model[0][1].running_mean.abs().max())  # type: ignore[index,union-attr]


def evaluated_by_timm() -> float:
    """As train.py and validate.py do: the loader's sampler for evaluation."""
    from timm.data.distributed_sampler import OrderedDistributedSampler

    return summed(len(list(OrderedDistributedSampler(pictures(IMAGES)))))


def evaluated_by_lightning() -> float:
    """`Trainer.validate` with its defaults."""
    module = lightning_module()
    with trainer() as make:
        make().validate(module, DataLoader(pictures(IMAGES), batch_size=4), verbose=False)
    return summed(module.seen)


def finetuned_by_lightning() -> tuple[float, float]:
    """`BackboneFinetuning` with its defaults: the backbone closed for an epoch, open for the next."""
    from lightning.pytorch.callbacks import BackboneFinetuning, Callback

    moved: list[float] = []

    class Look(Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: object, module: nn.Module) -> None:
            moved.append(float(module.backbone[1].running_mean.abs().max()))  # type: ignore[index]

    opening = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    module = lightning_module()
    with trainer() as make:
        loader = DataLoader(pictures(32), batch_size=4, shuffle=True)
        make(max_epochs=3, callbacks=[opening, Look()]).fit(module, loader)
    return apart(module), moved[0]


@contextmanager
def trainer() -> Iterator[Callable[..., object]]:
    """Makes Lightning trainers on both processes, quiet."""
    from lightning.pytorch import Trainer

    def make(**how: object) -> object:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "default_root_dir": folder}
        made = Trainer(accelerator="cpu", devices=2, **{"strategy": "ddp", **quiet, **how})
        assert made.world_size == 2
        return made

    with tempfile.TemporaryDirectory() as folder:
        yield make


def lightning_module() -> nn.Module:
    """The network as Lightning wants it, in the shape that `BackboneFinetuning` asks for."""
    from lightning.pytorch import LightningModule

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = network()
            self.seen = 0

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

        def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
            self.seen += len(batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    return Module()


def evaluated_by_fastai() -> float:
    """The evaluation at the end of an epoch of `Learner.fit`: images that its recorder's loss is a mean of."""
    with learner(pictures(32), pictures(IMAGES)) as learning:
        learning.fit(1)
    return summed(learning.recorder.loss.count)


def finetuned_by_fastai() -> tuple[float, float]:
    """As `Learner.fine_tune` does: an epoch after `freeze`, then one after `unfreeze`."""
    with learner(pictures(32), pictures(32)) as learning:
        learning.freeze()
        learning.fit(1)
        moved = float(learning.model[0][1].running_mean.abs().max())
        learning.unfreeze()
        learning.fit(1)
    return apart(learning.model), moved


@contextmanager
def learner(train: TensorDataset, judged: TensorDataset) -> Iterator[Any]:
    """A fastai learner on both processes with its defaults, but for two that need a GPU.

    `sync_bn`, and the broadcast of its loader, which goes through ``.cuda()``.
    """
    from fastai.data.core import DataLoaders
    from fastai.distributed import DistributedDL
    from fastai.learner import Learner

    def broadcast(_: object, indices: list[int], rank: int) -> list[int]:
        told = torch.tensor(indices)
        dist.broadcast(told, rank)
        return told.tolist()  # type: ignore[no-any-return]

    loaders = DataLoaders.from_dsets(list(train), list(judged), bs=4, device=torch.device("cpu"))
    parts = lambda whole: [[*part.parameters()] for part in whole]  # noqa: E731
    learning = Learner(loaders, network(), loss_func=nn.CrossEntropyLoss(), splitter=parts)
    random.seed(0)  # its loader shuffles with it
    with mock.patch.object(DistributedDL, "_broadcast", broadcast), learning.no_logging(), learning.no_bar():
        yield learning.to_distributed(sync_bn=False, cpu=True)


if __name__ == "__main__":
    main()
