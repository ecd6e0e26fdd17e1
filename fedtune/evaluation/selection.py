"""Check that the records that train or choose a run's adapter are not among those by which it is
measured."""

from __future__ import annotations

import itertools
from hashlib import sha256

from fedtune.core.config import EvaluationTable, PublicTable, Study
from fedtune.core.data.records import content_of, read_records
from fedtune.core.errors import DataError


def digests_of(table: EvaluationTable | PublicTable) -> frozenset[str]:
    """Return a digest of each record's content, by which the same record is recognised in another
    file. table: the file whose records are read.

    Errors: DataError."""
    records, _ = read_records(table, unit="record", labelled=True)
    return frozenset(sha256(content_of(record)).hexdigest()[:32] for record in records)


def taught_by(study: Study) -> PublicTable | None:
    """Return the study's [public] table if the model learns, before the first round, from the
    answers in it: if start.steps is above 0, or start.head is "public". Return None otherwise."""
    taught = study.start and (study.start.steps or study.start.head == "public")
    return study.public if taught else None


def check_apart(study: Study) -> None:
    """Check that no two of [selection], [evaluation] and [public] have a record in common. [public]
    counts only if the model learns from its answers before the first round.

    Errors: DataError if two of them share a record, or a file cannot be read."""
    files = {
        "public": taught_by(study),
        "selection": study.selection,
        "evaluation": study.evaluation,
    }
    given = {name: file for name, file in files.items() if file is not None}
    if len(given) < 2:
        return
    contents = {}
    for name, file in given.items():
        records, _ = read_records(file, unit="record", labelled=True, strict=True)
        contents[name] = {content_of(record) for record in records}
    for first, second in itertools.combinations(contents, 2):
        if shared := len(contents[first] & contents[second]):
            did = "trained" if first == "public" else "chose"
            then = "evaluate it" if second == "evaluation" else "choose its steps"
            raise DataError(
                f"{shared} records of [{first}] are in [{second}] too",
                "files that share no record",
                f"move them out of one of the two: records that {did} the adapter "
                f"cannot also {then}",
            )
