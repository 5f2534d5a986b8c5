"""A real Slurm, two nodes on one machine: what a queue does to a run, and that the run comes through."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import slurm_cluster
from faults.comparison import differences, newest_complete
from pictures import write_classes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
RUN_SECONDS = 600  # a run of two launchers takes 30 s on two free cores, and minutes on busy ones
FLAGS = "--model test_vit --weights none --image-size 32 --batch-size 8 --freeze-epochs 0 --workers 0 --tracker none"
QUICK = [*FLAGS.split(), "--save-every", "2", "--threads", "1", "--timeout", "0.5"]
EPOCHS = 40  # of five optimizer steps: long enough to be interrupted


@pytest.fixture(scope="module")
def slurm() -> Iterator[slurm_cluster.Cluster]:
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.cluster() as running:
        running.environment = {**running.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where jobs are submitted; a name with a space."""
    folder = tmp_path_factory.mktemp("a queue")
    write_classes(folder / "my photos" / "train", {"cat": 15, "dog": 12, "emu": 10})
    write_classes(folder / "my photos" / "val", {"cat": 5, "dog": 4, "emu": 2})
    return folder


def submit(slurm: slurm_cluster.Cluster, folder: Path, options: str, *flags: str) -> str:
    """The number of a job on two nodes of one process each, unless *options* say otherwise."""
    launch = [sys.executable, "-m", "launch", "slurm", "--submit", "--gpus-per-node", "0", "--cpus-per-node", "2"]
    recipe = [str(ROOT / "recipes" / "finetune.py"), "--data", "my photos", *QUICK]
    return slurm.run(*launch, *options.split(), "--", *recipe, *flags, cwd=folder).strip()


def until(slurm: slurm_cluster.Cluster, job: str, states: tuple[str, ...] = ENDED) -> dict[str, str]:
    """The job in one of *states*. A requeued one would wait two minutes; it starts at once here."""
    end = time.monotonic() + RUN_SECONDS
    while (seen := slurm.show(job))["JobState"] not in states:
        if seen["Reason"] == "BeginTime":
            slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now", cwd=slurm.folder, check=False)
        assert time.monotonic() < end, seen
        time.sleep(0.5)
    return seen


def wait_for_checkpoint(run: Path, after: int = 0) -> int:
    end = time.monotonic() + RUN_SECONDS
    while (step := newest_complete(run) or 0) <= after:
        assert time.monotonic() < end, sorted(run.rglob("*"))
        time.sleep(0.2)
    return step


