"""Every image once: 22, 17, 16, 3 and 1 images on 1, 2 and 3 processes give identical numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from ranks import run_ranks
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from tuning.data.loader import Micro
from tuning.data.sampling import EvalOrder
from tuning.errors import UserError
from tuning.judging.evaluation import evaluate

CLASSES = 7


class Inputs:
    """Evaluation batches whose input is the row of the logits itself."""

    def __init__(self, images: int, rank: int, world_size: int, unreadable: frozenset[int]) -> None:
        self.order, self.unreadable = EvalOrder(images, 4, rank, world_size), unreadable

    def __iter__(self) -> Iterator[Micro]:
        logits, labels = answers(self.order.images)
        for items in self.order.micro_batches():
            index = torch.tensor([item.row for item in items])
            weights = torch.tensor([item.weight * (item.row not in self.unreadable) for item in items])
            yield Micro(logits[index], labels[index], weights, index)


def answers(images: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(images)
    return torch.randn(images, CLASSES, generator=generator), torch.randint(0, CLASSES, (images,), generator=generator)


def judge(images: int, unreadable: frozenset[int] = frozenset()) -> dict[str, float]:
    accelerator = Accelerator()
    feed = Inputs(images, accelerator.process_index, accelerator.num_processes, unreadable)
    return evaluate(accelerator, nn.Identity(), feed, images, CLASSES)


@pytest.mark.parametrize("images", [22, 17, 16, 3, 1])
def test_identical_on_any_number_of_processes(images: int) -> None:
    results = [result for world_size in (1, 2, 3) for result in run_ranks(world_size, judge, images)]
    assert all(result == results[0] for result in results)
    logits, labels = answers(images)
    assert results[0]["images"] == images
    assert results[0]["top1"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert results[0]["top5"] == pytest.approx(
        float((logits.topk(5).indices == labels[:, None]).any(1).double().mean())
    )
    assert results[0]["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    assert results[0]["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits.double(), labels)))


def test_unreadable_pictures_are_left_out() -> None:
    for result in run_ranks(2, judge, 9, frozenset({0, 4})):
        logits, labels = answers(9)
        kept = [n for n in range(9) if n not in (0, 4)]
        assert result["images"] == 7
        assert result["top1"] == pytest.approx(float((logits.argmax(1) == labels)[kept].double().mean()))


def test_nothing_readable_is_refused() -> None:
    with pytest.raises(UserError, match="none of the 2 evaluation pictures"):
        judge(2, frozenset({0, 1}))
