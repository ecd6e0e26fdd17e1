"""Read the records on which a site's personal model is trained: the site's own, without those that
are held out.

Guarantee: patients are left out if they withdrew, did not consent, or are recognised by key or by
content among the records of [acceptance] or [evaluation] (`_left_out`)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedtune.core.config import Site, SiteData, Study
from fedtune.core.data.dataset import Dataset, Example
from fedtune.core.data.identity import identities, identity_of
from fedtune.core.data.load import UnitReader, check_columns
from fedtune.core.data.records import Record, read_file, unit_member
from fedtune.core.data.scan import scanning
from fedtune.core.errors import DataError
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.ledger.patient_column import check_column_stays
from fedtune.core.models.network import Network

LEAST = 10  # smallest number of patients; of records if there is no patient column
HELD_OUT = "held out in [acceptance] or [evaluation]"
WITHDREW = "withdrew"


@dataclass
class Own:
    """A site's own records.

    - units: the patient of each record, (n,), numbered in an order that follows from the site's
      salt
    - hashes: each patient's salted hash
    - left_out: reason → number of patients
    - rejected: reason → number of records"""

    dataset: Dataset
    units: np.ndarray
    hashes: tuple[str, ...]
    left_out: Counter[str]
    rejected: Counter[str]

    def folds(self, number: int) -> list[list[int]]:
        """Divide the records into `number` parts with nearly equal numbers of patients, and return
        each part's rows. All records of a patient are in one part, which follows from the site's
        salt."""
        return [np.flatnonzero(self.units % number == part).tolist() for part in range(number)]


def read_own(site: Site, study: Study, network: Network, ledger: Ledger) -> Own:
    """Read the site's records as the study reads them. If the site names a patient column, all
    records of a patient form one unit. Patients who withdrew or are held out are left out.

    - site: the site, whose [data] is read; [acceptance] and [evaluation] name who is held out
    - study: the study with which the personal model is trained
    - network: the network of this study, whose tokenizer and file reader are used
    - ledger: the site's ledger, which knows who withdrew, and whose salt orders the patients

    Errors: DataError (a file or columns that cannot be used, or fewer than LEAST patients);
    PolicyRefused if site.toml names no patient column any more."""
    record_format = check_columns(site.data, study, network.tokenizer, reader=network.reader)
    by_patient = site.data.columns.patient is not None
    unit: Literal["patient", "record"] = "patient" if by_patient else "record"
    remembers = None if site.data.declared else ledger  # no patient is in declared data
    check_column_stays(remembers, site, site.data.name, unit, at_site=True)
    read = read_file(site.data, unit=unit)
    reasons = _left_out(read.records, site, ledger, by_patient)
    by_unit: dict[str, list[Record]] = {}
    for record in read.records:
        if record.unit not in reasons:
            by_unit.setdefault(record.unit, []).append(record)
    rejected, hashes, examples = Counter(read.rejected), list[str](), list[Example]()
    with scanning(site.data.scan, site.data.declared_size) as scan:
        reader = UnitReader(
            study.objective, network.tokenizer, record_format, study.objective.resolved.outputs > 0,
            True, network.reader, scan=scan,
            max_records=study.max_records_per_unit if by_patient else None,
        )  # fmt: skip
        for key in sorted(by_unit, key=lambda unit: ledger.hashed(unit_member(unit))):
            result = reader(by_unit[key])
            rejected.update(reason for _, reason in result.rejected)
            if result.examples:
                examples += [replace(example, unit=len(hashes)) for example in result.examples]
                hashes.append(ledger.hashed(unit_member(key)))
    left_out = Counter(reasons.values())
    if len(hashes) < LEAST:
        who = "patients" if by_patient else "records"
        raise DataError(
            f"{site.data.where}: {len(hashes)} usable {who} are left to train a personal model on",
            f"at least {LEAST}",
            "use the released model as it is",
        )
    return Own(
        dataset=Dataset(examples, len(hashes), rejected),
        units=np.array([example.unit for example in examples]),
        hashes=tuple(hashes),
        left_out=left_out,
        rejected=rejected,
    )


def _left_out(
    records: list[Record], site: Site, ledger: Ledger, by_patient: bool
) -> dict[str, str]:
    """Return each patient who is left out → the reason.

    - records: the records of [data], each with its patient's key
    - site: the site; its [acceptance] and [evaluation] are read if they are on this machine
    - ledger: the site's ledger, which knows who withdrew
    - by_patient: whether [data] names a patient column

    A held-out patient is always recognised by a whole record, an image, a recording or a long text
    that is held out too; if both tables name a patient column, also by the patient's key."""
    held = set[bytes]()
    for table in filter(None, (site.acceptance, site.evaluation)):
        if table.url or table.path.exists():
            held |= set().union(*identities(_as_all(table)))
    withdrawn, reasons = ledger.withdrawn(), dict[str, str]()
    for record in records:
        if ledger.hashed(unit_member(record.unit)) in withdrawn:
            reasons[record.unit] = WITHDREW
        elif record.unit not in reasons and identity_of(record, by_patient) & held:
            reasons[record.unit] = HELD_OUT
    return reasons


def _as_all(table: SiteData) -> SiteData:
    """Return the table without its consent rules: patients who did not consent are held out as
    well."""
    return table.model_copy(update={"consent": None})
