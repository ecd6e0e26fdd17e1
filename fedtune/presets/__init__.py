"""Build ready-made studies with measured settings from one's own records: `fedtune init --task`.

Each task has a file of its own. The user's public file is divided once, into three parts:

- selection records, by which the coordinator chooses how far each round moves the adapter
- evaluation records, which only judge the result
- records to learn from before the first round

If the file holds few records, all are for evaluation.

The module of a task has these names. A task that trains an adapter gets its `study` from
`_adapter.Recipe`, which holds the task's settings.

- COLUMNS: for each field of Records that names a column, the key in site.toml and the column's
  default name
- PARTS: the shares of the public records
- study: a function that composes study.toml"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedtune.core.errors import ConfigError, InfrastructureError
from fedtune.core.files.writing import replace
from fedtune.presets import (
    _public,
    _shared_noise,
    _sites,
    _written,
    answer,
    classify,
    instruct,
    preference,
    speech,
    vision,
)
from fedtune.presets.places import WherePath
from fedtune.presets.templates import quote_string
from fedtune.report.delta import chance, delta_for

TASKS: dict[str, Any] = {
    "classify": classify,
    "answer": answer,
    "instruct": instruct,
    "preference": preference,
    "vision": vision,
    "speech": speech,
}
OPTIONS = {  # field of Records -> option of `fedtune init`
    "media": "--media",
    "prompt": "--text",
    "target": "--target",
    "rejected": "--rejected",
}


@dataclass(frozen=True)
class Records:
    """What a user gave to `fedtune init`: files, columns and settings, from which a preset builds a
    study. A field that the user did not give has the stated default. A unit is a patient, or a
    record if no column names the patient.

    - data: each site's file or folder, or URL#TABLE
    - evaluation: a public file with answers
    - public: another public file, to train on before the first round
    - prompt, target, rejected, media: columns of the input, of the target, of a worse answer, and
      of the path of an image or a recording; default: the task's columns
    - patient: column of the patient; without it the record is the unit
    - labels: the classes; default: the classes in the public files
    - also_labels: further classes
    - base: the model; default: the task's
    - size: the declared size of each site, i.e. the number of its units that is made public
    - sizes: the sites' declared sizes in the order of data, if they differ
    - epsilon: ε of the study; default: 4.9, or less if the sites share noise
    - declared: what a person declares the sites' records to be, for a rehearsal
    - role: whose files are written: the coordinator's, a single site's, or both
    - name: the name of the single site, for role "site"
    - expected: the number of sites that take part, if data does not have a file for each
    - colluding: how many sites may collude with the coordinator, if each site adds only a share of
      the noise that ε needs; default: each site adds all of this noise by itself"""

    prompt: str = ""
    target: str = ""
    rejected: str = ""
    media: str = ""
    patient: str | None = None
    data: tuple[WherePath, ...] = ()
    evaluation: Path | None = None
    public: Path | None = None
    labels: tuple[str, ...] = ()
    also_labels: tuple[str, ...] = ()
    base: str = ""
    size: int = 200
    sizes: tuple[int, ...] = ()
    epsilon: float = 0.0
    declared: Literal["public", "generated"] | None = None
    role: Literal["both", "coordinator", "site"] = "both"
    name: str | None = None
    expected: int | None = None
    colluding: int | None = None

    @property
    def unit(self) -> str:
        return "patient" if self.patient else "record"

    @property
    def declared_sizes(self) -> tuple[int, ...]:
        """The declared size of each site, as a tuple."""
        own = max(1, len(self.data)) if self.role == "site" else self.sites
        return self.sizes or (self.size,) * own

    @property
    def delta(self) -> float:
        """The study's δ: the largest power of ten that is at most 1 / (10 · n), for the n units of
        the largest site."""
        return delta_for(max(self.declared_sizes))

    @property
    def delta_rule(self) -> str:
        """A text for the files' comments that says by which rule δ follows from the number of
        units."""
        return f"δ: the power of ten at or below 1 / (10 · {max(self.declared_sizes)} units)"

    @property
    def delta_note(self) -> str:
        """The text of `delta_rule`, and what δ means for the largest site: with which probability ε
        may not hold for one unit, and with which for any unit of the site."""
        most = max(self.declared_sizes)
        return f"{self.delta_rule}; {chance(self.delta, self.unit, most)}"

    @property
    def sites(self) -> int:
        return self.expected or max(1, len(self.data))

    @property
    def noise_of_sum(self) -> float:
        """The standard deviation of the noise in the sum over all sites, in units of σ times the
        clipping norm: √K for K sites if each adds noise of its own, and less if they share it."""
        shares = 1 if self.colluding is None else self.sites - self.colluding
        return math.sqrt(self.sites / shares)

    @property
    def min_sites(self) -> str:
        """The line about min_sites for study.toml's [strategy], or "" if none is needed. It is
        needed if the sites share noise, or if the files are written for a coordinator alone, whose
        first round waits for all sites."""
        if self.colluding is not None:
            return f"min_sites = {self.sites:<24} # without one of them there is too little noise\n"
        if self.role != "coordinator":
            return ""
        return f"min_sites = {self.sites:<24} # the first round waits for all of them\n"


def write(folder: Path | str, task: str, records: Records) -> list[Path]:
    """Write a study of `task` to a new folder. Return the paths of study.toml, the site files, and
    the parts into which the public records are divided. If the role is not "both", only the files
    of this role are written.

    >>> from fedtune.presets import Records, write
    >>> [path.name for path in write("triage", "classify", Records(labels=("A", "B")))]
    ['study.toml', 'site.toml']

    Errors: ConfigError (no such task, labels missing, the folder holds a study), DataError (a file
    or a column that does not exist), InfrastructureError. No file is left after an error."""
    folder = Path(folder)
    records = complete_records(task, records)
    recipe = TASKS[task]
    for name in ("study.toml", "site.toml", "sites"):
        if (folder / name).exists():
            raise ConfigError(f"{folder / name} exists", "a new folder", "choose another")
    _sites.check(records)
    if records.role != "coordinator":
        for path in records.data:
            _sites.columns_of(path, list_columns(task, records, "patient"))
    contents: dict[str, bytes] = {}
    if records.role != "site":
        public = _public.divide_records(
            records, folder.name, recipe.PARTS, list_columns(task, records)
        )
        contents["study.toml"] = recipe.study(folder.name, records, public).encode()
        contents |= _public.files(records, public)
    if records.role != "coordinator":
        texts = _sites.files(
            records, column_lines(task, records), list_columns(task, records, "patient")
        )
        contents |= {name: text.encode() for name, text in texts.items()}
    paths = [folder / name for name in contents]
    try:
        for path, content in zip(paths, contents.values(), strict=True):
            replace(path, content, private=path.name == "site.toml")
    except InfrastructureError:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return paths


def complete_records(task: str, records: Records) -> Records:
    """Fill in what the user left out: return the user's settings with the task's own column names,
    and the presets' ε (4.9), where the user gave none. If the sites share noise, this ε may be
    smaller: it is the largest at which the ε that holds whoever colludes (the fallback ε) fits the
    sites' budget. A base that is a local folder gets its absolute path.

    task: a name in TASKS. records: what the user gave to `fedtune init`, not patients' records.

    Errors: ConfigError for a task that does not exist, a column that the task does not have, or too
    few sites to share noise."""
    if task not in TASKS:
        raise ConfigError(f"no preset is called {task}", f"one of {', '.join(TASKS)}")
    columns = TASKS[task].COLUMNS
    for field, option in OPTIONS.items():
        if getattr(records, field) and field not in columns:
            raise ConfigError(
                f"{option}: the records of --task {task} have no such column",
                "columns for " + ", ".join(OPTIONS[name] for name in columns),
            )
    _shared_noise.check(records)
    values = {field: getattr(records, field) or name for field, (_, name) in columns.items()}
    if records.base and Path(records.base).is_dir():
        values["base"] = str(Path(records.base).absolute())
    epsilon = _sites.EPSILON
    if not records.epsilon and records.colluding is not None:
        epsilon = _shared_noise.largest_epsilon(records, epsilon)
    return dataclasses.replace(records, **values, epsilon=records.epsilon or epsilon)


def list_columns(task: str, records: Records, *more: str) -> dict[str, str]:
    """Return option of `fedtune init` -> column, for the columns that a file of the task must have.
    records: the user's settings with all column names (`complete_records`). more: further fields of
    Records, such as "patient"; their columns are included if the user gave them."""
    fields = [*TASKS[task].COLUMNS, *(field for field in more if getattr(records, field))]
    return {OPTIONS.get(field, f"--{field}"): getattr(records, field) for field in fields}


def column_lines(task: str, records: Records) -> str:
    """Compose the lines of a table of columns, such as [data.columns], without the patient's
    column. records: the user's settings with all column names (`complete_records`)."""
    keys = {field: key for field, (key, _) in TASKS[task].COLUMNS.items()}
    return "\n".join(
        f"{key} = {quote_string(getattr(records, field))}" for field, key in keys.items()
    )


