"""Sweeps: one factor for all groups, the right end, every stage, and everything back where it was."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from plain_stages import plain_stage
from torch import Tensor, nn

from tuning.clipping import clipping
from tuning.data.loader import FeatureFeed
from tuning.data.sampling import TrainOrder
from tuning.engine import Step, train_steps
from tuning.entering import Entered, enter_stage
from tuning.errors import UserError
from tuning.flags import FinderFlags
from tuning.losses import Loss, cross_entropy
from tuning.lr_curve import smoothed, smoothing
from tuning.lr_search.auto import is_transformer
from tuning.lr_search.finder import Found, chosen_stage, find, search_for
from tuning.lr_search.no_trace import leaving_no_trace
from tuning.lr_search.race import Candidate, winner
from tuning.lr_search.report import draw, facts, race_table, table
from tuning.lr_search.trials import Judged, Search, Sweep, Trials, race, sweep
from tuning.plan import StagePlan, make_plan
from tuning.progress import Progress
from tuning.stages import Stage

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

IMAGES, CLASSES, SIZE = 13, 3, 32
NO_CLIP = clipping(0.0, None, None)
SEARCH = Search(1e-5, 1.0, 12, 1)


def stage(**changes: object) -> Stage:
    own = {"lr": 1e-2, "lr_ratio": 0.1, "optimizer": "adamw", "momentum": 0.9, "weight_decay": 0.05}
    return plain_stage(**{**own, "schedule": "cosine", "batch_norm": "train", **changes})


def network(name: str = "test_efficientnet", **changes: float) -> nn.Module:
    torch.manual_seed(0)
    size = {"img_size": SIZE} if "vit" in name else {}
    model: nn.Module = timm.create_model(name, num_classes=CLASSES, **size, **changes)
    model.get_classifier().weight.data *= 0.01  # type: ignore[operator]  # the loss starts near ln(3) for any picture
    return model


def planned_for(model: nn.Module, *stages: Stage, micro: int = 2) -> tuple[StagePlan, ...]:
    return make_plan(stages, model, train_images=IMAGES, world_size=1, micro_batch=micro, image_size=SIZE)


def bright(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Pictures whose brightness tells their class."""
    labels = torch.arange(IMAGES) % CLASSES
    noise = torch.randn(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return noise + 2 * labels[:, None, None, None], labels


def feed_for(planned: StagePlan) -> FeatureFeed:
    return FeatureFeed(*bright(), TrainOrder(IMAGES, 0, planned.batch, 0))


def trials_of(
    accelerator: Accelerator, entered: Entered, feed: FeatureFeed, loss: Loss | None = None, watch: Any = iter
) -> Trials:
    """Judged on other pictures of the same kind."""
    pictures, labels = bright(seed=2)

    def judge() -> Judged:
        entered.model.eval()
        with torch.no_grad():
            logits = entered.model(pictures)
            right = float((logits.argmax(dim=1) == labels).double().mean())
            return Judged(tuple(cross_entropy()(logits, labels).tolist()), right)

    return Trials(accelerator, entered, feed, loss or cross_entropy(), NO_CLIP, 0, judge, watch)


def entered_with(
    model: nn.Module, chosen: Stage, accelerator: Accelerator | None = None, micro: int = 2
) -> tuple[Accelerator, Entered, FeatureFeed]:
    accelerator = accelerator or Accelerator()
    (planned,) = planned_for(model, chosen, micro=micro)
    return accelerator, enter_stage(accelerator, model, planned), feed_for(planned)


def watched(kept: list[Step]) -> Any:
    def watch(steps: Iterable[Step]) -> Iterator[Step]:
        for step in steps:
            kept.append(step)
            yield step

    return watch


def test_one_factor_rises_on_every_group() -> None:
    """From start to end on the head, geometrically; the ratios of the groups are those of the stage."""
    accelerator, entered, feed = entered_with(network(), stage())
    peaks, steps = {g["name"]: g["peak_lr"] for g in entered.optimizer.param_groups}, []
    found = sweep(trials_of(accelerator, entered, feed, watch=watched(steps)), SEARCH)
    assert len(set(peaks.values())) > 3
    assert found.lrs == pytest.approx(tuple(np.geomspace(1e-5, 1.0, 12)[: len(found.lrs)]))
    for step, lr in zip(steps, found.lrs, strict=True):
        assert step.lrs == pytest.approx({name: peak * lr / 1e-2 for name, peak in peaks.items()})


def test_fewer_batches_than_steps_go_round_and_sweeps_see_other_orders() -> None:
    accelerator, entered, feed = entered_with(network(), stage())
    places: list[list[tuple[int, int]]] = []
    for number in range(2):
        steps: list[Step] = []
        sweep(trials_of(accelerator, entered, feed, watch=watched(steps)), SEARCH, number)
        places.append([step.place for step in steps])
    assert [place for _, place in places[0]][:9] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert not {epoch for epoch, _ in places[0]} & {epoch for epoch, _ in places[1]}
    assert min(epoch for place in places for epoch, _ in place) > 10_000, "epochs of the run itself"


def scaled(factors: Mapping[int, float]) -> Loss:
    """Cross-entropy, multiplied in some calls: two calls a step."""
    calls = iter(range(10**6))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy()(logits * 0, labels) * factors.get(next(calls) // 2, 1.0)

    return loss


@pytest.mark.parametrize(
    ("factors", "steps", "ended"),
    [
        ({5: math.nan}, 6, "not finite"),
        ({0: math.inf}, 1, "not finite"),
        ({5: 1000.0}, 6, "diverged"),
        ({}, 12, "end"),
        (dict.fromkeys(range(6, 12), 3.0), 12, "end"),
    ],
)
def test_where_a_sweep_ends(factors: dict[int, float], steps: int, ended: str) -> None:
    accelerator, entered, feed = entered_with(network(), stage(lr_ratio=1.0, open="head"))
    found = sweep(trials_of(accelerator, entered, feed, scaled(factors)), SEARCH)
    assert (len(found.losses), len(found.lrs), found.ended) == (steps, steps, ended)
    if ended != "not finite":
        smooth = smoothed(found.losses, smoothing(np.geomspace(1e-5, 1.0, 12)))
        assert (smooth[-1] > 4 * smooth.min()) == (ended == "diverged")


@pytest.mark.parametrize("depth", ["head", 2, "all"])
@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_closed_layers_stay_closed(depth: str | int, batch_norm: str) -> None:
    """During the sweep, too: what is closed does not move at the highest learning rate."""
    model = network()
    accelerator, entered, feed = entered_with(model, stage(open=depth, lr_ratio=0.5, batch_norm=batch_norm))
    before, moved = copy.deepcopy(model.state_dict()), set()

    def watch(steps: Iterable[Step]) -> Iterator[Step]:
        for step in steps:
            moved.update(k for k, v in model.state_dict().items() if not torch.equal(v, before[k]))
            yield step

    sweep(trials_of(accelerator, entered, feed, watch=watch), SEARCH)
    opened = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert opened
    assert {name for name in moved if "running" not in name and "tracked" not in name} == opened
    assert bool({name for name in moved if "running" in name}) == (batch_norm == "train" and depth != "head")


def snapshot(model: nn.Module, entered: Entered) -> dict[str, Any]:
    optimizer = entered.optimizer.optimizer
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "state": optimizer.state_dict()["state"],
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1],
            "python": random.getstate(),
            "modes": {name: module.training for name, module in model.named_modules()},
            "gradients": [parameter.grad for parameter in model.parameters()],
        }
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "madgrad", "adafactor"])
def test_everything_is_put_back_bit_for_bit(optimizer: str) -> None:
    """Also in mid-run, when the optimizer has a state; through an error in the sweep, too."""
    model = network(drop_rate=0.2)
    accelerator, entered, feed = entered_with(model, stage(optimizer=optimizer, epochs=2))
    steps = train_steps(accelerator, entered, feed, cross_entropy(), NO_CLIP, Progress(), 0)
    for _ in range(3):
        next(steps)
    steps.close()
    before = snapshot(model, entered)
    assert before["state"]

    def watch(steps: Iterable[Step]) -> Iterator[Step]:
        for step in steps:
            np.random.rand()
            random.random()
            yield step

    sweep(trials_of(accelerator, entered, feed, watch=watch), SEARCH)
    assert same(snapshot(model, entered), before)

    def fails(steps: Iterable[Step]) -> Iterator[Step]:
        yield next(iter(steps))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(trials_of(accelerator, entered, feed, watch=fails), SEARCH)
    assert same(snapshot(model, entered), before)


