"""Sizes that steps draw, sizes that a model can take, and the batch that follows them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from datasets import Dataset
from pictures import encode, noise
from PIL import Image
from plain_stages import plain_stage
from torch import Tensor, nn

from tuning.cli.command_line import parse_command
from tuning.data.loader import Micro, TrainFeed
from tuning.data.mixing import Mixing
from tuning.data.sampling import TrainOrder, drawn_size
from tuning.data.transforms import Crop, Normalise
from tuning.errors import UserError
from tuning.image_sizes import batch_at, run_sizes, sizes_of, stride
from tuning.models.build import build, save_timm_folder
from tuning.plan import StagePlan, check_sizes, make_plan
from tuning.sizes import BatchPlan
from tuning.stage_checks import check_stage
from tuning.stage_lists import read_stages
from tuning.stages import Stage

IMAGES, SIZES = 23, (16, 24, 32)
PRESETS = Path(__file__).parents[2] / "recipes" / "presets"


def test_every_size_is_drawn_as_often_and_by_seed_and_step_alone() -> None:
    drawn = [drawn_size(SIZES, 7, step) for step in range(6000)]
    assert all(abs(count / 6000 - 1 / 3) < 0.02 for count in Counter(drawn).values())
    torch.manual_seed(0)
    np.random.seed(0)
    assert [drawn_size(SIZES, 7, step) for step in range(100)] == drawn[:100]
    other = [drawn_size(SIZES, 8, step) for step in range(6000)]
    for one, two in ((drawn, other), (drawn[1:], drawn[:-1])):
        assert abs(np.corrcoef(one, two[: len(one)])[0, 1]) < 0.05


def rows() -> Dataset:
    pictures = [{"bytes": encode(noise(50, 40, seed=n)), "path": None} for n in range(IMAGES)]
    return Dataset.from_dict({"image": pictures, "label": [n % 3 for n in range(IMAGES)]})


def feed(
    *,
    sizes: tuple[int, ...] = SIZES,
    size: int = 32,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    mixes: bool = False,
) -> TrainFeed:
    order = TrainOrder(IMAGES, 7, BatchPlan(8, 4, world), rank)
    crop, normalise = Crop(size, "bicubic", 1.0), Normalise((0.0,) * 3, (1.0,) * 3)
    mixing = Mixing(0.4, 1.0, 7, IMAGES) if mixes else None
    device = torch.device("cpu")
    return TrainFeed(
        rows(), order, crop, normalise, augment="light", flip="none", workers=workers, device=device, mixing=mixing,
        sizes=sizes,
    )  # fmt: skip


def sides(micros: list[Micro]) -> list[int]:
    return [micro.inputs.shape[-1] for micro in micros]


def test_all_micro_batches_of_a_step_have_the_size_of_the_step() -> None:
    """Two micro-batches a step; the last step of the epoch, of 7 images, is short."""
    made = list(feed().epoch(1, 0, 3))
    expected = [drawn_size(SIZES, 7, step) for step in (3, 4, 5)]
    assert len({*expected}) > 1
    assert sides(made) == [size for size in expected for _ in range(2)]
    assert all(micro.inputs.shape[-2] == micro.inputs.shape[-1] for micro in made)


def test_pictures_are_those_of_the_largest_size_resized_with_antialiasing() -> None:
    """Against Pillow, which filters in the same way, to one level of 255."""
    large = list(feed(sizes=()).epoch(0))
    assert sides(large) == [32] * 6
    seen = set()
    for micro, whole in zip(feed().epoch(0), large, strict=True):
        size = micro.inputs.shape[-1]
        seen.add(size)
        for mine, full in zip(micro.inputs, whole.inputs, strict=True):
            picture = Image.fromarray((full * 255).round().byte().permute(1, 2, 0).numpy())
            theirs = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
            assert np.abs(mine.permute(1, 2, 0).numpy() * 255 - theirs).max() <= 1.01
    assert len(seen) > 1


def equal(one: list[Micro], other: list[Micro]) -> bool:
    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b if a is None or b is None else torch.equal(a, b)

    return len(one) == len(other) and all(
        same(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def test_draws_depend_on_no_worker_and_not_on_where_an_epoch_is_begun() -> None:
    """Mixed too: boxes are drawn for the size of the step."""
    reference = list(feed(mixes=True).epoch(1, 0, 3))
    assert equal(list(feed(mixes=True, workers=2).epoch(1, 0, 3)), reference)
    assert equal(list(feed(mixes=True).epoch(1, 1, 4)), reference[2:])


def test_two_processes_deal_out_the_micro_batches_of_one() -> None:
    alone = list(feed().epoch(0, 0, 9))
    ranks = [list(feed(rank=rank, world=2).epoch(0, 0, 9)) for rank in (0, 1)]
    assert equal(alone, [micro for pair in zip(*ranks, strict=True) for micro in pair])


def meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=3)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("resnet18", 32),
        ("vit_tiny_patch16_224", 16),
        ("eva02_tiny_patch14_224", 14),
        ("swin_tiny_patch4_window7_224", 32),
    ],
)
def test_stride_is_that_of_the_last_feature_map(name: str, pixels: int) -> None:
    assert stride(meta(name)) == pixels


def test_multi_scale_is_every_multiple_of_the_stride_within_reach() -> None:
    resnet, vit = meta("resnet18"), meta("vit_tiny_patch16_224")
    assert sizes_of(plain_stage(multi_scale=0.25), 128, resnet) == (96, 128, 160)
    assert sizes_of(plain_stage(multi_scale=0.25), 128, vit) == (96, 112, 128, 144, 160)
    assert sizes_of(plain_stage(multi_scale=0.3), 100, resnet) == (96, 128)
    assert sizes_of(plain_stage(train_sizes=(48, 32)), 128, resnet) == (32, 48)
    assert sizes_of(plain_stage(), 100, resnet) == (100,)
    assert sizes_of(plain_stage(open="head", cache_features=True, multi_scale=0.5), 100, resnet) == (100,)
    with pytest.raises(UserError, match=r"multiples of 32, .* within 102 to 154 pixels, and there is only 128\. "):
        sizes_of(plain_stage(multi_scale=0.2), 128, resnet)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_sizes": (96,)}, "--train-sizes is .96,.; give two or more different sizes"),
        ({"train_sizes": (96, 96)}, "two or more different"),
        ({"train_sizes": (4, 96)}, "from 8 pixels"),
        ({"multi_scale": -0.1}, "--multi-scale is -0.1; give a fraction"),
        ({"multi_scale": 1.0}, "--multi-scale is 1.0"),
        ({"multi_scale": float("nan")}, "--multi-scale is nan"),
        ({"multi_scale": 0.2, "train_sizes": (96, 128)}, "--train-sizes 96 128 and --multi-scale 0.2 exclude"),
    ],
)
def test_sizes_that_no_stage_can_have(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_stage(plain_stage(**changes))


def test_keys_of_a_stage() -> None:
    base = plain_stage(multi_scale=0.25)
    one, two, three = read_stages(
        [{"open": "all", "train-sizes": [96, 128]}, {"open": "all", "batch_scaling": "area"}, {"open": "norms"}],
        base,
        "x",
    )
    assert (one.train_sizes, one.multi_scale) == ((96, 128), 0)
    assert (two.train_sizes, two.multi_scale, two.batch_scaling) == ((), 0.25, "area")
    assert (three.open, three.name) == ("norms", "norms")
    for wrong in (96, "96 128", [96, "x"], [True]):
        with pytest.raises(UserError, match="is not a list of whole numbers"):
            read_stages([{"open": "all", "train_sizes": wrong}], base, "x")


def test_flags_without_effect_are_refused() -> None:
    head = ("--data", "photos", "--epochs", "0", "--cache-features")
    for flag in (("--train-sizes", "96", "128"), ("--multi-scale", "0.2")):
        with pytest.raises(
            UserError, match=f"{' '.join(flag)} draws sizes of pictures, but every stage trains on cached"
        ):
            parse_command([*head, *flag], "recipes/finetune.py", "", PRESETS)


def progressive(*sizes: int, **changes: object) -> list[Stage]:
    return [plain_stage(batch_size=64, lr=0.1, image_size=size, **changes) for size in sizes]


def plan(stages: list[Stage], model: nn.Module, **changes: object) -> tuple[StagePlan, ...]:
    options: dict[str, object] = {"train_images": 1000, "world_size": 1, "micro_batch": "auto", "image_size": 224}
    return make_plan(stages, model, **{**options, **changes})  # type: ignore[arg-type]


def test_all_stages_are_evaluated_at_the_size_of_the_last() -> None:
    made = plan([*progressive(128, 160), plain_stage(multi_scale=0.25)], meta("resnet18"))
    assert [planned.image_size for planned in made] == [128, 160, 224]
    assert [planned.eval_size for planned in made] == [224] * 3
    assert [planned.sizes for planned in made] == [(128,), (160,), (192, 224, 256)]
    assert [planned.largest_size for planned in made] == [128, 160, 256]
    assert run_sizes(progressive(128, 160)) == (160, True)
    assert run_sizes(progressive(160, 160)) == (160, False)
    assert run_sizes([plain_stage(multi_scale=0.2)]) == (None, True)


def test_the_batch_follows_the_area_in_whole_multiples() -> None:
    """(224/128)^2 = 3.06, (224/160)^2 = 1.96, (224/192)^2 = 1.36; a larger picture takes no smaller batch."""
    stages = progressive(128, 160, 192, 256, 224, batch_scaling="area")
    batches = [planned.batch.batch_size for planned in plan(stages, meta("resnet18"))]
    assert batches == [192, 128, 64, 64, 64]
    assert [p.batch.batch_size for p in plan(progressive(128, 224), meta("resnet18"))] == [64, 64]
    few = plan(stages, meta("resnet18"), train_images=150)
    assert [planned.batch.batch_size for planned in few] == [128, 128, 64, 64, 64], "never more than there are images"
    for scaling, lr in (("none", 0.1), ("linear", 0.3), ("sqrt", 0.1 * 3**0.5)):
        assert batch_at(stages[0], 128, 224, scaling, 1000).lr == pytest.approx(lr)
        (first, *_) = plan(stages, meta("resnet18"), lr_scaling=scaling)
        assert first.groups[-1].peak_lr == pytest.approx(lr)


CLASSES = ("cat", "dog", "emu")


def several(name: str, final: int | None) -> tuple[nn.Module, object]:
    return build(name, classes=CLASSES, weights="none", final_size=final, several_sizes=True)


def test_a_model_of_one_size_takes_several_and_leaves_a_plain_folder(tmp_path: Path) -> None:
    """A ViT with position embeddings for its own 160 pixels. The folder is that of a model of the last size."""
    fixed, _ = build("test_vit3", classes=CLASSES, weights="none")
    with pytest.raises(AssertionError, match="doesn't match"):
        fixed(torch.randn(1, 3, 64, 64))
    model, info = build("test_vit3", classes=CLASSES, weights="none", final_size=96, several_sizes=True)
    assert (info.input_size, dict(info.model_args)) == (160, {"img_size": 96})
    check_sizes(plan(progressive(64, 96), model), model, info)
    save_timm_folder(model, info, CLASSES, tmp_path / "model")
    plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    pictures = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(plain(pictures), model.eval()(pictures))
        smaller = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, img_size=64).eval()
        pictures = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(model(pictures), smaller(pictures))  # timm's resampling when weights are loaded


def test_embeddings_of_weights_are_resampled_to_the_last_size(tmp_path: Path) -> None:
    source = timm.create_model("test_vit3", num_classes=3)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model, _ = build(
        "test_vit3", classes=CLASSES, weights=str(tmp_path / "weights.pth"), final_size=96, several_sizes=True
    )
    old = source.pos_embed.detach()[0, 1:].T.reshape(1, -1, 10, 10)
    expected = nn.functional.interpolate(old, size=(6, 6), mode="bicubic", antialias=True).flatten(2)[0].T
    torch.testing.assert_close(model.pos_embed.detach()[0, 1:], expected)
    assert torch.equal(model.pos_embed[0, 0], source.pos_embed[0, 0]), "the class token has no place"


def test_sizes_that_a_model_cannot_take_are_refused_with_the_reason() -> None:
    def refused(name: str, stages: list[Stage], **changes: object) -> str:
        model, info = build(name, classes=CLASSES, weights="none", final_size=stages[-1].image_size, several_sizes=True)
        with pytest.raises(UserError) as caught:
            check_sizes(plan(stages, model, image_size=info.input_size, **changes), model, info)
        return str(caught.value)

    said = refused("test_vit3", progressive(100, 96))
    assert said.startswith("--image-size 100 does not work with test_vit3 (it would not see the last 4 pixels)")
    assert "choose a multiple of 16" in said
    said = refused("test_vit3", [plain_stage(train_sizes=(96, 120))])
    assert said.startswith("--train-sizes 120 does not work with test_vit3 (it would not see the last 8 pixels)")
    said = refused("resmlp_12_224", progressive(192, 224))
    assert said.startswith("--image-size 192: MlpMixer works at the 224 pixels only that it is built for, because timm")
    said = refused("resmlp_12_224", [plain_stage(multi_scale=0.25)])
    assert said.startswith("--multi-scale 176: MlpMixer works at the 224 pixels only")
