"""The manual page, read from the commands: `man fedtune` where the wheel is installed.

Written by tests/docs/reference.py, with its own page."""

from __future__ import annotations

import click

from tests.docs import reference

PAGE = reference.ROOT / "docs" / "fedtune.1"
HEAD = r""".\" Written by `python -m tests.docs.reference` from the code; not edited by hand.
.TH FEDTUNE 1
.SH NAME
fedtune \- fine\-tune a language model across hospitals without moving a record
.SH SYNOPSIS
.B fedtune
.I COMMAND
[\fIOPTION\fR...]
.SH COMMANDS"""
TAIL = r""".SH EXIT STATUS
0: done. 2: bad input or configuration. 3: refused by a policy or a budget.
4: infrastructure, or a fault of fedtune's. 130: stopped by Ctrl\-C. 141: nobody reads
the output.
.SH ENVIRONMENT
.TP
.B FEDTUNE_CACHE
Where fetched bases are kept.
.TP
.B FEDTUNE_DEBUG
1: show a traceback of an internal error. It may show records.
.SH SEE ALSO
The pages in docs/ of the source archive, and the documentation site of the same release.
"""


def page() -> str:
    """The whole of docs/fedtune.1."""
    parts = [HEAD]
    for name, command in reference.commands():
        arguments = [p for p in reference.parameters(command) if isinstance(p, click.Argument)]
        names = " ".join(escaped(p.metavar or (p.name or "").upper()) for p in arguments)
        parts += [f".SS {escaped(name)} {names}".rstrip(), escaped(words(command.help))]
        for parameter in reference.parameters(command):
            spelled = reference._spelled(parameter).replace("`", "")
            parts += [
                ".TP",
                rf"\fB{escaped(spelled)}\fR",
                escaped(words(reference._help(parameter))),
            ]
    return "\n".join(filter(None, parts)) + "\n" + TAIL


def words(text: str | None) -> str:
    return " ".join((text or "").replace("**", "").split())


def escaped(text: str) -> str:
    """Text as roff shows it: hyphens that can be copied, no line that is a request."""
    quoted = text.replace("\\", r"\e").replace("-", r"\-").replace("`", "").replace("…", "...")
    return rf"\&{quoted}" if quoted.startswith((".", "'")) else quoted
