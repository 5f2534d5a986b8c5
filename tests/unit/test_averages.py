"""EMA and SWA: the averages written out by hand, at the steps that the plan says, and which of them is chosen."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from plain_stages import plain_stage
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from tuning import schedules
from tuning.averaging.averages import Averages
from tuning.cli.command_line import parse_command
from tuning.errors import UserError
from tuning.plan import StagePlan
from tuning.progress import Progress
from tuning.sizes import BatchPlan
from tuning.tracking.summary import contenders

PRESETS = Path(__file__).parents[2] / "recipes" / "presets"
PER_EPOCH = 5


def planned(**changes: object) -> StagePlan:
    return StagePlan(plain_stage(**changes), BatchPlan(4, 4, 1), 32, (32,), 32, PER_EPOCH, 1.0, ())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def change(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    """Other weights and statistics, as a step of training would leave them; a copy of them."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(averages: Averages, model: nn.Module, progress: Progress, steps: int) -> list[dict[str, torch.Tensor]]:
    states = []
    for _ in range(steps):
        progress.step += 1
        progress.stage_step += 1
        states.append(change(model, progress.step))
        averages.update(model, progress)
    return states


def test_ema_is_the_recursion_with_its_warm_up() -> None:
    """Decay 0 at the first step, then 1 - step^(-2/3) until the wanted one is reached; buffers too."""
    model = network()
    averages, progress = Averages(model, [planned()], 0.6), Progress()
    expected: dict[str, torch.Tensor] = {}
    decays = []
    for step, state in enumerate(train(averages, model, progress, 12)):
        decays.append(0.0 if step == 0 else min(0.6, 1 - (1 + step) ** (-2 / 3)))
        for name, value in state.items():
            if value.is_floating_point():
                before = expected.get(name, torch.zeros_like(value)).double()
                expected[name] = decays[-1] * before + (1 - decays[-1]) * value.double()
    assert decays[:3] == pytest.approx([0, 0.3700395, 0.5192501])
    assert decays[3:] == [0.6] * 9
    (name,), (ema,) = averages.at(progress).keys(), averages.at(progress).values()
    assert name == "ema"
    for name, value in expected.items():
        assert torch.allclose(ema.state_dict()[name].double(), value, atol=1e-6), name


def test_ema_of_a_partly_closed_model_is_timm_s_bit_for_bit() -> None:
    """Closed layers are left alone only where the average has arrived at them."""
    model = nn.Sequential(network(), network())
    averages, progress = Averages(model, [planned()] * 3, 0.9), Progress()
    reference = ModelEmaV3(copy.deepcopy(model), 0.9, use_warmup=True, dtype=torch.float32)
    looked_at = []
    for stage, opened in enumerate(((1,), (0, 1), (0,))):
        progress.stage, progress.stage_step = stage, 0
        for place, part in enumerate(model):
            part.requires_grad_(place in opened).train(place in opened)
        for _ in range(3):
            progress.step += 1
            for place in opened:
                change(model[place], progress.step)
            averages.update(model, progress)
            reference.update(model, progress.step)
        assert averages._moving is not None
        looked_at.append(len(averages._moving[1].averaged))
        (mine,) = averages.at(progress).values()
        for name, value in reference.module.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value), (stage, name)
    assert looked_at == [6, 12, 12], "the second part had not arrived when it was closed"


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({"epochs": 4, "swa_epochs": 3}, (10, 15, 20)),
        ({"epochs": 3, "swa_epochs": 3}, (5, 10, 15)),
        ({"epochs": 4}, ()),
        ({"epochs": 4, "swa_epochs": 3, "schedule": "sgdr", "cycle_epochs": 1.0, "cycle_mult": 1}, (10, 15, 20)),
        ({"epochs": 4, "swa_epochs": 2, "schedule": "sgdr", "cycle_epochs": 0.4, "cycle_mult": 2}, (14,)),
        ({"epochs": 6, "swa_epochs": 6, "schedule": "sgdr", "cycle_epochs": 2.0, "cycle_mult": 1}, (10, 20, 30)),
        ({"epochs": 7, "swa_epochs": 7, "schedule": "sgdr", "cycle_epochs": 2.0, "cycle_mult": 1}, (10, 20, 30)),
        (
            {"epochs": 5, "swa_epochs": 5, "schedule": "sgdr", "cycle_epochs": 2.0, "cycle_mult": 1}
            | {"warmup_epochs": 1.0},
            (15, 25),
        ),
        (
            {"epochs": 4, "swa_epochs": 2, "swa_lr": 0.5, "schedule": "sgdr", "cycle_epochs": 0.4, "cycle_mult": 1},
            (15, 20),
        ),
    ],
)
def test_swa_takes_in_ends_of_epochs_or_of_cycles(stage: dict[str, object], expected: tuple[int, ...]) -> None:
    assert planned(**stage).swa_steps == expected