def summary(run: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((run / "summary.json").read_text())
    return content


def ranks(run: str) -> list[psutil.Process]:
    """The training processes of a run, on all nodes."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if (
            process.info["status"] != psutil.STATUS_ZOMBIE
            and run in words
            and len(words) > 2
            and words[2].endswith("finetune.py")
        ):
            found.append(process)
    return found


@pytest.fixture(scope="module")
def uninterrupted(slurm: slurm_cluster.Cluster, folder: Path) -> Path:
    """A run on two nodes that nothing happens to."""
    job = submit(slurm, folder, "--nodes 2 --time 10m", "--epochs", str(EPOCHS), "--output", "uninterrupted")
    seen = until(slurm, job)
    log = (folder / f"finetune-{job}.log").read_text()
    assert seen["JobState"] == "COMPLETED", log
    assert seen["NodeList"] == "n[1-2]"
    assert summary(folder / "uninterrupted")["world_size"] == 2
    logs = sorted(path.parent.name for path in (folder / "logs" / f"finetune-{job}").rglob("stdout.log"))
    assert len(logs) == 2, "a log for every process"
    return folder / "uninterrupted"


def test_preempted_requeued_and_bit_identical(slurm: slurm_cluster.Cluster, folder: Path, uninterrupted: Path) -> None:
    job = submit(slurm, folder, "--nodes 2 --name pre", "--epochs", str(EPOCHS))
    run = folder / "runs" / f"pre-{job}"
    wait_for_checkpoint(run)
    slurm.run("sbatch", "-p", "high", "-N2", "-n2", "-c2", "-o", "/dev/null", "--wrap", "sleep 2", cwd=folder)
    assert until(slurm, job, ("PENDING", *ENDED))["Restarts"] == "1"
    stopped = newest_complete(run)
    assert summary(run) == {"status": "preempted", "reason": f"SIGTERM, after step {stopped}"}
    assert until(slurm, job)["JobState"] == "COMPLETED"
    assert differences(run, uninterrupted) == []


def test_a_killed_process_is_restarted_and_bit_identical(
    slurm: slurm_cluster.Cluster, folder: Path, uninterrupted: Path
) -> None:
    job = submit(slurm, folder, "--nodes 2 --name killed --restarts 1", "--epochs", str(EPOCHS), "--output", "killed")
    wait_for_checkpoint(folder / "killed")
    both = ranks("killed")
    assert len(both) == 2
    both[1].kill()
    seen = until(slurm, job)
    log = (folder / f"killed-{job}.log").read_text()
    assert seen["JobState"] == "COMPLETED", log
    assert seen["Restarts"] == "0"
    assert "restart 1 of 1" in log
    assert differences(folder / "killed", uninterrupted) == []


def test_the_time_limit_and_scancel(slurm: slurm_cluster.Cluster, folder: Path) -> None:
    """Warned before the limit it goes back and goes on; cancelled, it saves and stays away."""
    job = submit(
        slurm, folder, "--nodes 2 --name limit --time 3m --warning 30", "--epochs", "5000", "--output", "limit"
    )
    until(slurm, job, ("RUNNING",))
    assert until(slurm, job, ("PENDING", *ENDED))["Restarts"] == "1"
    stopped = newest_complete(folder / "limit")
    assert stopped
    assert summary(folder / "limit") == {"status": "preempted", "reason": f"SIGTERM, after step {stopped}"}
    wait_after = until(slurm, job, ("RUNNING",))
    assert wait_after["Restarts"] == "1"
    wait_for_checkpoint(folder / "limit", after=stopped)
    slurm.run("scancel", job, cwd=folder)
    assert until(slurm, job)["JobState"] == "CANCELLED"
    assert str(summary(folder / "limit")["reason"]).startswith("SIGTERM, after step ")
    time.sleep(10)
    assert slurm.show(job)["JobState"] == "CANCELLED"
    assert ranks("limit") == []


def test_too_short_a_limit_ends(slurm: slurm_cluster.Cluster, folder: Path) -> None:
    """Nothing saved within the limit: another round would end the same way, so there is none."""
    job = submit(
        slurm, folder, "--nodes 1 --name short --time 1m --warning 59", "--epochs", "5000", "--output", "short"
    )
    seen = until(slurm, job)
    assert (seen["JobState"], seen["Restarts"]) == ("FAILED", "0")
    assert "give it more --time" in (folder / f"short-{job}.log").read_text()


def test_what_the_user_must_change_is_not_requeued(slurm: slurm_cluster.Cluster, folder: Path) -> None:
    job = submit(slurm, folder, "--nodes 1 --name wrong", "--epochs", "-3")
    seen = until(slurm, job)
    assert (seen["JobState"], seen["Restarts"]) == ("FAILED", "0")
    assert "--epochs is -3" in (folder / f"wrong-{job}.log").read_text()


def test_an_array_of_seeds(slurm: slurm_cluster.Cluster, folder: Path) -> None:
    job = submit(slurm, folder, "--nodes 1 --cpus-per-node 1 --name seeds --seeds 0-1", "--epochs", "1")
    end = time.monotonic() + RUN_SECONDS
    while slurm.run("squeue", "--noheader", "--job", job, cwd=folder, check=False).strip():
        assert time.monotonic() < end
        time.sleep(0.5)
    runs = folder / "runs" / f"seeds-{job}"
    assert sorted(path.name for path in runs.iterdir()) == ["seed=0", "seed=1"]
    for seed in (0, 1):
        assert summary(runs / f"seed={seed}")["status"] == "done"
        assert f"seed: {seed}\n" in (runs / f"seed={seed}" / "config.yaml").read_text()
