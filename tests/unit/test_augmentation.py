"""Four strengths, erased boxes, grey pictures, and a picture of it all that changes nothing."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from pictures import encode, noise
from PIL import Image
from plain_stages import plain_stage
from scipy.stats import ks_2samp
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2

from tuning.cli.command_line import parse_command, resolve_stages
from tuning.data import erasing
from tuning.data.erasing import Erasing, erased
from tuning.data.grey import are_grey
from tuning.data.loader import FeatureFeed, Micro, TrainFeed
from tuning.data.mixing import Mixing
from tuning.data.operations import GEOMETRIC, MAGNITUDE, Operations, augmentation_sentences, stage_operations
from tuning.data.resizing import resize
from tuning.data.sampling import TrainOrder, uniform
from tuning.data.transforms import CROP_AREA, Crop, Normalise
from tuning.errors import UserError
from tuning.flags import Flags, RegularisationFlags
from tuning.progress import Progress
from tuning.sizes import BatchPlan
from tuning.stage_checks import check_stage
from tuning.tracking.augmentation import FILE, draw_batch

GREY, SIZE, IMAGES = (124, 116, 104), 32, 21
CPU = torch.device("cpu")


def picture(seed: int = 0, side: int = 60) -> Tensor:
    return torch.from_numpy(np.array(noise(side, side - 10, seed)))


def cropped(crop: v2.RandomResizedCrop) -> Tensor:
    """What torchvision's crop takes, resized in the order of Pillow (`resizing`)."""
    box = crop.make_params([picture().permute(2, 0, 1)])
    rows, columns = (
        slice(box[start], box[start] + box[side]) for start, side in (("top", "height"), ("left", "width"))
    )
    return resize(picture()[rows, columns], SIZE, SIZE, crop.interpolation).permute(2, 0, 1)


def test_light_is_a_random_crop_and_nothing_else() -> None:
    mean = (0.5, 0.5, 0.5)
    assert [stage_operations(plain_stage(augment=name), mean) for name in ("none", "light")] == [None, None]
    for seed in range(10):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wanted = cropped(v2.RandomResizedCrop(SIZE, scale=(0.7, 1.0), interpolation=v2.InterpolationMode.BILINEAR))
        assert torch.equal(Crop(SIZE, "bilinear", 1.0).random(picture(), "light", seed), wanted)


@pytest.mark.parametrize("strength", ["medium", "strong"])
def test_medium_and_strong_are_torchvisions_operations_after_the_crop(strength: str) -> None:
    made = stage_operations(plain_stage(augment=strength), (0.485, 0.456, 0.406))
    assert made == Operations(strength, True, GREY)  # type: ignore[arg-type]
    how = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": list(GREY)}
    reference = v2.RandAugment(1, MAGNITUDE, **how) if strength == "medium" else v2.TrivialAugmentWide(**how)
    crop = v2.RandomResizedCrop(SIZE, scale=CROP_AREA[strength], interpolation=v2.InterpolationMode.BICUBIC)
    before, seen = torch.get_rng_state(), set()
    for seed in range(30):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wanted = reference(cropped(crop))
        ours = Crop(SIZE, "bicubic", 1.0, made).random(picture(), strength, seed)
        assert ours.dtype == torch.uint8
        assert torch.equal(ours, wanted)
        seen.add(ours.numpy().tobytes())
    assert len(seen) == 30
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("strength", ["medium", "strong"])
def test_kept_colours_are_kept(strength: str) -> None:
    """A picture of one colour, the same as what is moved in: only an operation on values can change more than a rim."""
    plain = torch.tensor(GREY, dtype=torch.uint8)[:, None, None].expand(3, SIZE, SIZE)
    changed = {}
    for color in ("keep", "change"):
        operations = stage_operations(plain_stage(augment=strength, color=color), (0.485, 0.456, 0.406))
        torch.manual_seed(0)
        results = [operations(plain) for _ in range(300)]  # type: ignore[misc]
        changed[color] = sum(bool(((a.short() - plain.short()).abs() > 1).float().mean() > 0.25) for a in results)
    assert changed["keep"] == 0
    assert changed["change"] > 50
    moved = Operations(strength, False, (0, 0, 0))  # type: ignore[arg-type]
    assert len({moved(plain).numpy().tobytes() for _ in range(60)}) > 5
    assert {*GEOMETRIC} <= {*v2.RandAugment._AUGMENTATION_SPACE} & {*v2.TrivialAugmentWide._AUGMENTATION_SPACE}


def grey_rows(*pictures: bytes) -> Dataset:
    return Dataset.from_dict(
        {"image": [{"bytes": one, "path": None} for one in pictures], "label": [0] * len(pictures)}
    )


