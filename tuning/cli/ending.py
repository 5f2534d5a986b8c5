"""What a command says, and how it ends: which process speaks, and what is said of its error. Imports no torch."""

from __future__ import annotations

import errno
import io
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from tuning.cli import launcher
from tuning.errors import UserError
from tuning.safety.echoes import RESUME, first_error

Run = Callable[[], None]


def explained(run: Run, output: str | None) -> Run:
    """Say which process is at fault when another one is, and what to do when the machine refuses to write.

    Args:
        output: folder of the run, as typed.
    """

    def told() -> None:
        """`run`, with these words."""
        try:
            with first_error():
                run()
        except OSError as error:
            remedy = _remedy(error, output)
            if remedy is None:
                raise
            raise UserError(f"{error.filename or 'a file'}: {error.strerror}. {remedy}") from error

    return told


def _remedy(error: OSError, output: str | None) -> str | None:
    """What the user can do about *error*; None when it is a defect."""
    name, inside = errno.errorcode.get(error.errno or 0, ""), _is_inside(str(error.filename or ""), output or "runs")
    if name in ("ENOSPC", "EDQUOT"):
        return f"Free some space; then {RESUME}"
    if name in ("EROFS", "EACCES", "EPERM"):
        choice = "Make it writable for this user, or choose another --output" if inside else "Give this user the right"
        return f"{choice}; {RESUME}"
    if name == "ENOENT" and inside:
        return "It was there before: the folder of the run was moved or deleted while the run wrote to it."
    return None


def _is_inside(path: str, folder: str) -> bool:
    return bool(path) and Path(path).resolve().is_relative_to(Path(folder).resolve())


def recorded(run: Run) -> Run:
    """Under a launcher, hand the true error of this rank to it: its closing lines show that one."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return run
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(run)  # type: ignore[return-value]


def report(error: UserError) -> None:
    """Print once: rank 0 at once; the others wait, because a launcher ends them when rank 0 has ended."""
    if rank() and launcher.ends_us_within(5):
        return
    where = f" (process {rank()})" if rank() else ""
    say(f"error{where}: {error}")


def say_stopped(error: KeyboardInterrupt, remedy: str) -> None:
    """All processes stop together, so rank 0 speaks for them.

    Args:
        remedy: what to do then; FOLDER in it is that of the run, which a note of *error* names.
    """
    reason, notes = str(error) or "Ctrl-C", getattr(error, "__notes__", ())
    if rank() == 0:
        say(f"stopped on {reason}; {remedy.replace('FOLDER', shlex.quote(notes[0])) if notes else remedy}")


def rank() -> int:
    """Of this process; 0 where there is one."""
    return int(os.environ.get("RANK", "0"))


def allow_any_letters() -> None:
    """Have letters that the output can't encode written as escapes, instead of ending the run over a class name.

    A log file on Windows has the code page of its country; on Linux ``LC_ALL=C`` with UTF-8 mode off is as narrow.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_yaml(text: str) -> None:
    """On stdout in UTF-8, as YAML is read, whatever else this machine writes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    print(text, end="")


def say(text: str) -> None:
    """A line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)
