"""Divide the public records of a preset into parts, with their images or recordings."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.core.data.files import rows
from fedtune.core.errors import DataError, escape_controls
from fedtune.presets import _written
from fedtune.presets.templates import quote_string

if TYPE_CHECKING:
    from fedtune.presets import Records

Rows = list[dict[str, Any]]
LEAST = 40  # if there are fewer public records, all of them are for evaluation
LICENCE = 'licence = "as its owner allows"  # say which\n'
MOST_CHOICES = 20


def divide_records(
    records: Records, seed: str, parts: Mapping[str, float], asked: Mapping[str, str]
) -> dict[str, Rows]:
    """Divide the records of the evaluation file into parts. All records of a patient go to one
    part. With fewer than LEAST records, all are for evaluation. A separate public file is not
    divided: it is the part "public".

    - records: the user's public files, and the patient's column
    - seed: a text that decides into which part a patient falls
    - parts: the name of each part -> its share; the shares need not add up to 1
    - asked: option of `fedtune init` -> the column that it names; a row without one of these
      columns is left out

    Returns the name of each part that is not empty -> its rows, with only the columns in `asked`.

    Errors: DataError if a file has no record that can be used."""
    public: dict[str, Rows] = {}
    if records.public and "public" in parts:
        found, _ = _read_usable(records.public, records.patient, asked)
        public["public"] = [row for unit in found for row in unit]
        parts = {name: part for name, part in parts.items() if name != "public"}
    if records.evaluation is None:
        return public
    units, _ = _read_usable(records.evaluation, records.patient, asked, public.get("public", []))
    random.Random(seed).shuffle(units)
    ends = itertools.accumulate(part / sum(parts.values()) for part in parts.values())
    total = sum(map(len, units))
    limits = dict(zip(parts, ends, strict=True)) if total >= LEAST else {"evaluation": 1.0}
    public |= {name: [] for name in limits}
    taken = 0
    for unit in units:
        share = (taken + len(unit) / 2) / total  # the place of the unit's middle, from 0 to 1
        name = next((name for name, end in limits.items() if share <= end), "evaluation")
        public[name] += unit
        taken += len(unit)
    return {name: part for name, part in public.items() if part}


def notes(records: Records, asked: Mapping[str, str]) -> list[str]:
    """Return a line for each public file that says how many of its rows can be used, and why the
    others cannot. asked: option of `fedtune init` -> the column that it names."""
    lines, known = list[str](), Rows()
    for path in (records.public, records.evaluation):
        if path is None:
            continue
        units, left_out = _read_usable(path, records.patient, asked, known)
        known = [row for unit in units for row in unit]
        total = len(known) + left_out.total()
        reasons = [f"{number:,} {reason}" for reason, number in left_out.most_common()]
        why = f"; left out: {', '.join(reasons)}" if reasons else ""
        lines.append(f"public: {len(known):,} of {total:,} records of {path.name}{why}")
    return lines


def classes_notes(records: Records, asked: Mapping[str, str]) -> list[str]:
    """Return lines that list the plan's classes, and the classes of which there is no public
    record. asked: option of `fedtune init` -> the column that it names."""
    found = _of_files(records, asked)
    planned = planned_classes(records, found)
    lines = [f"classes: {len(planned)} ({format_classes(planned)})"] if planned else []
    if found and (bare := [label for label in planned if label not in found]):
        are = "is" if len(bare) == 1 else "are"
        lines.append(
            f"of {len(bare)} of these classes there {are} no public record, so nothing is learnt "
            f"of them before the rounds, and nothing public judges them: {format_classes(bare)}"
        )
    return lines


def format_classes(labels: Sequence[str]) -> str:
    """Format the names of the first MOST_CHOICES classes as a text on one line."""
    more = ["…"] if len(labels) > MOST_CHOICES else []
    return ", ".join([*map(escape_controls, labels[:MOST_CHOICES]), *more])


def planned_classes(records: Records, found: Iterable[str]) -> tuple[str, ...]:
    """Return the plan's classes: the named classes or, if none was named, the classes `found` in
    the public files, followed by `records.also_labels`."""
    labels = records.labels or tuple(sorted(found))
    return tuple(dict.fromkeys((*labels, *records.also_labels)))


def classes(records: Records, asked: Mapping[str, str]) -> set[str]:
    """Return the classes that the study has. They are those that the user named (or, if none were
    named, those found in the public files) and `records.also_labels`. asked: option of `fedtune
    init` -> the column that it names."""
    return {*planned_classes(records, _of_files(records, asked))}


def _of_files(records: Records, asked: Mapping[str, str]) -> set[str]:
    """Return all classes that occur in the records of the user's public files."""
    paths = [path for path in (records.public, records.evaluation) if path]
    usable = [_read_usable(path, records.patient, asked)[0] for path in paths]
    return {str(row[records.target]).strip() for found in usable for unit in found for row in unit}