def test_grey_pictures_are_known() -> None:
    grey = noise(50, 40).convert("L")
    saved = [encode(grey, "PNG"), encode(grey, "JPEG"), encode(grey.convert("RGB"), "JPEG", quality=60)]
    assert are_grey(grey_rows(*saved))
    assert are_grey(grey_rows(b"broken", *saved))
    assert not are_grey(grey_rows(b"broken"))
    assert not are_grey(grey_rows(*saved, encode(noise(50, 40))))
    tinted = Image.merge("RGB", (grey, grey.point(lambda x: x * 0.9), grey.point(lambda x: x * 0.8)))
    assert not are_grey(grey_rows(*saved, encode(tinted)))


def timms(draws: list[tuple[float, ...]], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The boxes of timm's class where `random` answers with *draws*: whether, then area and shape of each attempt."""
    boxes = []
    for whether, down, across, *attempts in draws:
        answers, places = iter(attempts), iter((down, across))
        monkeypatch.setattr(random, "random", lambda value=whether: value)
        monkeypatch.setattr(random, "uniform", lambda low, high, answers=answers: low + (high - low) * next(answers))
        monkeypatch.setattr(random, "randint", lambda low, high, places=places: low + int(next(places) * (high + 1)))
        pixels = torch.ones(1, *size)
        RandomErasing(0.6, device="cpu")._erase(pixels, 1, *size, pixels.dtype)
        rows, columns = (torch.nonzero((pixels[0] == 0).any(dim)).flatten().tolist() for dim in (1, 0))
        boxes.append([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1] if rows else [0, 0, 0, 0])
    return boxes


@pytest.mark.parametrize("size", [(32, 32), (224, 160), (9, 9)])
def test_boxes_are_timms_for_the_same_draws(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    index = np.arange(300)
    streams = [erasing.WHETHER, erasing.DOWN, erasing.ACROSS, *range(erasing.ATTEMPT, erasing.ATTEMPT + 20)]
    draws = list(zip(*(uniform(3, 2, index, stream).tolist() for stream in streams), strict=True))
    ours = Erasing(0.6, 3).boxes(2, index, size)
    assert ours.tolist() == timms(draws, size, monkeypatch)
    assert 0.5 < (ours[:, 1] > 0).mean() < 0.7


def test_area_shape_and_place_are_of_timms_distribution() -> None:
    """Two-sample Kolmogorov-Smirnov tests against boxes that timm draws itself."""
    random.seed(0)
    pixels = RandomErasing(1.0, device="cpu")(torch.ones(1500, 1, 64, 64))[:, 0] == 0
    theirs = [pixels.any(2).sum(1), pixels.any(1).sum(1), pixels.any(2).int().argmax(1), pixels.any(1).int().argmax(1)]
    boxes = Erasing(1.0, 0).boxes(0, np.arange(1500), (64, 64))
    ours = [boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2], boxes[:, 0], boxes[:, 2]]
    for mine, timm in zip((ours[0] * ours[1], *ours), (theirs[0] * theirs[1], *theirs), strict=True):
        assert ks_2samp(mine, timm.numpy()).pvalue > 1e-3
    share = ours[0] * ours[1] / 64**2
    assert 0.015 < share.min() < 0.03
    assert 0.3 < share.max() < 0.35
    for probability in (0.25, 0.75):
        got = Erasing(probability, 0).boxes(0, np.arange(20_000), (64, 64))[:, 1] > 0
        assert got.mean() == pytest.approx(probability, abs=0.015)


def test_a_box_is_emptied_and_the_rest_keeps_every_bit() -> None:
    pictures = torch.randn(3, 3, 8, 6).contiguous(memory_format=torch.channels_last)
    result = erased(pictures, torch.tensor([[2, 5, 1, 4], [0, 0, 0, 0], [0, 8, 0, 6]]))
    wanted = pictures.clone()
    wanted[0, :, 2:5, 1:4] = 0
    wanted[2] = 0
    assert torch.equal(result, wanted)
    assert result.is_contiguous(memory_format=torch.channels_last)


def rows() -> Dataset:
    pictures = [{"bytes": encode(noise(40, 40, seed=n)), "path": None} for n in range(IMAGES)]
    return Dataset.from_dict({"image": pictures, "label": [n % 3 for n in range(IMAGES)]})


def feed(
    data: Dataset, probability: float, *, workers: int = 0, rank: int = 0, world: int = 1, mix: bool = True
) -> TrainFeed:
    order, operations = TrainOrder(IMAGES, 7, BatchPlan(8, 4, world), rank), Operations("strong", True, GREY)
    return TrainFeed(
        data,
        order,
        Crop(SIZE, "bilinear", 1.0, operations),
        Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        augment="strong",
        flip="both",
        workers=workers,
        device=CPU,
        mixing=Mixing(0.4, 1.0, 7, IMAGES) if mix else None,
        erasing=Erasing(probability, 7) if probability else None,
    )


def equal(one: list[Micro], other: list[Micro]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True) if a is not None
    )


