"""From an exception to one line on stderr and an exit code."""

from __future__ import annotations

import functools
import math
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer

from fedtune.errors import ConfigError, FedtuneError, printable
from fedtune.files import reading

P = ParamSpec("P")
R = TypeVar("R")
DEBUG = "FEDTUNE_DEBUG"


def command(
    on: typer.Typer, name: str | None = None, *, panel: str | None = None, epilog: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a command whose errors become one line on stderr and an exit code.

    What none can use is refused before it runs: a path that no file has, no text, no number."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            if os.environ.get(DEBUG) != "1":
                warnings.simplefilter("ignore")  # other libraries' advice to their own users
            try:
                for name, value in kwargs.items():
                    _check(name, value)
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
                    f"{_fault(error)}; to do: set {DEBUG}=1 for the "
                    "traceback, and mind that a traceback may show records"
                )
            typer.echo(f"fedtune: {printable(' '.join(line.split()))}", err=True)
            raise typer.Exit(code)

        on.command(name, rich_help_panel=panel, epilog=epilog)(guarded)
        return guarded

    return register


def _check(name: str, value: Any) -> None:
    """Errors: ConfigError."""
    if isinstance(value, list | tuple):
        for item in value:
            _check(name, item)
    elif isinstance(value, str) and ("\0" in value or not reading.is_sound(value)):
        raise ConfigError(f"{name}: not valid text", "UTF-8")
    elif isinstance(value, Path) and (why := reading.unusable(value)):
        raise ConfigError(f"{str(value)[:80]}: {why}", "a path", "choose another")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} = {value}", "a finite number")


def _fault(error: Exception) -> str:
    """Describe what the system refused, in its words; else name an internal error."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, OSError) and error.errno:
        return f"the system refused ({os.strerror(error.errno)})"
    return f"internal error ({type(error).__name__})"
