"""Sizes that change from stage to stage and from step to step: the same run on one process and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks
from stage_runs import largest_difference, run_stages

STAGES = """
stages:
- {open: head, epochs: 1, image_size: 32, batch_scaling: area}
- {open: all, epochs: 1, image_size: 48, multi_scale: 0.4}
- {open: all, epochs: 1, image_size: 64, train_sizes: [32, 48, 64]}
- {open: norms, epochs: 1, image_size: 64, augment: none}
- {open: norms-biases, epochs: 1, image_size: 64}
"""


@pytest.mark.parametrize("name", ["test_vit3", pytest.param("test_convnext", marks=pytest.mark.slow)])
def test_two_processes_equal_one(photos: Path, tmp_path: Path, name: str) -> None:
    """A ViT of a fixed size, which must resample its position embeddings; then a network that takes any size."""
    preset = tmp_path / "sizes.yaml"
    preset.write_text(STAGES)
    argv = ("--data", str(photos), "--model", name, "--weights", "none", "--preset", str(preset), "--batch-size", "8")
    argv += ("--micro-batch", "4", "--lr-scaling", "linear", "--lr-batch", "8", "--mixup", "0.4", "--cutmix", "1")
    (alone,) = run_ranks(1, run_stages, *argv)
    first, second = run_ranks(2, run_stages, *argv)
    # 32 pictures at the size of a quarter of the area, in two steps an epoch; 8 else, in five.
    assert len(alone.losses) == 2 + 5 + 5 + 5 + 5
    assert max(alone.lrs[0].values()) == pytest.approx(4 * max(alone.lrs[2].values()))
    for after_one, on_first, on_second in zip(alone.states, first.states, second.states, strict=True):
        assert largest_difference(on_first, on_second) == 0
        assert largest_difference(on_first, after_one) < 1e-5
    assert first.losses == second.losses
    assert first.losses == pytest.approx(alone.losses, abs=1e-5)
    assert first.metrics == second.metrics
