"""One optimizer step = processes x accumulation x micro-batch images."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.errors import UserError
from tuning.sizes import LARGEST_AUTO_MICRO_BATCH, largest_auto_micro_batch, plan_batch, scaled_lr


@given(st.integers(1, 3000), st.integers(1, 64), st.integers(1, 10_000))
def test_auto_fills_every_batch_or_names_one_that_works(batch: int, world: int, images: int) -> None:
    try:
        plan = plan_batch(batch, "auto", world, images)
    except UserError:
        plan = None
    share = batch // world
    awkward = share >= 8 and max((d for d in range(1, 65) if share % d == 0), default=1) < 8
    assert (plan is None) == (batch > images or batch % world > 0 or awkward)
    if plan is None:
        return
    assert plan.micro_batch * plan.accumulation * world == batch <= images
    assert plan.micro_batch <= LARGEST_AUTO_MICRO_BATCH
    larger = range(plan.micro_batch + 1, LARGEST_AUTO_MICRO_BATCH + 1)
    assert not any((batch // world) % size == 0 for size in larger), "a larger micro-batch would have fitted"


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 8), st.integers(1, 2000))
def test_steps_cover_the_images(micro: int, world: int, accumulation: int, images: int) -> None:
    batch = micro * world * accumulation
    plan = plan_batch(batch, micro, world, max(images, batch))
    steps = plan.steps_per_epoch(images)
    assert (steps - 1) * batch < images <= steps * batch
    short = images - (steps - 1) * batch
    assert 1 <= plan.micro_steps(short) <= plan.micro_steps(batch) == accumulation


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((65, "auto", 1, 64), ["--batch-size 65", "64 images", "at most 64"]),
        ((7, "auto", 2, 100), ["--batch-size 7", "2 processes", "Choose 6 or 8"]),
        ((3, "auto", 8, 100), ["--batch-size 3", "8 processes", "Choose 8"]),
        ((24, 5, 2, 100), ["--micro-batch 5", "12 images", "1, 2, 3, 4, 6, 12"]),
    ],
)
def test_refusals_state_the_arithmetic(arguments: tuple[int, int | str, int, int], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        plan_batch(*arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_scaled_lr() -> None:
    assert scaled_lr(1e-3, "none", 1024, 256) == 1e-3
    assert scaled_lr(1e-3, "linear", 1024, 256) == pytest.approx(4e-3)
    assert scaled_lr(1e-3, "sqrt", 1024, 256) == pytest.approx(2e-3)
    assert scaled_lr(1e-3, "linear", 64, 256) == pytest.approx(2.5e-4)
    assert scaled_lr(1e-3, "sqrt", 128, 256) == pytest.approx(1e-3 / math.sqrt(2))


@given(st.integers(1, 3000), st.integers(1, 8))
def test_smaller_forward_passes_keep_the_optimizer_step(share: int, world: int) -> None:
    plan, sizes = plan_batch(share * world, share, world, share * world), [share]
    while (smaller := plan.smaller) is not None:
        assert (smaller.batch_size, smaller.world_size) == (plan.batch_size, plan.world_size)
        assert smaller.micro_batch * smaller.accumulation * world == share * world
        half, rest = divmod(plan.micro_batch, 2)
        assert rest or smaller.micro_batch == half
        between = range(smaller.micro_batch + 1, plan.micro_batch)
        assert not rest or not any(share % size == 0 for size in between), "a larger divisor was passed over"
        plan = smaller
        sizes.append(plan.micro_batch)
    assert sizes[-1] == 1


@pytest.mark.parametrize(
    ("planned", "saved", "expected"), [(32, 8, 8), (32, 64, 32), (32, 7, 4), (24, 16, 12), (5, 4, 1), (8, 0, 1)]
)
def test_a_saved_micro_batch_on_another_share(planned: int, saved: int, expected: int) -> None:
    assert plan_batch(2 * planned, planned, 2, 1000).at_most(saved).micro_batch == expected


def test_auto_begins_higher_on_a_gpu() -> None:
    sizes = {kind: largest_auto_micro_batch(kind) for kind in ("cpu", "cuda", "mps")}
    assert sizes == {"cpu": 64, "cuda": 1024, "mps": 1024}
    assert plan_batch(4096, "auto", 2, 10_000, largest_auto=sizes["cuda"]).micro_batch == 1024
    assert plan_batch(384, "auto", 2, 10_000, largest_auto=sizes["cuda"]).micro_batch == 192
