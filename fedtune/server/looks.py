"""Count how often a continuous study's versions were compared on the same public records.

    out/versions/looked.json    for each public file that versions were compared on: its records

Each comparison on the same records is another chance of a false release, so the plan says how many
there are, and they start anew only with a file that shares no record with an earlier one. Files
that do share one, or are linked by others that do, count as one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedtune.files import reading, writing
from fedtune.server.store import CheckpointError
from fedtune.server.versions import FOLDER, Index

FILE = "looked.json"
Files = Mapping[str, frozenset[str]]  # by a file's sha256: digests of its records


def files_of(out: Path) -> dict[str, frozenset[str]]:
    """Read which public files versions were compared on. Errors: CheckpointError."""
    path = out / FOLDER / FILE
    if not path.exists():
        return {}
    expected, todo = "the file as it was written", "restore it from a copy"
    found = reading.json_in(path, expected, todo, CheckpointError)
    if not all(isinstance(records, list) for records in found.values()):
        raise CheckpointError(f"{path}: damaged", expected, todo)
    return {public: frozenset(map(str, records)) for public, records in found.items()}


def note(out: Path, files: Files) -> None:
    """Write which public files versions are compared on. Errors: InfrastructureError."""
    document = {public: sorted(records) for public, records in files.items()}
    writing.replace(out / FOLDER / FILE, json.dumps(document).encode())


def count_looks(index: Index, files: Files, public: str) -> int:
    """Count the comparisons on the file `public` and on all that share records with it, those of a
    release before there were looks among them.

    >>> count_looks(Index(1, False, ()), {"a": frozenset("xy")}, "a")
    0
    """
    family, rest = {public}, set(files) - {public}
    records = files.get(public, frozenset())
    while shared := {other for other in rest if files[other] & records}:
        family, rest = family | shared, rest - shared
        records = records.union(*(files[other] for other in shared))
    compared = [v for v in index.versions if v.p is not None or v.sure is not None]
    return sum(version.public in family for version in compared)
