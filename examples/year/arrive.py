"""Let the notes that were written before a day arrive in the hospitals' databases."""

from __future__ import annotations

import argparse
import json
import sqlite3
from contextlib import closing
from pathlib import Path

from examples.write import read_jsonl
from examples.year.prepare import HOSPITALS, INSERT


def arrive(year: Path, until: str) -> dict[str, int]:
    """Add to each notes.db what was written before `until` (YYYY-MM-DD) and is not there, and
    return the number of notes that each hospital has by then."""
    found = {}
    for name in HOSPITALS:
        rows = read_jsonl(year / "coming" / f"{name}.jsonl")
        with closing(sqlite3.connect(year / "sites" / name / "notes.db")) as database:
            database.executemany(INSERT.format("note"), [r for r in rows if r["written"] < until])
            database.commit()
            (found[name],) = database.execute("SELECT count(*) FROM note").fetchone()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--year", type=Path, required=True, help="the folder of examples.year.prepare"
    )
    parser.add_argument("--until", required=True, metavar="YYYY-MM-DD", help="a day of 2026")
    chosen = parser.parse_args()
    print(json.dumps({"notes by then": arrive(chosen.year, chosen.until)}))


if __name__ == "__main__":
    main()
