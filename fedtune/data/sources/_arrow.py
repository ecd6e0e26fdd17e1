"""Rows of Arrow record batches, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fedtune.data.sources._interface import BadCell, Names, Row

if TYPE_CHECKING:
    import pyarrow as pa

Classes = Mapping[str, Sequence[str]]  # of a column of class numbers, their names


def asked(present: Sequence[str], names: Names) -> list[str]:
    """Tell `names` which columns a file has, and list those of them that are asked for."""
    names.header(list(present))
    return sorted(set(names.keys.values()) & set(present))


def rows_of(
    batch: pa.RecordBatch, columns: Sequence[str], classes: Classes | None = None
) -> Iterator[Row | str]:
    """Yield each row of a batch, or why it cannot be used."""
    cells = {name: batch.column(name) for name in columns}
    for index in range(batch.num_rows):
        row, reason = dict[str, object](), ""
        for name, column in cells.items():
            try:
                value = column[index].as_py()
                labels = (classes or {}).get(name)
                row[name] = value if labels is None or value is None else _class(labels, value)
            except UnicodeDecodeError:
                reason = reason or "not UTF-8"
            except Exception:  # a value that Python has no type for: a date in the year 300,000
                reason = reason or "wrong type"
        yield BadCell(reason, row) if reason else row


def _class(labels: Sequence[str], number: int) -> str | None:
    """Name a class by its number; -1 is a data set's own mark of a missing one."""
    if number == -1:
        return None
    if not 0 <= number < len(labels):
        raise ValueError("no class has this number")
    return labels[number]
