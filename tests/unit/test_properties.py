"""What holds for any number of images, processes, epochs and steps, and for any damage to a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tuning import schedules
from tuning.cli.command_line import resolve_stages
from tuning.data.sampling import EvalOrder, TrainOrder
from tuning.errors import UserError
from tuning.flags import Flags
from tuning.progress import Progress
from tuning.safety.checkpoint import find, name_of
from tuning.safety.manifest import FORMAT, MANIFEST, OPTIMIZER, WEIGHTS, digest, read, sealed
from tuning.sizes import BatchPlan, plan_batch
from tuning.stage_checks import check_stage
from tuning.stage_lists import standard_stages
from tuning.stages import Stage

BASE = resolve_stages(Flags())[-1]
WORLDS = st.integers(1, 8)
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=50)
steady = settings.get_profile("steady")
steady_files = settings(steady, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, BatchPlan]:
    """(images, batch plan): 1 to 200 images on 1 to 8 processes, in every way the batch can be divided."""
    world = draw(WORLDS)
    images = draw(st.integers(world, 200))
    share = draw(st.integers(1, images // world))
    micro = draw(st.sampled_from([d for d in range(1, share + 1) if share % d == 0]))
    return images, plan_batch(share * world, micro, world, images)


def dealt(images: int, plan: BatchPlan, epoch: int, first_step: int = 0) -> list[list[int]]:
    """The real rows of every optimizer step from *first_step* on, over all processes, in the order of the run."""
    orders = [TrainOrder(images, 7, plan, rank) for rank in range(plan.world_size)]
    streams = [order.micro_batches(epoch, first_step) for order in orders]
    steps = []
    for step in range(first_step, plan.steps_per_epoch(images)):
        rows = []
        for _ in range(plan.micro_steps(orders[0].images_in(step))):
            for stream in streams:
                items = next(stream)
                assert len(items) == plan.micro_batch
                rows += [item.row for item in items if item.weight]
                assert {(item.epoch, item.weight) for item in items} <= {(epoch, 0.0), (epoch, 1.0)}
        steps.append(rows)
    assert all(next(stream, None) is None for stream in streams), "a process has forward passes left over"
    return steps


@steady
@given(batches(), st.integers(0, 5), st.data())
def test_every_image_once_an_epoch_from_any_point(
    drawn: tuple[int, BatchPlan], epoch: int, data: st.DataObject
) -> None:
    images, plan = drawn
    whole = dealt(images, plan, epoch)
    assert sorted(row for step in whole for row in step) == list(range(images))
    first = data.draw(st.integers(0, len(whole)))
    assert dealt(images, plan, epoch, first) == whole[first:]
    order = TrainOrder(images, 7, plan, 0)
    assert [order.rows(epoch, step) for step in range(len(whole))] == whole
    assert [order.images_in(step) for step in range(len(whole))] == [len(step) for step in whole]


@steady
@given(batches(), WORLDS, st.data())
def test_the_order_is_the_same_on_any_number_of_processes(
    drawn: tuple[int, BatchPlan], world: int, data: st.DataObject
) -> None:
    images, plan = drawn
    assume(plan.batch_size % world == 0)
    share = plan.batch_size // world
    micro = data.draw(st.sampled_from([d for d in range(1, share + 1) if share % d == 0]))
    other = plan_batch(plan.batch_size, micro, world, images)
    first = data.draw(st.integers(0, plan.steps_per_epoch(images)))
    assert dealt(images, other, 2, first) == dealt(images, plan, 2)[first:], "resumed on other processes"


@steady
@given(st.integers(1, 200), st.integers(1, 70), WORLDS)
def test_evaluation_sees_every_image_once(images: int, batch: int, world: int) -> None:
    shares = [list(EvalOrder(images, batch, rank, world).micro_batches()) for rank in range(world)]
    items = [item for share in shares for micro in share for item in micro]
    assert sorted(item.row for item in items if item.weight == 1) == list(range(images))
    assert {item.weight for item in items} <= {0.0, 1.0}
    assert all(0 <= item.row < images for item in items)
    assert len({tuple(map(len, share)) for share in shares}) == 1, "processes would wait for each other for ever"


@steady
@given(st.integers(1, 2000), st.integers(1, 512), WORLDS, st.one_of(st.just("auto"), st.integers(1, 600)))
def test_a_batch_is_divided_without_remainder_or_refused(images: int, batch: int, world: int, micro: int | str) -> None:
    try:
        plan = plan_batch(batch, micro, world, images)
    except UserError:
        possible = batch <= images and batch % world == 0
        too_small = micro == "auto" and batch // world >= 8
        assert not possible or too_small or (micro != "auto" and (batch // world) % int(micro))
        return
    assert plan.accumulation * plan.micro_batch * plan.world_size == plan.batch_size == batch
    order = TrainOrder(images, 0, plan, 0)
    steps = [order.images_in(step) for step in range(plan.steps_per_epoch(images))]
    assert sum(steps) == images
    assert all(step == batch for step in steps[:-1])
    assert 1 <= steps[-1] <= batch
    assert all(1 <= plan.micro_steps(step) <= plan.accumulation for step in steps)


@steady
@given(st.integers(0, 30), st.integers(0, 30), st.sampled_from(["all", "gradual"]), st.integers(1, 50))
def test_standard_stages_last_as_long_as_was_asked(frozen: int, epochs: int, unfreeze: str, per_epoch: int) -> None:
    base = dataclasses.replace(BASE, epochs=epochs)
    if not frozen + epochs:
        with pytest.raises(UserError, match="nothing to train"):
            standard_stages(base, frozen, 1e-3, unfreeze)
        return
    stages = standard_stages(base, frozen, 1e-3, unfreeze)
    assert sum(stage.steps(per_epoch) for stage in stages) == (frozen + epochs) * per_epoch
    assert all(stage.epochs >= 1 for stage in stages)
    assert not epochs or stages[-1].open == "all"
    for stage in stages:
        check_stage(stage)


EPOCHS = st.one_of(st.none(), st.floats(1e-6, 1e3))


@st.composite
def scheduled(draw: st.DrawFn) -> Stage:
    """Any stage that `check_stage` lets through."""
    epochs = draw(st.integers(1, 40))
    stage = dataclasses.replace(
        BASE,
        epochs=epochs,
        schedule=draw(st.sampled_from(["constant", "cosine", "one-cycle", "sgdr", "step", "triangular"])),
        warmup_epochs=draw(st.floats(0, epochs, exclude_max=True)),
        cycle_epochs=draw(EPOCHS),
        cycle_mult=draw(st.integers(1, 5)),
        cycle_decay=draw(st.floats(0, 1, exclude_min=True)),
        step_epochs=draw(EPOCHS),
        step_gamma=draw(st.floats(0, 1, exclude_min=True)),
        lr_floor=draw(st.floats(0, 1, exclude_max=True)),
    )
    check_stage(stage)
    return stage


@settings(steady, max_examples=150)
@given(scheduled(), st.integers(1, 30), st.lists(st.integers(0, 10**6), max_size=5))
def test_factors_lie_between_0_and_1_in_and_beyond_the_stage(stage: Stage, per_epoch: int, beyond: list[int]) -> None:
    factor, total = stage.factor(per_epoch), stage.steps(per_epoch)
    warmup = round(stage.warmup_epochs * per_epoch)
    for step in (*range(min(total, 200)), total - 1, total, total + 1, *beyond):
        assert 0 <= factor(step) <= 1
        assert math.isfinite(factor(step))
    rise = [factor(step) for step in range(min(warmup, total, 200))]
    assert rise == sorted(rise)
    assert warmup >= total or all(value <= factor(warmup) for value in rise)
    assert factor(0) == stage.factor(per_epoch)(0), "no state"
    assert stage.cut_cycle(per_epoch) is None or stage.schedule == "sgdr"


@steady
@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 5000))
def test_restarts_are_where_sgdr_jumps(first: int, mult: int, steps: int) -> None:
    found = schedules.restarts(first, mult, steps)
    factor = schedules.sgdr(first, mult)
    assert all(0 < step < steps for step in found)
    assert all(factor(step) == 1 for step in found)
    if first > 1:
        assert found == [step for step in range(1, steps) if factor(step) == 1]


KINDS: dict[str, st.SearchStrategy[Any]] = {
    "whole": st.integers(0, 2**53),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "text": st.text(max_size=20),
}
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3)),
    max_leaves=6,
)


def progresses() -> st.SearchStrategy[Progress]:
    whole, best = KINDS["whole"], st.one_of(st.none(), KINDS["float"])
    own = dict.fromkeys(("due", "stage_over"), st.booleans()) | dict.fromkeys(("best", "stage_best", "lr"), best)
    own |= dict.fromkeys(("seconds", "lr_factor"), KINDS["float"])
    own |= dict.fromkeys(("best_step", "searched", "micro_batch"), st.one_of(st.none(), whole))
    own |= dict.fromkeys(("tracker_id", "frozen_forward"), st.one_of(st.none(), KINDS["text"]))
    return st.builds(Progress, **{f.name: own.get(f.name, whole) for f in dataclasses.fields(Progress)})


@steady
@given(progresses(), st.dictionaries(st.text(min_size=1, max_size=9).map("x_".__add__), JSON, max_size=3))
def test_progress_survives_json_and_ignores_what_it_does_not_know(progress: Progress, more: dict[str, Any]) -> None:
    content = json.loads(json.dumps({**progress.to_json(), **more}))
    assert Progress.from_json(content) == progress


@settings(steady, max_examples=150)
@given(st.sampled_from([f.name for f in dataclasses.fields(Progress)]), JSON)
def test_progress_of_another_type_is_refused(name: str, value: object) -> None:
    try:
        taken = Progress.from_json({name: value})
    except TypeError:
        return
    assert getattr(taken, name) == value or value != value
    kind = type(getattr(Progress(), name))
    optional = ("best", "best_step", "stage_best", "tracker_id", "frozen_forward", "searched", "lr", "micro_batch")
    assert name in optional or isinstance(value, kind | int)


def write_checkpoint(folder: Path, step: int = 4) -> None:
    """Files that `read` takes for a checkpoint."""
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(bytes(range(256)))
    (folder / OPTIMIZER).write_bytes(b"optimizer" * 9)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in sorted(folder.iterdir())}
    content = {"format": FORMAT, "progress": Progress(step=step).to_json(), "world_size": 2, "files": files}
    (folder / MANIFEST).write_text(sealed(content))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (2, 4):
        write_checkpoint(tmp_path / "checkpoints" / name_of(step), step)
    return tmp_path


def refused(run: Path) -> None:
    """The newest checkpoint is refused by name, and the one before it is used."""
    with pytest.raises(UserError):
        read(run / "checkpoints" / name_of(4))
    found, damaged = find(run, "auto")
    assert found is not None
    assert found.progress.step == 2
    assert any(name_of(4) in text for text in damaged)


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER])
def test_any_damage_to_a_file_is_found(run: Path, name: str) -> None:
    path = run / "checkpoints" / name_of(4) / name
    good = path.read_bytes()
    flipped = [good[:n] + bytes([good[n] ^ 1 << n % 8]) + good[n + 1 :] for n in range(len(good))]
    for damaged in (*flipped, *(good[:n] for n in range(len(good))), good + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name} is missing or damaged"):
            read(path.parent)
    refused(run)
    path.unlink()
    refused(run)
    path.mkdir()
    refused(run)
    path.rmdir()
    path.write_bytes(good)
    assert read(path.parent).progress.step == 4


def test_any_damage_to_the_manifest_is_found(run: Path) -> None:
    """Or harmless: blanks between the values."""
    path = run / "checkpoints" / name_of(4) / MANIFEST
    good, taken = path.read_bytes(), read(path.parent)
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        with suppress(UserError):
            assert read(path.parent) == taken
        path.write_bytes(good[:place])
        with pytest.raises(UserError, match="no complete checkpoint"):
            read(path.parent)
    refused(run)
    path.unlink()
    refused(run)


@steady_files
@given(value=JSON, key=st.sampled_from(["progress", "world_size", "files", "format", "in files", "itself"]))
def test_odd_manifests_are_refused_without_a_traceback(run: Path, value: object, key: str) -> None:
    """Those that some other program has written and sealed."""
    path = run / "checkpoints" / name_of(4) / MANIFEST
    good = path.read_text()
    content = {name: one for name, one in json.loads(good).items() if name != "sha256"}
    if key == "in files":
        content["files"][WEIGHTS] = value
    else:
        content[key] = value
    path.write_text(json.dumps(value) if key == "itself" else sealed(content))
    try:
        read(path.parent)
    except UserError:
        refused(run)
    finally:
        path.write_text(good)
