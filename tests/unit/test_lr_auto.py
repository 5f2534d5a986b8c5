"""When a run searches for its learning rate, and what the answer does to its plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import timm
from plain_stages import plain_stage

from tuning.cli.command_line import parse_command
from tuning.errors import UserError
from tuning.lr_search.auto import as_found, before_search, must_search, searching_stages
from tuning.plan import StagePlan, make_plan
from tuning.progress import Progress
from tuning.stages import Stage

PRESETS = Path(__file__).parents[2] / "recipes/presets"


def planned(*stages: Stage) -> tuple[StagePlan, ...]:
    model = timm.create_model("test_efficientnet", num_classes=3)
    return make_plan(stages, model, train_images=64, world_size=1, micro_batch="auto", image_size=32)


def searches(plan: tuple[StagePlan, ...], when: str) -> list[int]:
    """Stages at which a run through *plan* searches."""
    progress, found = Progress(), []
    for number in range(len(plan)):
        progress.stage, progress.stage_step = number, 0
        if must_search(plan, progress, when):  # type: ignore[arg-type]
            found.append(number)
            progress.searched = number
            assert not must_search(plan, progress, when), "twice"  # type: ignore[arg-type]
        progress.stage_step = 1
        assert not must_search(plan, progress, when), "within a stage"  # type: ignore[arg-type]
    return found


def test_when_a_run_searches() -> None:
    head, whole = plain_stage(open="head"), plain_stage(find_lr=True, image_size=32)
    larger = dataclasses.replace(whole, image_size=64)
    plan = planned(head, whole, whole, larger, head, larger)
    assert searches(plan, "start") == searching_stages(plan, "start") == [1]
    assert searches(plan, "stages") == searching_stages(plan, "stages") == [1, 2, 3, 5]
    assert searches(plan, "sizes") == searching_stages(plan, "sizes") == [1, 3]


def test_another_kind_of_optimizer_needs_a_search_of_its_own() -> None:
    adamw, sgd = (plain_stage(find_lr=True, optimizer=name) for name in ("adamw", "sgd"))
    lamb = plain_stage(find_lr=True, optimizer="lamb")
    assert searches(planned(adamw, lamb, sgd, sgd, adamw), "start") == [0, 2, 4]


def test_what_is_found_moves_every_group_and_only_where_it_was_asked_for() -> None:
    asked, fixed = plain_stage(lr=3e-4, lr_ratio=0.1, find_lr=True), plain_stage(lr=1e-2)
    plan = planned(asked, fixed)
    moved = [as_found(stage, Progress(lr=3e-5)) for stage in plan]
    (as_if,) = planned(dataclasses.replace(asked, lr=3e-5))
    assert moved[0].stage == as_if.stage
    assert [g.peak_lr for g in moved[0].groups] == pytest.approx([g.peak_lr for g in as_if.groups], rel=1e-12)
    assert moved[1] == plan[1]
    assert as_found(plan[0], Progress(lr=3e-5, micro_batch=2)).batch.micro_batch == 2
    assert [as_found(stage, Progress()) for stage in plan] == list(plan)


def stages(*argv: str) -> list[tuple[str, float, bool]]:
    command = parse_command(["--data", "photos", *argv], "recipes/finetune.py", "", PRESETS)
    return [(stage.name, stage.lr, stage.find_lr) for stage in command.stages]


def test_which_stages_take_auto(tmp_path: Path) -> None:
    assert stages("--lr", "auto", "--freeze-lr", "1e-2") == [("head", 1e-2, False), ("all", 3e-4, True)]
    assert stages("--lr", "1e-3") == [("head", 1e-3, False), ("all", 1e-3, False)]
    listed = tmp_path / "list.yaml"
    listed.write_text("lr: 1e-3\nstages:\n- {open: head, epochs: 1, lr: auto}\n- {open: 2, epochs: 1}\n")
    assert stages("--preset", str(listed)) == [("head", 1e-3, True), ("top-2", 1e-3, False)]
    listed.write_text("lr: auto\nstages:\n- {open: head, epochs: 1, lr: 1e-2}\n- {open: 2, epochs: 1}\n")
    assert stages("--preset", str(listed)) == [("head", 1e-2, False), ("top-2", 3e-4, True)]


@pytest.mark.parametrize(
    ("model", "optimizer", "open_", "lr"),
    [
        ("test_efficientnet", "adamw", "all", 3e-4),
        ("test_vit", "adamw", "all", 1e-4),
        ("test_vit", "adamw", "head", 1e-3),
        ("test_efficientnet", "sgd", "all", 1e-2),
        ("test_vit", "lion", 2, 1e-5),
    ],
)
def test_without_an_answer_it_suits_optimizer_and_network(model: str, optimizer: str, open_: str, lr: float) -> None:
    network = timm.create_model(model)
    searching = plain_stage(lr=5.0, find_lr=True, optimizer=optimizer, open=open_)
    assert before_search(searching, network) == dataclasses.replace(searching, lr=lr)
    typed = dataclasses.replace(searching, find_lr=False)
    assert before_search(typed, network) == typed


def test_auto_is_kept_in_the_configuration(tmp_path: Path) -> None:
    command = parse_command(["--data", "photos", "--lr", "auto"], "recipes/finetune.py", "", PRESETS)
    (tmp_path / "config.yaml").write_text(command.config)
    again = parse_command(["--config", str(tmp_path / "config.yaml")], "recipes/finetune.py", "", PRESETS)
    assert again.stages == command.stages


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("--lr", "auto", "--lr-scaling", "sqrt"), "--lr auto is found for --batch-size as it is; --lr-scaling sqrt"),
        (("--lr", "auto", "--finder-share", "0"), r"--finder-share is 0.0; give a share in \(0, 1\]"),
        (("--lr", "auto", "--finder-race", "5"), "--finder-race is 5; give 0, or a whole number from 10"),
        (("--finder-at", "stages"), "--finder-at stages is for --lr auto of recipes/finetune.py and has no effect in"),
        (("--lr", "auto", "--stage", "2"), "--stage 2 is for recipes/find_lr.py"),
        (("--lr", "-1"), "--lr is -1.0; give auto or a rate above 0"),
    ],
)
def test_refused(typed: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_command(["--data", "photos", *typed], "recipes/finetune.py", "", PRESETS)


def test_the_finder_alone_has_no_share_of_a_run() -> None:
    typed = ["--data", "photos", "--lr", "auto", "--finder-share", "0.2"]
    with pytest.raises(
        UserError, match=r"--finder-share 0.2 is for --lr auto of recipes/finetune.py and has no effect"
    ):
        parse_command(typed, "recipes/find_lr.py", "", PRESETS)
    parse_command(["--data", "photos", "--finder-race", "0"], "recipes/find_lr.py", "", PRESETS)


def test_a_stage_key_of_our_own_can_t_be_typed(tmp_path: Path) -> None:
    listed = tmp_path / "list.yaml"
    listed.write_text("stages:\n- {open: head, epochs: 1, find_lr: true}\n")
    with pytest.raises(UserError, match="unknown key 'find_lr'"):
        stages("--preset", str(listed))
