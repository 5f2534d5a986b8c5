"""The folder of a run: its name, its files, and what may not be written over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tuning.cli.command_line import NOT_IN_CONFIG, dump
from tuning.errors import UserError
from tuning.flags import Flags
from tuning.tracking.run_folder import MAY_CHANGE, RunFolder, choose, refuse_other_run, settled_hash, write_atomically

CONFIG = "lr: 0.001\nepochs: 3\nworkers: 2\n"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create(CONFIG)
    return folder


def test_choose_takes_output() -> None:
    assert choose("some/where", "never", "resnet18", "cats", 0.0).path == Path("some/where")


def test_chosen_name_is_one_folder_whatever_the_model_is_called() -> None:
    path = choose(None, "never", "local-dir:/a/b", "hub/cats", 1e9).path
    assert path.parent == Path("runs")
    assert path.name.endswith("-local-dir--a-b-hub-cats")
    assert ":" not in path.name


def test_chosen_name_is_short_and_plain() -> None:
    name = choose(None, "never", "m" * 200, "a b\0$(x)\n/\ud800", 1e9).path.name
    assert len(name) == 150
    assert choose(None, "never", "m", "a b\0$(x)\n/..\ud800", 1e9).path.name.endswith("-m-a-b---x---..-")
    assert len(choose(None, "never", "m", "猫" * 100, 1e9).path.name.encode()) <= 150


def test_resume_names_the_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    with pytest.raises(UserError, match="there is no such checkpoint"):
        choose(None, str(checkpoint), "m", "d", 0.0)
    checkpoint.mkdir(parents=True)
    assert choose(None, str(checkpoint), "m", "d", 0.0).path == tmp_path / "run"
    with pytest.raises(UserError, match="belongs to the run in"):
        choose("other", str(checkpoint), "m", "d", 0.0)
    with pytest.raises(UserError, match="--resume auto needs --output"):
        choose(None, "auto", "m", "d", 0.0)


def test_create_can_be_repeated(run: RunFolder) -> None:
    run.create("lr: 0.002\n")
    assert (run.path / "config.yaml").read_text() == "lr: 0.002\n"
    assert run.plots.is_dir()
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "plots"]


def test_summary_is_replaced_as_a_whole(run: RunFolder) -> None:
    run.write_summary({"status": "failed", "error": "long " * 100})
    run.write_summary({"status": "done"})
    assert json.loads((run.path / "summary.json").read_text()) == {"status": "done"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file.json"
    write_atomically(file, "old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_another_run_is_not_written_over(run: RunFolder) -> None:
    with pytest.raises(UserError, match=r"holds another run.*--resume auto"):
        refuse_other_run(run, "never", CONFIG)


def test_the_same_run_goes_on(run: RunFolder) -> None:
    refuse_other_run(run, "auto", CONFIG)
    refuse_other_run(run, "auto", CONFIG.replace("workers: 2", "workers: 0"))


def test_changed_flags_are_named_with_both_values(run: RunFolder) -> None:
    with pytest.raises(UserError) as caught:
        refuse_other_run(run, "auto", "lr: 0.01\nepochs: 3\nworkers: 2\nnesterov: true\n")
    assert "--lr was 0.001, now 0.01" in str(caught.value)
    assert "--nesterov was None, now True" in str(caught.value)
    assert "epochs" not in str(caught.value)
    assert "These may change: " in str(caught.value)
    assert "--keep, --latency-repeats, --license, --log-every" in str(caught.value)


def test_odd_keys_of_an_older_config_are_named(run: RunFolder) -> None:
    (run.path / "config.yaml").write_text(CONFIG + "1: 2\nnull: x\nlong: [" + "1, " * 1000 + "]\n")
    with pytest.raises(UserError, match="--1 was 2, now None; --None was 'x', now None") as caught:
        refuse_other_run(run, "auto", CONFIG)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("content", [b"", b"- a\n- b\n", b"{", b"lr", b"\xff", b"{a: " * 9999, b"a: &a [*a]"])
def test_a_foreign_config_is_not_a_run(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"not the config\.yaml of a run"):
        refuse_other_run(RunFolder(tmp_path), "auto", CONFIG)


def test_only_real_flags_may_change() -> None:
    names = {line.partition(":")[0] for line in dump(Flags()).splitlines()}
    assert names | set(NOT_IN_CONFIG) >= MAY_CHANGE
    assert not MAY_CHANGE & {"lr", "batch_size", "seed", "epochs", "precision"}


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--output .*file"):
            refuse_other_run(RunFolder(output), "never", CONFIG)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="can't be written"):
        refuse_other_run(RunFolder(tmp_path / "run"), "never", CONFIG)
    tmp_path.chmod(0o700)


def test_refusing_writes_nothing(tmp_path: Path) -> None:
    refuse_other_run(RunFolder(tmp_path / "a" / "b"), "never", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_the_hash_is_of_what_may_not_change() -> None:
    one = settled_hash(CONFIG)
    assert one == settled_hash("workers: 0\nepochs: 3\nlr: 1.0e-3\n"), "order, notation and free flags"
    assert one == settled_hash("lr: 0.001\nepochs: 3\nmax_skipped: 7\n")
    others = {
        settled_hash(CONFIG.replace("3", "4")),
        settled_hash("lr: 0.001\n"),
        settled_hash(CONFIG + "a: 2024-05-01"),
    }
    assert one not in others
    assert len(others) == 3
