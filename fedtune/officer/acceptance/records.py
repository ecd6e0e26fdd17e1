"""Read the records on which a site judges a model: the records of patients on whom the site never
trained.

Guarantee: a patient who withdrew, who did not consent, or on whom any study here trained or was
to train, is left out with all records, and counted for the site's own page."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedtune.core.config import AcceptanceTable, Site, Study
from fedtune.core.data.dataset import Dataset, Example
from fedtune.core.data.files import Place
from fedtune.core.data.identity import identities, identity_of
from fedtune.core.data.load import LONG, UnitReader, check_columns
from fedtune.core.data.records import Record, content_of, read_file, record_member, unit_member
from fedtune.core.data.scan import scanning
from fedtune.core.errors import DataError
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.models.network import Network
from fedtune.core.registry.bands import band_names, band_of
from fedtune.evaluation.groups import MISSING, group_of, groups_at

NO_NUMBER = "(no number)"
TRAINED = "trained on here"
WITHDREW = "withdrew"


@dataclass
class HeldOut:
    """A site's held-out records, without those that are left out.

    - units: the patient of each record, (n,)
    - groups: column → each record's value
    - places: the file and row of each record
    - left_out: reason → number of patients. For one reason, "did not agree, by record", it is the
      number of records
    - rejected: reason → number of records
    - keyed: a digest of the records under the site's salt, which tells nobody else what they are
    - compared_by: how these records were compared with those that train: "patients", by the
      patients' keys; or "contents", if [acceptance] or [data] names no patient column
    - training_read: whether [data] was on this machine and was read for the comparison. If not,
      only what the ledger knows of it was compared
    - known_since: the day since which the ledger knows everybody on whom a study here trained; ""
      if it always did"""

    dataset: Dataset
    units: np.ndarray
    places: list[Place | None]
    keyed: str
    compared_by: str
    training_read: bool
    groups: dict[str, list[str]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    known_since: str = ""

    @property
    def patients(self) -> int:
        return self.dataset.n_units


def read_held_out(
    table: AcceptanceTable,
    site: Site,
    study: Study,
    network: Network,
    ledger: Ledger,
    taught: Collection[str] = (),
) -> HeldOut:
    """Read the records of [acceptance] as the study's model reads records, but without a cap on a
    patient's records.

    - table: the site's [acceptance], with the place and columns of the records
    - site: the site, with whose [data] the records are compared
    - study: the study of the model that is to be scored
    - network: the network of this study, whose tokenizer and file reader are used
    - ledger: the site's ledger, which knows the patients of its datasets and who withdrew
    - taught: salted hashes of patients on whom a personal model was trained, who are left out even
      if they are no longer in [data]; () for a released model

    Errors: DataError (a file or columns that cannot be used, or nobody is left), ConfigError (a
    column of groups with more than MOST_GROUPS values)."""
    record_format = check_columns(table, study, network.tokenizer, reader=network.reader)
    by_patient = table.columns.patient is not None
    read = read_file(table, unit="patient" if by_patient else "record")
    patients = by_patient and site.data.columns.patient is not None
    reasons = _left_out(read.records, site, ledger, patients, taught)
    objective = study.objective.resolved
    choices = study.evaluation.choices if study.evaluation else ()
    rejected = read.rejected
    kept, examples = list[Record](), list[Example]()
    with scanning(table.scan) as scan:
        reader = UnitReader(
            study.objective, network.tokenizer, record_format, objective.outputs > 0, True,
            network.reader, choices=choices, scan=scan,
        )  # fmt: skip
        for record in read.records:
            if record.unit not in reasons:
                unit = reader([record])
                rejected.update(reason for _, reason in unit.rejected)
                kept += unit.records
                examples += unit.examples
    if not kept:
        raise DataError(
            f"{table.where}: no record is left by which to judge the model (left out: "
            f"{_format_counts(Counter(reasons.values()))}; rejected: {_format_counts(rejected)})",
            "usable records of patients whom this site did not train on",
        )
    keys = {unit: number for number, unit in enumerate(dict.fromkeys(r.unit for r in kept))}
    units = np.array([keys[record.unit] for record in kept])
    left_out = Counter(reasons.values())
    if read.withheld:
        left_out["did not agree, by record"] = read.withheld
    return HeldOut(
        dataset=Dataset(examples, len(keys), rejected),
        units=units,
        places=[record.place for record in kept],
        keyed=_digest_records(kept, ledger),
        compared_by="patients" if patients else "contents",
        training_read=_is_there(site),
        groups=_groups(table, [record.place for record in kept]),
        left_out=left_out,
        rejected=rejected,
        known_since=_known_since(ledger),
    )


def _format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in counts.most_common()) or "none"


def _left_out(
    records: list[Record], site: Site, ledger: Ledger, patients: bool, taught: Collection[str]
) -> dict[str, str]:
    """Return each patient who is left out → the reason.

    - records: the records of [acceptance], each with its patient's key
    - site: the site, whose [data] is read if it is on this machine
    - ledger: the site's ledger, which knows the patients of its datasets and who withdrew
    - patients: whether [acceptance] and [data] both name a patient column
    - taught: salted hashes of patients on whom a personal model was trained

    Patients count as trained on if they are in [data] now, or ever were members of a dataset of
    this site other than its [evaluation]. They are always recognised by an image, a recording or a
    text of LONG characters; if both tables name a patient column, also by the patient's key; if
    not, also by a shorter record as a whole."""
    held_out = site.evaluation.name if site.evaluation else None
    tests = [ledger.member_test(name) for name in ledger.datasets if name != held_out]
    trained = set().union(*identities(site.data)) if _is_there(site) else set()
    withdrawn = ledger.withdrawn()
    reasons: dict[str, str] = {}
    for record in records:
        members = identity_of(record, patients)
        # A short record does not identify a patient: others may have one with the same words.
        if patients and _measure_longest(record) < LONG:
            members -= {record_member(record)}
        unit = ledger.hashed(unit_member(record.unit))
        if unit in withdrawn:
            reasons[record.unit] = WITHDREW
        elif unit in taught:
            reasons[record.unit] = TRAINED
        elif record.unit not in reasons:
            known = (m in trained or any(test(m) for test in tests) for m in members)
            if any(known):
                reasons[record.unit] = TRAINED
    return reasons


def _known_since(ledger: Ledger) -> str:
    """Return the newest day (in UTC) of a restore that may have lost on whom was trained, or of an
    adoption, which takes over charges without the patients whom they are for. Of these patients
    the ledger knows only those who were in the site's files then or later. Return "" if there was
    neither."""
    adopted = [spent.time for spent in ledger.spending() if spent.charge.adopted]
    newest = max([*adopted, ledger.members_lost])
    return time.strftime("%Y-%m-%d", time.gmtime(newest)) if newest else ""


def _is_there(site: Site) -> bool:
    """Return whether this site has records of [data] on this machine now: a site that only
    judges a model, or has deleted its training data, has none."""
    return bool(site.data.url) or Path(site.data.path).exists()


def _measure_longest(record: Record) -> int:
    texts = (record.prompt, record.completion, record.rejected, *(c for _, c in record.messages))
    return max(map(len, texts))


def _digest_records(records: list[Record], ledger: Ledger) -> str:
    """Compute a digest of the records' patients and contents under the site's salt, which the
    ledger holds, so that nobody else can tell which records they are."""
    each = sorted(hashlib.sha256(r.unit.encode() + b"\0" + content_of(r)).digest() for r in records)
    return ledger.hashed(b"acceptance\0" + hashlib.sha256(b"".join(each)).digest())


def _groups(table: AcceptanceTable, places: list[Place | None]) -> dict[str, list[str]]:
    """Read the columns that group the records, and return column → the name of each record's group.
    places: the file and row of each record. Errors: DataError (a column that does not exist),
    ConfigError (too many values)."""
    if not table.groups:
        return {}
    return groups_at(
        table,
        table.groups,
        places,
        lambda column, cell: _value(table, column, cell),
        "acceptance.groups.{column}",
        "make groups of numbers by acceptance.bands.{column}, or name another column",
    )


def _value(table: AcceptanceTable, column: str, cell: object) -> str:
    """Return the name of a row's group in one column: the cell's value or, if [acceptance] divides
    the column's numbers into bands, the name of the band."""
    text, edges = group_of(cell), table.bands.get(column)
    if not edges or text == MISSING:
        return text
    band = band_of(text, edges)
    return NO_NUMBER if band is None else band_names(edges)[band]
