"""An order near to the blocks of the data: every image once, the same steps for any processes, each in its own part."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuning.data.local_order import Blocks, LocalOrder, train_order
from tuning.data.sampling import EvalOrder, Item, TrainOrder
from tuning.sizes import BatchPlan

SEEDS = st.integers(0, 2**63 - 1)
PINNED = [[7, 8, 3, 2], [9, 1, 6, 4], [0, 5]]


def blocks_of(sizes: list[int], held: int) -> Blocks:
    return Blocks(np.concatenate([[0], np.cumsum(sizes)]), held)


@st.composite
def plans(draw: st.DrawFn) -> tuple[Blocks, BatchPlan]:
    """Odd blocks, and a batch that is no larger than the data."""
    micro, world, accumulation = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=30))
    plan = BatchPlan(micro * world * accumulation, micro, world)
    sizes.append(draw(st.integers(1, 9)) + max(0, plan.batch_size - sum(sizes)))
    return blocks_of(sizes, draw(st.integers(1, 40))), plan


def orders(blocks: Blocks, seed: int, plan: BatchPlan) -> list[LocalOrder]:
    """One a process."""
    images = int(blocks.starts[-1])
    return [LocalOrder(images, seed, plan, rank, blocks=blocks) for rank in range(plan.world_size)]


def passes_of(blocks: Blocks, seed: int, plan: BatchPlan, epoch: int) -> list[list[list[Item]]]:
    """``[step] -> micro-batches of all processes``, in the order in which the step has them."""
    shares = [list(order.micro_batches(epoch)) for order in orders(blocks, seed, plan)]
    order, steps, passed = orders(blocks, seed, plan)[0], [], 0
    for step in range(order.steps_per_epoch):
        count = plan.micro_steps(order.images_in(step))
        steps.append([micro for share in shares for micro in share[passed : passed + count]])
        passed += count
    assert all(len(share) == passed for share in shares), "processes would wait for each other for ever"
    return steps


@given(plans(), SEEDS, st.integers(0, 1000))
def test_every_image_once_an_epoch_in_full_micro_batches(plan: tuple[Blocks, BatchPlan], seed: int, epoch: int) -> None:
    blocks, batch = plan
    micros = [micro for step in passes_of(blocks, seed, batch, epoch) for micro in step]
    items = [item for micro in micros for item in micro]
    images = int(blocks.starts[-1])
    assert sorted(item.row for item in items if item.weight == 1) == list(range(images))
    assert {item.weight for item in items} <= {0.0, 1.0}
    assert all(0 <= item.row < images and item.epoch == epoch for item in items)
    assert {len(micro) for micro in micros} == {batch.micro_batch}
    assert all(item.weight == 1 for item in items[: -batch.micro_batch * batch.world_size])


@given(plans(), SEEDS, st.integers(0, 9))
def test_steps_do_not_depend_on_processes_or_accumulation(
    plan: tuple[Blocks, BatchPlan], seed: int, epoch: int
) -> None:
    blocks, batch = plan
    alone = orders(blocks, seed, BatchPlan(batch.batch_size, batch.batch_size, 1))[0]
    for step, micros in enumerate(passes_of(blocks, seed, batch, epoch)):
        real = [item.row for micro in micros for item in micro if item.weight]
        assert real == alone.rows(epoch, step)
        assert len(real) == alone.images_in(step)


@given(plans(), SEEDS)
def test_micro_batches_of_one_size_are_the_same_on_any_number_of_processes(
    plan: tuple[Blocks, BatchPlan], seed: int
) -> None:
    """What mixes pictures or normalises over a micro-batch sees the same companions; filler included."""
    blocks, batch = plan
    several = passes_of(blocks, seed, batch, 0)
    alone = passes_of(blocks, seed, BatchPlan(batch.batch_size, batch.micro_batch, 1), 0)
    for mine, theirs in zip(several, alone, strict=True):
        assert mine[: len(theirs)] == theirs
        assert all(item.weight == 0 for micro in mine[len(theirs) :] for item in micro)


@given(plans(), SEEDS, st.data())
def test_resuming_goes_on_where_it_stopped(plan: tuple[Blocks, BatchPlan], seed: int, data: st.DataObject) -> None:
    blocks, batch = plan
    order = data.draw(st.sampled_from(orders(blocks, seed, batch)))
    first = data.draw(st.integers(0, order.steps_per_epoch))
    skipped = sum(batch.micro_steps(order.images_in(step)) for step in range(first))
    assert list(order.micro_batches(3, first)) == list(order.micro_batches(3))[skipped:]
    both = [(rows.tolist(), weights.tolist()) for rows, weights in order.indices(3, first)]
    assert both == [([i.row for i in items], [i.weight for i in items]) for items in order.micro_batches(3, first)]


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_every_process_reads_its_own_blocks(world: int) -> None:
    """Of 800 blocks each is read by one process, but for those in which one part of the sequence ends."""
    blocks = blocks_of([10] * 800, held=32)
    readers = [
        {item.row // 10 for micro in order.micro_batches(1) for item in micro}
        for order in orders(blocks, 0, BatchPlan(64, 4, world))
    ]
    lanes, window = 32, 1
    assert set().union(*readers) == set(range(800))
    assert sum(map(len, readers)) <= 800 + (world - 1) * window
    assert max(map(len, readers)) <= 800 / world + 2 * window
    assert orders(blocks, 0, BatchPlan(64, 4, world))[0].share == max(1, lanes // world) / lanes


@pytest.mark.parametrize("rest", [8, 50])
def test_a_short_last_step_reads_few_blocks_of_others(rest: int) -> None:
    """Its images may go to other processes, so that forward passes are the same on any number; filler costs nothing."""
    blocks = blocks_of([10] * 640 + [rest], held=32)
    shares = orders(blocks, 0, BatchPlan(64, 8, 8))
    assert shares[0].images_in(100) == rest
    readers = [{min(i.row // 10, 640) for micro in order.micro_batches(1) for i in micro} for order in shares]
    assert sum(map(len, readers)) <= 641 + 7 + rest


def test_few_blocks_are_open_at_a_time() -> None:
    """Between its first and its last use a block waits no longer than its window lasts."""
    blocks = blocks_of([10] * 400, held=64)
    order = orders(blocks, 0, BatchPlan(32, 32, 1))[0]
    assert (order.lanes, order.window) == (32, 2)
    seen = np.array([[item.row // 10, n] for n, micro in enumerate(order.micro_batches(0)) for item in micro])
    open_at = np.zeros(order.steps_per_epoch, int)
    split = 0
    for block in range(400):
        used = seen[seen[:, 0] == block, 1]
        whole = used.max() - used.min() < 40  # a window that a lane begins and another ends is read twice
        split += not whole
        if whole:
            open_at[used.min() : used.max() + 1] += 1
    assert split <= 2 * order.lanes
    assert open_at.max() <= order.lanes * order.window


@pytest.mark.parametrize(
    ("batch", "held", "lanes", "window"),
    [(256, 200, 64, 3), (256, 10**6, 64, 15625), (256, 5, 4, 1), (96, 100, 32, 3), (7, 50, 1, 50), (8, 0, 1, 1)],
)
def test_lanes_divide_the_batch_and_fit_what_is_held(batch: int, held: int, lanes: int, window: int) -> None:
    order = orders(blocks_of([10] * 100, held), 0, BatchPlan(batch, batch, 1))[0]
    assert (order.lanes, order.window) == (lanes, window)


def test_orders_differ_between_epochs_and_seeds() -> None:
    blocks, plan = blocks_of([10] * 8, 2), BatchPlan(8, 8, 1)
    seen = {
        tuple(item.row for micro in orders(blocks, seed, plan)[0].micro_batches(epoch) for item in micro)
        for seed in range(10)
        for epoch in range(10)
    }
    assert len(seen) == 100


def test_the_order_is_pinned() -> None:
    """A change here would break resuming of runs that exist."""
    order = orders(blocks_of([4, 3, 3], 2), 42, BatchPlan(4, 4, 1))[0]
    assert [order.rows(3, step) for step in range(3)] == PINNED


def test_sorted_data_is_mixed_as_far_as_what_is_held() -> None:
    """Classes in a row, 100 classes of 10 blocks: the more is held, the more classes are in a step."""
    plan = BatchPlan(64, 64, 1)

    def classes(held: int) -> float:
        order = orders(blocks_of([10] * 1000, held), 0, plan)[0]
        return float(np.mean([len({row // 100 for row in order.rows(0, step)}) for step in range(20, 60)]))

    full = TrainOrder(10_000, 0, plan, 0)
    best = float(np.mean([len({row // 100 for row in full.rows(0, step)}) for step in range(20, 60)]))
    assert classes(1) < 8
    assert classes(16) < classes(64) <= classes(512) + 1
    assert classes(512) > 0.97 * best


def test_without_blocks_the_order_is_the_full_shuffle() -> None:
    plan = BatchPlan(8, 4, 2)
    assert train_order(50, 1, plan, 1, None) == TrainOrder(50, 1, plan, 1)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 6))
def test_evaluation_sees_every_image_once_in_parts_that_lie_together(images: int, batch: int, world: int) -> None:
    shares = [list(EvalOrder(images, batch, rank, world, together=True).micro_batches()) for rank in range(world)]
    items = [item for share in shares for micro in share for item in micro]
    assert [item.row for item in items if item.weight == 1] == list(range(images))
    assert all(0 <= item.row < images for item in items)
    assert len({tuple(map(len, share)) for share in shares}) == 1
