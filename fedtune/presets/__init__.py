"""Ready-made studies, whose settings were measured, of one's own records: `fedtune init --task`.

One file per task. A preset's public file is divided once: its selection records choose how far each
round moves the adapter, its evaluation records only judge the result; some tasks also learn from a
part of it, before the first round.

A task has COLUMNS, what its two columns are called if nobody says; KEYS, those that site.toml has
for them; EPSILON; PARTS, the shares of the public records; and `study`, which composes study.toml.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedtune.data.files import rows
from fedtune.errors import ConfigError, DataError, InfrastructureError
from fedtune.files.writing import replace
from fedtune.presets import answer, classify

TASKS = {"classify": classify, "answer": answer}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LEAST = 40  # public records: with fewer, all of them judge


@dataclass(frozen=True)
class Records:
    """One's own files and their columns, of which a preset makes a study.

    data: each site's file; evaluation: a public file with answers; public: another to learn from,
    before the first round; prompt, target: the columns of what is read and of what is to be said
    of it, else the task's own; patient: that of the patient, else the record is the unit; labels:
    the classes, else those of `evaluation`; size: units at a site, as a person states it in public;
    epsilon: else the task's own; role: whose files are written; name: a single site's, for role
    "site"; expected: how many sites take part, where no data says so."""

    prompt: str = ""
    target: str = ""
    patient: str | None = None
    data: tuple[Path, ...] = ()
    evaluation: Path | None = None
    public: Path | None = None
    labels: tuple[str, ...] = ()
    size: int = 200
    epsilon: float = 0.0
    role: Literal["both", "coordinator", "site"] = "both"
    name: str | None = None
    expected: int | None = None

    @property
    def delta(self) -> float:
        """The power of ten that is at most a fifth of 1 / size, so that no unit can be let out."""
        return 10.0 ** -len(str(5 * self.size - 1))

    @property
    def sites(self) -> int:
        return self.expected or max(1, len(self.data))

    @property
    def min_sites(self) -> str:
        """The line of study.toml's [strategy] for a coordinator, whose first round waits for all
        sites; else nothing."""
        if self.role != "coordinator":
            return ""
        return f"min_sites = {self.sites:<20} # the first round waits for all of them\n"


def write(folder: Path | str, task: str, records: Records) -> list[Path]:
    """Write a study of `task` to a new folder: study.toml, site files, and the public records that
    `records.evaluation` was divided into; of one role's, its own alone. Returns the paths.

    >>> from fedtune.presets import Records, write
    >>> [path.name for path in write("triage", "classify", Records(labels=("A", "B")))]
    ['study.toml', 'site.toml']

    Errors: ConfigError (no such task, labels missing, the folder holds a study), DataError (a file
    or a column that is not there), InfrastructureError. Nothing is written then."""
    folder = Path(folder)
    if task not in TASKS:
        raise ConfigError(f"no preset is called {task}", f"one of {', '.join(TASKS)}")
    for name in ("study.toml", "site.toml", "sites"):
        if (folder / name).exists():
            raise ConfigError(f"{folder / name} exists", "a new folder", "choose another")
    _check_sites(records)
    for path in records.data:
        if not path.exists():
            raise DataError(f"{path}: no such file", "each site's file of records")
        if path.resolve() in {p.resolve() for p in (records.evaluation, records.public) if p}:
            raise ConfigError(
                f"{path}: a site's records and public ones in one file",
                "public records that are no site's",
            )
    recipe, texts = TASKS[task], {}
    records = dataclasses.replace(
        records,
        prompt=records.prompt or recipe.COLUMNS[0],
        target=records.target or recipe.COLUMNS[1],
        epsilon=records.epsilon or recipe.EPSILON,
    )
    if records.role != "site":
        public = _public(records, folder.name, recipe.PARTS)
        texts["study.toml"] = recipe.study(folder.name, records, public)
        for name, part in public.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
            texts[f"{name}.jsonl"] = "".join(lines)
    if records.role != "coordinator":
        texts |= _site_files(records, recipe.KEYS)
    paths = [folder / name for name in texts]
    try:
        for path, text in zip(paths, texts.values(), strict=True):
            replace(path, text.encode(), private=path.name == "site.toml")
    except InfrastructureError:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return paths


def tables(
    what: dict[str, str], public: dict[str, list[dict[str, Any]]], columns: str, metric: str
) -> str:
    """Compose the tables of study.toml for the public records that there are, each commented."""
    return "".join(
        f'\n[{table}]{" " * (23 - len(table))}{comment}\npath = "{table}.jsonl"\n'
        + {"evaluation": f'metric = "{metric}"\n', "public": LICENCE}.get(table, "")
        + f"[{table}.columns]\n{columns}\n"
        for table, comment in what.items()
        if table in public
    )


def _public(
    records: Records, seed: str, parts: dict[str, float]
) -> dict[str, list[dict[str, Any]]]:
    """Divide the public records with answers, all of a patient's to one part; {} where there are
    none."""
    public: dict[str, list[dict[str, Any]]] = {}
    if records.public and "public" in parts:
        public["public"] = [row for rows in _usable(records.public, records) for row in rows]
        parts = {name: part for name, part in parts.items() if name != "public"}
    if records.evaluation is None:
        return public
    units = _usable(records.evaluation, records, public.get("public", []))
    random.Random(seed).shuffle(units)
    ends = itertools.accumulate(part / sum(parts.values()) for part in parts.values())
    total = sum(map(len, units))
    parts = dict(zip(parts, ends, strict=True)) if total >= LEAST else {"evaluation": 1.0}
    public |= {name: [] for name in parts}
    taken = 0
    for unit in units:
        share = (taken + len(unit) / 2) / total  # where its middle lies
        name = next((name for name, end in parts.items() if share <= end), "evaluation")
        public[name] += unit
        taken += len(unit)
    return {name: part for name, part in public.items() if part}


def _usable(
    path: Path, records: Records, but: Sequence[dict[str, Any]] = ()
) -> list[list[dict[str, Any]]]:
    """Read the records that have both columns, each once and none of `but`, by patient where the
    file has that column."""
    both = {"--text": records.prompt, "--target": records.target}
    units: dict[Any, dict[str, dict[str, Any]]] = {}
    seen = {json.dumps(row, sort_keys=True) for row in but}
    for number, row in enumerate(rows(path, both)):
        if not isinstance(row, dict):
            continue
        kept = {name: row.get(name) for name in both.values()}
        key = json.dumps(kept, sort_keys=True)
        if key in seen or not all(str(value or "").strip() for value in kept.values()):
            continue
        seen.add(key)
        patient = row.get(records.patient or "")
        units.setdefault(str(patient) if patient else number, {})[key] = kept
    if not units:
        raise DataError(f"{path}: no usable record", "public records with answers")
    return [[*unit.values()] for unit in units.values()]


def _check_sites(records: Records) -> None:
    """Errors: ConfigError where the number of files does not suit the number of sites, or a name is
    none."""
    files, expected = len(records.data), 1 if records.role == "site" else records.expected
    if files and expected and files != expected and records.role != "coordinator":
        raise ConfigError(
            f"{files} files of records for {expected} site{'s' if expected > 1 else ''}",
            "one of each site",
            "--data once for each site, and --sites as many",
        )
    if records.name is not None and not NAME.fullmatch(records.name):
        raise ConfigError(
            f"--name {records.name[:80]!r}: no site's name",
            "1 to 64 letters, digits, dots, dashes or underscores",
        )


def _site_files(records: Records, keys: tuple[str, str]) -> dict[str, str]:
    """Fill in a site file for each site, by the name that it lies under."""
    if records.role == "site" or (not records.data and records.sites == 1):
        name = records.name or "my-hospital"
        path = records.data[0].absolute() if records.data else "data.jsonl"
        state = _state(records.data[0]) if records.data else ""
        text = SITE.format(name=name, path=quoted(path), state=state, **_of(records, keys))
        return {"site.toml": text}
    names = [re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") for path in records.data]
    if not names or len({*names}) < len(names) or not all(NAME.fullmatch(name) for name in names):
        names = [f"site-{n}" for n in range(1, records.sites + 1)]
    places = [path.absolute() for path in records.data] or [Path("data.jsonl")] * len(names)
    states = [_state(path) for path in records.data] or [""] * len(names)
    return {
        f"sites/{name}/site.toml": SITE.format(
            name=name, path=quoted(path), state=state, **_of(records, keys)
        )
        for name, path, state in zip(names, places, states, strict=True)
    }


def _state(data: Path) -> str:
    """Compose the line of site.toml that keeps a site's ledger beside its records, where every
    study of them finds it; "" where that folder cannot be written to."""
    folder = data.absolute().parent
    if not os.access(folder, os.W_OK):
        return ""
    place = folder / ".fedtune" / re.sub(r"[^A-Za-z0-9_-]+", "-", data.name).strip("-")
    return f"\nstate = {quoted(place)}   # the ledger: every study of these records pays there"


def _of(records: Records, keys: tuple[str, str]) -> dict[str, Any]:
    patient = records.patient
    column = f"\npatient = {quoted(patient)}" if patient else '\n# patient = "patient_id"'
    return {
        "size": records.size,
        "delta": f"{records.delta:g}",
        "columns": f"{keys[0]} = {quoted(records.prompt)}\n{keys[1]} = {quoted(records.target)}"
        + column,
    }


def quoted(text: object) -> str:
    """Quote a TOML string."""
    return json.dumps(str(text), ensure_ascii=False)


def listed(texts: Sequence[str]) -> str:
    """Format a TOML list of strings, one on each line."""
    return "[\n" + "".join(f"    {quoted(text)},\n" for text in texts) + "]"


LICENCE = 'licence = "as its owner allows"  # say which\n'
SITE = """\
# {name}'s own file: where its records lie and what it allows. It is never sent.
[site]
name = "{name}"
declared_size = {size}               # units, as a person states it in public; never counted{state}

[data]
path = {path}
[data.columns]
{columns}

[policy]
max_epsilon = 8.0
max_delta = {delta}
"""
