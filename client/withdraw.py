"""A patient withdraws consent: left out from now on; and what was released before."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.config import Site
from fedtune.data.records import read_records, unit_member
from fedtune.dp.accountant import Steps, epsilon
from fedtune.dp.ledger import Ledger
from fedtune.errors import ConfigError, DataError


@dataclass(frozen=True)
class Release:
    """A study that sent updates from the dataset before the withdrawal."""

    name: str
    digest: str
    rounds: int
    epsilon: float


@dataclass(frozen=True)
class Withdrawal:
    """in_file: records of the patient that the site's file still holds; seen: whether the patient
    was ever trained on here; releases: studies whose adapters may still reflect the patient."""

    in_file: int
    seen: bool
    releases: list[Release]


def withdraw(site: Site, patient: str, ledger: Ledger) -> Withdrawal:
    """Enter the withdrawal and say what it cannot undo.

    From the next round on, the patient's records are left out, states kept in memory for them are
    dropped, and nothing on the wire changes: batch, noise and divisor never depended on the true
    count. What was released stays released: the adapters of `releases` were trained with the
    patient's records under the ε stated, and whoever holds them learns at most that much.
    Errors: ConfigError where site.toml names no patient column; LedgerError."""
    if not site.data.columns.patient:
        raise ConfigError(
            "this site names no patient column, so nobody can tell whose record is whose",
            "data.columns.patient in site.toml",
            "take the record out of the file",
        )
    key = unit_member(patient.strip())
    seen = ledger.holds(site.data.name, key)
    ledger.withdraw(key)
    try:
        records, _ = read_records(site.data, unit="patient")
    except DataError:
        records = []
    in_file = sum(record.unit == patient.strip() for record in records)
    return Withdrawal(in_file, seen, _releases(site, ledger) if seen else [])


def _releases(site: Site, ledger: Ledger) -> list[Release]:
    found: dict[str, list[tuple[str, Steps]]] = {}
    for spent in ledger.spending(site.data.name):
        if spent.released:
            found.setdefault(spent.charge.study, []).append((spent.charge.name, spent.charge.event))
    releases = []
    for digest, entries in found.items():
        events = [event for _, event in entries]
        private = all(event.noise_multiplier > 0 for event in events)
        cost = epsilon(events, site.policy.max_delta) if private else float("inf")
        releases.append(Release(entries[0][0], digest, len(entries), cost))
    return releases
