"""The command line of a recipe that trains nothing and takes no flags of a run. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from tuning.cli.ending import allow_any_letters, report, say_stopped
from tuning.errors import UserError
from tuning.safety import interrupts

Asked = TypeVar("Asked")


def run_plain(recipe: Callable[[Asked], None], asked: type[Asked], name: str) -> NoReturn:
    """Parse the command line, call the recipe and end the process.

    Exit status as of every recipe: 0 done; 2 the user must change something; 75 stopped on request; 1 a defect.

    Args:
        recipe: does the work; its docstring is the description in ``--help``.
        asked: a dataclass, one field a flag, with docstrings.
        name: shown in ``--help``, such as ``recipes/compare.py``.
    """
    import tyro

    interrupts.listen()
    allow_any_letters()
    try:
        recipe(tyro.cli(asked, args=sys.argv[1:], prog=f"python {name}", description=recipe.__doc__))
    except UserError as error:
        report(error)
        sys.exit(2)
    except KeyboardInterrupt as error:
        say_stopped(error, "Start it again.")
        sys.exit(75)
    sys.exit(0)
