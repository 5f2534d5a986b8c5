"""How closed layers are run: what is chosen from times, when nothing is timed, and what a choice changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from pictures import encode, noise
from plain_stages import plain_stage
from torch import nn

from tuning import frozen_choice
from tuning.cli.command_line import parse_command
from tuning.data.loader import FeatureFeed
from tuning.data.sampling import TrainOrder
from tuning.data.sources import Data
from tuning.engine import train_steps
from tuning.entering import Entered, enter_stage
from tuning.errors import UserError
from tuning.features import compute_features
from tuning.flags import Flags, RunFlags, StageFlags
from tuning.frozen import Low, lay_back, lay_out
from tuning.frozen_choice import Timed, chosen, described, difference, settle_forward, time_candidates
from tuning.losses import cross_entropy
from tuning.lr_search.auto import as_found
from tuning.models.build import ModelInfo
from tuning.plan import StagePlan, make_plan
from tuning.progress import Progress

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
IMAGES, SIZE = 8, 32
PRESETS = Path(__file__).parents[2] / "recipes" / "presets"
INFO = ModelInfo("m", "m", "", SIZE, (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0, {})


def network(name: str = "test_efficientnet") -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3)


def planned(model: nn.Module, **stage: Any) -> StagePlan:
    asked = plain_stage(**{"open": "head", **stage})
    (plan,) = make_plan([asked], model, train_images=IMAGES, world_size=1, micro_batch=4, image_size=SIZE)
    return plan


def photos() -> Data:
    rows = [{"image": {"bytes": encode(noise(40, 40, seed)), "path": None}, "label": 0} for seed in range(IMAGES)]
    from datasets import Dataset

    table = Dataset.from_list(rows)
    return Data("photos", table, table, ("a", "b", "c"), (), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("milliseconds", "apart", "expected"),
    [
        ({"fp32": 10}, 0.0, "fp32"),
        ({"fp32": 10, "fp32-channels-last": 9.2}, 0.0, "fp32"),
        ({"fp32": 10, "fp32-channels-last": 9.0}, 0.0, "fp32-channels-last"),
        ({"fp32": 10, "bf16": 8.5}, 0.01, "fp32"),
        ({"fp32": 10, "bf16": 8.0}, 0.01, "bf16"),
        ({"fp32": 10, "bf16": 5.0}, 0.06, "fp32"),
        ({"fp32": 10, "bf16": 5.0}, float("nan"), "fp32"),
        ({"fp32": 10, "fp32-channels-last": 6, "bf16": 5.5, "bf16-channels-last": 5.4}, 0.01, "fp32-channels-last"),
        ({"fp32": 10, "fp32-channels-last": 8, "bf16": 6, "bf16-channels-last": 4}, 0.01, "bf16-channels-last"),
        ({"fp32": 10, "fp32-channels-last": 8, "bf16": 5, "bf16-channels-last": 4.8}, 0.01, "bf16"),
        ({}, 0.0, "fp32"),
    ],
)
def test_each_step_away_from_fp32_must_be_clearly_faster(
    milliseconds: dict[str, float], apart: float, expected: str
) -> None:
    timed = {n: Timed(t / 1e3, apart if n.startswith("bf16") else 0.0) for n, t in milliseconds.items()}
    assert chosen(timed) == expected
    assert expected in described(timed)
    assert ("is beyond 5%" in described(timed)) == ("bf16" in milliseconds and not apart <= 0.05)


def test_difference_is_noise_by_signal() -> None:
    """Pictures that are 2 apart in each of 50 numbers, and an offset that all share: only the former is signal."""
    full = torch.tensor([[-1.0], [1.0]]).expand(2, 50) + 1000
    assert difference(full, full) == 0
    assert difference(full, full + 0.03) == pytest.approx(0.03, rel=1e-3)
    assert not difference(full, full * float("nan")) <= 1


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_timing_leaves_the_model_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real passes. bf16 differs, by no more than rounding explains; emulated bf16 would be left out."""
    monkeypatch.setattr(frozen_choice, "HOPELESS", float("inf"))
    model = network(name)
    images = torch.randn(4, 3, *([160] * 2 if name == "test_vit" else [SIZE] * 2))
    before = {key: (value.clone(), value.stride()) for key, value in model.state_dict().items()}
    timed = time_candidates(model, images)
    assert list(timed) == ["fp32", "fp32-channels-last", "bf16", "bf16-channels-last"]
    assert timed["fp32"].difference == 0
    assert timed["fp32-channels-last"].difference < 1e-4
    assert 1e-4 < timed["bf16"].difference < 0.05
    after = model.state_dict()
    assert all(
        torch.equal(after[key], value) and after[key].stride() == order for key, (value, order) in before.items()
    )
    monkeypatch.setattr(frozen_choice, "HOPELESS", 0.0)
    assert set(time_candidates(model, images)) == {"fp32", "fp32-channels-last"}


