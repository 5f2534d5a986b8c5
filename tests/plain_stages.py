"""A stage with nothing in it: plain SGD at a constant rate, everything open."""

from __future__ import annotations

import dataclasses

from tuning.stages import Stage


def plain_stage(**changes: object) -> Stage:
    """The stage, but for *changes*."""
    base = Stage(
        name="all", open="all", epochs=1, lr=0.1, lr_ratio=1.0, layer_decay=None, optimizer="sgd", momentum=0.0,
        weight_decay=0.0, schedule="constant", warmup_epochs=0, cycle_epochs=None, cycle_mult=2, cycle_decay=1.0,
        step_epochs=None, step_gamma=0.1, lr_floor=0.0, batch_size=4, image_size=None, batch_norm="frozen",
        augment="none", cache_features=False,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]
