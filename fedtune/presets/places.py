"""Parse the place of a site's records from the command line: a file, a folder, or a database
table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypeAlias

from fedtune.core.config.database import FILES, anchor_url, check_url, file_of, kind_of
from fedtune.core.errors import ConfigError

WherePath: TypeAlias = Path | str  # a file or a folder; URL#TABLE
BULK = ".ndjson"  # files of a FHIR bulk export


def place_of(text: str) -> WherePath:
    """Parse a place as it was typed: a url with a table behind #, or else a path.

    >>> place_of("notes.csv")
    PosixPath('notes.csv')
    >>> place_of("sqlite:///clinic.db#note")
    'sqlite:///clinic.db#note'

    Errors: ConfigError if the url is not allowed or names no table. The error's text leaves out the
    url, since a url may hold a password."""
    if "://" not in text:
        return Path(text)
    url, table = split_place(text)
    try:
        check_url(url)
    except ValueError as error:
        raise ConfigError(f"--data: a url {error}", "such as sqlite:///clinic.db#note") from None
    if not table:
        raise ConfigError(
            "--data: the url names no table", "URL#TABLE, as sqlite:///clinic.db#note"
        )
    return text


def split_place(place: str) -> tuple[str, str]:
    """Split a place URL#TABLE into the url and the table; the table is "" if none is named."""
    url, _, table = place.partition("#")
    return url, table


def file_at(place: WherePath) -> Path | None:
    """Return the path of a place's file or folder. For a table of a database that is one file
    (SQLite, DuckDB), return the path of the database. For a database on a server, return None."""
    if isinstance(place, Path):
        return place
    url, _ = split_place(place)
    return file_of(url) if kind_of(url) in FILES else None


def is_bulk(place: WherePath) -> bool:
    """Return whether a place is a folder that holds a FHIR bulk export, by the names of its
    files."""
    return isinstance(place, Path) and place.is_dir() and any(place.glob(f"*{BULK}"))


def names_of(place: WherePath) -> list[str]:
    """List candidates for a site's name, taken from the place of its records, the nearest first:
    the table of a database, then the file's name, then the name of the file's folder. A character
    that a name may not have becomes a dash."""
    texts = [] if isinstance(place, Path) else [split_place(place)[1]]
    if file := file_at(place):
        texts += [file.stem, file.absolute().parent.name]
    return [re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") for text in texts]


def lines_of(place: WherePath) -> str:
    """Return the lines that name the place of the records in the table [data] of site.toml."""
    if isinstance(place, Path):
        return f"path = {_quote(place.absolute())}" + ('\nsource = "fhir"' * is_bulk(place))
    url, table = split_place(place)
    return f"url = {_quote(anchor_url(url, Path.cwd()))}\noptions = {{ table = {_quote(table)} }}"


def _quote(text: object) -> str:
    return json.dumps(str(text), ensure_ascii=False)
