"""Rows of Arrow record batches, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from fedtune.data.sources._interface import Names, Row

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
        try:
            row = {name: column[index].as_py() for name, column in cells.items()}
            for name, labels in (classes or {}).items():
                if row.get(name) is not None:
                    row[name] = _class(labels, row[name])
            yield row
        except UnicodeDecodeError:
            yield "not UTF-8"
        except Exception:  # a value that Python has no type for: a date in the year 300,000
            yield "wrong type"


def _class(labels: Sequence[str], number: int) -> str | None:
    """Name a class by its number; -1 is a data set's own mark of a missing one."""
    if number == -1:
        return None
    if not 0 <= number < len(labels):
        raise ValueError("no class has this number")
    return labels[number]
