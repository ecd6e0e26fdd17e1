"""The interface of a data source, and what a source tells of columns and of unusable rows."""

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
Keys = Mapping[str, str]  # configuration key, such as "data.columns.text" -> the column's name

CHARACTERS = 16 * 2**20  # most characters of one unit: at most 64 MiB, to leave memory for others
SHOWN = 20  # column names in a message
FEW = 5  # among fewer records than this, a key that half of them have may be a patient's name
# Why a row cannot be used. No other words of a source are kept, since they may quote the row.
REASONS = (
    *("not JSON", "not UTF-8", "NUL byte", "too long", "wrong type", "wrong column count"),
    *("missing value", "empty text", "cannot be read", "not in the encoding"),
)
# The form of a column's name. A first line of such cells may be shown if one of them is requested
# or has one of these WORDS; else it may be a record, in a file without a header.
COLUMN = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,39}")
KEY = re.compile(r"[^\W\d][\w.-]{0,39}")  # form of a JSON record's key, in any language
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
    """The reason why a row cannot be used, together with `cells`, those of its cells that can be
    read. They are kept since one of them may be the patient's refusal of consent, which counts all
    the same."""

    cells: Row

    def __new__(cls, reason: str, cells: Row) -> BadCell:
        made = super().__new__(cls, reason)
        made.cells = cells
        return made


@dataclass
class Names:
    """The column names that a dataset's files have, and those that they must have. Not all of them
    may be shown in a message: a key that few JSON records have may itself be content, and so may
    the first line of a CSV file without a header.

    - where: the path or the name of the dataset, for messages
    - keys: for each configuration key that names a column, the column; the files must have these
    - headers: the columns of all headers
    - shown: the columns of headers that a message may show
    - keys_met: in how many JSON records each key occurs
    - objects: the number of JSON records"""

    where: Path | str
    keys: Keys
    headers: set[str] = field(default_factory=set)
    shown: list[str] = field(default_factory=list)
    keys_met: Counter[str] = field(default_factory=Counter)
    objects: int = 0
    row: int = 0  # number of the row that the source yields next; 0: the source does not set it
    hints: list[str] = field(default_factory=list)  # what may be wrong with a whole file

    def begin(self) -> None:
        """Prepare for the next file: set `row`, the row number that a source set in the last file,
        to 0."""
        self.row = 0

    def suspect(self, hint: str) -> None:
        """Add to `hints` what may be wrong with a whole file. The hint must hold no content."""
        if hint not in self.hints:
            self.hints.append(hint)

    @property
    def listed(self) -> list[str]:
        """The column names that a message may show: those in `shown`, and the keys that at least
        half of the JSON records have. Of these keys only those of the form KEY are listed; one with
        a space, for example, may be a person's name. If there are fewer than FEW JSON records, keys
        are listed only if `is_header` takes them for a header."""
        common = self.common
        if self.objects < FEW and not is_header(common, self.keys):
            common = []
        return self.shown + [name for name in common if KEY.fullmatch(name)]

    @property
    def common(self) -> list[str]:
        """The keys that at least half of the JSON records have. Only a person who may see the
        records may be shown them."""
        return [name for name, n in self.keys_met.items() if 2 * n >= self.objects]

    def header(self, names: list[str], shown: bool = True) -> None:
        """Record `names`, the columns in a file's header, as columns that the files have. shown:
        whether a message may show these names."""
        self.headers.update(names)
        if shown:
            self.shown += [name for name in names if name not in self.shown]

    def object(self, row: Row) -> None:
        """Count the keys of one row of a file without a header, such as JSONL."""
        self.objects += 1
        self.keys_met.update(row.keys())

    def require(self) -> None:
        """Check that each column that study.toml or site.toml names is in at least one file. If no
        column was found at all, as in an empty file, nothing is checked unless there are `hints`.
        Errors: DataError, for the first column that is in no file."""
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
    """A CSV file has broken quoting, so that the boundaries of its records are unknown."""


@dataclass(frozen=True)
class Source(ABC):
    """The base class of data sources. A source reads the rows of one kind of file.

    Subclasses are frozen dataclasses, whose fields are the keys of [data.options] in site.toml.
    suffixes: the suffixes of the files that the source reads, in lower case."""

    suffixes: ClassVar[tuple[str, ...]]

    def files(self, folder: Path) -> list[Path] | None:
        """Return the files of a folder that are to be read, if a file in the folder lists them.
        Return None if every file with one of `suffixes` is to be read. Errors: DataError."""
        return None

    @abstractmethod
    def rows(self, path: Path, names: Names) -> Iterator[Row | str]:
        """Yield the rows of the file `path` in order: each as a dict by column or, if it is
        rejected, as one of REASONS (as a BadCell if some of its cells can be read).

        The method adds the file's columns to `names` (`Names.header`). What it yields for a row
        must depend on that row alone. If it raises any exception, the file counts as unreadable. A
        DataError must hold no content, and must name `names.where` and not `path`, which may hold a
        patient's name."""


@dataclass(frozen=True)
class Collection(Source):
    """A source that reads a database, or a folder of files that refer to each other, as a whole.

    - kept: the values that a row must have, by column, unless data.filter names the column
    - patient: the column that data.columns.patient must name; "" if any column may be named"""

    suffixes = ()
    kept: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    patient: ClassVar[str] = ""

    @abstractmethod
    def collect(self, where: Path, names: Names) -> Iterator[tuple[str, Row | str]]:
        """Yield, for each row of a database or folder, two values: the name of its file or table,
        and the row as a dict by column or, if it is rejected, as one of REASONS.

        - where: the folder; a source of databases ignores it
        - names: the object to which the columns' names are added; its `where` names the data in
          errors

        What is yielded for a row must depend on that patient's rows alone. Errors: as for `rows`.
        """

    def rows(self, path: Path, names: Names) -> Iterator[Row | str]:
        return (row for _, row in self.collect(path, names))


def is_header(cells: list[str], keys: Keys) -> bool:
    """Return whether a message may show a file's first line. It may if a cell of the line is a
    column that study.toml or site.toml names. It may also if all cells look like column names
    (COLUMN) and one of them has a word of WORDS.

    - cells: the first line's
    - keys: for each configuration key, the column that it names"""
    if any(column in cells for column in keys.values()):
        return True
    words = {word for cell in cells for word in re.split(r"[_.-]", cell.lower())}
    return all(COLUMN.fullmatch(cell) for cell in cells) and bool(words & WORDS)


def find_unclean(text: str) -> str:
    """Return the reason why a string is unusable in any column; "" if it is usable. Lone surrogates
    count as not UTF-8."""
    if "\0" in text:
        return "NUL byte"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "not UTF-8"
    return ""
