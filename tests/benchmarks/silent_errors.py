"""What other tools do, without a word, on two processes: their own parts, run here.

    pip install lightning fastai
    torchrun --nproc_per_node 2 -m tests.benchmarks.silent_errors

Three questions, each put to the parts of the tools that answer it (gloo, CPU, tiny networks, under a minute):

- how many images an evaluation of 17 counts,
- how far the parameters of two processes are apart after a stage that opened the backbone (should be 0),
- how far running statistics of a closed BatchNorm layer have moved (should be 0).

Ours are tested in `tests/distributed`. A tool that is not installed is left out.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

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
    ask("largest difference between the ranks' parameters", "lightning", lambda: finetuned_by_lightning()[0], 0.0)
    ask("largest movement of a closed BatchNorm's mean", "lightning", lambda: finetuned_by_lightning()[1], 0.0)
    ask("largest movement of a closed BatchNorm's mean", "fastai", frozen_by_fastai, 0.0)
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


def frozen_by_fastai() -> float:
    """`Learner.freeze` and a fit, with its defaults; one process, its statistics are the same on two."""
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    model, rows = network(), list(pictures(32))
    loaders = DataLoaders.from_dsets(rows, rows, bs=4, device=torch.device("cpu"))
    parts = lambda whole: [[*part.parameters()] for part in whole]  # noqa: E731
    learner = Learner(loaders, model, loss_func=nn.CrossEntropyLoss(), splitter=parts)
    learner.freeze()
    with learner.no_logging():
        learner.fit(1)
    return float(model[0][1].running_mean.abs().max())  # type: ignore[index,union-attr]


if __name__ == "__main__":
    main()
