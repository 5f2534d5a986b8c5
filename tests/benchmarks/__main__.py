"""The speed benchmarks, each in a process of its own: one Markdown table each, ratios within one run, and their bars.

    python -m tests.benchmarks                          # all, one after the other; the machine should do nothing else
    python -m tests.benchmarks steps evaluation         # some
    python -m tests.benchmarks --quick --out speed.md   # a few rounds only; the tables are appended to a file, too
    python -m tests.benchmarks --list                   # what there is

Nothing is asserted: what a machine is too busy for shows in the range of the ratios.
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Those that are not there are passed over; other modules beside this one are studies, with commands of their own.
NAMES = ("steps", "peers", "loader", "cache", "frozen", "startup", "two_processes", "evaluation")


def present() -> dict[str, str]:
    """Name and first line of every benchmark."""
    files = {name: HERE / f"{name}.py" for name in NAMES if (HERE / f"{name}.py").exists()}
    texts = {name: ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "" for name, file in files.items()}
    return {name: text.partition("\n")[0] for name, text in texts.items()}


def run(name: str, quick: bool, out: Path | None) -> bool:
    """Run one and show what it prints as it comes; whether it ended well."""
    asked = ["--quick"] if quick and '"--quick"' in (HERE / f"{name}.py").read_text("utf-8") else []
    env = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *asked]
    printed = [f"\n## {name}\n\n`{' '.join(['python', *command[1:]])}`\n\n"]
    print(printed[0], end="", flush=True)
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            printed.append(line)
    if process.returncode:
        printed.append(f"\nIt failed with exit status {process.returncode}.\n")
        print(printed[-1], flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.writelines(printed)
    return process.returncode == 0


def main() -> None:
    """Run what was asked for; exit status 1 if one failed."""
    known = present()
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(known)}; without: all")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see it work, not to quote")
    parser.add_argument("--out", type=Path, help="file that the tables are appended to")
    parser.add_argument("--list", action="store_true", help="say what there is")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(known)}")
    if given.list:
        print("\n".join(f"{name:15}{text}" for name, text in known.items()))
        return
    well = [run(name, given.quick, given.out) for name in given.names or known]
    sys.exit(not all(well))


if __name__ == "__main__":
    main()
