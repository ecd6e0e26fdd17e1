"""Read rows from files, from a folder of files, or from a database (data/sources).

For a bad row no exception is raised: a reason from a fixed list is yielded in its place. For a bad
file, DataError is raised as long as a person can still correct it. Once a site takes part in a
study, a reason is yielded for a bad file too, so that no row, and no file of a folder, decides
whether the others are read. Reasons and errors hold no content, and no library's error is chained
to them, since its message may quote a row."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from fedtune.core.data.sources import Collection, Source, by_suffix
from fedtune.core.data.sources._interface import REASONS, BadCell, Keys, Names, NotWellFormed, Row
from fedtune.core.errors import DataError

log = logging.getLogger("fedtune.data")
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
SPREADSHEET = (
    'open it and save it under another name as "CSV UTF-8 (comma delimited)", in LibreOffice as '
    '"Text CSV" with the character set UTF-8; save only one table, whose first row names the '
    "columns"
)


class Rejected(Exception):
    """Says that one record is unusable. The only argument is the reason, one of a fixed list of
    texts."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


class Place(NamedTuple):
    """Where a row was read, for people at the site.

    - file: the file's name without its folder
    - row: for CSV the number that a spreadsheet shows (the header is row 1); for JSON Lines the
      line's number; for other formats a number from 1; 0 for the whole file"""

    file: str
    row: int


def rows(
    where: Path, keys: Keys, *, strict: bool = True, source: Source | None = None
) -> Iterator[Row | str]:
    """Yield each row as a dict by column, or the reason for its rejection.

    - where: the file, or the folder whose files are read
    - keys: for each configuration key, such as "data.columns.text", the column that it names
    - strict: whether to raise the errors marked "if strict" below too, for a person who can still
      correct the data. For a file whose error is not raised, one reason is yielded in place of the
      rows that could not be read
    - source: the source that reads the files; None if each file's suffix decides

    Errors: DataError if the path is missing, is neither a file nor a folder, or leads to no file of
    a known suffix. If strict, also if `where` is a file that cannot be read, if a CSV file is not
    well-formed, or if no file has a column that `keys` names."""
    for _, row in placed_rows(where, keys, strict=strict, source=source):
        yield row


def placed_rows(
    where: Path,
    keys: Keys,
    *,
    strict: bool = True,
    source: Source | None = None,
    names: Names | None = None,
) -> Iterator[tuple[Place, Row | str]]:
    """Yield (place, row) for each row, in the order of the sorted files. The row is a dict by
    column, or the reason for its rejection.

    - where: the file, or the folder whose files are read; a source that reads a database ignores it
    - keys: for each configuration key, such as "data.columns.text", the column that it names; not
      used if `names` is given, which holds them already
    - strict: whether to raise the errors marked "if strict" below too, for a person who can still
      correct the data. For a file whose error is not raised, one reason is yielded in place of the
      rows that could not be read
    - source: the source that reads the files; None if each file's suffix decides
    - names: the object to which the names of the files' columns are added; None if the caller does
      not need these names

    Errors: DataError if the path is missing, is neither a file nor a folder, or leads to no file of
    a known suffix. If strict, also if `where` is a file that cannot be read, if a CSV file is not
    well-formed, or if no file has a column that `keys` names. An error names `where` only, since a
    file in a folder may bear a patient's name. MemoryError is always raised: it is not the fault of
    one row or file, since it depends on how much memory others take.
    Guarantee: if not strict, what is yielded for a row follows from that row alone. A CSV file that
    is not well-formed is the exception: none of its rows is yielded. For each file that cannot be
    read one reason is yielded."""
    names = names or Names(where, keys)
    if isinstance(source, Collection):
        yield from _collect_rows(where, source, names, strict)
        return
    readers = by_suffix() if source is None else dict.fromkeys(source.suffixes, source)
    for path in _paths(where, readers):
        names.begin()
        try:
            if not os.path.isfile(path):  # a pipe, which would be waited for
                raise OSError
            for number, row in enumerate(readers[path.suffix.lower()].rows(path, names), 1):
                yield Place(path.name, names.row or number), _check_row(row)
        except NotWellFormed:
            if strict:
                raise
            yield Place(path.name, 0), "not well-formed CSV"
        except MemoryError:
            raise
        except Exception as error:  # whatever one file makes a library do is that file's matter
            if strict and os.path.isfile(where):
                data_error = (
                    error if isinstance(error, DataError) else _build_read_error(where, error)
                )
                raise data_error from None
            yield Place(path.name, 0), "unreadable file"
    if strict:
        names.require()


def _collect_rows(
    where: Path, source: Collection, names: Names, strict: bool
) -> Iterator[tuple[Place, Row | str]]:
    """Yield (place, row) for each row of a database, or of a folder that one source reads as a
    whole. The row is a dict by column, or the reason for its rejection.

    - where: the folder; a database's source ignores it
    - source: the source that reads the database or the folder
    - names: the object to which the names of the columns are added; its `where` names the dataset
      in errors
    - strict: whether an error of the source is raised. If not, the reason "unreadable file" is
      yielded in its place, and no row after it"""
    file = ""
    try:
        for number, (file, row) in enumerate(source.collect(where, names), 1):
            yield Place(file, names.row or number), _check_row(row)
    except MemoryError:
        raise
    except Exception as error:
        if strict:
            data_error = (
                error if isinstance(error, DataError) else _build_read_error(names.where, error)
            )
            raise data_error from None
        if isinstance(error, DataError):  # which holds no content
            log.warning("%s", error)
        yield Place(file or str(names.where), 0), "unreadable file"
    if not strict:
        return
    names.require()


def _check_row(row: object) -> Row | str:
    """Check that what a source yielded for a row has a permitted form. Return the row if it is a
    dict, or the reason if it is one of REASONS; for anything else return a fixed reason. A BadCell
    (a reason with the row's readable cells) keeps these cells."""
    if isinstance(row, str):
        if row in REASONS:
            return row
        return (
            BadCell("cannot be read", row.cells) if isinstance(row, BadCell) else "cannot be read"
        )
    return row if isinstance(row, dict) else "wrong type"


def _build_read_error(where: Path | str, error: Exception) -> DataError:
    return DataError(f"{where}: cannot be read ({type(error).__name__})")


def _paths(where: Path, readers: Mapping[str, Source]) -> list[Path]:
    suffixes = sorted(readers)
    kinds = ", ".join(suffixes)
    if os.path.isfile(where):
        if where.suffix.lower() not in suffixes:
            todo = SPREADSHEET if where.suffix.lower() in SPREADSHEETS else "convert the file"
            raise DataError(f"{where}: unsupported suffix", kinds, todo)
        return [where]
    if not os.path.isdir(where):
        raise DataError(f"{where}: no such file", f"a file or a folder of {kinds}")
    for reader in dict.fromkeys(readers.values()):
        if (listed := reader.files(where)) is not None:
            return listed
    try:
        entries = sorted(where.iterdir())
    except OSError as error:
        raise _build_read_error(where, error) from None
    files = [  # os.path.isfile: Path.is_file raises for some links, and the others are read
        p
        for p in entries
        if p.suffix.lower() in suffixes and p.name[0] != "." and os.path.isfile(p)
    ]
    if not files:
        raise DataError(f"{where}: the folder has no data file", f"files of one of {kinds}")
    return files