def test_generators_inside_an_optimizer_are_put_back() -> None:
    accelerator, entered, _ = entered_with(network(), stage(optimizer="kron"))
    held = entered.optimizer.optimizer
    held.rng, held.generator = random.Random(3), torch.Generator().manual_seed(3)  # type: ignore[attr-defined]
    before = held.rng.getstate(), held.generator.get_state()
    with leaving_no_trace(accelerator, entered):
        held.rng.random()
        torch.rand(3, generator=held.generator)
        held.param_groups[0]["made up"] = 1
    assert same((held.rng.getstate(), held.generator.get_state()), before)
    assert "made up" not in held.param_groups[0]


def test_the_scaler_is_put_back_and_its_skipped_steps_don_t_end_the_sweep() -> None:
    """The first steps under fp16 overflow until the scale has come down: their losses are finite."""
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    model = network("test_vit")
    _, entered, feed = entered_with(model, stage(), accelerator)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    before, scales = copy.deepcopy(model.state_dict()), []

    def overflowing(logits: Tensor, labels: Tensor) -> Tensor:
        losses = cross_entropy()(logits, labels)
        losses.register_hook(lambda grad: grad * (math.inf if len(scales) < 3 else 1.0))
        return losses

    def watch(steps: Iterable[Step]) -> Iterator[Step]:
        for step in steps:
            scales.append(accelerator.scaler.get_scale())  # type: ignore[union-attr]
            yield step

    found = sweep(trials_of(accelerator, entered, feed, overflowing, watch), SEARCH)
    assert scales[:4] == [2.0**9, 2.0**8, 2.0**7, 2.0**7]
    assert len(found.losses) > 3
    assert accelerator.scaler.get_scale() == 2.0**10
    assert same(model.state_dict(), before)


