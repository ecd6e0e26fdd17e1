"""Report on a site's files in counts, never content, for the person who can correct them.

Guarantee: no cell of a record is in the report, except the names of classes, of columns and of
files. The report goes to the site's own screen or to a file that its user names, and nowhere
else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedtune.core.bases.find import find_base
from fedtune.core.config import Site, SiteData, Study
from fedtune.core.data.consent import NO_CONSENT
from fedtune.core.data.dataset import NO_TARGET, Dataset, Example, Failed
from fedtune.core.data.declared_size import describe_wrong_size
from fedtune.core.data.load import UnitReader, check_columns, count_duplicates
from fedtune.core.data.records import Read, Record, keys_of, read_file, site_rows
from fedtune.core.data.sources._interface import Names
from fedtune.core.errors import DataError, FedtuneError
from fedtune.core.files.writing import replace
from fedtune.core.vault.policy import base_for
from fedtune.core.vault.reading import SHOWN, by_reason, read_for_training
from fedtune.homes.opening import find_ledger
from fedtune.officer.data_files import COUPLED, FileFacts, files_of
from fedtune.officer.reading import reading_of
from fedtune.officer.shared_files import SharedFiles, find_shared_files

CLASSES = 50  # a label column with more distinct values is not taken to hold classes
LONGEST = 2**20  # the largest number of tokens that is measured
YEAR = re.compile(r"(?:19|20)\d\d\b")
Table = tuple[str, list[tuple[str, ...]]]  # a heading, and rows of cells


@dataclass(frozen=True)
class Spread:
    """How some numbers are spread: the smallest, the median, the 95th percentile and the
    largest."""

    least: int
    median: int
    most_95: int
    largest: int

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Spread | None:
        values = np.array(list(numbers), dtype=np.int64)
        if not len(values):
            return None
        at = np.percentile(values, [0, 50, 95, 100], method="higher")
        return cls(*(int(value) for value in at))

    def __str__(self) -> str:
        return (
            f"{self.least:,} at least, {self.median:,} median, {self.most_95:,} up to 95 %, "
            f"{self.largest:,} at most"
        )


@dataclass(frozen=True)
class StudyFit:
    """How a study would use the records.

    - problem: why the study cannot use them, "" if it can
    - lengths: the spread of the records' lengths before they are cut, in tokens
    - too_long: number of records longer than max_length
    - train: number of records that training uses
    - cut: number of these records that training cuts to max_length
    - cap: the largest number of records of one patient that the study uses; None if there is none
    - over_cap: number of records left out because a patient has more than `cap` records
    - excluded: number of records left out because their patients withdrew, or already take part in
      another dataset that is declared to share no patient with this one
    - rejected: reason -> number of records"""

    study: str
    problem: str
    max_length: int
    overflow: str
    lengths: Spread | None = None
    too_long: int = 0
    train: int = 0
    units: int = 0
    cut: int = 0
    over_cap: int = 0
    excluded: int = 0
    cap: int | None = None
    rejected: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class DataReport:
    """Counts of the rows, units and values in a site's files. `str` gives the report as text,
    `as_dict` for JSON.

    - problem: why the data cannot be used, or is outside the guarantee; "" if neither is so
    - columns: the names of the files' columns, as far as a message may show them
    - usable: the number of records that can be used
    - filtered: the number of rows that data.filter leaves out
    - withheld: the number of rows of patients who did not agree
    - duplicates: the number of records that say what an earlier record says; they are used, too
    - failed: the rows that cannot be used, including those that a study rejects
    - shared: the images, recordings or clips that rows of two or more units name
    - classes: class -> number of records. Records whose value is not shown are counted together,
      under ""
    - lengths: the spread of the lengths of the records' texts, in characters; None if there are
      none
    - per_patient: the spread of the number of records per patient; None if there are no patients"""

    site: str
    path: str
    problem: str
    unit: str
    files: list[FileFacts]
    columns: list[str]
    rows: int
    usable: int
    filtered: int
    withheld: int
    duplicates: int
    units: int
    declared_size: int
    failed: list[Failed]
    shared: SharedFiles
    rejected: dict[str, int]
    classes: dict[str, int]
    lengths: Spread | None
    per_patient: Spread | None
    years: dict[str, int]
    fit: StudyFit | None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        values = asdict(self) | {"failed": [failed._asdict() for failed in self.failed]}
        values["shared"]["rows"] = [row._asdict() for row in self.shared.rows]
        return values

    def save(self, path: Path | str) -> Path:
        """Write the report as one HTML file that only this user can read (0600).

        Errors: InfrastructureError."""
        from fedtune.officer.data_page import page

        return replace(Path(path), page(self).encode(), private=True)

    def __str__(self) -> str:
        lines = []
        for heading, rows in self.tables():
            lines += [heading, *("  " + "  ".join(row) for row in rows), ""]
        return "\n".join(lines)

    def tables(self) -> list[Table]:
        """Return the report as tables, each a heading with rows of cells."""
        tables = [("files", self._files()), ("records", self._records())]
        if self.classes:
            tables.append(("classes", self._classes()))
        if self.years:
            tables.append(("years", [(year, f"{n:,}") for year, n in self.years.items()]))
        if self.failed:
            tables.append(("rows that cannot be used", _list_rows(self.failed)))
        if self.shared.rows:
            named = f"rows whose file a row of another {self.unit} names, too"
            tables.append((named, _list_rows(self.shared.rows)))
        if self.fit:
            tables.append((f"study {self.fit.study}", self._fit(self.fit)))
        return tables

    def _files(self) -> list[tuple[str, ...]]:
        head = ("file", "bytes", "encoding", "delimiter", "rows", "failed")
        return [
            head,
            *(
                (f.name, f"{f.size:,}", f.encoding, f.delimiter, f"{f.rows:,}", f"{f.failed:,}")
                for f in self.files
            ),
        ]

    def _records(self) -> list[tuple[str, ...]]:
        columns = ", ".join(self.columns) or "not shown: the first line may be a record"
        rows: list[tuple[str, ...]] = [("columns", columns)] if self.files else []
        if self.problem:
            rows.append(("PROBLEM", self.problem))
        if warning := str(self.shared):
            rows.append(("WARNING", warning))
        rows += [
            ("rows", f"{self.rows:,}"),
            ("usable", f"{self.usable:,}"),
            ("rejected", by_reason(Counter(self.rejected)) or "0"),
        ]
        if self.filtered:
            rows.append(("left out by data.filter", f"{self.filtered:,}"))
        if self.withheld:
            rows.append(("of patients who did not agree", f"{self.withheld:,}"))
        rows.append(("say what an earlier one says", f"{self.duplicates:,} (counted, and kept)"))
        declared = f"{self.units:,}; site.declared_size = {self.declared_size:,}"
        rows.append((f"{self.unit}s", declared))
        rows += [
            ("", line) for line in describe_wrong_size(self.units, self.declared_size, self.unit)
        ]
        if self.per_patient:
            rows.append(("records of a patient", str(self.per_patient)))
        if self.lengths:
            rows.append(("characters of a record", str(self.lengths)))
        return rows

    def _classes(self) -> list[tuple[str, ...]]:
        total = sum(self.classes.values())
        return [
            (name or "(not shown)", f"{number:,}", f"{number / total:.1%}")
            for name, number in self.classes.items()
        ]

    def _fit(self, fit: StudyFit) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("PROBLEM", fit.problem)] if fit.problem else []
        rows.append(("objective.max_length", f'{fit.max_length:,}, overflow = "{fit.overflow}"'))
        if fit.lengths:
            rows.append(("tokens of a record", str(fit.lengths)))
            what = "left out" if fit.overflow == "reject" else "cut"
            rows.append(("longer than max_length", f"{fit.too_long:,}: {what}"))
        rows += [
            ("train", f"{fit.train:,} records of {fit.units:,} {self.unit}s"),
            ("cut to max_length", f"{fit.cut:,}"),
            ("rejected", by_reason(Counter(fit.rejected)) or "0"),
        ]
        if fit.cap is not None:
            rows.append((f"over max_records_per_unit = {fit.cap}", f"{fit.over_cap:,}"))
        if fit.excluded:
            rows.append(("of patients who withdrew or are elsewhere", f"{fit.excluded:,}"))
        return rows


def _list_rows(listed: Sequence[Failed]) -> list[tuple[str, ...]]:
    """Return a table of the first SHOWN rows, with the reason why each is listed."""
    rows: list[tuple[str, ...]] = [("file", "row", "reason")]
    rows += [(f, f"{row:,}" if row else "all", why) for f, row, why in listed[:SHOWN]]
    if len(listed) > SHOWN:
        rows.append(("", "", f"and {len(listed) - SHOWN:,} more"))
    return rows


def data_report(site: Site, study: Study | None = None, *, date: str | None = None) -> DataReport:
    """Report on a site's records: columns, rows that cannot be used, classes, lengths, duplicates.

    Args:
        study: report also how this study would use the records: how many tokens they have, compared
            with max_length, and how many records would be cut, left out because a patient has too
            many, or rejected. The study's base must be on this machine.
        date: the name of a column of dates; the report counts records by its year.

    Nothing is written, and the report holds no record's content. Since it counts private records,
    it is for the site alone. `print(report)` shows it, `report.save("data.html")` writes it.

    Errors: DataError if there is no file, ConfigError, ModelError."""
    protects_patients = study is None or study.unit == "patient"
    unit: Literal["patient", "record"] = "record"
    if site.data.columns.patient and protects_patients:
        unit = "patient"
    read = read_file(site.data, unit=unit, strict=False)
    problem = ""
    try:
        read.names.require()
    except DataError as error:
        problem = str(error)
    if site.data.free_query:
        problem = f"{COUPLED}; {problem}".rstrip("; ")
    dataset, fit = _fit(site, study, read) if study else (None, None)
    failed = sorted(dataset.counts.failed if dataset else read.failed)
    by_unit = Counter(record.unit for record in read.records)
    return DataReport(
        site=site.site.name,
        path=str(site.data.where),
        problem=problem,
        unit=unit,
        files=files_of(site.data, read),
        columns=read.names.shown + read.names.common,
        rows=read.rows,
        usable=len(read.records),
        filtered=read.filtered,
        withheld=read.withheld,
        duplicates=count_duplicates(read.records),
        units=len(by_unit),
        declared_size=site.site.declared_size,
        failed=failed,
        shared=find_shared_files(read.records, unit),
        rejected=dict(read.rejected.most_common()),
        classes=_classes(read.records, study),
        lengths=Spread.of(map(_characters, read.records)),
        per_patient=Spread.of(by_unit.values()) if unit == "patient" else None,
        years=_years(site.data, date) if date else {},
        fit=fit,
    )


def _classes(records: Sequence[Record], study: Study | None) -> dict[str, int]:
    """Count the records by class, and return class -> number of records. If the study names
    classes, these are shown, and records of other values are counted together under "". Otherwise a
    value is shown only if several records have it, its name is short, and there are at most CLASSES
    values."""
    known: Sequence[str] = ()
    values = Counter(record.label.strip() for record in records if record.label)
    if study and study.evaluation and study.evaluation.choices and not values:
        known = study.evaluation.choices
        values = Counter(record.completion.strip() for record in records)
    elif study:
        known = study.objective.labels
    names = [name.strip() for name in known]
    if names:
        counts = {name: values[name] for name in names}
    elif len(values) <= CLASSES:
        counts = {name: n for name, n in values.most_common() if n > 1 and len(name) <= LONG_NAME}
    else:
        counts = {}
    if others := values.total() - sum(counts.values()):
        counts[""] = others
    return counts


LONG_NAME = 60  # a value with more characters is not taken for the name of a class


def _characters(record: Record) -> int:
    texts = [record.prompt, record.completion, *(text for _, text in record.messages)]
    return sum(map(len, texts))


def _years(data: SiteData, date: str) -> dict[str, int]:
    """Return year -> number of rows, by the column `date`; rows whose cell names no year are
    counted under "no date"."""
    counts: Counter[str] = Counter()
    names = Names(data.where, {"--date": date} | keys_of(data))
    for _, row in site_rows(data, names, strict=False):
        if row is NO_CONSENT:
            continue
        value = row.get(date) if isinstance(row, dict) else None
        match = YEAR.match(str(value).lstrip())
        counts[match[0] if match else "no date"] += 1
    names.keys = {"--date": date}
    names.require()
    return dict(sorted(counts.items()))


# ----------------------------------------------------------------------------- what a study makes


def _fit(site: Site, study: Study, read: Read) -> tuple[Dataset | None, StudyFit]:
    """Find out how a study would use the site's records: read them as the study's training does,
    and measure their lengths before they are cut. read: the records as they were read without a
    study.

    Returns: the dataset, None if the study cannot use the records; and how it would use them.
    Errors: ModelError if the base is not on this machine."""
    if study.base.digest is None:  # a study.toml, which states no digest
        base = find_base(site.site.base or study.base.model)
    else:
        base = base_for(study, site)
    tokenizer, reader = reading_of(base, study.base.modality)
    objective = study.objective
    cap = study.max_records_per_unit if study.unit == "patient" else None
    public: dict[str, Any] = {
        "study": study.study.name,
        "max_length": objective.max_length,
        "overflow": objective.overflow,
        "cap": cap,
    }
    try:
        record_format = check_columns(site.data, study, tokenizer, reader=reader)
        ledger = find_ledger(site.home)
        dataset = read_for_training(site.data, study, tokenizer, reader, ledger)
    except FedtuneError as error:
        return None, StudyFit(problem=str(error), **public)
    whole = objective.model_copy(update={"max_length": LONGEST, "overflow": "truncate"})
    scored = objective.resolved.outputs > 0
    measure = UnitReader(whole, tokenizer, record_format, scored, reader=reader)
    lengths = [_tokens(example) for example in measure(read.records).examples]
    problem = ""
    if dataset.n_units < 2:
        problem = f"fewer than 2 usable {study.unit}s: this site would send noise alone"
    return dataset, StudyFit(
        problem=problem,
        lengths=Spread.of(lengths),
        too_long=sum(length > objective.max_length for length in lengths),
        train=len(dataset.examples),
        units=dataset.n_units,
        cut=dataset.n_cut,
        over_cap=dataset.counts.over_cap,
        excluded=dataset.counts.excluded,
        rejected=dict(dataset.rejected.most_common()),
        **public,
    )


def _tokens(example: Example) -> int:
    """Return the number of a record's tokens. The last target is not an input, but counts too. For
    a pair of answers, return the number of the longer passage. example: the record, as the study's
    base reads it."""
    return max(
        len(passage.input_ids) + bool((passage.target_ids != NO_TARGET).any())
        for passage in example.passages
    )
