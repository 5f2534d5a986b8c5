"""What the sbatch script does when the recipe ends, with a Slurm that only notes what it is asked."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import rendered

from launch import slurm
from launch.job import Job

VARIABLES = {"SLURM_JOB_ID": "15007", "SLURM_JOB_NAME": "job", "SLURM_JOB_NODELIST": "n[1-2]"}
WRITE = "mkdir -p out; echo '{summary}' > out/summary.json"
BY_SIGNAL = WRITE.format(summary='{"status": "preempted", "reason": "SIGTERM, after step 5"}')
BY_FILE = WRITE.format(summary='{"status": "preempted", "reason": "the file STOP, after step 5"}')
FAILED = WRITE.format(summary='{"status": "failed", "error": "ValueError: no"}')

ALONE = slurm.Queue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rendered.make_programs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(**changes: object) -> Job:
    fixed = {"recipe": "recipes/finetune.py", "flags": ("--output", "out"), "name": "job", "nodes": 2}
    return Job(**(fixed | changes))  # type: ignore[arg-type]


def run(folder: Path, job: Job, queue: slurm.Queue = ALONE, **variables: str) -> rendered.Called:
    (folder / "script").write_text(slurm.render(job, queue)[0])
    return rendered.run(["bash", "script"], folder, "recipes/finetune.py", **VARIABLES, **variables)


# (what the recipe does, its exit status, state of the job, exit status of the job, back into the queue)
ENDS = {
    "done": ("", "0", "RUNNING", 0, False),
    "preempted": (BY_SIGNAL, "1", "RUNNING", 75, True),
    "stopped on request": (BY_FILE, "1", "RUNNING", 75, False),
    "failed": (FAILED, "1", "RUNNING", 1, False),
    "cancelled": (BY_SIGNAL, "1", "COMPLETING", 1, False),
    "taken back": (BY_SIGNAL, "1", "PENDING", 1, False),
}


@pytest.mark.parametrize("end", ENDS)
def test_ends(folder: Path, end: str) -> None:
    does, status, state, returncode, requeued = ENDS[end]
    called = run(folder, job(), DO=does, EXIT=status, STATE=state)
    assert called.returncode == returncode, called.stderr
    assert (folder / "requeued").exists() == requeued


def test_no_requeue(folder: Path) -> None:
    called = run(folder, job(), slurm.Queue(requeue=False), DO=BY_SIGNAL, EXIT="1")
    assert called.returncode == 75
    assert not (folder / "requeued").exists()


def test_an_earlier_part_of_the_run_says_nothing(folder: Path) -> None:
    """The recipe dies before it writes anything; what lies there is from before it came back."""
    subprocess.run(["bash", "-c", BY_SIGNAL], check=True, cwd=folder)
    called = run(folder, job(), EXIT="1")
    assert called.returncode == 1
    assert not (folder / "requeued").exists()


def test_restarts_are_counted_and_take_another_port(folder: Path) -> None:
    count = 'echo "$LAUNCH_PORT" >> "$NOTES/ports"; ' + FAILED
    called = run(folder, job(restarts=2), DO=count, EXIT="1")
    assert called.returncode == 1
    assert (folder / "ports").read_text().split() == ["15007", "15008", "15009"]
    assert "failed (exit status 1) after 2 restarts" in called.stderr
    assert called.option("--log_dir") == "logs/job-15007/0.2/1"


def test_machines_meet_at_the_first(folder: Path) -> None:
    called = run(folder, job())
    assert called.option("--main_process_ip") == "first"
    assert called.option("--main_process_port") == called.variables["LAUNCH_PORT"] == "15007"
    assert (called.option("--machine_rank"), called.option("--num_machines")) == ("1", "2")
    assert called.variables["PET_RDZV_ID"] == "15007"
    assert called.recipe == ["recipes/finetune.py", "--resume", "auto", "--output", "out"]


def test_one_machine_and_one_process_are_supervised_too(folder: Path) -> None:
    """`accelerate launch` of one process dies of a signal before the recipe has saved; torch's supervisor waits."""
    called = run(folder, job(nodes=1))
    assert called.option("--config_file").endswith("cpu_ddp.yaml")
    assert called.option("--main_process_port") == "0"


def test_an_array(folder: Path) -> None:
    queue = slurm.Queue(tasks=((("lr", "1e-3"), ("seed", "0")), (("lr", "a/b"), ("seed", "1"))), at_once=1)
    text, said = slurm.render(job(flags=()), queue)
    assert "#SBATCH --array=0-1%1\n" in text
    assert len(said) == 3
    called = run(folder, job(flags=()), queue, SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_JOB_ID="15000")
    wanted = ["--resume", "auto", "--lr=a/b", "--seed=1", "--output", "runs/job-15000/lr=a%2fb,seed=1"]
    assert called.recipe[1:] == wanted


def test_options_of_sbatch(folder: Path) -> None:
    made = job(nodes=3, gpus=4, processes=4, seconds=90061, memory=64)
    queue = slurm.Queue(
        partition="gpu", account="team", warning=300, setup=("module load cuda",), more=("--exclusive",)
    )
    lines = slurm.render(made, queue)[0].splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert options >= {"--nodes=3", "--ntasks-per-node=1", "--gres=gpu:4", "--cpus-per-task=32", "--mem=64G"}
    assert options >= {"--time=1-01:01:01", "--signal=B:USR1@300", "--requeue", "--partition=gpu", "--account=team"}
    assert "--exclusive" in options
    assert "module load cuda" in lines
