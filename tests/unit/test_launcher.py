"""What a run knows of its launcher, and what its processes know of one another."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.utils import InitProcessGroupKwargs
from ranks import run_ranks

from tuning import session
from tuning.cli import launcher
from tuning.safety import echoes, heartbeat
from tuning.safety.echoes import ProcessLost, first_error, is_echo
from tuning.safety.heartbeat import Sign
from tuning.schedules import with_warmup

ROOT = Path(__file__).parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="prctl is a call of Linux")


@pytest.fixture
def restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")


def test_without_a_restart_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    launcher.leave_token(tmp_path / "a")
    assert not list((tmp_path / "a").iterdir())
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert launcher.first_start(None, "never", tmp_path) == (None, "never")
    assert launcher.first_start("b", "auto", tmp_path) == ("b", "auto")
    assert launcher.first_start("b", "never", tmp_path) == ("b", "never")


def test_after_a_failure_on_another_host_the_token_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher of this host counts no restart of its own then."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    (tmp_path / "a").mkdir()
    launcher.leave_token(tmp_path / "a")
    assert launcher.first_start(None, "never", tmp_path) == (str(tmp_path / "a"), "auto")
    assert launcher.first_start(str(tmp_path / "a"), "never", tmp_path) == (str(tmp_path / "a"), "auto")


def test_a_restart_goes_on_in_the_folder_of_the_first_start(tmp_path: Path, restarted: None) -> None:
    assert launcher.restarted()
    assert launcher.first_start(None, "never", tmp_path) == (None, "never")  # it died before it had a folder
    for name, text in {"1": "other host 7 1.0", "2": launcher.token(), "3": launcher.token() + "5"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / launcher.TOKEN).write_text(text + "\n")
    assert launcher.first_start(None, "never", tmp_path) == (str(tmp_path / "2"), "auto")
    assert launcher.first_start("mine", "never", tmp_path) == ("mine", "auto")
    (tmp_path / "4").mkdir()
    launcher.leave_token(tmp_path / "4")
    assert launcher.first_folder(tmp_path) == tmp_path / "4"


def test_a_restart_of_a_run_that_began_with_a_checkpoint(tmp_path: Path, restarted: None) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert launcher.first_start(None, str(checkpoint), tmp_path) == (str(tmp_path / "run"), "auto")
    assert launcher.first_start("mine", str(checkpoint), tmp_path) == ("mine", "auto")


def test_the_token_names_this_parent_alone() -> None:
    assert launcher.token() == launcher.token()
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tuning.cli.launcher import token; print(token())"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert other.split()[-2:] == [str(os.getpid()), str(psutil.Process().create_time())]
    assert other != launcher.token()


# A launcher in name: it starts a child, says its pid and waits.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
child.wait()
"""
CHILD = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from tuning.cli.launcher import end_with_launcher
end_with_launcher()
print("ready", flush=True)
time.sleep(60)
"""


@LINUX
@pytest.mark.parametrize(("name", "ends"), [("torchrun", True), ("accelerate", True), ("nohup.py", False)])
def test_a_run_ends_with_its_launcher_alone(tmp_path: Path, name: str, ends: bool) -> None:
    (tmp_path / name).write_text(PARENT)
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no", "TORCHELASTIC_RUN_ID": "exported"}
    command = [sys.executable, str(tmp_path / name), CHILD]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    child = psutil.Process(int((lines - {"ready"}).pop()))
    parent.kill()
    parent.wait()
    try:
        gone, _ = psutil.wait_procs([child], timeout=10 if ends else 0.5)
        zombie = child.is_running() and child.status() == psutil.STATUS_ZOMBIE  # nobody may be there to reap it
        assert (bool(gone) or zombie) == ends
    finally:
        if child.is_running():
            child.kill()
        parent.stdout.close()


@pytest.mark.parametrize(
    ("error", "echo"),
    [
        (torch.distributed.DistBackendError("NCCL error: unhandled system error"), True),
        (torch.distributed.DistNetworkError("The client socket has failed to connect"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 60000ms for recv"), True),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc] Broken pipe"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), False),
        (RuntimeError("DataLoader timed out after 5 seconds"), False),
        (RuntimeError("the state can't be restored"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("Connection closed by peer"), False),
        (ConnectionResetError(104, "Connection reset by peer"), False),  # of a tracker, for example
    ],
)
def test_what_is_an_echo(error: Exception, echo: bool) -> None:
    assert is_echo(error) == echo


def test_one_process_is_left_alone() -> None:
    error = RuntimeError("gloo: Connection closed by peer")
    began = time.monotonic()
    with pytest.raises(RuntimeError) as caught, first_error():
        raise error
    assert caught.value is error
    assert time.monotonic() - began < 1


def _failing(kind: str) -> str:
    """Rank 1 fails or hangs in the second exchange; what the others say of it."""
    heartbeat.BEAT_SECONDS, echoes.ECHO_SECONDS = 0.1, 0.6
    heartbeat.start_heartbeat(timeout=1, start="0")
    rank = torch.distributed.get_rank()
    group = torch.distributed.new_group(timeout=torch.distributed.distributed_c10d.timedelta(seconds=1))
    heartbeat.beat(1)
    torch.distributed.all_reduce(torch.ones(1), group=group)
    try:
        with first_error(), first_error():
            if rank == 1:
                _fault(kind)
            heartbeat.beat(2)
            torch.distributed.all_reduce(torch.ones(1), group=group)
    except (ProcessLost, ValueError) as error:
        if rank == 1:
            time.sleep(1.5)  # processes end slowly
        return f"{type(error).__name__}: {error}"
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        heartbeat.stop_heartbeat()
    return "no error"


def _fault(kind: str) -> None:
    if kind == "raises":
        raise ValueError("injected fault")
    if kind == "silent":
        heartbeat.stop_heartbeat()
    if kind == "ahead":
        heartbeat.beat(2)
        with_warmup(_slow, 1)(1)
    else:
        _slow(0)


def _slow(step: int) -> float:
    time.sleep(2.5)
    return 1.0


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raises", "failed first, of ValueError: injected fault."),
        ("silent", " gave no sign of life for "),
        ("behind", " is still at step 1, in code of others, while others have made step 2."),
        ("ahead", " is in tuning/schedules.py: <lambda>, line "),
    ],
)
def test_the_process_at_fault_is_named(kind: str, words: str) -> None:
    said, own = run_ranks(2, _failing, kind)
    assert said.startswith("ProcessLost: process 1 (pid "), said
    assert words in said
    assert "--resume auto" in said
    if kind == "raises":
        assert own == "ValueError: injected fault"


def _watched() -> str:
    """What rank 0 says while it waits for rank 1, with NCCL, which would end it without an error."""
    heartbeat.BEAT_SECONDS = 0.1
    heartbeat.start_heartbeat(timeout=1, start="0")
    beating, sys.stderr = heartbeat._heartbeat, io.StringIO()
    assert beating is not None
    beating._warn_after = 0.5
    if torch.distributed.get_rank() == 1:
        heartbeat.stop_heartbeat()
    time.sleep(2.5)
    torch.distributed.barrier()
    heartbeat.stop_heartbeat()
    return sys.stderr.getvalue()


def test_with_nccl_the_suspect_is_named_before_the_end() -> None:
    said, silent = run_ranks(2, _watched)
    assert said.startswith("process 0 waits: process 1 (pid ")
    assert said.count("gave no sign of life for") == 1
    assert silent == ""


def test_a_store_out_of_reach_is_named() -> None:
    beating: Any = object.__new__(heartbeat.Heartbeat)
    beating.world_size, beating.rank, beating._server, beating._prefix = 2, 1, "10.0.0.1", "tuning/0"
    beating._store, beating._reachable = _Endless(), True
    heartbeat_seconds, heartbeat.STORE_SECONDS = heartbeat.STORE_SECONDS, 0.2
    try:
        assert "process 0 on 10.0.0.1 does not answer" in beating.suspect(None)
        assert "process 0 on 10.0.0.1 does not answer" in beating.suspect([])
    finally:
        heartbeat.STORE_SECONDS = heartbeat_seconds


class _Endless:
    """A store behind a cut link."""

    def check(self, keys: list[str]) -> bool:
        time.sleep(2)
        return False


def test_a_process_that_ended_is_named() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    beating: Any = object.__new__(heartbeat.Heartbeat)
    here = [Sign(rank, pid, socket.gethostname(), 1, 1.0, 7, "") for rank, pid in enumerate((os.getpid(), child.pid))]
    elsewhere = Sign(2, child.pid, "another host", 1, 1.0, 7, "")
    child.wait()
    said = beating.ended([*here, elsewhere])
    assert said.startswith(f"process 1 (pid {child.pid} on {socket.gethostname()}) ended without a word, after step 7:")
    assert "process 2" not in said
    assert beating.ended(here[:1]) is None
    assert beating.ended(None) is None


def test_signs_survive_the_way_through_the_store() -> None:
    sign = Sign(3, 4711, "b", 7, 1.5, 12, heartbeat._place(threading.main_thread().ident or 0))
    assert Sign(**json.loads(json.dumps(vars(sign)))) == sign
    assert str(sign) == "process 3 (pid 4711 on b)"


def test_the_place_is_the_innermost_line_of_our_own() -> None:
    inside, leave = threading.Event(), threading.Event()

    def factor(step: int) -> float:
        inside.set()
        leave.wait(10)
        return 1.0

    def work() -> None:
        with_warmup(factor, 1)(1)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(10)
    place = heartbeat._place(thread.ident or 0)
    leave.set()
    thread.join()
    assert place.startswith("tuning/schedules.py: "), place


def test_a_signal_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher ends an echo by SIGTERM: the wait ends at once, as a failure and not as a stop on request."""
    from tuning.safety import interrupts

    monkeypatch.setenv("WORLD_SIZE", "2")
    old = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    interrupts.listen()
    began = time.monotonic()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        with pytest.raises(RuntimeError, match="Connection closed"), first_error():
            raise RuntimeError("gloo: Connection closed by peer")
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), old, strict=True):
            signal.signal(number, handler)
        interrupts._state.wish = None
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("minutes", [0.2, 10.0, 30.0])
def test_the_time_out_reaches_the_process_group(minutes: float) -> None:
    """The accelerator drops what equals its own default, and torch would wait half an hour instead of ten minutes."""
    handler = InitProcessGroupKwargs(backend=None, timeout=session._waiting_time(minutes))
    passed_on = handler.to_kwargs()["timeout"]
    assert passed_on.total_seconds() == pytest.approx(60 * minutes)