def test_a_feed_erases_what_it_would_deal_out_without() -> None:
    """After mixing, as timm's default loader has it; the labels' shares stay."""
    data = rows()
    whole, made = list(feed(data, 0.0).epoch(1)), list(feed(data, 0.7).epoch(1))
    for before, after in zip(whole, made, strict=True):
        boxes = Erasing(0.7, 7).boxes(1, before.rows.numpy(), (SIZE, SIZE))
        assert torch.equal(after.inputs, erased(before.inputs, torch.from_numpy(boxes)))
        assert torch.equal(after.shares, before.shares)  # type: ignore[arg-type]
    assert equal(list(feed(data, 1e-9).epoch(1)), whole), "none is drawn"


def test_nothing_depends_on_workers_processes_or_where_an_epoch_is_begun() -> None:
    data = rows()
    alone = list(feed(data, 0.7).epoch(1))
    torch.manual_seed(5)
    assert equal(list(feed(data, 0.7, workers=2).epoch(1)), alone)
    assert equal(list(feed(data, 0.7).epoch(1, first_step=2)), alone[4:])
    ranks = [list(feed(data, 0.7, rank=rank, world=2).epoch(1)) for rank in (0, 1)]
    assert equal([micro for pair in zip(*ranks, strict=True) for micro in pair], alone)
    assert not torch.equal(next(feed(data, 0.7).epoch(2)).inputs, alone[0].inputs)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_picture_shows_what_the_model_sees_and_moves_nothing(tmp_path: Path, workers: int) -> None:
    data = rows()
    untouched, drawn = (feed(data, 0.7, workers=workers) for _ in range(2))
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for progress in (Progress(), Progress(epoch=1, stage_step=4)):
        draw_batch(drawn, progress, ("<a>", "$b$", "c" * 90), tmp_path)
        assert Image.open(tmp_path / FILE).width > 300
        (tmp_path / FILE).unlink()
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    wanted = list(untouched.epoch(1))
    assert equal(list(drawn.epoch(1)), wanted)
    for count in (2, 3, 4, 16):
        sample = drawn.sample(1, 2, count)
        assert equal([sample], [Micro(*(part[:count] for part in wanted[4]))])  # type: ignore[index]
    assert not drawn.unreadable.found
    normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    assert torch.allclose(normalise.undone(normalise(pixels)), pixels / 255, atol=1e-6)


def test_the_picture_is_drawn_once_and_not_of_features(tmp_path: Path) -> None:
    order = TrainOrder(IMAGES, 7, BatchPlan(8, 4, 1), 0)
    features = FeatureFeed(torch.zeros(IMAGES, 2), torch.zeros(IMAGES, dtype=torch.int64), order)
    draw_batch(features, Progress(), ("a",), tmp_path)
    assert not (tmp_path / FILE).exists()
    (tmp_path / FILE).write_text("earlier")
    draw_batch(feed(rows(), 0.0, mix=False), Progress(), ("a", "b", "c"), tmp_path)
    assert (tmp_path / FILE).read_text() == "earlier"


def test_defaults_and_what_the_plan_says() -> None:
    assert [plain_stage(augment=name).erases for name in ("none", "light", "medium", "strong")] == [0, 0, 0, 0.25]
    assert plain_stage(augment="strong", random_erasing=0.0).erases == 0
    assert plain_stage(random_erasing=0.4).erases == 0.4
    assert plain_stage(augment="strong", open="head", cache_features=True).erases == 0
    stages = [
        plain_stage(name="a", augment="strong", color="change", mixup=0.2),
        plain_stage(name="b", augment="medium", color="keep"),
        plain_stage(name="c", augment="medium", color="keep"),
        plain_stage(name="d", augment="strong", open="head", cache_features=True),
    ]
    assert augmentation_sentences(stages) == [
        "strong: crops of 8 % to 100 % of the area, TrivialAugment, mixup 0.2, random erasing 0.25 (a)",
        "medium: crops of 35 % to 100 % of the area, RandAugment, moving pixels only (grey pictures, or --color keep)"
        " (b, c)",
        "none: features are computed once (d)",
    ]
    assert augmentation_sentences([plain_stage(random_erasing=0.5)]) == [
        "none: the evaluation crop, random erasing 0.5 (all)"
    ]


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_no_probability_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"--random-erasing is .*give a probability"):
        check_stage(plain_stage(random_erasing=value))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--color", "keep"), "--color keep has no effect with --augment light"),
        (("--random-erasing", "0.2", "--epochs", "0", "--cache-features"), "--random-erasing 0.2 erases parts"),
    ],
)
def test_what_has_no_effect_is_refused(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_command(["--data", "x", *flags], "test", "", Path())


def test_a_stage_can_have_its_own() -> None:
    (first, *_) = resolve_stages(Flags(regularisation=RegularisationFlags(augment="strong", color="keep")))
    assert (first.augment, first.color, first.erases) == ("strong", "keep", 0.25)
