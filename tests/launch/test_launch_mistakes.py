"""Wrong values: one sentence with the remedy, exit status 2, and nothing is submitted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch import engine, local, slurm
from launch.command_line import main
from launch.job import RESUMABLE, clock, parse_time

ROOT = Path(__file__).parents[2]
ON = {
    "local": "local --processes 1",
    "slurm": "slurm --gpus-per-node 0 --submit",
    "kubernetes": "kubernetes --gpus-per-node 1 --image i",
    "sky": "sky --gpus-per-node 0 --bucket runs",
}


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(text: str) -> str:
        raise AssertionError(text)

    monkeypatch.setattr(local, "run", never)
    monkeypatch.setattr(slurm, "submit", never)
    monkeypatch.chdir(ROOT)


# (target and its options, recipe and flags, what is said)
MISTAKES = [
    (
        "locla",
        "recipes/finetune.py",
        "unknown target 'locla'; choose local, slurm, kubernetes, sky. Perhaps you meant 'local'",
    ),
    ("local --nodez 2", "recipes/finetune.py", "unrecognized arguments: --nodez 2. Perhaps you meant '--nodes'"),
    ("local --nodes two", "recipes/finetune.py", "invalid int value: 'two'"),
    ("local --nodes 0", "recipes/finetune.py", "--nodes is 0; it must be at least 1"),
    ("local --gpus-per-node -1", "recipes/finetune.py", "--gpus-per-node is -1; it must be at least 0"),
    ("local --gpus-per-node 64", "recipes/finetune.py", "--gpus-per-node is 64; this machine has"),
    ("local --processes 0", "recipes/finetune.py", "--processes is 0; it must be at least 1"),
    ("local --processes 2 --restarts -1", "recipes/finetune.py", "--restarts is -1; it must be at least 0"),
    ("local --processes 1", "recipes/finetun.py", "there is no recipe 'recipes/finetun.py'"),
    ("local --processes 1", "--epochs 3", "'--epochs' is no recipe"),
    ("local --processes 1 --time soon", "recipes/finetune.py", "--time is 'soon', which is no time"),
    ("local --processes 1 --time 0m", "recipes/finetune.py", "--time is '0m', which is no time"),
    ("local --processes 1 --time 90", "recipes/finetune.py", "--time is '90', which is no time; write 90m"),
    ("local --processes 1 --env NAME", "recipes/finetune.py", "--env NAME: write NAME=VALUE"),
    ("local --processes 1 --env 1A=2", "recipes/finetune.py", "'1A' can't be the name of a variable"),
    ("local --processes 1 --env PET_NNODES=2", "recipes/finetune.py", "--env PET_NNODES=2 clashes with launch"),
    ("local --processes 1 --name My_Job", "recipes/finetune.py", "--name is 'My_Job'"),
    ("local --processes 1 --config no.yaml", "recipes/finetune.py", "--config 'no.yaml' is no file"),
    ("local --processes 1 --mixed-precision fp8", "recipes/finetune.py", "invalid choice: 'fp8'"),
    (
        "local --processes 1 --nodes 2",
        "recipes/finetune.py",
        "run the same command on each machine with --machine-rank",
    ),
    ("local --processes 1 --machine-rank 0", "recipes/finetune.py", "need several machines"),
    (
        "local --processes 1 --nodes 2 --machine-rank 2 --main-address a",
        "recipes/finetune.py",
        "--machine-rank is 2; with --nodes 2 it must be 0 to 1",
    ),
    ("slurm --submit", "recipes/finetune.py", "--gpus-per-node is missing"),
    ("slurm --gpus-per-node 4 --processes 2", "recipes/finetune.py", "--processes 2 and --gpus-per-node 4 clash"),
    (f"{ON['slurm']} --dry-run", "recipes/finetune.py", "--submit and --dry-run clash"),
    (f"{ON['slurm']} --time 30s", "recipes/finetune.py", "at least 1m"),
    (f"{ON['slurm']} --time 2m", "recipes/finetune.py", "--warning 120 (seconds) clashes with --time 0-00:02:00"),
    (f"{ON['slurm']} --warning 0", "recipes/finetune.py", "--warning is 0"),
    (f"{ON['slurm']} --partition a\nb", "recipes/finetune.py", "it must be one word"),
    (f"{ON['slurm']} --sbatch=exclusive", "recipes/finetune.py", "--sbatch is 'exclusive'"),
    (f"{ON['slurm']} --seeds 3-1", "recipes/finetune.py", "--seeds is '3-1'"),
    (f"{ON['slurm']} --seeds 1,1", "recipes/finetune.py", "comes twice"),
    (f"{ON['slurm']} --seeds 1 --vary seed=2", "recipes/finetune.py", "comes twice"),
    (f"{ON['slurm']} --vary lr", "recipes/finetune.py", "write a flag and its values"),
    (f"{ON['slurm']} --vary lr=1e-3,", "recipes/finetune.py", "write a flag and its values"),
    (f"{ON['slurm']} --vary lr=1,2", "recipes/finetune.py --lr 3", "--lr 3 is fixed in the recipe's flags and varied"),
    (f"{ON['slurm']} --vary output=a,b", "recipes/finetune.py", "a folder of its own"),
    (f"{ON['slurm']} --at-once 2", "recipes/finetune.py", "needs --vary or --seeds"),
    (ON["slurm"], "recipes/finetune.py --resume never", "--resume never clashes with a job that may be interrupted"),
    (ON["slurm"], "recipes/finetune.py --resume=runs/a/checkpoints/b", "clashes with a job that may be interrupted"),
    ("kubernetes --gpus-per-node 1", "recipes/finetune.py", "the following arguments are required: --image"),
    (f"{ON['kubernetes']} --shared-memory lots", "recipes/finetune.py", "write a size such as 16Gi"),
    (f"{ON['kubernetes']} --claim My_Claim", "recipes/finetune.py", "--claim is 'My_Claim'"),
    (f"{ON['kubernetes']} --workdir here", "recipes/finetune.py", "must be an absolute path"),
    (ON["kubernetes"], "recipes/finetune.py --output runs/a", "--output runs/a would vanish with the machine"),
    (ON["kubernetes"], f"{ROOT}/recipes/finetune.py", "isn't below this folder"),
    ("sky --gpus-per-node 0", "recipes/finetune.py", "the following arguments are required: --bucket"),
    ("sky --gpus-per-node 8 --bucket runs", "recipes/finetune.py", "--gpu None and --gpus-per-node 8 clash"),
    (f"{ON['sky']} --gpu H100", "recipes/finetune.py", "--gpu H100 and --gpus-per-node 0 clash"),
    (f"{ON['sky']} --infra AWS!", "recipes/finetune.py", "--infra is 'AWS!'"),
    ("sky --gpus-per-node 0 --bucket R", "recipes/finetune.py", "--bucket is 'R'"),
    (ON["sky"], "recipes/finetune.py --output=runs", "would vanish with the machine"),
]


@pytest.mark.parametrize(("target", "recipe", "said"), MISTAKES)
def test_mistakes(capsys: pytest.CaptureFixture[str], target: str, recipe: str, said: str) -> None:
    assert main([*target.split(" "), "--", *recipe.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert said in shown.err
    assert shown.err.count("\n") == 1


def test_two_dashes_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["local", "--processes", "1", "recipes/finetune.py", "--epochs", "3"]) == 2
    assert "put -- before recipes/finetune.py" in capsys.readouterr().err
    assert main(["local", "--processes", "1"]) == 2
    assert "there is nothing to run" in capsys.readouterr().err
    assert main(["local", "--processes", "1", "--"]) == 2
    assert "there is nothing to run" in capsys.readouterr().err


def test_configs_are_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when the package was installed without the project's other files."""
    monkeypatch.setattr(engine, "CONFIGS", tmp_path / "accelerate_configs")
    assert main(["local", "--processes", "1", "--", "recipes/finetune.py"]) == 2
    assert "run this in a checkout of the project, or give --config" in capsys.readouterr().err


