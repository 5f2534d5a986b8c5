"""Run what `launch` renders through a real bash, with an interpreter that only notes how it was called."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Notes its words and variables, each ended by NUL, in the folder $NOTES.
PYTHON = """#!/bin/bash
printf "%s\\0" "$@" > "$NOTES/words"
env -0 > "$NOTES/variables"
eval "${DO:-}"
exit "${EXIT:-0}"
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=1 exec "$@"\n'
SLEEP = "#!/bin/bash\nexit 0\n"
SCONTROL = """#!/bin/bash
case "$*" in
  "show hostnames"*) printf 'first\\nsecond\\n' ;;
  requeue*) echo requeued >> "$NOTES/requeued" ;;
  *) echo "JobId=7 JobState=${STATE:-RUNNING} PreemptTime=None" ;;
esac
"""


@dataclass(frozen=True)
class Called:
    """How the interpreter was called.

    Attributes:
        launcher: words before the recipe.
        recipe: the recipe and its flags.
        variables: its environment.
        returncode, stderr: of the shell.
    """

    launcher: list[str]
    recipe: list[str]
    variables: dict[str, str]
    returncode: int
    stderr: str

    def option(self, name: str) -> str:
        return self.launcher[self.launcher.index(name) + 1]


def make_programs(folder: Path) -> Path:
    """A folder for PATH with an interpreter, `srun`, `scontrol` and a `sleep` that doesn't."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name, text in (("python", PYTHON), ("srun", SRUN), ("scontrol", SCONTROL), ("sleep", SLEEP)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return programs


def run(command: list[str], folder: Path, recipe: str, **variables: str) -> Called:
    """Run *command* in *folder*, where `make_programs` was called, and read the notes."""
    path = f"{folder / 'programs'}:{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(folder), "NOTES": str(folder), **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=60)
    assert (folder / "words").exists(), done.stderr
    words = (folder / "words").read_bytes().decode().split("\0")[:-1]
    pairs = (folder / "variables").read_bytes().decode().split("\0")[:-1]
    for note in ("words", "variables"):
        (folder / note).unlink()
    at = words.index(recipe)
    found = {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
    return Called(words[:at], words[at:], found, done.returncode, done.stderr.decode())