def searched(
    chosen: Stage, search: Search, loss: Loss | None = None
) -> tuple[Found, list[tuple[dict[str, float], int]]]:
    accelerator, entered, feed = entered_with(network(), chosen, micro=chosen.batch_size)
    written: list[tuple[dict[str, float], int]] = []
    trials = trials_of(accelerator, entered, feed, loss)
    found = find(trials, search, lambda values, step: written.append((dict(values), step)))
    return found, written


def test_every_step_is_written_and_the_answer_once(tmp_path: Path) -> None:
    found, written = searched(stage(lr_ratio=1.0, batch_size=12), Search(1e-6, 1.0, 40, 3))
    assert found.lr is not None, found.band.reason
    assert [step for values, step in written if "lr_finder/loss" in values] == list(range(1, found.steps + 1))
    assert [values["lr_finder/loss"] for values, _ in written[:-1]] == [x for s in found.sweeps for x in s.losses]
    assert [number for _, number in written] == list(range(1, len(written) + 1))
    assert all(math.log10(v["lr_finder/lr"]) == v["lr_finder/log10_lr"] for v, _ in written[:-1])
    low, high = found.band.low, found.band.high
    assert written[-1][0] == {"lr_finder/chosen": found.lr, "lr_finder/low": low, "lr_finder/high": high}
    assert found.band.low is not None
    assert found.band.high is not None
    assert found.band.low <= found.lr <= found.band.high
    assert f"{found.lr:.2e}" in found.described()
    draw(found, tmp_path / "plots/lr_finder.png")
    assert (tmp_path / "plots/lr_finder.png").stat().st_size > 5_000
    assert facts(found)["chosen"] == found.lr
    assert table(found).row_count == 3


def test_without_an_answer_nothing_is_chosen(tmp_path: Path) -> None:
    found, written = searched(stage(), SEARCH, scaled({2: math.nan}))
    assert found.lr is None
    assert not any("lr_finder/chosen" in values for values, _ in written)
    assert "no confident answer (diverges at once" in found.described()
    assert facts(found)["reason"].startswith("diverges at once")
    draw(found, tmp_path / "lr_finder.png")
    assert (tmp_path / "lr_finder.png").exists()
    everywhere = Found(None, "", found.band, (Sweep((1e-3,), (math.nan,), "not finite"),), (), 1.0)
    draw(everywhere, tmp_path / "lr_finder.png")
    assert table(everywhere).row_count == 1