def files(records: Records, public: Mapping[str, Rows]) -> dict[str, bytes]:
    """Compose the files of the public parts: for each part one file of records and, in a folder
    with the part's name, its images or recordings. Return path -> content. public: the name of each
    part -> its rows.

    Errors: DataError for an image or a recording outside the folder of its records."""
    made: dict[str, bytes] = {}
    for table, part in public.items():
        given = records.public if table == "public" and records.public else records.evaluation
        assert given is not None
        if records.media:
            part = [{**row} for row in part]
            for row in part:
                name = str(row[records.media])
                row[records.media] = f"{table}/{name}"
                made[f"{table}/{name}"] = _medium(given, name)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        made[f"{table}.jsonl"] = "".join(lines).encode()
    return made


def tables(what: Mapping[str, str], public: Mapping[str, Rows], columns: str, judged: str) -> str:
    """Compose the tables of study.toml that name the parts of the public records, each with a
    comment. A part that does not exist gets no table.

    - what: the name of each part -> its comment
    - public: the name of each part -> its rows
    - columns: the lines of each part's table of columns
    - judged: the lines of [evaluation] about the metric"""
    return "".join(
        f'\n[{table}]{" " * (23 - len(table))}{comment}\npath = "{table}.jsonl"\n'
        + {"evaluation": judged, "public": LICENCE}.get(table, "")
        + f"[{table}.columns]\n{columns}\n"
        for table, comment in what.items()
        if table in public
    )


def judged_by(public: Mapping[str, Rows], target: str, lead: str) -> str:
    """Compose the lines of [evaluation] about the metric: accuracy if there are few different
    answers, else loss.

    - public: the name of each part of the public records -> its rows
    - target: the column of the answers
    - lead: the text before each answer"""
    answers = [str(row[target]).strip() for part in public.values() for row in part]
    choices = sorted({*answers})
    if not 2 <= len(choices) <= min(MOST_CHOICES, len(answers) // 4):
        return 'metric = "loss"\n'
    listed = ", ".join(quote_string(lead + choice) for choice in choices)
    return f'metric = "accuracy"\nchoices = [{listed}]\n'


def _medium(given: Path, name: str) -> bytes:
    path, parts = (given.parent / name).resolve(), Path(name)
    inside = path.is_relative_to(given.parent.resolve()) and not parts.is_absolute()
    if not inside or ".." in parts.parts or not path.is_file():
        raise DataError(
            f"{given}: names an image or a recording that does not lie in its folder",
            "a path relative to the file, of a file beside or below it",
        )
    return path.read_bytes()


def _read_usable(
    path: Path, patient: str | None, asked: Mapping[str, str], but: Sequence[dict[str, Any]] = ()
) -> tuple[list[Rows], Counter[str]]:
    """Read those records of a public file that have all columns. Duplicates, and the records in
    `but`, are left out.

    - path: a public file of the user
    - patient: the patient's column; None if there is none
    - asked: option of `fedtune init` -> the column that it names
    - but: rows that this function returned for another file

    Returns two things: the records, with only the columns in `asked`, in a list for each patient
    (or for each record without a patient); and the number of rows left out, by reason.

    Errors: DataError if no record can be used."""
    units: dict[Any, dict[str, dict[str, Any]]] = {}
    left_out = Counter[str]()
    seen = {json.dumps(row, sort_keys=True) for row in but}
    for number, row in enumerate(rows(path, asked, source=_written.source(path, asked))):
        if not isinstance(row, dict):
            left_out[row] += 1
            continue
        kept = {name: row.get(name) for name in asked.values()}
        key = json.dumps(kept, sort_keys=True)
        if not all(str(value or "").strip() for value in kept.values()):
            left_out["a cell is empty"] += 1
        elif key in seen:
            left_out["the same as an earlier one"] += 1
        else:
            seen.add(key)
            whose = row.get(patient or "")
            units.setdefault(str(whose) if whose else number, {})[key] = kept
    if not units:
        raise DataError(f"{path}: no usable record", "public records with answers")
    return [[*unit.values()] for unit in units.values()], left_out