def test_flags_that_no_script_can_carry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["local", "--processes", "1", "--", "recipes/finetune.py", "--data", "caf\udce9"]) == 2
    assert "only UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90m", 5400),
        ("2h30m", 9000),
        ("1d", 86400),
        ("12:00:00", 43200),
        ("1-12:00:00", 129600),
        ("01:30", 5400),
        ("45s", 45),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


def test_clock() -> None:
    assert clock(129600 + 61) == "1-12:01:01"


def test_sbatch_says_no(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n"
    )
    (tmp_path / "sbatch").chmod(0o755)
    assert main([*ON["slurm"].split(), "--", "recipes/find_lr.py"]) == 2
    assert "sbatch refuses the job: sbatch: error: invalid partition specified: gpu" in capsys.readouterr().err


def test_the_recipes_that_resume_are_those_that_save() -> None:
    saving = {
        path.name for path in (ROOT / "recipes").glob("*.py") if "saver.save(" in path.read_text(encoding="utf-8")
    }
    assert saving == set(RESUMABLE)


def test_help_needs_no_package() -> None:
    """The standard library only: a login node may have nothing else."""
    for words in ([], ["local", "--help"], ["slurm", "--help"], ["kubernetes", "--help"], ["sky", "--help"]):
        command = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['launch'] + {words}",
        ]
        command[-1] += "\nimport runpy; runpy.run_module('launch', run_name='__main__', alter_sys=False)"
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "usage: python -m launch" in done.stdout
