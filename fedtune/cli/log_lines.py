"""Write warnings of libraries in the form of fedtune's own errors."""

from __future__ import annotations

import logging
import sys

from fedtune.core.errors import escape_controls


class _Stderr(logging.Handler):
    """Writes each log record to the stderr of the moment, which a progress bar replaces while it is
    drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        name = record.name.partition(".")[0]
        print(f"{name}: {escape_controls(record.getMessage())}", file=sys.stderr)


def use_one_style() -> None:
    """Print each library's warning as one line that begins with the library's name. Libraries that
    are loaded later do not change this: one such as opacus would set a format with dates for the
    whole process, but does so only if no format is set yet."""
    logging.basicConfig(handlers=[_Stderr()], level=logging.WARNING)
