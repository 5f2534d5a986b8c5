"""What `python -m launch local` would run on machines that aren't here."""

from __future__ import annotations

from pathlib import Path

import pytest
import rendered

from launch import local
from launch.command_line import main
from launch.job import Job

ROOT = Path(__file__).parents[2]
LISTED = "".join(f"GPU {number}: NVIDIA H100 80GB HBM3 (UUID: GPU-{number}abc)\n" for number in range(4))


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("visible", "found"), [(None, 4), ("0,2", 2), ("3", 1), ("", 0), ("-1", 0)])
def test_gpus_are_counted(four_gpus: None, monkeypatch: pytest.MonkeyPatch, visible: str | None, found: int) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local.count_gpus() == found


# (options, what the launcher gets, what it must not get)
TEXTS = [
    ("", ["ddp_bf16.yaml --num_processes 4 --num_machines 1 --main_process_port 0 "], ["ACCELERATE_USE_CPU"]),
    ("--gpus-per-node 1", ["one_gpu.yaml --num_processes 1 recipes/"], ["--main_process_port"]),
    ("--gpus-per-node 0", ["ACCELERATE_USE_CPU=true", "cpu.yaml --num_processes 1 recipes/"], ["--num_machines"]),
    ("--processes 3", ["ACCELERATE_USE_CPU=true", "cpu_ddp.yaml --num_processes 3 "], []),
    ("--gpus-per-node 2 --mixed-precision fp16", ["--num_processes 2 ", "--mixed_precision fp16"], []),
    ("--config accelerate_configs/ddp_fp16.yaml", ["ddp_fp16.yaml --num_processes 4 "], ["ddp_bf16"]),
    (
        "--nodes 2 --machine-rank 1 --main-address first",
        ["several_machines.yaml --num_processes 8 --num_machines 2 --machine_rank 1 --main_process_ip first"],
        [],
    ),
    ("--time 2h --gpus-per-node 1", ["timeout --foreground --signal=TERM --kill-after=90 7200 ", "ddp_bf16.yaml"], []),
]


@pytest.mark.parametrize(("options", "there", "absent"), TEXTS)
def test_the_command(
    four_gpus: None, capsys: pytest.CaptureFixture[str], options: str, there: list[str], absent: list[str]
) -> None:
    assert main(["local", *options.split(), "--dry-run", "--", "recipes/finetune.py"]) == 0
    text = capsys.readouterr().out
    assert [words for words in there if words not in text] == []
    assert [words for words in absent if words in text] == []


def test_more_gpus_than_there_are(four_gpus: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["local", "--gpus-per-node", "5", "--dry-run", "--", "recipes/finetune.py"]) == 2
    assert "--gpus-per-node is 5; this machine has 4" in capsys.readouterr().err


COUNT = 'echo start >> "$NOTES/starts"; '
PREEMPTED = """mkdir -p out; echo '{"status": "preempted", "reason": "the file STOP"}' > out/summary.json"""


@pytest.mark.parametrize(
    ("does", "status", "starts"), [("", "0", 1), ("", "1", 3), (PREEMPTED, "1", 1), ("kill -TERM $PPID", "1", 1)]
)
def test_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, status: str, starts: int) -> None:
    """After failures only: not after the end, a requested stop, or a signal to the shell that supervises."""
    rendered.make_programs(tmp_path)
    monkeypatch.chdir(tmp_path)
    job = Job("recipes/finetune.py", ("--output", "out"), restarts=2, processes=2)
    text, _ = local.render(job)
    called = rendered.run(["bash", "-c", text], tmp_path, "recipes/finetune.py", DO=COUNT + does, EXIT=status)
    assert called.returncode == int(status) or "kill" in does
    assert len((tmp_path / "starts").read_text().split()) == starts
    assert called.recipe == ["recipes/finetune.py", "--resume", "auto", "--output", "out"]
