"""The public records of a preset: which part of them does what, and their images or recordings."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config.templates import quoted
from fedtune.data.files import rows
from fedtune.errors import DataError, printable

if TYPE_CHECKING:
    from fedtune.presets import Records

Rows = list[dict[str, Any]]
LEAST = 40  # public records: with fewer, all of them judge
LICENCE = 'licence = "as its owner allows"  # say which\n'
MOST_CHOICES = 20


def divided(
    records: Records, seed: str, parts: Mapping[str, float], asked: Mapping[str, str]
) -> dict[str, Rows]:
    """Divide the public records with answers, all of a patient's to one part; {} where there are
    none. asked: option -> the column that it names."""
    public: dict[str, Rows] = {}
    if records.public and "public" in parts:
        found = _usable(records.public, records.patient, asked)
        public["public"] = [row for unit in found for row in unit]
        parts = {name: part for name, part in parts.items() if name != "public"}
    if records.evaluation is None:
        return public
    units = _usable(records.evaluation, records.patient, asked, public.get("public", []))
    random.Random(seed).shuffle(units)
    ends = itertools.accumulate(part / sum(parts.values()) for part in parts.values())
    total = sum(map(len, units))
    limits = dict(zip(parts, ends, strict=True)) if total >= LEAST else {"evaluation": 1.0}
    public |= {name: [] for name in limits}
    taken = 0
    for unit in units:
        share = (taken + len(unit) / 2) / total  # where its middle lies
        name = next((name for name, end in limits.items() if share <= end), "evaluation")
        public[name] += unit
        taken += len(unit)
    return {name: part for name, part in public.items() if part}


def note(path: Path, asked: Mapping[str, str], target: str | None) -> str:
    """Say how many of a public file's rows can be used, and why others cannot. target: the column
    of the classes, which are named too."""
    reasons, kept = Counter[str](), dict[str, str]()
    for row in rows(path, asked):
        values = [row.get(name) for name in asked.values()] if isinstance(row, dict) else []
        key = json.dumps(values)
        if not isinstance(row, dict):
            reasons[row] += 1
        elif not all(str(value or "").strip() for value in values):
            reasons["a cell is empty"] += 1
        elif key in kept:
            reasons["the same as an earlier one"] += 1
        else:
            kept[key] = str(row[target]).strip() if target else ""
    total = len(kept) + reasons.total()
    line = f"public: {len(kept):,} of {total:,} records of {path.name}"
    if reasons:
        why = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())
        line += f"; left out: {why}"
    if target:
        classes = sorted({*kept.values()})
        shown = ", ".join(map(printable, classes[:MOST_CHOICES])) + (
            " …" if len(classes) > MOST_CHOICES else ""
        )
        line += f"\nclasses: {len(classes)} ({shown})"
    return line


def files(records: Records, public: Mapping[str, Rows]) -> dict[str, bytes]:
    """Compose each part's file, and beside it its images or recordings under the part's name.

    Errors: DataError for one that is not inside the folder of its records."""
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
    """Compose the tables of study.toml for the public records that there are, each commented.
    judged: the lines of [evaluation] that say by what."""
    return "".join(
        f'\n[{table}]{" " * (23 - len(table))}{comment}\npath = "{table}.jsonl"\n'
        + {"evaluation": judged, "public": LICENCE}.get(table, "")
        + f"[{table}.columns]\n{columns}\n"
        for table, comment in what.items()
        if table in public
    )


def judged_by(public: Mapping[str, Rows], target: str, lead: str) -> str:
    """Compose [evaluation]'s lines: accuracy, where the answers are a few that come again; else
    loss. lead: what the base reads before each answer."""
    answers = [str(row[target]).strip() for part in public.values() for row in part]
    choices = sorted({*answers})
    if not 2 <= len(choices) <= min(MOST_CHOICES, len(answers) // 4):
        return 'metric = "loss"\n'
    listed = ", ".join(quoted(lead + choice) for choice in choices)
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


def _usable(
    path: Path, patient: str | None, asked: Mapping[str, str], but: Sequence[dict[str, Any]] = ()
) -> list[Rows]:
    """Read the records that have all columns, each once and none of `but`, by patient where the
    file has that column."""
    units: dict[Any, dict[str, dict[str, Any]]] = {}
    seen = {json.dumps(row, sort_keys=True) for row in but}
    for number, row in enumerate(rows(path, asked)):
        if not isinstance(row, dict):
            continue
        kept = {name: row.get(name) for name in asked.values()}
        key = json.dumps(kept, sort_keys=True)
        if key in seen or not all(str(value or "").strip() for value in kept.values()):
            continue
        seen.add(key)
        whose = row.get(patient or "")
        units.setdefault(str(whose) if whose else number, {})[key] = kept
    if not units:
        raise DataError(f"{path}: no usable record", "public records with answers")
    return [[*unit.values()] for unit in units.values()]
