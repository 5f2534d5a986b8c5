"""Every suspect from values that show it, its absence from values that don't, and what the sentence names."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pictures import write_classes

from tuning.cli.command_line import parse_command
from tuning.data.sources import open_data
from tuning.depth import head_names
from tuning.errors import UserError
from tuning.overfit.overfitting import Learning, choose_stage, silence, small_plan, verdict, verdict_lines
from tuning.overfit.suspects import (
    Picture,
    Suspect,
    of_first_loss,
    of_gradients,
    of_head,
    of_losses,
    of_outputs,
    of_pictures,
)
from tuning.safety.replay import Replay, read_replay

PRESETS = Path(__file__).parents[2] / "recipes" / "presets"
HEALTHY = [Picture(n, f"p{n}.jpg", n % 3, f"digest{n}", (0.1 * n,) * 3, (1.0 + 0.1 * n,) * 3, True) for n in range(6)]


def kinds(found: Sequence[Suspect]) -> list[str]:
    return [suspect.kind for suspect in found]


def seen(pictures: Sequence[Picture] = HEALTHY, unreadable: Sequence[str] = (), **options: Any) -> list[Suspect]:
    return of_pictures(pictures, unreadable, outputs=3, target=0.1, **options)


def test_a_healthy_batch_has_no_suspect() -> None:
    assert seen() == []


@pytest.mark.parametrize("label", [-1, -100, 3, 7])
def test_labels_out_of_range(label: int) -> None:
    (suspect,) = seen([*HEALTHY[:-1], replace(HEALTHY[-1], label=label)])
    assert (suspect.kind, suspect.decisive) == ("labels-out-of-range", True)
    assert f"1 of 6 labels are outside 0 ... 2, the model's outputs: {label} of p5.jpg" in suspect.text


def test_labels_all_equal() -> None:
    same = [replace(picture, label=1) for picture in HEALTHY]
    (suspect,) = seen(same)
    assert (suspect.kind, suspect.decisive) == ("labels-equal", True)
    assert [(s.kind, s.decisive) for s in seen(same, chosen=True)] == [("labels-equal", False)]
    assert seen(same[:1]) == []


def test_equal_pictures_and_contradictions() -> None:
    """Two labels, half each: no model can get below ln 2."""
    same = [replace(picture, digest="x", label=n % 2) for n, picture in enumerate(HEALTHY)]
    equal, apart = seen(same)
    assert (equal.kind, apart.kind, apart.decisive) == ("inputs-equal", "contradictory-labels", True)
    assert f"below {math.log(2):.3f}" in apart.text
    assert "p0.jpg (0) and p1.jpg (1)" in apart.text


def test_a_rare_contradiction_leaves_the_target_in_reach() -> None:
    many = [replace(HEALTHY[0], row=n, digest=str(n), label=n % 3) for n in range(100)]
    many[1] = replace(many[1], digest="0")
    (suspect,) = seen(many)
    assert (suspect.kind, suspect.decisive) == ("contradictory-labels", False)
    assert f"below {2 * math.log(2) / 100:.3f}" in suspect.text
    many[1] = replace(many[1], label=many[0].label)
    assert seen(many) == [], "a twin with the same label contradicts nothing"


@pytest.mark.parametrize(
    ("mean", "std"), [(500.0, 300.0), (-2.1, 0.004), (0.0, 0.01), (0.0, 6.0), (3.0, 1.0), (math.nan, 1.0)]
)
def test_wrong_normalisation(mean: float, std: float) -> None:
    (suspect,) = seen([replace(picture, mean=(mean,) * 3, square=(mean**2 + std**2,) * 3) for picture in HEALTHY])
    assert suspect.kind == "normalisation"
    assert f"mean {mean:.3g}" in suspect.text


def test_channels_of_one_value_each_do_not_vary() -> None:
    channels = (-2.1, -1.9, -1.7)
    (suspect,) = seen([replace(p, mean=channels, square=tuple(m**2 + 1e-5 for m in channels)) for p in HEALTHY])
    assert suspect.kind == "normalisation"
    assert "mean -1.9 and standard deviation 0.00316" in suspect.text


@pytest.mark.parametrize(("mean", "std"), [(-1.9, 0.3), (2.2, 0.2), (-0.5, 0.1), (0.0, 1.0), (0.3, 2.0)])
def test_dark_bright_and_pale_pictures_are_normal(mean: float, std: float) -> None:
    assert seen([replace(picture, mean=(mean,) * 3, square=(mean**2 + std**2,) * 3) for picture in HEALTHY]) == []


def test_flat_pictures() -> None:
    flat = [replace(picture, mean=(n % 2,) * 3, square=(n % 2,) * 3) for n, picture in enumerate(HEALTHY)]
    assert kinds(seen(flat)) == ["flat-pictures"]
    assert seen([*flat[:3], *HEALTHY[3:]]) == []


def test_unreadable_pictures() -> None:
    (suspect,) = seen(unreadable=["a.jpg: empty", "b.jpg: empty"])
    assert (suspect.kind, suspect.decisive) == ("unreadable", False)
    assert "2 of the 8 pictures can't be read: a.jpg: empty, b.jpg: empty." in suspect.text
    (suspect,) = seen([], unreadable=["a.jpg: empty"])
    assert (suspect.kind, suspect.decisive) == ("unreadable", True)


def test_outputs_that_are_not_finite() -> None:
    (suspect,) = seen([replace(HEALTHY[0], finite=False), *HEALTHY[1:]])
    assert suspect.kind == "not-finite"
    assert "1 of 6 pictures before any training: p0.jpg" in suspect.text


def test_a_closed_head() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    assert of_head(model) == []
    for name in head_names(model):
        model.get_parameter(name).requires_grad_(False)
    (suspect,) = of_head(model)
    assert (suspect.kind, suspect.decisive) == ("closed-head", True)
    assert "head.bias, head.weight" in suspect.text


def test_outputs_that_nothing_can_train() -> None:
    assert of_outputs(True) == []
    assert kinds(of_outputs(False)) == ["no-gradient"]


LAYERS = {"stem.w": "layer0", "block.w": "layer1", "block.b": "layer1", "head.w": "layer2"}
ALIVE: dict[str, float | None] = dict.fromkeys(LAYERS, 0.1)


@pytest.mark.parametrize(("value", "kind"), [(None, "no-gradient"), (0.0, "zero-gradient")])
def test_silent_layers_are_named(value: float | None, kind: str) -> None:
    (suspect,) = of_gradients({**ALIVE, "block.w": value, "block.b": value}, LAYERS, steps=5)
    assert (suspect.kind, suspect.decisive) == (kind, True)
    assert "1 of 3 open layers" in suspect.text
    assert "layer1 (block.w)" in suspect.text
    (suspect,) = of_gradients({**ALIVE, "block.b": value}, LAYERS, steps=5)
    assert (suspect.kind, suspect.decisive) == (kind, False), "half a layer may be meant so"
    assert "1 open parameters" in suspect.text
    assert "block.b" in suspect.text


def test_zero_gradients_are_right_at_first() -> None:
    zero = {**ALIVE, "stem.w": 0.0}
    assert of_gradients(zero, LAYERS, steps=2) == []
    assert kinds(of_gradients(zero, LAYERS, steps=3)) == ["zero-gradient"]
    assert of_gradients({**ALIVE, "stem.w": math.nan, "head.w": 1e-30}, LAYERS, steps=9) == []


@pytest.mark.parametrize(("loss", "wrong"), [(0.1, True), (0.4, False), (0.69, False), (3.3, False), (3.5, True)])
def test_the_first_loss_against_guessing(loss: float, wrong: bool) -> None:
    assert kinds(of_first_loss(loss, 2)) == ["initial-loss"] * wrong
    assert of_first_loss(math.nan, 2) == []


def test_the_first_loss_says_which_way() -> None:
    assert "ln(10) = 2.3" in of_first_loss(50.0, 10)[0].text
    assert "too large" in of_first_loss(50.0, 10)[0].text
    assert "already" in of_first_loss(0.01, 10)[0].text


def of(losses: Sequence[float], stuck: bool = False) -> list[Suspect]:
    return of_losses(losses, 0.1, 3e-4, stuck)


def test_a_slow_fall_names_its_pace() -> None:
    (suspect,) = of([0.7 * 0.99**n for n in range(100)])
    assert suspect.kind == "lr-too-small"
    further = math.log(0.1 / (0.7 * 0.99**87)) / math.log(0.99)  # from the middle of the last quarter
    assert abs(int(suspect.text.partition("pace ")[2].split()[0]) - further) < 2
    assert "--lr (the head's is 0.0003)" in suspect.text


@pytest.mark.parametrize("fall", [0.0, 1e-9, 1e-6])
def test_a_loss_that_hardly_moves(fall: float) -> None:
    (suspect,) = of([0.7 - fall * n for n in range(40)])
    assert suspect.kind == "lr-too-small"
    assert "hardly moves" in suspect.text


@pytest.mark.parametrize(
    "losses",
    [[0.7, 3.0, 30.0, *[0.7] * 10], [0.7 + 0.02 * n for n in range(20)], [0.7, 0.6, *[0.5] * 10, math.inf, 1.0]],
)
def test_a_loss_that_rises(losses: list[float]) -> None:
    (suspect,) = of(losses)
    assert suspect.kind == "exploding"
    assert "Lower --lr" in suspect.text


def test_not_finite_from_the_start_is_not_the_learning_rate() -> None:
    assert kinds(of([math.nan] * 10, stuck=True)) == ["not-finite"]
    assert kinds(of([0.7] * 10, stuck=True)) == ["not-finite"]


@pytest.mark.parametrize(
    "losses",
    [[0.7 * 0.5**n for n in range(20)], [0.3 + 0.4 * 0.7**n for n in range(60)], [0.7, 0.6], []],
    ids=["learned", "plateau", "too short to tell", "none"],
)
def test_other_curves_accuse_no_learning_rate(losses: list[float]) -> None:
    assert of(losses) == []


@pytest.mark.parametrize(
    "name", ["test_vit", "test_efficientnet", "test_convnext", "test_resnet", "test_nfnet", "test_byobnet"]
)
def test_a_silenced_model_draws_nothing(name: str) -> None:
    options = {"drop_rate": 0.5} | ({} if name == "test_byobnet" else {"drop_path_rate": 0.9})
    options |= {"patch_drop_rate": 0.5, "attn_drop_rate": 0.5, "img_size": 32} if name == "test_vit" else {}
    model = timm.create_model(name, num_classes=3, **options).train()
    images = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(images), model(images)), "nothing was random to begin with"
    silence(model)
    assert torch.equal(model(images), model(images))


def plan(images: int, world_size: int, *flags: str) -> Any:
    command = parse_command(["--data", "photos", "--weights", "none", *flags], "test", "", PRESETS)
    from tuning.models.build import build

    model, info = build("test_vit", classes=3, weights="none", image_size=32)
    micro = command.flags.batch.micro_batch
    return small_plan(choose_stage(command.stages, None, None), model, info, images, micro, world_size, 50)


@pytest.mark.parametrize(
    ("images", "world_size", "flags", "batch"),
    [
        (16, 1, (), (16, 16, 1)),
        (16, 2, (), (16, 8, 1)),
        (16, 2, ("--micro-batch", "4"), (16, 4, 2)),
        (16, 1, ("--micro-batch", "5"), (20, 5, 4)),
        (67, 1, ("--batch-size", "128"), (68, 34, 2)),
        (7, 2, (), (8, 4, 1)),
        (1, 2, (), (2, 1, 1)),
        (40, 1, ("--batch-size", "16"), (16, 16, 1)),
    ],
)
def test_any_number_of_pictures_makes_a_batch(
    images: int, world_size: int, flags: tuple[str, ...], batch: tuple[int, int, int]
) -> None:
    planned = plan(images, world_size, *flags)
    assert (planned.batch.batch_size, planned.batch.micro_batch, planned.batch.accumulation) == batch
    assert planned.steps_per_epoch == math.ceil(images / batch[0])
    assert planned.steps >= 50


def test_what_makes_a_batch_harder_is_off() -> None:
    planned = plan(16, 1, "--augment", "medium", "--weight-decay", "0.3", "--warmup-epochs", "2", "--lr", "0.01")
    stage = planned.stage
    assert (stage.augment, stage.weight_decay, stage.warmup_epochs, stage.schedule) == ("none", 0.0, 0.0, "constant")
    assert {group.weight_decay for group in planned.groups} == {0.0}
    assert {lr for rates in planned.lrs() for lr in rates.values()} == {0.01}


def test_stages_by_name_number_and_replay() -> None:
    stages = parse_command(["--data", "photos"], "test", "", PRESETS).stages
    assert [choose_stage(stages, wanted, None).name for wanted in (None, "head", "1", "2")] == [
        *("all", "head", "head", "all")
    ]
    assert choose_stage(stages, None, Replay((0,), 0)).name == "head"
    assert choose_stage(stages, "all", Replay((0,), 0)).name == "all"
    for wanted in ("hed", "0", "3"):
        with pytest.raises(UserError, match=rf"--overfit-stage '{wanted}' is not a stage: 1 = head, 2 = all"):
            choose_stage(stages, wanted, None)


@pytest.fixture
def replayed(tmp_path: Path) -> tuple[Path, Any, dict[str, Any]]:
    data = write_classes(tmp_path / "photos", {"cat": 4, "dog": 4})
    options = dict.fromkeys(("image_column", "label_column", "train_split", "eval_split", "limit_train", "limit_eval"))
    train = open_data(str(data), val_fraction=0.25, seed=0, **options).train  # type: ignore[arg-type]
    names = [train[row]["image"]["path"] for row in (4, 1)]
    return tmp_path / "step.json", train, {"rows": [4, 1], "images": names, "stage": 1}


def test_a_replay_file_is_read(replayed: tuple[Path, Any, dict[str, Any]]) -> None:
    path, train, content = replayed
    path.write_text(json.dumps(content))
    assert read_replay(path, train) == Replay((4, 1), 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": ["x.jpg", "y.jpg"]}, "names 'x.jpg' as row 4 of the training data, now '.*--config RUN"),
        ({"rows": [4, 99]}, "as row 99 of the training data, now 'nothing"),
        ({"rows": []}, "doesn't list rows"),
        ({"rows": [-1, 4]}, "doesn't list rows"),
        ({"rows": [1]}, "doesn't list rows"),
        ({"stage": "1"}, "doesn't list rows"),
    ],
)
def test_a_replay_of_other_data_is_refused(
    replayed: tuple[Path, Any, dict[str, Any]], change: dict[str, Any], words: str
) -> None:
    path, train, content = replayed
    path.write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=words):
        read_replay(path, train)


@pytest.mark.parametrize(("text", "words"), [(None, "can't be read"), ("{", "not JSON"), ("[]", "doesn't list")])
def test_no_replay_file_is_refused(replayed: tuple[Path, Any, Any], text: str | None, words: str) -> None:
    path, train, _ = replayed
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        read_replay(path, train)


def test_the_verdict() -> None:
    learned = Learning(0.1, 50, 10, steps=3, first=0.7, losses=[0.7, 0.3, 0.09])
    facts = {"train_images": 16, "seconds": 1.5}
    note, fault = Suspect("unreadable", "One."), Suspect("closed-head", "Two.", decisive=True)
    passed = verdict(learned, [note], facts)
    assert (passed["verdict"], passed["last_loss"], passed["suspects"][0]["kind"]) == ("PASS", 0.09, "unreadable")
    assert verdict(learned, [note, fault], facts)["verdict"] == "FAIL"
    failed = verdict(replace(learned, losses=[0.7, math.nan]), [], facts)
    assert (failed["verdict"], failed["last_loss"]) == ("FAIL", None)
    assert verdict_lines(passed) == [
        "PASS: 16 pictures, 3 steps, 1.5 s, loss 0.7 -> 0.09, target 0.1.",
        "  unreadable: One.",
    ]
    assert "not finite" in verdict_lines(failed)[0]
    assert "None of the usual suspects" in verdict_lines(failed)[1]
    untrained = verdict(Learning(0.1, 50, 10), [fault], facts)
    assert "not trained" in verdict_lines(untrained)[0]
