"""A command of the bench in a Python that has not what it needs says so in a line, before anything is imported."""

from __future__ import annotations

import importlib.util
import sys


def needs(command: str, *modules: str) -> None:
    """Exit status 2, and one line, where a module is not there."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        print(
            f"{command}: {sys.executable} has no {', '.join(missing)}; "
            f"name an interpreter that has them: {command} PYTHON=/path/to/python",
            file=sys.stderr,
        )
        sys.exit(2)