def settled(
    monkeypatch: pytest.MonkeyPatch, timed: dict[str, Timed], progress: Progress, flags: Flags, share: float = 1e6
) -> list[str]:
    """What `settle_forward` says when timing would give *timed*."""
    model, said = network(), list[str]()
    monkeypatch.setattr(frozen_choice, "SHARE", share)
    monkeypatch.setattr(frozen_choice, "time_candidates", lambda model, images: timed)
    settle_forward(Accelerator(), model, planned(model), photos(), INFO, flags, progress, said.append)
    return said


BF16_WINS = {"fp32": Timed(0.01, 0.0), "bf16": Timed(0.004, 0.012)}


def test_a_choice_is_made_once_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress()
    (said,) = settled(monkeypatch, BF16_WINS, progress, Flags())
    assert progress.frozen_forward == "bf16"
    assert "closed layers run in bf16, 1.2% from fp32 (timed, ms a picture: fp32 10.00, bf16 4.00)" in said
    assert "--frozen-forward bf16 repeats it" in said
    kept = Progress.from_json(progress.to_json())  # what a run goes on from
    assert settled(monkeypatch, {"fp32": Timed(0.01, 0.0)}, kept, Flags()) == []
    assert kept.frozen_forward == "bf16"


@pytest.mark.parametrize(
    ("progress", "flags", "expected"),
    [
        (Progress(), Flags(run=RunFlags(precision="fp32")), None),
        (Progress(stage_step=1), Flags(), None),
        (Progress(), Flags(staging=StageFlags(frozen_forward="fp32-channels-last")), "fp32-channels-last"),
    ],
    ids=["given precision", "within the stage", "given forward"],
)
def test_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch, progress: Progress, flags: Flags, expected: str | None
) -> None:
    assert settled(monkeypatch, BF16_WINS, progress, flags) == []
    assert progress.frozen_forward == expected


def test_a_short_stage_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By arithmetic, not by a clock: the timing would take more than its share of the stage's pictures."""
    progress = Progress()
    assert settled(monkeypatch, BF16_WINS, progress, Flags(), share=0.02) == []
    assert progress.frozen_forward is None


def test_layout_is_of_closed_convolutions_and_goes_back() -> None:
    model = network()
    before = {name: (p.detach().clone(), p.stride()) for name, p in model.named_parameters()}
    moved = lay_out(model, "fp32-channels-last")
    inner = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert inner
    assert all(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in inner)
    assert lay_out(model, "bf16-channels-last") == []
    lay_back(moved)
    assert all(torch.equal(p, before[n][0]) and p.stride() == before[n][1] for n, p in model.named_parameters())
    assert lay_out(model, "bf16") == lay_out(model, None) == []


