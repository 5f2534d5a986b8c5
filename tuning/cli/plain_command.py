"""The command line of a recipe that trains nothing and takes no flags of a run. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

from tuning.cli.ending import allow_any_letters
from tuning.errors import UserError

Asked = TypeVar("Asked")


def run_plain(recipe: Callable[[Asked], None], asked: type[Asked], name: str) -> NoReturn:
    """Parse the command line, call the recipe and end the process: status 0, or 2 where the user must change something.

    Args:
        recipe: does the work; its docstring is the description in ``--help``.
        asked: a dataclass, one field a flag, with docstrings.
        name: shown in ``--help``, such as ``recipes/compare.py``.
    """
    import tyro

    allow_any_letters()
    try:
        recipe(tyro.cli(asked, args=sys.argv[1:], prog=name, description=recipe.__doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
