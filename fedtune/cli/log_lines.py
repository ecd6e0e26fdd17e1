"""Write warnings of libraries in the form of fedtune's own errors."""

from __future__ import annotations

import logging
import sys

from fedtune.core.errors import escape_controls


class _Stderr(logging.Handler):
    """Writes to the current stderr, which a progress bar replaces while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        name = record.name.partition(".")[0]
        print(f"{name}: {escape_controls(record.getMessage())}", file=sys.stderr)


def use_one_style() -> None:
    """Write warnings as lines that begin with whose they are, whatever library is loaded later:
    opacus sets a format with dates for all of a process, unless there is one."""
    logging.basicConfig(handlers=[_Stderr()], level=logging.WARNING)