def test_what_is_found_is_brought_into_the_known_range(monkeypatch: pytest.MonkeyPatch) -> None:
    from tuning.lr_curve import Band
    from tuning.lr_search import finder as lr_finder

    monkeypatch.setattr(lr_finder, "band", lambda curves: Band(5.0, 5.0, 5.0, "", ()))
    found, written = searched(stage(), SEARCH)
    assert found.lr == 1e-2
    assert written[-1][0]["lr_finder/chosen"] == 1e-2
    assert "1.00e-02, brought there from 5.00e+00" in found.described()


def test_the_search_fits_the_optimizer_and_the_budget() -> None:
    usual, model = FinderFlags(), network()
    adamw, sgd = planned_for(model, stage(epochs=40), stage(epochs=40, optimizer="sgd"))
    assert adamw.steps == 160
    assert search_for(adamw, usual) == Search(1e-6, 1.0, 100, 3, 50)
    assert search_for(sgd, FinderFlags(finder_end=2.0)) == Search(1e-5, 2.0, 100, 3, 50)
    assert search_for(adamw, FinderFlags(finder_start=1e-4), 400) == Search(1e-4, 1.0, 30, 1, 40)
    assert search_for(adamw, usual, 100_000) == search_for(adamw, usual)
    with pytest.raises(UserError, match="--finder-start 2 must be below --finder-end 1,"):
        search_for(adamw, FinderFlags(finder_start=2.0))


def test_a_short_stage_is_raced_whole() -> None:
    (short,) = planned_for(network(), stage(epochs=25))
    assert short.steps == 100
    assert search_for(short, FinderFlags()) == Search(1e-6, 1.0, 100, 3, 100, whole=True)
    assert search_for(short, FinderFlags(), 120) == Search(1e-6, 1.0, 30, 1, 100, whole=True)
    assert search_for(short, FinderFlags(finder_race=60)) == Search(1e-6, 1.0, 100, 3, 60)
    assert search_for(short, FinderFlags(finder_race=300)).whole
    assert search_for(short, FinderFlags(finder_race=0)) == Search(1e-6, 1.0, 100, 3, 0)


def test_a_candidate_of_a_whole_race_is_the_run_itself() -> None:
    """Its images, its dropout, its learning rates: what the race saw of it is what training then does."""
    chosen = stage(lr_ratio=1.0, batch_size=12, epochs=3, warmup_epochs=1)
    accelerator, entered, feed = entered_with(network(drop_rate=0.5), chosen, micro=12)
    stands, seen = Progress(epoch=2, step=5), list[Step]()
    trials = dataclasses.replace(trials_of(accelerator, entered, feed, watch=watched(seen)), at=stands)
    steps = entered.stage.steps(feed.order.steps_per_epoch)
    ran = race(trials, 1e-3, Search(1e-5, 1.0, 20, 1, race=steps, whole=True))
    assert len(ran) == len(seen) / steps
    candidate = next(candidate for candidate in ran if candidate.lr == 1e-3)
    first = seen[:steps]  # the centre runs first
    planned = planned_for(entered.model, dataclasses.replace(chosen, lr=1e-3), micro=12)[0]
    entered = enter_stage(accelerator, entered.model, planned, before=entered)
    how = feed, cross_entropy(), NO_CLIP, dataclasses.replace(stands), 0
    trained = list(train_steps(accelerator, entered, *how))
    assert [(float(s.loss), s.place, s.lrs) for s in trained] == [(float(s.loss), s.place, s.lrs) for s in first]
    assert tuple(trials_of(accelerator, entered, feed).judge()) == (candidate.judged, candidate.reached)


def test_after_a_whole_race_the_metric_decides() -> None:
    """A learning rate between candidates has not been tried, and a lower loss is not what was asked for."""
    lowest, most = Candidate(1e-3, 20, (0.5,) * 4, 0.7), Candidate(3e-3, 20, (0.6,) * 4, 0.8)
    start = (2.0, 2.2, 1.8, 2.1)
    assert winner([lowest, most], start, whole=True) == (3e-3, "")
    assert winner([lowest, dataclasses.replace(most, reached=0.7)], start, whole=True) == (1e-3, ""), "a tie: the loss"
    assert winner([lowest, most], start, whole=False)[0] == pytest.approx(1e-3)
    assert winner([Candidate(1e-3, 20, start, 0.9)], start, whole=True)[0] is None, "nothing learned"


