"""Check that the records that choose a run's adapter are not those that its figures are of."""

from __future__ import annotations

from fedtune.config import Study
from fedtune.data.records import content_of, read_records
from fedtune.errors import DataError


def check_selection(study: Study) -> None:
    """Check that [selection] shares no record with [evaluation].

    Errors: DataError where it does, or where a file cannot be read."""
    if study.selection is None or study.evaluation is None:
        return
    contents = []
    for file in (study.selection, study.evaluation):
        records, _ = read_records(file, unit="record", labelled=True, strict=True)
        contents.append({content_of(record) for record in records})
    shared = len(contents[0] & contents[1])
    if shared:
        raise DataError(
            f"{shared} records of [selection] are in [evaluation] too",
            "two files that share no record",
            "move them out of one of the two: what chose the adapter cannot also judge it",
        )
