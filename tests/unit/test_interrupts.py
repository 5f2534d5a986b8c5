"""Signals, in a process of their own: at once while nothing can be lost, remembered after that."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START = "import os, signal, time\nfrom tuning.safety import interrupts\ninterrupts.listen()\n"


def outcome(script: str, rank: str = "0") -> tuple[int, str, str]:
    """Exit status, stdout and stderr of *script* after `interrupts.listen()`."""
    environment = {"RANK": rank, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", START + script], env=environment, capture_output=True, text=True, timeout=30
    )
    return done.returncode, done.stdout.strip(), done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_before_training_a_signal_ends_the_run_at_once(name: str) -> None:
    code, said, _ = outcome(f"""
try:
    os.kill(os.getpid(), signal.{name})
    time.sleep(5)
except interrupts.StopRequested as stop:
    print("stopped by", stop, isinstance(stop, KeyboardInterrupt))
""")
    assert (code, said) == (0, f"stopped by {name} True")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_in_training_a_signal_is_a_wish(name: str) -> None:
    code, said, told = outcome(f"""
interrupts.hold()
print(interrupts.wish())
for _ in range(2):
    os.kill(os.getpid(), signal.{name})
print(interrupts.wish())
""")
    assert (code, said) == (0, f"None\n{name}")
    assert told.count(f"{name}: stopping after this optimizer step and saving") == 1
    assert ("Ctrl-C again" in told) == (name == "SIGINT")


def test_a_second_ctrl_c_ends_at_once_but_the_echo_of_the_first_does_not() -> None:
    code, said, _ = outcome("""
interrupts.hold()
interrupts.SAME_CTRL_C_SECONDS = 0.2
for _ in range(2):
    os.kill(os.getpid(), signal.SIGINT)
print("alive", flush=True)
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGTERM)
print("still alive", flush=True)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(5)
""")
    assert (code, said) == (-signal.SIGINT, "alive\nstill alive")


def test_only_rank_0_speaks() -> None:
    script = "interrupts.hold()\nos.kill(os.getpid(), signal.SIGTERM)\n"
    assert outcome(script, rank="1")[2] == ""


BLOCK = """
import ctypes
interrupts.BLOCKED_SECONDS = 0.5
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
if os.fork() == 0:
    time.sleep(0.5)
    os.kill(os.getppid(), signal.SIGTERM)
    os._exit(0)
"""


def test_a_process_that_is_blocked_before_training_ends_as_well() -> None:
    """In C, where no Python code can run: as when another process of the run is gone before they have met."""
    assert outcome(BLOCK + "lock(mutex)\n")[0] == 75


def test_a_process_that_is_blocked_in_training_is_left_alone() -> None:
    code, said, _ = outcome(BLOCK + "interrupts.hold()\ntime.sleep(2)\nprint(interrupts.wish())\n")
    assert (code, said) == (0, "SIGTERM")


def test_a_signal_that_was_noted_ends_nothing_later() -> None:
    """A program that catches the stop and goes on, as the tests of this project do, is not ended seconds later."""
    script = """
interrupts.BLOCKED_SECONDS = 0.3
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
except interrupts.StopRequested:
    interrupts.listen()
time.sleep(1)
print("alive")
"""
    assert outcome(script)[:2] == (0, "alive")


def test_a_signal_to_a_forked_child_does_not_end_the_parent() -> None:
    script = """
interrupts.BLOCKED_SECONDS = 0.3
child = os.fork()
if child == 0:
    interrupts.hold()
    time.sleep(5)
    os._exit(0)
time.sleep(0.3)
os.kill(child, signal.SIGTERM)
time.sleep(1)
print("alive")
"""
    assert outcome(script)[:2] == (0, "alive")