def unit_note(task: str | None, records: Records) -> str:
    """Return a line that says which unit the study protects. If no patient column is named, the
    line also names a column of the sites' files that may be one, if there is any. task: a name in
    TASKS; None for a study without a preset.

    Errors: DataError for a missing file or column; the error lists the columns that exist."""
    columns: list[str] = []
    names: dict[str, str] = {}
    if records.role != "coordinator":
        names = list_columns(task, complete_records(task, records), "patient") if task else {}
        if records.patient:
            names |= {"--patient": records.patient}
        columns = [name for path in records.data for name in _sites.columns_of(path, names)]
    if records.patient:
        return (
            f"protected: a patient, whom the column {records.patient!r} names: all of the "
            "patient's records together"
        )
    # A column of the input or target is no patient's key, even if it is called "dialogue".
    found = _sites.looks_like_a_patients([c for c in columns if c not in names.values()])
    hint = f"; {found!r} looks like one: --patient {quote_string(found)}" if found else ""
    return (
        "protected: a record, each by itself, since no --patient names the column that says whose "
        f"it is{hint}"
    )


def public_note(task: str, records: Records) -> str:
    """Return a text that says how many of the public records can be used, why the others cannot,
    and which classes the plan has. Return "" for the role "site", and if there are no public
    records."""
    if records.role == "site":
        return ""
    records = complete_records(task, records)
    lines = _public.notes(records, list_columns(task, records))
    lines += (
        _public.classes_notes(records, list_columns(task, records)) if task == "classify" else []
    )
    return "".join(f"{line}\n" for line in lines)


