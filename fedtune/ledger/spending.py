"""Summarise a dataset's spending: by study, and in total against the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedtune.config import PolicyTable
from fedtune.dp import accountant
from fedtune.dp.accountant import Steps
from fedtune.dp.filter import total_epsilon
from fedtune.ledger.declared import declared
from fedtune.ledger.entries import Cohort, Spent
from fedtune.ledger.ledger import Ledger


@dataclass(frozen=True)
class StudyLine:
    """One study's share of a dataset's budget. epsilon: of this study alone, at the δ asked for.

    rounds: distinct rounds; charged: reservations, more than rounds where one was paid twice;
    first, last: UTC seconds; known: whether ε is known (Charge.is_known_for)."""

    name: str
    study: str
    dataset: str
    unit: str
    rounds: int
    charged: int
    released: int
    steps: int
    sigma: tuple[float, float]  # least and most
    rate: tuple[float, float]
    records: int
    epsilon: float
    first: int
    last: int
    known: bool = True


@dataclass(frozen=True)
class DatasetBudget:
    """A dataset's total ε as the privacy filter bounds it, and the same composed by PLD.

    epsilon: at 2 · delta; pld: at delta, which is policy.max_delta; remaining: of
    policy.max_epsilon, never below 0."""

    dataset: str
    epsilon: float
    how: str
    pld: float
    ceiling: float
    delta: float

    @property
    def remaining(self) -> float:
        return max(0.0, self.ceiling - self.epsilon)


def study_lines(spent: Sequence[Spent], delta: float, unit: str | None = None) -> list[StudyLine]:
    """One line per study and dataset, in the order of their first charge. unit: whose ε; None: that
    of each study."""
    groups: dict[tuple[str, str], list[Spent]] = {}
    for entry in spent:
        groups.setdefault((entry.charge.study, entry.dataset), []).append(entry)
    return [_line(group, delta, unit) for group in groups.values()]


def facts(
    ledger: Ledger, dataset: str, policy: PolicyTable, unit: str | None = None
) -> dict[str, Any]:
    """Return what `fedtune ledger` shows of a dataset: studies, budget, the ledger's head. unit: of
    whom the site's file names the records."""
    spent, cohorts = ledger.spending(dataset), ledger.cohorts(dataset)
    total = heaviest(dataset, cohorts, policy)
    return {
        "dataset": dataset,
        "studies": [asdict(line) for line in study_lines(spent, policy.max_delta, unit)],
        "budget": asdict(total) | {"remaining": total.remaining},
        "not_known": ledger.unknown(dataset, unit) if unit else [],
        "declared": declared(ledger),
        "head": {"entry": ledger.head.seq, "hash": ledger.head.hash},
    }


def _line(group: Sequence[Spent], delta: float, unit: str | None) -> StudyLine:
    charges = [entry.charge for entry in group]
    sigmas, rates = [c.noise_multiplier for c in charges], [c.sampling_rate for c in charges]
    return StudyLine(
        name=charges[-1].name,
        study=charges[0].study,
        dataset=group[0].dataset,
        unit=charges[0].unit,
        rounds=len({c.round for c in charges}),
        charged=len(charges),
        released=sum(entry.released and entry.kind == "reserve" for entry in group),
        steps=sum(c.steps for c in charges),
        sigma=(min(sigmas), max(sigmas)),
        rate=(min(rates), max(rates)),
        records=max(c.records for c in charges),
        epsilon=_epsilon([c.event for c in charges], delta),
        first=min(entry.time for entry in group),
        last=max(entry.time for entry in group),
        known=all(charge.is_known_for(unit or charge.unit) for charge in charges),
    )


def budget(dataset: str, spent: Sequence[Spent], policy: PolicyTable) -> DatasetBudget:
    """Compose the charges in `spent`, against the policy's ceiling."""
    events = [entry.charge.event for entry in spent]
    order = spent[0].charge.order if spent else 2.0
    total = total_epsilon(events, order, policy.max_delta)
    pld = _epsilon(events, policy.max_delta)
    return DatasetBudget(
        dataset, total.epsilon, total.how, pld, policy.max_epsilon, policy.max_delta
    )


def heaviest(dataset: str, cohorts: Sequence[Cohort], policy: PolicyTable) -> DatasetBudget:
    """The dataset's budget: that of the cohort with the largest ε."""
    budgets = [budget(dataset, cohort.spent, policy) for cohort in cohorts]
    return max(budgets, key=lambda total: total.epsilon)


def _epsilon(events: Sequence[Steps], delta: float) -> float:
    if any(event.noise_multiplier == 0 for event in events):
        return math.inf
    return accountant.epsilon(events, delta)
