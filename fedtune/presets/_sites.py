"""Compose the site files of a preset, after checking the column names in a site's own file."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.core import isolation
from fedtune.core.bases.find import find_base
from fedtune.core.config.database import anchor_url, is_over_tcp, redact_url
from fedtune.core.data.cells import key_of
from fedtune.core.data.declared_size import FAR
from fedtune.core.data.files import Rejected, placed_rows
from fedtune.core.data.sources import SOURCES, Source
from fedtune.core.data.sources._interface import Names
from fedtune.core.errors import ConfigError, DataError, escape_controls
from fedtune.presets import _written
from fedtune.presets._public import MOST_CHOICES
from fedtune.presets.places import WherePath, file_at, is_bulk, lines_of, names_of, split_place
from fedtune.presets.templates import NAME, acceptance, ledger_beside, quote_string

if TYPE_CHECKING:
    from fedtune.presets import Records

# Words in a column's name that suggest that it identifies the patient.
WHOSE = frozenset(
    {
        *("patient", "patients", "subject", "person", "participant", "mrn", "pid", "unit", "case"),
        *("encounter", "admission", "visit", "stay", "dialogue", "conversation", "document", "doc"),
    }
)

CHARACTERS = 4.0  # characters in a token: 4.0 to 4.9 in English medical texts
HALF = 0.5  # share of a median record; if the plan reads less, there is a warning


def check(records: Records) -> None:
    """Check the values that are written into the site files. Errors: ConfigError if the number of
    files does not fit the number of sites, or a name is invalid; DataError for a file that does not
    exist."""
    files, expected = len(records.data), 1 if records.role == "site" else records.expected
    if files and expected and files != expected and records.role != "coordinator":
        raise ConfigError(
            f"{files} files of records for {expected} site{'s' if expected > 1 else ''}",
            "one file for each site",
            "give --data once for each site, and the same number as --sites",
        )
    if records.sizes and len(records.sizes) != records.sites:
        raise ConfigError(
            f"{len(records.sizes)} sizes for {records.sites} site{'s' * (records.sites > 1)}",
            "--size once for all of them, or once for each, in the order of --data",
        )
    if records.name is not None and not re.fullmatch(NAME, records.name):
        raise ConfigError(
            f"--name {records.name[:80]!r}: not a valid site name",
            "1 to 64 letters, digits, dots, dashes or underscores",
        )
    for place in records.data:
        path = file_at(place)
        if path is None:
            continue
        if not path.exists():
            raise DataError(f"{path}: no such file", "each site's file of records")
        if path.resolve() in {p.resolve() for p in (records.evaluation, records.public) if p}:
            raise ConfigError(
                f"{path}: is named as a site's records and as public records",
                "public records that are not a site's records",
            )


def columns_of(place: WherePath, asked: Mapping[str, str]) -> list[str]:
    """List those columns of a site's file whose names may be shown. All rows are read, and none is
    kept.

    asked: option -> the column that it names. Errors: DataError for a column that the file does not
    have (the error lists the columns that it has), and for a file or a database that cannot be read
    or is empty."""
    path, names, source = _open_place(place, asked)
    if not sum(1 for _ in placed_rows(path, asked, names=names, source=source)):
        raise DataError(f"{names.where}: no records", "a file of records", "choose another --data")
    return names.shown + names.common


@dataclass(frozen=True)
class FileCounts:
    """Counts of a site's own file, shown only to the person who has the file.

    - where: the file's name
    - rows: number of records
    - units: number of patients if a column names them, else of records
    - target: the column of the classes
    - classes: class -> number of records
    - lengths: for each record, the number of characters of its input and its longest answer
      together"""

    where: str
    rows: int
    units: int
    target: str
    classes: Counter[str]
    lengths: list[int]


def count_file(
    place: WherePath,
    asked: Mapping[str, str],
    *,
    prompt: str | None,
    answers: Sequence[str],
    target: str,
    patient: str | None,
) -> FileCounts:
    """Read a site's file once and count what it holds.

    - place: the site's file, folder or table
    - asked: option of `fedtune init` -> the column that it names, which the file must have
    - prompt: the column of the input; None if the task has none
    - answers: the columns of answers; of each record the longest one counts for its length
    - target: the column of the class
    - patient: the column of the patient; None if each record is a unit

    Errors: DataError if the file lacks a column, cannot be read or is empty."""
    path, names, source = _open_place(place, asked)
    classes = Counter[str]()
    units = set[str]()
    lengths = list[int]()
    total = 0
    for _, row in placed_rows(path, asked, names=names, source=source):
        total += 1
        cells = row if isinstance(row, dict) else {}
        with suppress(Rejected):
            classes[key_of(cells.get(target))] += 1
        with suppress(Rejected):
            units.add(key_of(cells.get(patient or "")))
        texts = [len(str(cells.get(name) or "")) for name in answers]
        lengths.append(max(texts, default=0) + len(str(cells.get(prompt or "") or "")))
    where = names.where.name if isinstance(names.where, Path) else names.where
    return FileCounts(where, total, len(units) if patient else total, target, classes, lengths)


def classes_note(counts: FileCounts, known: set[str]) -> str:
    """Return a line that says how many of a site's records are of classes which the study does not
    have, and lists these classes, since such records train nothing; "" if there are none. counts:
    the counts of the site's file. known: the study's classes; if it is empty, since nobody named
    classes, all classes of the file are listed."""
    strange = Counter({label: n for label, n in counts.classes.items() if label not in known})
    if not strange:
        return ""
    shown = ", ".join(
        f"{escape_controls(c)[:40]} {n:,}" for c, n in strange.most_common(MOST_CHOICES)
    )
    texts = len(strange) > MOST_CHOICES and 2 * len(strange) > counts.rows  # a column of texts
    if len(strange) > MOST_CHOICES:  # texts are not for a screen
        shown = f"is {counts.target!r} the column of the classes?" if texts else f"{shown} …"
    if not known:
        return (
            f"{counts.where}: {counts.rows:,} records of {len(strange)} classes: {shown}; records "
            "of a class that the study does not have will be left out: compare these classes with "
            "the coordinator's"
        )
    are = "is" if strange.total() == 1 else "are"
    options = " ".join(
        f"--also-label {quote_string(escape_controls(c)[:40])}" for c in list(strange)[:4]
    )
    todo = "" if texts else f"; in a new folder, {options} takes such records in"
    return (
        f"{counts.where}: {strange.total():,} of {counts.rows:,} records {are} of a class that the "
        f"study has not, and will be left out: {shown}{todo}"
    )


def size_note(counts: FileCounts, declared: int, unit: str) -> str:
    """Return a line that says that a file holds far more or fewer units than the site declares; ""
    if it does not. The line is a warning if the numbers differ by a factor of two or more, which
    changes what the study can do.

    counts: the counts of the file. declared: the declared size. unit: the noun for a unit,
    "patient" or "record"."""
    if abs(declared - counts.units) <= FAR * declared:
        return ""
    twice = counts.units >= 2 * declared or 2 * counts.units <= declared
    return (
        f"{'WARNING: ' if twice else ''}{counts.where}: {counts.units:,} {unit}s, and the site "
        f"declares {declared:,}, on which rates, noise and weight depend. To correct this, give "
        "--size once for each --data, or set site.declared_size in its site.toml; choose a round "
        "figure, since it is public"
    )


def length_note(counts: FileCounts, most: int, cut: str) -> str:
    """Return a line that says how much of a median record the plan reads; "" if it reads all of it.
    Tokens are estimated, since no base is loaded yet.

    counts: the counts of the file. most: objective.max_length. cut: a text that says what a longer
    record loses."""
    tokens = statistics.median(counts.lengths or [0]) / CHARACTERS
    if tokens <= most:
        return ""
    share = most / tokens
    todo = ""
    if share < HALF:
        todo = ". Raise objective.max_length in study.toml, or shorten the texts"
    return (
        f"{'WARNING: ' if share < HALF else ''}{counts.where}: a median record has about "
        f"{tokens:,.0f} tokens, of which the plan reads {most} ({share:.0%}); {cut}{todo}"
    )


def _open_place(place: WherePath, asked: Mapping[str, str]) -> tuple[Path, Names, Source | None]:
    if isinstance(place, str):
        url, table = split_place(place)
        options = {"url": anchor_url(url, Path.cwd()), "table": table}
        names = Names(redact_url(url), asked)
        source: Source | None = SOURCES.build("sql", options)
    else:
        names = Names(place, asked)
        source = SOURCES.build("fhir", {}) if is_bulk(place) else _written.source(place, asked)
    return place if isinstance(place, Path) else Path(), names, source


def looks_like_a_patients(columns: list[str]) -> str | None:
    """Return the first column whose name suggests that it identifies the patient.

    >>> looks_like_a_patients(["note", "Patient ID"])
    'Patient ID'
    """
    for name in columns:
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
        if WHOSE & {word.lower() for word in words} and len(words) <= 3:
            return name
    return None


def files(records: Records, columns: str, asked: Mapping[str, str]) -> dict[str, str]:
    """Compose a site file for each site; return its path in the study -> its text. columns: the
    lines of [data.columns]; asked: option -> the column that it names."""
    if records.role == "site" or (not records.data and records.sites == 1):
        places = {"site.toml": records.name or "my-hospital"}
    else:
        places = {f"sites/{name}/site.toml": name for name in names(records)}
    paths = records.data or (None,) * len(places)
    read = [
        lines_of(path) + _written.lines(path, asked) if path else 'path = "data.jsonl"'
        for path in paths
    ]
    patient = f"\npatient = {quote_string(records.patient)}" if records.patient else NOBODY
    return {
        place: SITE.format(
            name=name,
            where=where,
            state=_state(path),
            size=size,
            most=MAX_EPSILON,
            delta=f"{records.delta:g}",
            rule=records.delta_rule,
            declared=f"\ndeclared = {quote_string(records.declared)}" if records.declared else "",
            bases=_bases(records.base),
            admission=REVIEWED + HELD + _isolation(path) if records.role == "site" else "",
            columns=columns + patient,
            acceptance=acceptance(where, columns + patient),
        )
        for (place, name), path, where, size in zip(
            places.items(), paths, read, records.declared_sizes, strict=True
        )
    }


def _isolation(records: WherePath | None) -> str:
    """Compose the line of [policy] that asks for as much isolation of vault and courier as this
    machine supports. records: the place of the site's records, since a database over TCP allows
    less; None if it is not known."""
    lacks = [each for half in isolation.try_confinement() for each in half.missing]
    if isinstance(records, str) and is_over_tcp(records):
        lacks.append("a database over TCP")
    if lacks:
        return f'isolation = "preferred"       # this machine gives less: {"; ".join(lacks)}\n'
    return ISOLATED


def _bases(model: str) -> str:
    """Compose the line of [policy] that allows the base in the folder `model`, and no other base;
    "" if `model` is no folder."""
    if not model or not Path(model).is_dir():
        return ""
    found = find_base(model).digest
    return f"bases = [{quote_string(found)}]   # of {quote_string(model)}, which the study names\n"


def _state(data: WherePath | None) -> str:
    place = ledger_beside(data) if data else None
    if place is None:
        return ""
    return (
        f"\nstate = {quote_string(place)}   # the ledger: every study of these records pays there"
    )


def names(records: Records) -> list[str]:
    """Return a name for each site. The sites are named after their tables, their files or the
    folders of these files: the first of the three whose names all differ and are valid. If none of
    them is so, the sites are numbered: site-1 and so on."""
    for found in zip(*map(names_of, records.data), strict=False):
        if len({*found}) == len(found) and all(re.fullmatch(NAME, name) for name in found):
            return [*found]
    return [f"site-{n}" for n in range(1, records.sites + 1)]


# For a site that joins a consortium: no plan spends ε before a person at the site has signed it.
REVIEWED = """\
admission = "reviewed"        # joining signs the plan in the coordinator's answer; a further plan
                              # waits for `fedtune review --sign`. "standing": the rules decide
"""
# Commented out: a site where nobody looks would be left out of every round.
HELD = """\
# answers = "held"            # each answer waits here until a person lets it go: `fedtune let-go`
"""
ISOLATED = """\
isolation = "required"        # the process that reads records has no network, and the process with
                              # a network cannot read them; "preferred": as far as a machine can
"""
MAX_EPSILON = 8.0  # policy.max_epsilon of a site; comments in the recipes' study.toml name it too
# ε of a recipe's study. A site's budget then has room for its round twice (at δ ≤ 0.01): for a
# round that a crash repeats, or for a second study of the same records.
EPSILON = 4.9
NOBODY = '\n# patient = "patient_id"'
SITE = """\
# {name}'s own file: where its records lie and what it allows. It is never sent.
[site]
name = "{name}"
declared_size = {size}               # units, as a person states it in public; never counted{state}

[data]
{where}{declared}
[data.columns]
{columns}

[policy]
max_epsilon = {most}
max_delta = {delta:<17} # {rule}
{admission}{bases}{acceptance}"""