def classes_note(task: str, records: Records) -> str:
    """Return a text that lists the classes in the sites' own files which the study does not have;
    "" if there are none, or for a task other than classify. If the files are written for a single
    site (role "site"), the study's classes are not known, so all classes of its own file are
    listed.

    Errors: DataError for a missing file or column; the error lists the columns that exist."""
    if task != "classify" or records.role == "coordinator":
        return ""
    records = complete_records(task, records)
    known = _public.classes(records, list_columns(task, records))
    notes = [_sites.classes_note(counts, known) for counts in _count_files(task, records)]
    return "".join(f"{note}\n" for note in notes if note)


def files_note(task: str, records: Records) -> str:
    """Return a text about the sites' own files, with a line for each file whose number of units is
    far from the declared size, and a line for each file whose median record is longer than what the
    plan reads. Return "" if there is nothing to report.

    Errors: DataError for a missing file or column; the error lists the columns that exist."""
    if records.role == "coordinator":
        return ""
    records, recipe = complete_records(task, records), TASKS[task]
    notes: list[str] = []
    for counts, size in zip(_count_files(task, records), records.declared_sizes, strict=False):
        notes.append(_sites.size_note(counts, size, records.unit))
        notes.append(_sites.length_note(counts, recipe.MAX_LENGTH, recipe.CUT))
    return "".join(f"{note}\n" for note in notes if note)


def _count_files(task: str, records: Records) -> list[_sites.FileCounts]:
    columns, fields = list_columns(task, records, "patient"), TASKS[task].COLUMNS
    answers = [getattr(records, name) for name in ("target", "rejected") if name in fields]
    return [
        _sites.count_file(
            place,
            columns,
            prompt=records.prompt if "prompt" in fields else None,
            answers=[] if task == "classify" else answers,
            target=records.target,
            patient=records.patient,
        )
        for place in records.data
    ]


def notes(task: str, records: Records) -> str:
    """Return a text that describes the files of a task's study and the unit that it protects."""
    given = complete_records(task, records)
    own = given.data if given.role != "coordinator" else ()
    public = (given.evaluation, given.public) if given.role != "site" else ()
    places = [place for place in (*own, *public) if place]
    ways = "".join(_written.note(place, list_columns(task, given)) for place in places)
    found = public_note(task, records) + classes_note(task, records) + files_note(task, records)
    return ways + found + unit_note(task, records)


def format_list(texts: Sequence[str]) -> str:
    """Format a TOML list of strings, with each string on its own line."""
    return "[\n" + "".join(f"    {quote_string(text)},\n" for text in texts) + "]"


def head(records: Records, **values: object) -> Mapping[str, object]:
    """Return name -> value for the template of study.toml: the values about privacy and sites that
    the template of every preset needs, and `values`, those that this preset adds."""
    return {
        "epsilon": records.epsilon,
        "delta": f"{records.delta:g}",
        "rule": records.delta_rule,
        "unit": records.unit,
        "least": records.min_sites,
        "sharing": _shared_noise.table(records),
        **values,
    }
