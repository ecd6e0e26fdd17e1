"""Read the rows of Arrow record batches, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedtune.core.data.sources._interface import BadCell, Names, Row
from fedtune.core.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

Classes = Mapping[str, Sequence[str]]  # column of class numbers -> the classes' names


def list_asked_columns(schema: pa.Schema, names: Names) -> list[str]:
    """Return, sorted, the file's columns that study.toml or site.toml names (`names.keys`), and add
    the names of all the file's columns to `names`. Also import the modules that Arrow needs to read
    cells of the returned columns. schema: the file's columns and their types."""
    names.header(list(schema.names))
    columns = sorted(set(names.keys.values()) & set(schema.names))
    _import_what_cells_need([schema.field(name).type for name in columns])
    return columns


def _import_what_cells_need(types: Sequence[pa.DataType]) -> None:
    """Import the modules that Arrow needs for cells of these types, such as nanoseconds or a time
    with a zone, and look up the types' time zones, before the first cell is read. Which modules a
    process imports, and which files of zones it reads, must not depend on a record."""
    import zoneinfo  # noqa: F401

    import pyarrow as pa

    for zone in set().union(*map(_zones, types)):
        with suppress(Exception):  # the zone is unknown; its cells are rejected one by one
            pa.scalar(0, pa.timestamp("us", zone)).as_py()
    for name in ("pandas", "pytz", "pyarrow.pandas_compat", "pyarrow.vendored.version"):
        with suppress(ImportError):
            import_module(name)


def _zones(type_: pa.DataType) -> set[str]:
    """Return the names of the time zones in an Arrow type and in the types of its fields and
    elements."""
    parts = [type_.field(index).type for index in range(type_.num_fields)]
    parts += [type_.value_type] if hasattr(type_, "value_type") else []
    own = {type_.tz} if getattr(type_, "tz", None) else set()
    return own.union(*map(_zones, parts))


def rows_of(
    batch: pa.RecordBatch, columns: Sequence[str], classes: Classes | None = None
) -> Iterator[Row | str]:
    """Yield each row of a batch as a dict of the cells in `columns`, or as the reason (a str) why
    the row cannot be used. classes: for each column whose cells are a class's number, the names of
    the classes; the name is put in the number's place. None: there is no such column.

    Errors, before any row: pyarrow.ArrowInvalid if an offset of the file points outside its own
    cell, to another patient's text or to memory beyond the file; DataError for a column of a type
    that is not read. Guarantee: no error depends on a value; a value affects only its own row."""
    cells = {name: batch.column(name) for name in columns}
    for column in cells.values():
        column.validate()
        _check(column)
    for index in range(batch.num_rows):
        row, reason = dict[str, object](), ""
        for name, column in cells.items():
            try:
                value = _value(column[index])
                labels = (classes or {}).get(name)
                row[name] = value if labels is None or value is None else _class(labels, value)
            except UnicodeDecodeError:
                reason = reason or "not UTF-8"
            except MemoryError:
                raise
            except Exception:  # a value that Python has no type for: a date in the year 300,000
                reason = reason or "wrong type"
        yield BadCell(reason, row) if reason else row


def _check(column: pa.Array) -> None:
    """Check where each cell of a column begins and ends, but not what it holds:
    `validate(full=True)` of the whole column would refuse every row because of one text that is not
    UTF-8, a time of 24:00 or a decimal with too many digits. Errors: pyarrow.ArrowInvalid;
    DataError for a type that is not read.

    Arrow has no checksums, so a changed offset that is still in order and within the file is not
    noticed."""
    import pyarrow as pa

    kind, types = column.type, pa.types
    as_bytes = {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.string_view(): pa.binary_view(),
    }.get(kind, kind)
    if as_bytes in (pa.binary(), pa.large_binary(), pa.binary_view()):
        column.view(as_bytes).validate(full=True)
    elif types.is_dictionary(kind):  # its indices are values: _value checks each
        _check(column.dictionary)
    elif types.is_struct(kind):
        for number in range(kind.num_fields):
            _check(column.field(number))
    elif types.is_fixed_size_list(kind):
        _check(column.values)
    elif types.is_list(kind) or types.is_map(kind):
        _check_lists(column, pa.list_(pa.null()))
    elif types.is_large_list(kind):
        _check_lists(column, pa.large_list(pa.null()))
    elif types.is_list_view(kind):
        _check_lists(column, pa.list_view(pa.null()))
    elif types.is_large_list_view(kind):
        _check_lists(column, pa.large_list_view(pa.null()))
    elif isinstance(kind, pa.BaseExtensionType) and not kind.storage_type.num_fields:
        _check(column.storage)
    elif types.is_nested(kind) or types.is_run_end_encoded(kind) or hasattr(kind, "storage_type"):
        raise DataError(
            "a column has an Arrow type that is not read",
            "text, numbers, times, dictionaries, lists and structs",
            "write the column as one of these",
        )


def _check_lists(column: pa.Array, of_nulls: pa.DataType) -> None:
    """Check where each list of a column begins and ends, and then the column of all lists'
    elements. The lists are checked as if their type were `of_nulls`, the same type of list but with
    nulls as elements, since Arrow then looks at no element. Errors: pyarrow.ArrowInvalid; DataError
    for elements of a type that is not read."""
    import pyarrow as pa

    values = column.values
    own = column.buffers()[: 3 if "view" in str(of_nulls) else 2]
    lists = pa.Array.from_buffers(
        of_nulls, len(column), own, offset=column.offset, children=[pa.nulls(len(values))]
    )
    lists.validate(full=True)
    _check(values)


def _value(cell: pa.Scalar) -> Any:
    """Return a cell as a Python value, None if it is missing. If the cell cannot be read, an
    exception of any type is raised; whether one is raised depends on this cell alone."""
    import pyarrow as pa

    if not cell.is_valid:
        return None
    if isinstance(cell, pa.DictionaryScalar):  # as_py would read before the dictionary's beginning
        number = cell.index.as_py()
        if not 0 <= number < len(cell.dictionary):
            raise ValueError("a cell points outside the dictionary")
        return _value(cell.dictionary[number])
    if isinstance(cell, pa.StructScalar):
        return {name: _value(cell[name]) for name in cell}
    if isinstance(cell, pa.ListScalar):  # lists of any kind, and maps
        return [_value(item) for item in cell.values]
    return cell.as_py()


def _class(labels: Sequence[str], number: int) -> str | None:
    """Return the name of the class with this number; None for -1, which marks a missing class.
    labels: the names of classes 0, 1, and so on. Errors: ValueError if no class has the number."""
    if number == -1:
        return None
    if not 0 <= number < len(labels):
        raise ValueError("no class has the number in a cell")
    return labels[number]
