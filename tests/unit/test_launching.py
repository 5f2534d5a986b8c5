"""A trial as a process: its values as they come, how it ended, and that nothing of it is left after a stop.

The process is a few lines of Python that write what a run writes; `tests/recipes/test_sweep.py` has real ones.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tuning.safety.interrupts import StopRequested
from tuning.searching import launching
from tuning.searching.launching import LOG, Ended, Launched, wait_until_free

NEVER = float("inf")
HELP = """
import json, os, pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
def judged(top1, **other):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "eval/loss": 1.0, "eval/top1": top1, **other}) + "\\n")
def summary(**content):
    (folder / "summary.json").write_text(json.dumps(content))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "LOOK_SECONDS", 0.1)


def launch(folder: Path, script: str, mercy: float = 20) -> Launched:
    return Launched([sys.executable, "-c", HELP + script, str(folder)], folder, os.environ, mercy)


def test_values_come_while_it_runs(tmp_path: Path) -> None:
    script = """
judged(0.5); judged(None); judged(0.25, **{"eval_ema/top1": 0.9, "eval_ema/loss": 1.0})
while not (folder / "go").exists(): time.sleep(0.05)
judged(0.75); summary(status="done", best={"top1": 0.75})
"""
    with launch(tmp_path, script) as launched:
        values = launched.values("eval", "top1", NEVER)
        first = [next(values) for _ in range(3)]
        assert (first[0], math.isnan(first[1]), first[2]) == (0.5, True, 0.25)
        (tmp_path / "go").touch()
        assert list(values) == [0.75]
    ended = launched.ended("top1", pruned=True)  # too late: it was done
    assert ended == Ended("done", 0.75, ended.seconds)
    assert ended.seconds < 60


def test_averaged_weights_are_followed_on_their_own(tmp_path: Path) -> None:
    with launch(tmp_path, 'judged(0.1); judged(0.2, **{"eval_ema/top1": 0.9, "eval_ema/loss": 1.0})') as launched:
        assert list(launched.values("eval_ema", "top1", NEVER)) == [0.9]


@pytest.mark.parametrize(
    ("script", "reason", "mistake"),
    [
        ('print("error: no such data"); sys.exit(2)', "no such data", True),
        ('print("error (process 1): lost"); sys.exit(1)', "ended with exit status 1; see ", False),
        ('summary(status="failed", error="OSError: full"); sys.exit(1)', "OSError: full", False),
        ('summary(status="preempted", reason="the file STOP"); sys.exit(1)', "was stopped by the file STOP", False),
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL", False),
        ("pass", "ended with exit status 0", False),
        ('summary(status="done", best=None)', "no evaluation had a finite top1", False),
        ('(folder / "summary.json").write_text("{")', "ended with exit status 0", False),
    ],
)
def test_what_went_wrong_is_told(tmp_path: Path, script: str, reason: str, mistake: bool) -> None:
    (tmp_path / "summary.json").write_text('{"status": "preempted", "reason": "of an earlier start"}')
    (tmp_path / LOG).write_text("error: of an earlier start\n")
    with launch(tmp_path, script) as launched:
        assert list(launched.values("eval", "top1", NEVER)) == []
    ended = launched.ended("top1")
    assert (ended.status, ended.value, ended.mistake) == ("failed", None, mistake)
    assert reason in str(ended.reason)
    assert "earlier" not in str(ended.reason)


CHILD = "import sys, time, signal; signal.signal(signal.SIGTERM, {}); print('up', flush=True); time.sleep(60)"
FAMILY = """
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, {more}stderr=sys.stderr)
child.stdout.readline(); (folder / "child").write_text(str(child.pid))
judged(0.5); time.sleep(60)
"""


def is_over(pid: int) -> bool:
    """Orphans may stay as zombies where nobody waits for them."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_stop_waits_for_every_process_of_the_trial(tmp_path: Path) -> None:
    """The launcher ends at once; the run, which saves for a second, is waited for."""
    child = (
        "import sys, time, signal\ndef save(*_):\n    time.sleep(1); sys.exit()\nsignal.signal(signal.SIGTERM, save)\n"
    )
    child += "print('up', flush=True); time.sleep(60)"
    with launch(tmp_path, FAMILY.format(child=child, more="")) as launched:
        next(launched.values("eval", "top1", NEVER))
        started = time.monotonic()
        launched.stop()
        assert time.monotonic() - started >= 0.9
    assert is_over(int((tmp_path / "child").read_text()))
    assert launched.ended("top1", pruned=True).status == "pruned"


def test_what_does_not_stop_is_killed(tmp_path: Path) -> None:
    """In a session of its own too, as torchrun starts its processes."""
    deaf = CHILD.format("signal.SIG_IGN")
    script = FAMILY.format(child=deaf, more="start_new_session=True, ")
    with launch(tmp_path, script, mercy=1) as launched:
        next(launched.values("eval", "top1", NEVER))
        launched.stop()
    assert is_over(int((tmp_path / "child").read_text()))


def test_an_interruption_stops_it(tmp_path: Path) -> None:
    with pytest.raises(StopRequested, match="--stop-after"), launch(tmp_path, "judged(1); time.sleep(60)") as launched:
        list(launched.values("eval", "top1", time.time() + 1))
    assert launched._process.returncode is not None
    assert wait_until_free(tmp_path, 0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's word to orphans")
def test_nothing_outlives_a_killed_search(tmp_path: Path) -> None:
    script = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tuning.searching.launching import Launched
words = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
Launched(words, Path(sys.argv[1]), os.environ, 1)
time.sleep(60)
"""
    search = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    end = time.monotonic() + 30
    while not ((tmp_path / LOG).exists() and "up" in (tmp_path / LOG).read_text()):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not wait_until_free(tmp_path, 0)
    search.kill()
    search.wait()
    assert wait_until_free(tmp_path, 10)
