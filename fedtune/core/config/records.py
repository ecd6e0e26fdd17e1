"""Write records from memory to the file from which a site reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedtune.core.errors import DataError
from fedtune.core.files.writing import replace

RECORDS = "records.jsonl"


def write_records(path: Path, records: Iterable[Mapping[str, Any]] | Any) -> None:
    """Write a DataFrame, or dicts by column name, as JSONL that only this user can read. A missing
    value of a DataFrame becomes null.

    Errors: DataError naming the row and its types, never a value; InfrastructureError."""
    if hasattr(records, "to_json"):  # a DataFrame; pandas is no dependency
        text = records.to_json(orient="records", lines=True, force_ascii=False, date_format="iso")
    else:
        text = "".join(_line(number, row) + "\n" for number, row in enumerate(records, 1))
    replace(path, text.encode(), private=True)


def _line(number: int, row: Any) -> str:
    try:
        if isinstance(row, Mapping):
            return json.dumps(dict(row), ensure_ascii=False, allow_nan=False)
        kind = type(row).__name__
    except (TypeError, ValueError):
        kind = ", ".join(sorted({type(value).__name__ for value in row.values()}))
    raise DataError(
        f"row {number} is not a record ({kind})",
        "a dict of text and numbers by column name, or a DataFrame",
    )
