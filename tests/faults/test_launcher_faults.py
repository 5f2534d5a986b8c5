"""Real launchers and processes that fail: all end in time, and the first true error is what is read last."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pictures import write_classes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FAULTY = str(Path(__file__).with_name("faulty_rank.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TIMEOUT_MINUTES = 0.2
# The echo waits 10 s, the launcher gives a process 30 s to end, and two busy cores take their time to end Python.
LATEST_END = 60 * TIMEOUT_MINUTES + 10 + 30 + 30
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
LAUNCH_SECONDS = 300  # a launch takes 15-30 s on free cores


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run of 14 optimizer steps."""
    photos = tmp_path_factory.mktemp("photos")
    write_classes(photos / "train", {"cat": 15, "dog": 12, "emu": 10})
    write_classes(photos / "val", {"cat": 5, "dog": 4, "emu": 2})
    tiny = [
        "--data",
        str(photos),
        "--model",
        "test_vit",
        "--weights",
        "none",
        "--image-size",
        "32",
        "--batch-size",
        "8",
    ]
    quick = ["--freeze-epochs", "0", "--epochs", "3", "--workers", "0", "--tracker", "none", "--save-every", "2"]
    return [*tiny, *quick, "--threads", "1", "--timeout", str(TIMEOUT_MINUTES)]


class Launch:
    """A launcher, its output in a file, and everything it started."""

    def __init__(self, command: list[str], folder: Path, name: str = "launch") -> None:
        self.log = folder / f"{name}.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=log, stderr=log)

    def wait_for(self, words: str) -> str:
        """The output, as soon as *words*, a regular expression, are in it."""
        end = time.monotonic() + LAUNCH_SECONDS
        while time.monotonic() < end:
            if re.search(words, text := self.log.read_text()) or self.process.poll() is not None:
                break
            time.sleep(0.2)
        assert re.search(words, text), text[-6000:]
        return text

    def wait(self) -> str:
        """The whole output, when the launcher has ended."""
        self.process.wait(LAUNCH_SECONDS)
        return self.log.read_text()

    def family(self) -> list[psutil.Process]:
        """The launcher and everything below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        return []


@contextlib.contextmanager
def launched(command: list[str], folder: Path, name: str = "launch") -> Iterator[Launch]:
    """Start *command* and leave nothing of it behind."""
    launch = Launch(command, folder, name)
    seen: list[psutil.Process] = []
    try:
        yield launch
        seen = launch.family()
    finally:
        for process in launch.family() or seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        launch.process.wait()


def gone(processes: list[psutil.Process], seconds: float) -> bool:
    """Whether all have ended within *seconds*; a zombie, which nobody reaps in a container, has."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            return True
        time.sleep(0.2)
    return False


def seconds_since_fault(text: str) -> float:
    found = re.search(r"fault at ([\d.]+)", text)
    assert found, text[-6000:]
    return time.time() - float(found[1])


def summary(folder: Path) -> dict[str, str]:
    content: dict[str, str] = json.loads((folder / "summary.json").read_text())
    return content


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


HOSTS = {"a": "10.99.7.1", "b": "10.99.7.2"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _namespaces_work() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return False
    try:
        ip("netns", "add", "tuning-probe")
        ip("netns", "delete", "tuning-probe")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two network namespaces joined by one cable."""
    if not _namespaces_work():
        pytest.skip("needs root and network namespaces")
    with contextlib.ExitStack() as clean:
        for host in HOSTS:
            ip("netns", "add", f"tuning-{host}")
            clean.callback(ip, "netns", "delete", f"tuning-{host}")
        ip("link", "add", "veth-a", "netns", "tuning-a", "type", "veth", "peer", "veth-b", "netns", "tuning-b")
        for host, address in HOSTS.items():
            ip("-n", f"tuning-{host}", "address", "add", f"{address}/24", "dev", f"veth-{host}")
            for device in ("lo", f"veth-{host}"):
                ip("-n", f"tuning-{host}", "link", "set", device, "up")
        yield


def on_host(host: str, rank: int, recipe: list[str]) -> list[str]:
    """The launcher of one of two hosts, which has a name of its own."""
    inside = ["ip", "netns", "exec", f"tuning-{host}", "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', host]
    group = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(rank)]
    network = ["env", f"GLOO_SOCKET_IFNAME=veth-{host}"]
    return [*inside, *network, *TORCHRUN, *group, "--master_addr", HOSTS["a"], "--master_port", "29577", *recipe]


@pytest.mark.parametrize("fault", ["killed", "cut"])
def test_two_hosts(tmp_path: Path, flags: list[str], hosts: None, fault: str) -> None:
    recipe = [str(ROOT / "recipes" / "finetune.py"), *flags, "--epochs", "2000", "--output", "run"]
    recipe = [FAULTY, "none", "0", "none", *recipe[1:]]
    folders = {host: tmp_path / host for host in HOSTS}
    for folder in folders.values():
        folder.mkdir()
    with contextlib.ExitStack() as stack:
        a, b = (
            stack.enter_context(launched(on_host(host, rank, recipe), folders[host], host))
            for rank, host in enumerate(HOSTS)
        )
        for launch in (a, b):
            launch.wait_for("world size 2")
        time.sleep(5)
        of_b = b.family()
        if fault == "cut":
            ip("-n", "tuning-a", "link", "set", "veth-a", "down")
        else:
            for process in of_b:
                process.kill()
        began = time.monotonic()
        said_by_a = a.wait()
        assert time.monotonic() - began < LATEST_END
        assert re.search(r"ProcessLost: process 1 \(pid \d+ on b\) gave no sign of life for \d+ s", said_by_a), (
            said_by_a
        )
        assert "process 1 (pid" in summary(folders["a"] / "run")["error"]
        if fault == "cut":
            said_by_b = b.wait()
            assert time.monotonic() - began < LATEST_END
            assert f"process 0 on {HOSTS['a']} does not answer" in said_by_b
        assert gone(of_b, 5)
