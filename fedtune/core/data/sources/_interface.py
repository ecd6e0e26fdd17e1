"""Define the interface of a data source."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from fedtune.core.errors import DataError

Row = dict[str, object]
Keys = Mapping[str, str]  # a configuration key, "data.columns.text", to the column that it names

SHOWN = 20  # column names in a message
FEW = 5  # records of a file; of fewer a key in half of them may be a patient's own
# Why a row cannot be used. No other words of a source are kept, since they may quote the row.
REASONS = (
    *("not JSON", "not UTF-8", "NUL byte", "too long", "wrong type", "wrong column count"),
    *("missing value", "empty text", "cannot be read", "not in the encoding"),
)
# What a column is called. A first line of such cells is shown, even where none of them is asked
# for, if one has one of these words; without a header the first line is a record.
COLUMN = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,39}")
KEY = re.compile(r"[^\W\d][\w.-]{0,39}")  # of a JSON record, in any language
WORDS = frozenset(
    {
        *("text", "note", "notes", "prompt", "completion", "question", "answer", "label", "class"),
        *("category", "target", "messages", "chosen", "rejected", "patient", "subject", "id"),
        *("image", "audio", "video", "file", "date", "input", "output"),
    }
)
DELIMITERS = {";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # the byte order marks


class BadCell(str):
    """The reason why a row cannot be used, with its readable cells: a patient's refusal of
    consent counts whatever other cells hold."""

    cells: Row

    def __new__(cls, reason: str, cells: Row) -> BadCell:
        made = super().__new__(cls, reason)
        made.cells = cells
        return made


@dataclass
class Names:
    """Column names of a dataset: where it is, the requested columns, and the column names met in
    all its files; and which of these a message may show: a key of a few JSON records may itself
    be content, and so may the first line of a CSV file without a header."""

    where: Path | str
    keys: Keys
    headers: set[str] = field(default_factory=set)
    shown: list[str] = field(default_factory=list)
    keys_met: Counter[str] = field(default_factory=Counter)
    objects: int = 0
    row: int = 0  # of the row that a source yields next, as a person finds it; 0: it does not say
    hints: list[str] = field(default_factory=list)  # what may be wrong with a whole file

    def begin(self) -> None:
        """Begin another file."""
        self.row = 0

    def suspect(self, hint: str) -> None:
        """Add what may be wrong with a whole file, in words that hold no content."""
        if hint not in self.hints:
            self.hints.append(hint)

    @property
    def listed(self) -> list[str]:
        """List the column names that a message may show: those of a header, and keys of JSON
        records without a space (a key with a space may be a person's name) that half of several
        records have, or that stand beside a requested key."""
        common = self.common
        if self.objects < FEW and not is_header(common, self.keys):
            common = []
        return self.shown + [name for name in common if KEY.fullmatch(name)]

    @property
    def common(self) -> list[str]:
        """List the keys that half of the records have, for a person who may see the records."""
        return [name for name, n in self.keys_met.items() if 2 * n >= self.objects]

    def header(self, names: list[str], shown: bool = True) -> None:
        """Add a file's columns. shown: whether they may be in a message."""
        self.headers.update(names)
        if shown:
            self.shown += [name for name in names if name not in self.shown]

    def object(self, row: Row) -> None:
        """Add the keys of one row, for a format whose files have no header."""
        self.objects += 1
        self.keys_met.update(row.keys())

    def require(self) -> None:
        """Check the requested columns. Errors: DataError for a column that no file has."""
        present = self.headers | set(self.keys_met)
        absent = [(key, column) for key, column in self.keys.items() if column not in present]
        if not absent or not (present or self.hints):
            return
        key, column = absent[0]
        listed, hints = self.listed, "".join(f"; {hint}" for hint in self.hints)
        if listed:
            omitted = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
            expected = "one of " + ", ".join(repr(name[:40]) for name in listed[:SHOWN]) + omitted
        elif self.keys_met:
            expected = "a key that the records have (not shown: it may itself be content)"
        else:
            expected = "a first line that names the columns, separated by commas"
        happened = f"{self.where}: no column {column!r}, which {key} names{hints}"
        raise DataError(happened, expected, f"correct {key}")


class NotWellFormed(DataError):
    """CSV with broken quoting: the boundaries of its records are unknown."""


@dataclass(frozen=True)
class Source(ABC):
    """A data source: it reads the rows of one kind of file.

    Subclasses are frozen dataclasses whose fields are [data.options] of site.toml. suffixes: the
    suffixes of the files that it reads, in lower case."""

    suffixes: ClassVar[tuple[str, ...]]

    def files(self, folder: Path) -> list[Path] | None:
        """List the files of a folder to read, if a file beside them lists them; None: each with one
        of `suffixes`.
        Errors: DataError."""
        return None

    @abstractmethod
    def rows(self, path: Path, names: Names) -> Iterator[Row | str]:
        """Yield each row of `path` in order, as a dict by column, or as one of REASONS if it is
        rejected (a BadCell if some of its cells can be read).

        It tells `names` which columns the file has (`Names.header`), and reads one row at a time:
        the result for a row depends on that row alone. If it raises any exception, the file counts
        as unreadable; a DataError must name `names.where`, never `path`, which may hold a patient's
        name, and no content."""


@dataclass(frozen=True)
class Collection(Source):
    """A source that reads a place as a whole: a database, or a folder of files that refer to each
    other.

    kept: the filter for columns that data.filter does not name; patient: the column that
    data.columns.patient must name, if there is only one."""

    suffixes = ()
    kept: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    patient: ClassVar[str] = ""

    @abstractmethod
    def collect(self, where: Path, names: Names) -> Iterator[tuple[str, Row | str]]:
        """Yield each row, or one of REASONS, behind the name of its file or table.

        The result for a row depends on that patient's rows alone. Otherwise as `rows`."""

    def rows(self, path: Path, names: Names) -> Iterator[Row | str]:
        return (row for _, row in self.collect(path, names))


def is_header(cells: list[str], keys: Keys) -> bool:
    """Return whether a file's first line may be shown: it has a requested column, or consists of
    what look like column names."""
    if any(column in cells for column in keys.values()):
        return True
    words = {word for cell in cells for word in re.split(r"[_.-]", cell.lower())}
    return all(COLUMN.fullmatch(cell) for cell in cells) and bool(words & WORDS)


def find_unclean(text: str) -> str:
    """Return why a string is unusable in any column, or "". Lone surrogates count as not UTF-8."""
    if "\0" in text:
        return "NUL byte"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "not UTF-8"
    return ""