def test_candidates_race_on_the_same_images_and_the_lowest_loss_wins() -> None:
    """Each with a whole schedule in its few steps; the loss of `stage` at 1e-2 is what the ratios refer to."""
    chosen = stage(lr_ratio=1.0, batch_size=12, epochs=3, warmup_epochs=1.5)
    accelerator, entered, feed = entered_with(network(), chosen, micro=12)
    before, seen = snapshot(entered.model, entered), []
    ran = race(trials_of(accelerator, entered, feed, watch=watched(seen)), 1e-3, Search(1e-5, 1.0, 20, 1, race=20))
    assert same(snapshot(entered.model, entered), before)
    assert len(ran) >= 3
    lrs = [candidate.lr for candidate in ran]
    assert lrs == sorted(lrs)
    assert 1e-3 in lrs
    apart = [later / earlier for earlier, later in itertools.pairwise(lrs)]
    assert set(np.round(apart, 1)) <= {1.5, 1.7, 2.0, 3.0, 3.3}, (
        "rungs of 1, 2, 3, 6 beside the best, every other elsewhere"
    )
    places = [step.place for step in seen]
    assert places[:20] == places[20:40] == places[40:60]
    assert min(epoch for epoch, _ in places) > 10_000
    heads = [step.lrs["head"] if "head" in step.lrs else max(step.lrs.values()) for step in seen[:20]]
    assert max(heads) == pytest.approx(1e-3, rel=0.01), "the first to run is the centre"
    assert heads[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3]), "three steps of warm-up, as in the stage"
    assert heads[-1] < 0.1e-3
    best = min(ran, key=lambda candidate: candidate.score)
    assert lrs[0] < best.lr < lrs[-1] or best.lr in (1e-5, 1e-2), "the best has neighbours"


def test_the_race_decides_and_is_written(tmp_path: Path) -> None:
    found, written = searched(stage(lr_ratio=1.0, batch_size=12), Search(1e-6, 1.0, 20, 1, race=20))
    raced = [values for values, _ in written if "lr_finder/race_loss" in values]
    assert [values["lr_finder/race_lr"] for values in raced] == [candidate.lr for candidate in found.race]
    best = min(found.race, key=lambda candidate: candidate.score)
    assert found.lr is not None
    assert best.lr / 10**0.5 <= found.lr <= best.lr * 10**0.5
    assert best.score == pytest.approx(sum(best.judged) / IMAGES)
    assert written[-1][0]["lr_finder/chosen"] == found.lr
    assert found.steps == len(found.sweeps[0].losses) + sum(candidate.steps for candidate in found.race)
    assert f"it won a race of {len(found.race)} over 20 steps" in found.described()
    assert [entry["lr"] for entry in facts(found)["race"]] == [candidate.lr for candidate in found.race]
    assert race_table(found).row_count == len(found.race)
    draw(found, tmp_path / "lr_finder.png")


def test_a_race_without_a_winner_is_no_answer() -> None:
    """Where nothing learns, and where everything diverges."""
    found, written = searched(stage(), Search(1e-6, 1.0, 12, 1, race=10), scaled({}))
    assert (found.lr, found.reason.partition(":")[0]) == (None, "nothing learned")
    assert not any("lr_finder/chosen" in values for values, _ in written)
    found, _ = searched(stage(), Search(1e-6, 1.0, 12, 1, race=10), scaled(dict.fromkeys(range(1, 10**4), math.nan)))
    assert found.reason.startswith("all diverge: every candidate from ")
    assert facts(found)["race"][0]["loss"] is None


def test_the_stage_in_which_most_is_open_is_the_default() -> None:
    model = network()
    stages = [stage(open="head", name="head"), stage(), stage(name="again"), stage(open=2, name="top-2", lr_ratio=1.0)]
    plan = planned_for(model, *stages)
    assert [chosen_stage(plan, name) for name in (None, "1", "4", "again", "head")] == [1, 0, 3, 2, 0]
    for name in ("0", "5", "-1", "agian", "²"):
        with pytest.raises(UserError, match=r"--stage .*1 = head, 2 = all, 3 = again, 4 = top-2"):
            chosen_stage(plan, name)


@pytest.mark.parametrize(
    ("name", "attends"),
    [("test_vit", True), ("test_efficientnet", False), ("resnet18", False), ("convnext_atto", False)],
)
def test_families(name: str, attends: bool) -> None:
    assert is_transformer(timm.create_model(name)) is attends
