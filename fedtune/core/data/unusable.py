"""Make the errors for a dataset of which too few records can be used to train. They tell a person
what to correct."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from fedtune.core.config import ObjectiveTable
from fedtune.core.data.records import Read
from fedtune.core.errors import DataError


def one_unit(path: Path | str, unit: str) -> DataError:
    """Return the error for a dataset whose usable records all belong to one unit. path: where the
    records are, as messages name it; unit: "record" or "patient"."""
    return DataError(
        f"{path}: all usable records belong to one {unit}, and one {unit} alone can be neither "
        "protected nor trained on",
        f"at least 2 {unit}s",
        "add records, or check data.columns.patient",
    )


def nothing_left(
    path: Path | str, rejected: Counter[str], objective: ObjectiveTable, read: Read
) -> DataError:
    """Return the error for a dataset without a usable record. It says what most likely has to be
    corrected: the filter or the consent column, the labels, or the length.

    - path: where the records are, as messages name it
    - rejected: the number of rejected rows by reason
    - objective: the plan's objective, whose labels are listed if no record has one of them
    - read: what was read from the file; it says how many rows data.filter and data.consent left out
    """
    if (read.filtered or read.withheld) and not rejected:
        key = "data.consent" if read.withheld else "data.filter"
        return DataError(
            f"{path}: {key} leaves none of {read.filtered + read.withheld} rows",
            f"rows that {key} admits",
            f"compare {key} with the column; `fedtune data report` counts what is left out",
        )
    if set(rejected) == {"unknown label"}:
        return DataError(
            f"{path}: no record has a label that objective.labels lists",
            f"one of {', '.join(objective.labels)}",
            "compare the label column with objective.labels",
        )
    counts = ", ".join(f"{n} {reason}" for reason, n in rejected.most_common())
    todo = ""
    if rejected["too long"] or rejected["answer too long"]:
        todo = 'raise objective.max_length, or set objective.overflow = "truncate"'
        todo = todo if rejected["too long"] else "raise objective.max_length"
    return DataError(
        f"{path}: all records are rejected ({counts})", "at least 2 usable records", todo
    )
