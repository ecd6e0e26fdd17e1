"""Write warnings of libraries in the form of fedtune's own errors."""

from __future__ import annotations

import logging
import sys

from fedtune.core.errors import escape_controls


class _Stderr(logging.Handler):
    """Writes each log record to sys.stderr as it is at that moment, since a progress bar replaces
    sys.stderr while it is drawn."""

    def emit(self, record: logging.LogRecord) -> None:
        name = record.name.partition(".")[0]
        print(f"{name}: {escape_controls(record.getMessage())}", file=sys.stderr)


def use_one_style() -> None:
    """Print each library's warning as one line that begins with the library's name. Call this
    before libraries are loaded: a library such as opacus sets a format with dates for the whole
    process if no format is set yet."""
    logging.basicConfig(handlers=[_Stderr()], level=logging.WARNING)
