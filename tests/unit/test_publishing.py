"""Uploads: what they would hold, and one message where they can't be. No hub is reached here."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import wandb

from tuning.errors import UserError
from tuning.exporting import publishing
from tuning.exporting.publishing import artifact_name, check_login, check_repository, push, tracker_run, upload_lines
from tuning.tracking import weights_and_biases

REAL = huggingface_hub.HfApi


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"1234")
    return folder


class Hub:
    """Stands for ``huggingface_hub.HfApi``: takes only arguments that the real one takes."""

    calls: list[tuple[str, dict[str, Any]]]
    fails: str | None = None

    def __getattr__(self, name: str) -> Any:
        signature = inspect.signature(getattr(REAL, name))

        def call(*args: Any, **arguments: Any) -> str:
            bound = signature.bind(None, *args, **arguments).arguments
            self.calls.append((name, {key: value for key, value in bound.items() if key != "self"}))
            if self.fails == name:
                raise ConnectionError("[Errno -2] Name or service not known\nand more")
            return "https://huggingface.co/me/cells"

        return call


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    stand_in.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stand_in)
    return stand_in


def test_a_new_repository_is_private_and_gets_the_whole_folder(hub: Hub, bundle: Path) -> None:
    assert push("me/cells", bundle) == "https://huggingface.co/me/cells"
    (made, create), (sent, upload) = hub.calls
    assert (made, sent) == ("create_repo", "upload_folder")
    assert (create["repo_id"], create["private"], create["exist_ok"]) == ("me/cells", True, True)
    assert (upload["repo_id"], upload["folder_path"], upload["repo_type"]) == ("me/cells", bundle, "model")


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_a_failed_upload_says_how_to_do_it_later(hub: Hub, bundle: Path, step: str) -> None:
    hub.fails = step
    with pytest.raises(UserError) as raised:
        push("me/cells", bundle)
    assert str(raised.value) == (
        f"--push me/cells failed ([Errno -2] Name or service not known). The export is complete in {bundle}; upload it "
        f"by: hf upload me/cells {bundle}"
    )
    assert bundle.exists()


def test_no_network_is_one_message(hub: Hub) -> None:
    hub.fails = "whoami"
    with pytest.raises(
        UserError, match=r"can't be reached or refuses the login \(\[Errno -2\] Name or service not known"
    ):
        check_login()


def test_no_login_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", _without_token)
    with pytest.raises(UserError, match="hf auth login, or set HF_TOKEN"):
        check_login()


def _without_token(_: object) -> None:
    raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required")


def test_the_real_client_offline_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")  # HF_HUB_OFFLINE is set in all tests
    with pytest.raises(UserError, match="offline mode is enabled"):
        check_login()


@pytest.mark.parametrize("name", ["cells", "a/b/c", "me/two words", "me/", "", "me/--x--"])
def test_names_that_are_no_repository(name: str) -> None:
    with pytest.raises(UserError, match="--push"):
        check_repository(name)


def test_names_that_are() -> None:
    check_repository("me/cells-1.0_b")


def test_the_training_run_is_found_by_its_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this model has no W&B run"):
        tracker_run(None)
    with pytest.raises(UserError, match=r"has no W&B run .* --tracker wandb"):
        tracker_run(tmp_path)
    for name in ("offline-run-20260101_101010-abc123", "run-20260102_101010-abc123", "latest-run", "debug.log"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    assert tracker_run(tmp_path) == "abc123"


def test_names_of_artifacts_hold_what_wandb_takes() -> None:
    wandb.Artifact(artifact_name("my run (2): é-onnx"), type="model")
    assert artifact_name("my run (2): é-onnx") == "my-run-2--onnx"


def test_what_an_upload_holds_is_listed() -> None:
    assert upload_lines("me/cells", [("model.onnx", 1234567), ("README.md", 9)]) == [
        "me/cells: 2 files, 1,234,576 bytes",
        "  model.onnx      1,234,567 bytes",
        "  README.md               9 bytes",
    ]


class TrackedRun:
    """Stands for a run of W&B."""

    logged: wandb.Artifact | None = None

    def __enter__(self) -> TrackedRun:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log_artifact(self, artifact: wandb.Artifact) -> TrackedRun:
        self.logged = artifact
        return self

    def wait(self) -> None:
        pass


def test_an_artifact_continues_the_training_run(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    run, asked = TrackedRun(), {}
    real = inspect.signature(wandb.init)

    def init(**settings: Any) -> TrackedRun:
        asked.update(real.bind(**settings).arguments)
        return run

    monkeypatch.setattr(wandb, "init", init)
    weights_and_biases.push_artifact(bundle, "run-onnx", "abc123", "fine-tuning", {"format": "onnx"})
    assert asked == {"project": "fine-tuning", "id": "abc123", "resume": "must"}
    assert run.logged is not None
    assert (run.logged.name, run.logged.type, run.logged.metadata) == ("run-onnx", "model", {"format": "onnx"})
    assert list(run.logged.manifest.entries) == ["model.onnx"]


def test_a_refused_artifact_is_one_message(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    def init(**_: Any) -> None:
        raise wandb.errors.UsageError("resume='must' but run (abc123)\n doesn't exist")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"run abc123 .*doesn't exist.*The export is complete.*wandb sync"):
        weights_and_biases.push_artifact(bundle, "run-onnx", "abc123", "fine-tuning", {})


def test_an_artifact_needs_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--push-wandb continues the training run"):  # WANDB_MODE is offline in tests
        weights_and_biases.check_artifact()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    with pytest.raises(UserError, match="wandb login"):
        weights_and_biases.check_artifact()
    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    weights_and_biases.check_artifact()


def test_nothing_is_asked_of_a_person() -> None:
    assert "input(" not in inspect.getsource(publishing)
