"""Guess the dialect (delimiter and encoding) of a person's CSV file once, for the person's
site.toml."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.core.data.sources._interface import DELIMITERS
from fedtune.core.data.sources.csv import Csv, guess_format
from fedtune.presets.places import WherePath, file_at
from fedtune.presets.templates import quote_string

Asked = Mapping[str, str]  # option -> the column that it names


def source(place: WherePath, asked: Asked) -> Csv | None:
    """Return the guessed dialect of a CSV file; None for a database, and for a file in the usual
    dialect or another format. asked: option of `fedtune init` -> the column that it names, by which
    a guess is checked. place: the place of a site's records."""
    path = file_at(place)
    return guess_format(path, asked.values()) if path else None


def lines(place: WherePath, asked: Asked) -> str:
    """Compose the lines of [data] in site.toml that name the dialect of a CSV file; "" for the
    usual dialect and for records that are not in a CSV file. place: the place of a site's records.
    asked: option of `fedtune init` -> the column that it names."""
    told = ", ".join(
        f"{key} = {quote_string(value)}" for key, value in _options(place, asked).items()
    )
    return f'\nsource = "csv"\noptions = {{ {told} }}' if told else ""


def note(place: WherePath, asked: Asked) -> str:
    """Return a line for the screen that says with which dialect a CSV file is read; "" for the
    usual dialect and for records that are not in a CSV file. place: the place of a site's records.
    asked: option of `fedtune init` -> the column that it names."""
    path, options = file_at(place), _options(place, asked)
    told = [f"{DELIMITERS[options['delimiter']]} between cells"] if "delimiter" in options else []
    told += [options["encoding"]] if "encoding" in options else []
    return f"{path.name}: read as CSV with {' and '.join(told)}\n" if path and told else ""


def _options(place: WherePath, asked: Asked) -> dict[str, str]:
    found, usual = source(place, asked) or Csv(), Csv()
    options = {"delimiter": found.delimiter, "encoding": found.encoding}
    return {key: value for key, value in options.items() if value != getattr(usual, key)}