def head_losses(forward: str | None) -> tuple[list[float], Entered, nn.Module]:
    model, accelerator = network(), Accelerator()
    plan = as_found(planned(model, epochs=3), Progress(frozen_forward=forward))
    entered = enter_stage(accelerator, model, plan)
    images = torch.randn(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    images = images.contiguous(memory_format=torch.channels_last)
    feed = FeatureFeed(images, torch.arange(IMAGES) % 3, TrainOrder(IMAGES, 0, plan.batch, 0))
    clip = lambda trained: torch.zeros(())  # noqa: E731
    steps = train_steps(accelerator, entered, feed, cross_entropy(), clip, Progress(), 0)
    return [float(step.loss) for step in steps], entered, model


def test_the_head_trains_on_what_the_choice_computes() -> None:
    plain, entered, model = head_losses(None)
    assert entered.laid_out == []
    assert entered.wrapped is model
    low, entered, model = head_losses("bf16-channels-last")
    assert isinstance(entered.wrapped, Low)
    assert entered.laid_out
    assert entered.wrapped(torch.randn(2, 3, SIZE, SIZE)).dtype == torch.float32
    assert low != plain
    assert low == pytest.approx(plain, abs=0.03)
    later = enter_stage(Accelerator(), model, planned(model, open="all"), before=entered)
    assert not isinstance(later.wrapped, Low)
    assert all(p.is_contiguous() for p in model.parameters())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_cached_features_are_computed_by_the_choice() -> None:
    from tuning.data.loader import EvalFeed
    from tuning.data.sampling import EvalOrder
    from tuning.data.transforms import Crop, Normalise

    model, accelerator = network(), Accelerator()
    crop, normalise = Crop(SIZE, "bilinear", 1.0), Normalise((0.5,) * 3, (0.25,) * 3)
    feed = EvalFeed(photos().train, EvalOrder(IMAGES, 4, 0, 1), crop, normalise, workers=0, device=torch.device("cpu"))
    plain, low = (compute_features(accelerator, model, feed, forward)[0] for forward in (None, "bf16"))
    assert low.dtype == torch.float32
    assert 0 < difference(plain, low) < 0.05


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_command(["--data", "photos", *argv], "recipes/finetune.py", "", PRESETS)
    return str(caught.value)


def test_flags_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    assert "has no effect without --cache-features" in refused("--feature-views", "2")
    cached = ("--cache-features", "--freeze-epochs", "3")
    assert "an epoch takes one view, so give 1 to 3" in refused(*cached, "--feature-views", "4")
    same = refused(*cached, "--feature-views", "3", "--augment", "none", "--flip", "none")
    assert "all views are the same picture" in same
    assert "no stage trains the head alone" in refused("--freeze-epochs", "0", "--frozen-forward", "bf16")
    assert "--feature-views is 0" in refused(*cached, "--feature-views", "0")
    preset = tmp_path / "stages.yaml"
    preset.write_text("stages:\n- {open: head, epochs: 4, feature_views: 2}\n")
    assert "feature_views without cache_features: true" in refused("--preset", str(preset))
    erased = parse_command(
        ["--data", "photos", *cached, "--epochs", "0", "--feature-views", "3", "--random-erasing", "0.5"],
        "recipes/finetune.py", "", PRESETS,
    )  # fmt: skip
    assert erased.stages[0].erases == 0.5


def test_a_given_precision_excludes_a_given_forward() -> None:
    from tuning.precision import remember

    accelerator, flags = Accelerator(), Flags(staging=StageFlags(frozen_forward="fp32"))
    frozen_choice.check_forward(accelerator, flags)
    remember(accelerator, "bf16-pure")
    with pytest.raises(UserError, match="--frozen-forward fp32: training is in bf16-pure"):
        frozen_choice.check_forward(accelerator, flags)


def test_memory_of_views_is_in_the_plan() -> None:
    model = network()
    features = model.get_classifier().in_features  # type: ignore[operator]
    plan = planned(model, cache_features=True, feature_views=3, epochs=3, augment="light")
    assert plan.feature_bytes == 4 * features * IMAGES * 3
