"""Real launchers and processes that fail: all end in time, and the first true error is what is read last."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.launched import LATEST_END, LAUNCH_SECONDS, ROOT, TORCHRUN, flags, gone, launched, summary
from tests.two_hosts import HOSTS, hosts, lose_b, on_host

__all__ = ["flags", "hosts"]  # fixtures

pytestmark = pytest.mark.slow

FAULTY = str(Path(__file__).with_name("faulty_rank.py"))
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def seconds_since_fault(text: str) -> float:
    found = re.search(r"fault at ([\d.]+)", text)
    assert found, text[-6000:]
    return time.time() - float(found[1])


# (fault of process 1, what the last lines must say, what the summary must say)
FAULTS = {
    "raise": (r"rank +: 1 .*ValueError: injected fault", "process 1 .* failed first, of ValueError: injected fault"),
    "SIGKILL": (r"rank +: 1 .*exitcode +: -9 .*\(SIGKILL\)", r"process 1 \(pid \d+ on .*\) ended without a word"),
    "SIGSTOP": (r"process 1 \(pid \d+ on .*\) gave no sign of life for \d+ s", "gave no sign of life for"),
    "hang": (r"process 1 \(pid \d+ on .*\) is (still )?(at step|in) ", r"process 1 .* in tuning/engine\.py: "),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_the_first_true_error_comes_last(tmp_path: Path, flags: list[str], kind: str) -> None:
    last, noted = FAULTS[kind]
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", FAULTY, "1", "5", kind, *flags, "--output", "run"]
    with launched(command, tmp_path) as launch:
        launch.wait_for("fault at")
        processes = launch.family()
        text = launch.wait()
        assert seconds_since_fault(text) < LATEST_END
        assert gone(processes, 1)
    assert launch.process.returncode == 1
    assert text.count("world size 2") == 2
    root_cause = text[text.rindex("Root Cause (first observed failure)") :]
    assert re.search(last, root_cause, re.DOTALL), text[-6000:]
    assert summary(tmp_path / "run")["status"] == "failed"
    assert re.search(noted, summary(tmp_path / "run")["error"]), summary(tmp_path / "run")


def test_a_restart_by_the_launcher_goes_on(tmp_path: Path, flags: list[str]) -> None:
    """Without --output: the second start finds the folder of the first."""
    launcher = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "--max-restarts", "2"]
    with launched([*launcher, FAULTY, "1", "9", "SIGKILL", *flags], tmp_path) as launch:
        text = launch.wait()
    assert launch.process.returncode == 0, text[-6000:]
    assert text.count("world size 2") == 4
    [run] = (tmp_path / "runs").iterdir()
    assert summary(run)["status"] == "done"
    assert summary(run)["world_size"] == 2
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "train/loss" in record]
    assert steps == list(range(1, steps[-1] + 1))
    assert len(steps) > 9


@pytest.mark.skipif(sys.platform != "linux", reason="a launcher that ends tells its children on Linux only")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_ends_with_its_launcher(tmp_path: Path, flags: list[str], number: signal.Signals) -> None:
    launcher = [*ACCELERATE, "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    endless = ["--epochs", "2000", "--output", "run"]
    recipe = [str(ROOT / "recipes" / "finetune.py"), *flags, *endless]
    with launched(
        [*launcher, "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", *recipe], tmp_path
    ) as run:
        deadline = time.monotonic() + LAUNCH_SECONDS
        while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
            assert time.monotonic() < deadline, run.log.read_text()
            time.sleep(0.2)
        processes = run.family()
        assert len(processes) == 2
        os.kill(run.process.pid, number)
        try:
            assert gone(processes, 40), run.log.read_text()
        finally:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    assert summary(tmp_path / "run")["status"] == "preempted"
    assert "stopped on SIGTERM" in run.log.read_text()


@pytest.mark.parametrize("fault", ["killed", "cut"])
def test_two_hosts(tmp_path: Path, flags: list[str], hosts: None, fault: str) -> None:
    recipe = [FAULTY, "none", "0", "none", *flags, "--epochs", "2000", "--output", "run"]
    both = []
    with contextlib.ExitStack() as stack:
        for rank, host in enumerate(HOSTS):
            (tmp_path / host).mkdir()
            group = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)]
            meeting = ["--master_addr", HOSTS["a"], "--master_port", "29577"]
            network = ["env", f"GLOO_SOCKET_IFNAME=veth-{host}"]
            command = on_host(host, *network, *TORCHRUN, *group, *meeting, *recipe)
            both.append(stack.enter_context(launched(command, tmp_path / host, host)))
        for launch in both:
            launch.wait_for("world size 2")
        time.sleep(5)
        assert "ProcessLost: process 1" in lose_b(both[0], both[1], fault, tmp_path / "a" / "run")
