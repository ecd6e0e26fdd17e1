"""Run a plug-in's conversion on the rows of one unit at a time, each in a process of its own that
ends afterwards.

    this process ── a socket and a pipe ──> conversion_process ── forks ──> a child for the unit

The process that forks (children.py) runs no code of the plug-in. A child imports the plug-in, reads
its unit's rows, writes the converted rows, and ends.

Guarantee: the conversion of a unit's rows depends only on those rows and on public settings. If it
fails, the unit has no records, and nothing changes for any other unit."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.core.config.site import ConvertTable
from fedtune.core.data.children import ChildFailed, Children
from fedtune.core.data.sources._interface import Row
from fedtune.core.data.typed_rows import BYTES, given_bytes, returned_rows

PROGRAM = "fedtune.core.data.conversion_process"
CPU_SECONDS = 20  # processor time of one child; other processes' time does not count


class Unconverted(Exception):
    """The conversion of one unit failed; the error says nothing about the rows."""


class Conversion(Children):
    """Converts rows, one unit's at a time, with the plug-in that `table` names. It is used in a
    `with` block, during which a site's rows are read.

    - table: the table [data.convert] of site.toml
    - declared_size: the site's declared size if its whole dataset is read, else 0 (see Children)

    Errors, before a row is passed: ConfigError if the plug-in is not installed or does not accept
    its options; InfrastructureError if this machine cannot confine a child process."""

    def __init__(self, table: ConvertTable, declared_size: int = 0) -> None:
        super().__init__(
            PROGRAM,
            table.model_dump(mode="json"),
            what=f"data.convert.name = {table.name!r}",
            otherwise="convert the files by hand, and leave data.convert out",
            cpu_seconds=CPU_SECONDS,
            declared_size=declared_size,
        )

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Convert one unit's rows, and return the rows to be read in their place.

        Errors: Unconverted if the plug-in raises, hangs, exits or needs too much memory; if the
        unit's rows or the result are too long; or if the result is not a list of rows with plain
        finite values (typed_rows)."""
        try:
            (converted,) = self.run([given_bytes(rows)], BYTES, returned_rows)
        except (ChildFailed, ValueError, RecursionError):  # too long, or not of these types
            raise Unconverted from None
        return converted
