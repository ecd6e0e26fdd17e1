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
    """Yield each row of a batch, or why it cannot be used.

    Errors: pyarrow.ArrowInvalid, before any row, where an offset of the file points elsewhere than
    to its own cell: another patient's text, or memory beyond the file."""
    cells = {name: batch.column(name) for name in columns}
    for column in cells.values():
        _check(column)
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


def _check(column: pa.Array) -> None:
    """Check offsets and lengths. Errors: pyarrow.ArrowInvalid.

    As bytes: a text that is not UTF-8 is its own row's matter. Arrow has no checksums: a changed
    offset that is still in order and within the file cannot be told from a true one."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        _check(column.dictionary)
        column.indices.validate(full=True)
        if any(
            not 0 <= i < len(column.dictionary)
            for i in column.indices.drop_null().unique().to_pylist()
        ):
            raise pa.ArrowInvalid("a cell that the dictionary does not have")
        return
    column.view(_bytes(column.type)).validate(full=True)


def _bytes(kind: pa.DataType) -> pa.DataType:
    """Return the same type with bytes for strings."""
    import pyarrow as pa

    types = pa.types
    if types.is_string(kind):
        return pa.binary()
    if types.is_large_string(kind):
        return pa.large_binary()
    if types.is_string_view(kind):
        return pa.binary_view()
    if types.is_list(kind):
        return pa.list_(_bytes(kind.value_type))
    if types.is_large_list(kind):
        return pa.large_list(_bytes(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([field.with_type(_bytes(field.type)) for field in kind])
    return kind


def _class(labels: Sequence[str], number: int) -> str | None:
    """Name a class by its number; -1 is a data set's own mark of a missing one."""
    if number == -1:
        return None
    if not 0 <= number < len(labels):
        raise ValueError("no class has this number")
    return labels[number]
