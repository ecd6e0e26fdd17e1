"""From an exception to one line on stderr and an exit code."""

from __future__ import annotations

import functools
import os
import traceback
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from fedtune.errors import FedtuneError

P = ParamSpec("P")
R = TypeVar("R")
DEBUG = "FEDTUNE_DEBUG"


def command(
    on: typer.Typer, name: str | None = None, *, panel: str | None = None, epilog: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a command whose errors become one line on stderr and an exit code."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            if os.environ.get(DEBUG) != "1":
                warnings.simplefilter("ignore")  # other libraries' advice to their own users
            try:
                return function(*args, **kwargs)
            except KeyboardInterrupt:
                code, line = 130, "stopped; continue with --resume"
                if "resume" not in kwargs:
                    line = "stopped"
            except FedtuneError as error:
                code, line = error.exit_code, str(error)
            except (typer.Exit, typer.Abort):
                raise
            except Exception as error:  # a traceback may hold record content: off by default
                if os.environ.get(DEBUG) == "1":
                    traceback.print_exc()
                code = 4
                line = (
                    f"internal error ({type(error).__name__}); to do: set {DEBUG}=1 for the "
                    "traceback, and mind that a traceback may show records"
                )
            typer.echo(f"fedtune: {' '.join(line.split())}", err=True)
            raise typer.Exit(code)

        on.command(name, rich_help_panel=panel, epilog=epilog)(guarded)
        return guarded

    return register