def test_swa_is_the_mean_of_the_weights_at_these_steps() -> None:
    model = network()
    plan = [planned(epochs=2), planned(epochs=4, swa_epochs=3)]
    averages, progress = Averages(model, plan, None), Progress()
    train(averages, model, progress, 10)
    assert averages.at(progress) == {}, "of the last stage alone"
    progress.stage, progress.stage_step = 1, 0
    states = train(averages, model, progress, 9)
    assert averages.at(progress) == {}
    states += train(averages, model, progress, 11)
    swa = averages.at(progress)["swa"].state_dict()
    for name, value in swa.items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(value, states[-1][name]), "buffers are those of the last weights"
        else:
            expected = torch.stack([states[step - 1][name].double() for step in (10, 15, 20)]).mean(0)
            assert torch.allclose(value.double(), expected, atol=1e-6), name


def test_a_mean_goes_on_bit_for_bit_in_another_process() -> None:
    """From tensors and progress alone."""
    plan = [planned(epochs=4, swa_epochs=4)]
    whole, half, rest = (Averages(network(), plan, 0.9) for _ in range(3))
    model, progress = network(), Progress()
    train(whole, model, progress, 20)
    model, progress = network(), Progress()
    train(half, model, progress, 12)
    for name, average in half.at(progress).items():
        rest.all[name].load_state_dict(average.state_dict())
    train(rest, model, dataclasses.replace(progress), 8)
    for name, average in whole.all.items():
        for key, value in average.state_dict().items():
            assert torch.equal(value, rest.all[name].state_dict()[key]), (name, key)


def test_the_constant_rate_follows_the_schedule() -> None:
    stage = plain_stage(epochs=4, schedule="cosine", warmup_epochs=1.0, swa_epochs=2, swa_lr=0.3)
    factor, shape = stage.factor(PER_EPOCH), schedules.with_warmup(schedules.cosine(5), 5)
    assert [factor(step) for step in range(20)] == [shape(step) for step in range(10)] + [0.3] * 10
    without = dataclasses.replace(stage, swa_lr=None).factor(PER_EPOCH)
    assert without(12) == schedules.with_warmup(schedules.cosine(15), 5)(12)


@pytest.mark.parametrize(
    ("best_of", "decay", "epochs", "expected"),
    [
        (None, None, 0, ("eval",)),
        (None, 0.9, 0, ("eval_ema",)),
        ("raw", 0.9, 3, ("eval",)),
        ("ema", 0.9, 3, ("eval_ema",)),
        ("swa", 0.9, 3, ("eval_swa",)),
        ("any", 0.9, 3, ("eval", "eval_ema", "eval_swa")),
        (None, None, 3, ("eval", "eval_swa")),
        ("any", None, 0, ("eval",)),
    ],
)
def test_who_chooses_the_model(
    best_of: str | None, decay: float | None, epochs: int, expected: tuple[str, ...]
) -> None:
    assert contenders(best_of, decay, epochs) == expected


def parsed(*argv: str) -> tuple[object, ...]:
    return parse_command(["--data", "photos", *argv], "recipes/finetune.py", "", PRESETS).stages


def test_the_flags_are_those_of_the_last_stage() -> None:
    stages = parsed("--freeze-epochs", "2", "--epochs", "6", "--unfreeze", "gradual", "--swa-epochs", "2")
    assert [stage.swa_epochs for stage in stages] == [0, 0, 0, 0, 2]


CYCLES = ("--schedule", "sgdr", "--cycle-epochs", "2", "--cycle-mult", "1", "--epochs", "8")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--swa-epochs", "-1"), "--swa-epochs is -1"),
        (("--swa-epochs", "11"), "--swa-epochs is 11; the last stage has 10 epochs"),
        (("--swa-lr", "0.5"), "--swa-lr 0.5 is the rate of --swa-epochs, which is 0"),
        (("--swa-epochs", "3", "--swa-lr", "0"), "--swa-lr is 0.0; give a fraction of the peak"),
        (("--best-of", "swa"), "--best-of swa needs an average of the last epochs"),
        (("--best-of", "ema", "--swa-epochs", "3"), "--best-of ema needs averaged weights"),
        (("--snapshots",), "--snapshots keeps the ends of sgdr cycles"),
        (("--snapshots", *CYCLES, "--patience", "2"), "--patience may end a stage before them. Drop one."),
        (("--swa-epochs", "2", "--patience", "2"), "the epochs that --swa-epochs 2 averages. Drop one of the two"),
        (("--batch-norm", "train", "--batch-norm-images", "1"), "--batch-norm-images is 1"),
        (("--batch-norm-images", "100"), "--batch-norm-images 100 has no effect with --batch-norm frozen"),
    ],
)
def test_what_can_t_work_is_refused(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(*argv)


def test_a_stage_of_a_file_has_no_such_key(tmp_path: Path) -> None:
    preset = tmp_path / "stages.yaml"
    preset.write_text("swa_epochs: 2\nstages:\n- {open: head, epochs: 1}\n- {open: all, epochs: 3}\n")
    assert [stage.swa_epochs for stage in parsed("--preset", str(preset))] == [0, 2]
    preset.write_text("stages:\n- {open: all, epochs: 3, swa_epochs: 2}\n")
    with pytest.raises(UserError, match="unknown key 'swa_epochs'"):
        parsed("--preset", str(preset))
