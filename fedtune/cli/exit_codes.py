"""Turn an exception into one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import click
import typer

from fedtune.core.errors import ConfigError, FedtuneError, escape_controls
from fedtune.core.files import reading

P = ParamSpec("P")
R = TypeVar("R")
DEBUG = "FEDTUNE_DEBUG"
JSON = "as_json"  # the parameter of --json
NOT_READ = 141  # 128 + SIGPIPE: as a shell shows it of any program whose output nobody reads


class ErrorWithResult(Exception):
    """Carries a result that is printed although the command ends with an error, such as failed
    checks."""

    def __init__(self, result: Any, error: FedtuneError) -> None:
        self.result, self.error = result, error
        super().__init__()


def command(
    on: typer.Typer, name: str | None = None, *, panel: str | None = None, epilog: str | None = None
) -> Callable[[Callable[P, R]], Callable[P, None]]:
    """Build a decorator that registers a command. An error of the command becomes an exit code and
    one line on stderr, with the error's notes below it.

    Arguments that no command can use are refused before the command runs: a path that no file can
    have, text that is not UTF-8, a number that is not finite. A command whose function returns a
    result, rather than None, gets the option --json. With --json, only the result goes to stdout,
    as JSON, and text for people goes to stderr.

    - on: the app, or the group of commands, at which the command is registered
    - name: the command's name; None for the name of its function
    - panel: the heading under which --help lists the command
    - epilog: the last lines of the command's own --help"""

    def register(function: Callable[P, R]) -> Callable[P, None]:
        @functools.wraps(function)
        def run_command(*args: P.args, **kwargs: P.kwargs) -> None:
            as_json, notes = bool(kwargs.pop(JSON, False)) if adds_json else False, list[str]()
            if os.environ.get(DEBUG) != "1":
                warnings.simplefilter("ignore")  # other libraries' advice to their own users
            try:
                for name, value in kwargs.items():
                    _check(name, value)
                with contextlib.redirect_stdout(sys.stderr) if as_json else nullcontext():
                    result = function(*args, **kwargs)
                if as_json:
                    _print_json(result)
                sys.stdout.flush()
                return
            except KeyboardInterrupt as stop:
                code, line = 130, str(stop) or "stopped"
            except ErrorWithResult as told:
                if as_json:
                    _print_json(told.result)
                code, line = told.error.exit_code, str(told.error)
            except FedtuneError as error:
                code, line = error.exit_code, str(error)
                notes = getattr(error, "__notes__", notes)
            except (typer.Exit, typer.Abort):
                raise
            except Exception as error:  # a traceback may hold record content: off by default
                if isinstance(error, BrokenPipeError) and _is_unread():
                    raise
                if os.environ.get(DEBUG) == "1":
                    traceback.print_exc()
                code = 4
                line = (
                    f"{_fault(error)}; to do: set {DEBUG}=1 for the "
                    "traceback, and mind that a traceback may show records"
                )
            typer.echo(f"fedtune: {escape_controls(' '.join(line.split()))}", err=True)
            for note in notes:
                typer.echo(escape_controls(note), err=True)
            raise typer.Exit(code)

        adds_json = _returns(function)
        if adds_json:
            _add_json(run_command, function)
        on.command(name, rich_help_panel=panel, epilog=epilog)(run_command)
        return run_command

    return register


@contextlib.contextmanager
def quiet_if_unread() -> Iterator[None]:
    """Run the block, a command; if nobody reads its output any more, as behind `| head`, end with
    exit code NOT_READ and without a message. click and rich would end with exit code 1."""
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)  # takes what Python still flushes at its end
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        raise SystemExit(NOT_READ) from None


def _is_unread() -> bool:
    """Return whether the reader of stdout or of stderr has closed it."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # no descriptor
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def wants_json() -> bool:
    """Return whether the running command was given --json."""
    context = click.get_current_context(silent=True)
    return bool(context and context.params.get(JSON))


def _returns(function: Callable[..., Any]) -> bool:
    """Return whether a command gets the option --json: whether its function returns a result and
    does not define --json itself."""
    hints = function.__annotations__
    return hints.get("return") not in (None, "None") and JSON not in hints


def _add_json(guarded: Any, function: Callable[..., Any]) -> None:
    """Add the option --json to a command. guarded: the wrapper that is registered as the command;
    its signature becomes that of `function` with --json added. function: the command's own
    function, which has no parameter for --json."""
    option = typer.Option(
        "--json", help="Print the result as JSON on stdout; everything else goes to stderr."
    )
    hint = Annotated[bool, option]
    own = inspect.signature(function, eval_str=True)
    flag = inspect.Parameter(
        JSON, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=False, annotation=hint
    )
    guarded.__signature__ = own.replace(parameters=[*own.parameters.values(), flag])
    guarded.__annotations__ = function.__annotations__ | {JSON: hint}


def _print_json(result: Any) -> None:
    from fedtune.report import jsonable

    print(json.dumps(jsonable(result), indent=1, ensure_ascii=False, allow_nan=False))


def _check(name: str, value: Any) -> None:
    """Check that a command can use this value of its argument `name`. Errors: ConfigError."""
    if isinstance(value, list | tuple):
        for item in value:
            _check(name, item)
    elif isinstance(value, str) and ("\0" in value or not reading.is_sound(value)):
        raise ConfigError(f"{name}: not valid text", "UTF-8")
    elif isinstance(value, Path) and not reading.is_sound(str(value)):
        raise ConfigError(f"{name}: not valid text", "a path in UTF-8")
    elif isinstance(value, Path) and (why := reading.refuse_path(value)):
        raise ConfigError(f"{str(value)[:80]}: {why}", "a path", "choose another")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} = {value}", "a finite number")


def _fault(error: Exception) -> str:
    """Describe in a few words an exception that fedtune does not expect: that memory is lacking,
    that the operating system refused something and why, or else that the error is internal."""
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, OSError) and error.errno:
        return f"the system refused ({os.strerror(error.errno)})"
    return f"internal error ({type(error).__name__})"
