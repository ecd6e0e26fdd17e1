"""Write five hospitals' SQLite databases, and the public files, of MedQuAD and PubMedQA.

    <hospital>.db            tables `patient_answer` and, of further patients for the hospital's own
                             acceptance, `held_out`; both (patient_id, question, answer)
    <hospital>-acceptance.toml    the rules of that acceptance, to be added to its site.toml
    public.csv               questions and conclusions of research, which anybody may read: PubMedQA
    test.csv                 further answers like the hospitals': they choose and evaluate

MedQuAD names no patients: each of its pages, a topic with up to four questions, stands for one."""

from __future__ import annotations

import argparse
import csv
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from examples.write import read_jsonl

HOSPITALS = ("alder", "birch", "cedar", "elm", "fir")
PUBLIC, TEST, HELD_OUT = 400, 150, 25  # records; patients; patients of each hospital
QUESTIONS = 4  # of a patient, at most
ACCEPTANCE = """
[acceptance]
url = "sqlite:///{database}"
options = {{ table = "held_out" }}
least_group = 10
thresholds = {{ loss = 3.0 }}
columns = {{ prompt = "question", completion = "answer", patient = "patient_id" }}
"""
Answers = list[tuple[str, str]]  # question, answer


def write(data: Path, public: Path, out: Path, seed: int) -> dict[str, int]:
    """Write all files under `out`, and return the number of each hospital's patients; the same
    seed writes the same records."""
    draw = np.random.default_rng([seed, 47])
    out.mkdir(parents=True, exist_ok=True)
    articles = read_jsonl(public)
    known = draw.choice(len(articles), PUBLIC, replace=False)
    _csv(out / "public.csv", [(articles[i]["question"], articles[i]["long_answer"]) for i in known])
    patients = _patients(read_jsonl(data))
    patients = [patients[i] for i in draw.permutation(len(patients))]
    _csv(out / "test.csv", [answers[0] for answers in patients[:TEST]])
    sizes = {}
    for number, name in enumerate(HOSPITALS):
        mine = patients[TEST + number :: len(HOSPITALS)]
        database = out / f"{name}.db"
        _database(database, {"held_out": mine[:HELD_OUT], "patient_answer": mine[HELD_OUT:]})
        rules = ACCEPTANCE.format(database=database.resolve())
        (out / f"{name}-acceptance.toml").write_text(rules, encoding="utf-8")
        sizes[name] = len(mine) - HELD_OUT
    return sizes


def _patients(rows: Sequence[dict[str, Any]]) -> list[Answers]:
    by_page: dict[str, Answers] = {}
    for row in rows:
        by_page.setdefault(row["doc_id"], []).append((row["question"], row["answer"]))
    return [answers[:QUESTIONS] for answers in by_page.values()]


def _csv(path: Path, rows: Answers) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer"])
        table.writerows(rows)


def _database(path: Path, tables: dict[str, list[Answers]]) -> None:
    path.unlink(missing_ok=True)
    number = 0
    with closing(sqlite3.connect(path)) as database:
        for table, patients in tables.items():
            database.execute(f"CREATE TABLE {table} (patient_id TEXT, question TEXT, answer TEXT)")
            for answers in patients:
                number += 1
                rows = [(f"{path.stem}-{number:03}", *answer) for answer in answers]
                database.executemany(f"INSERT INTO {table} VALUES (?, ?, ?)", rows)
        database.commit()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="MedQuAD's train.jsonl")
    parser.add_argument("--public", type=Path, required=True, help="PubMedQA's train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of who has which patient")
    chosen = parser.parse_args()
    sizes = write(chosen.data, chosen.public, chosen.out, chosen.seed)
    print(json.dumps({"patients": sizes, "public": PUBLIC, "test": TEST}))


if __name__ == "__main__":
    main()
