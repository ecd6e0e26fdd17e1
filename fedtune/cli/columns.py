"""Parse column names that were given on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.core.errors import ConfigError

if TYPE_CHECKING:
    from fedtune.core.config import PublicTable


if TYPE_CHECKING:
    from fedtune.core.config import DataFile


def named_columns(data: Path, pairs: list[str]) -> DataFile:
    """Return the file `data`, with its columns named by `pairs`: texts KEY=NAME, such as
    prompt=question. Without any pair the file has one column, "prompt".

    Errors: ConfigError if a KEY is no part of a record, or the parts do not fit together."""
    from pydantic import ValidationError

    from fedtune.core.config import Columns, DataFile

    by_part = dict(pair.partition("=")[::2] for pair in pairs or ["prompt=prompt"])
    if unknown := set(by_part) - set(Columns.model_fields):
        names = ", ".join(Columns.model_fields)
        raise ConfigError(f"--column {min(unknown)}: no such part of a record", f"one of {names}")
    try:
        return DataFile(path=data, columns=Columns(**by_part))
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--column: {message}", "KEY=NAME, as prompt=question") from None


SEEDS = 2**63 - 1
COLUMNS = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="KEY=NAME",
        help="Name the column of the file that holds a part of a record, such as "
        "prompt=question; may be repeated.",
    ),
]


def public_prompts(path: Path, licence: str, pairs: list[str]) -> PublicTable:
    from fedtune.core.config import PublicTable

    return PublicTable(path=path, columns=named_columns(path, pairs).columns, licence=licence)
