"""Summarise the ε that was spent on a dataset, for each study and in total, and compare the total
with the policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedtune.core.config import PolicyTable
from fedtune.core.dp import accountant
from fedtune.core.dp.accountant import Steps
from fedtune.core.dp.filter import total_epsilon
from fedtune.core.ledger.declared import read_declarations
from fedtune.core.ledger.entries import (
    Charge,
    Cohort,
    Spent,
    are_kinds_known,
    orders_of,
    samples_first,
)
from fedtune.core.ledger.ledger import Ledger


@dataclass(frozen=True)
class StudyLine:
    """All charges of one study against a dataset's budget.

    - name, study: the study's name, and the digest of its plan
    - dataset, unit: the dataset's name, and the unit of the study, such as "patient"
    - rounds: number of distinct rounds
    - charged: number of reservations, more than `rounds` if a round was charged twice
    - released: number of reservations whose update was released
    - steps: number of noised steps that were charged, of all rounds together
    - sigma: the smallest and the largest σ of a round
    - rate: the smallest and the largest sampling rate of a round
    - records: the most rows of one unit in a step (k)
    - epsilon: ε of this study alone, at the δ that the caller gave
    - first, last: when the first and the last charge were entered, in UTC seconds
    - known: whether the charges give an ε for the unit that the caller named (Spent.is_known_for)
    - fallback: with secure aggregation, the ε that this site's own noise alone gives, which holds
      whatever the other sites do; else None"""

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
    fallback: float | None = None


@dataclass(frozen=True)
class DatasetBudget:
    """The total ε of a dataset, computed in two ways, and the limits of the policy.

    - dataset: the dataset's name
    - epsilon: the ε at 2 · delta that the site's privacy filter bounds and compares with the
      ceiling
    - how: the name of the composition that gave `epsilon`, such as "PLD"
    - pld: the ε at delta of the same charges composed by PLD
    - ceiling: the most ε that the policy allows; `remaining` is what is left of it, at least 0
    - delta: policy.delta
    - fallback: the ε of this site's own noise alone, computed like `epsilon`; None if no charge has
      secure aggregation, since `epsilon` then rests on this noise alone
    - fallback_ceiling: the most that the policy allows of `fallback`; None if `fallback` is None
    - known: whether every charge gives an ε for the unit that the caller named; if not, `epsilon`
      counts all of them as if they did"""

    dataset: str
    epsilon: float
    how: str
    pld: float
    ceiling: float
    delta: float
    fallback: float | None = None
    fallback_ceiling: float | None = None
    known: bool = True

    @property
    def remaining(self) -> float:
        return max(0.0, self.ceiling - self.epsilon)

    @property
    def fallback_remaining(self) -> float | None:
        """Return what is left of fallback_ceiling, at least 0; None if there is no fallback ε or no
        ceiling for it."""
        if self.fallback is None or self.fallback_ceiling is None:
            return None
        return max(0.0, self.fallback_ceiling - self.fallback)


def known_epsilon(spent: Sequence[Spent], delta: float, unit: str) -> float | None:
    """Return the ε of charges composed at δ = `delta`, infinite if one is without noise. Return
    None if it is not known, since a charge gives no ε for one `unit` ("patient" or "record").
    spent: the charges, with their columns of patients (`charges_with_columns`)."""
    if not all(each.is_known_for(unit) for each in spent):
        return None
    return _epsilon([each.charge.event for each in spent], delta)


def known_fallback(spent: Sequence[Spent], delta: float, unit: str) -> float | None:
    """Return the ε of charges by this site's own noise alone, as `known_epsilon` does. Return None
    if no charge shares its noise, or if the ε is not known."""
    shared = any(each.charge.sites > 1 for each in spent)
    if not shared or not all(each.is_known_for(unit) for each in spent):
        return None
    return _epsilon([each.charge.fallback for each in spent], delta)


def charges_with_columns(
    ledger: Ledger, datasets: Collection[str], columns: Mapping[str, str]
) -> list[Spent]:
    """List the charges that count against any of `datasets`, each once, oldest first. If a charge
    counts against several of them, it is listed with the columns of one for which another column
    tells patients apart now, if there is such a dataset. columns: each dataset's column of
    patients, as the site's files are now."""
    found = dict[tuple[int, int], list[Spent]]()
    for dataset in datasets:
        for spent in ledger.spending(dataset, columns):
            found.setdefault(spent.number, []).append(spent)
    return [
        next((each for each in listed if each.has_other_column), listed[0])
        for _, listed in sorted(found.items())
    ]


def list_ended(ledger: Ledger) -> list[str]:
    """List the names of private studies that get no further answer from this ledger's site, since a
    restore may have lost rounds of theirs."""
    ended = ledger.ended_plans
    charges = (spent.charge for spent in ledger.spending())
    return sorted({c.name for c in charges if c.study in ended and c.noise_multiplier > 0})


def study_lines(spent: Sequence[Spent], delta: float, unit: str | None = None) -> list[StudyLine]:
    """Build a line for each study and dataset with charges, in the order of their first charge.

    - spent: the charges
    - delta: the δ at which each study's ε is stated
    - unit: "patient" or "record": each line says whether ε is known for this unit; None: for the
      study's own unit"""
    groups: dict[tuple[str, str], list[Spent]] = {}
    for entry in spent:
        groups.setdefault((entry.charge.study, entry.dataset), []).append(entry)
    return [_line(group, delta, unit) for group in groups.values()]


def facts(
    ledger: Ledger,
    dataset: str,
    policy: PolicyTable,
    unit: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return what `fedtune ledger` shows of a dataset, as a dict for JSON: its `studies` and
    `budget`, the charges whose ε is not known (`not_known`), the site's declarations (`declared`)
    and the ledger's `head`; at a membership also the `share` and the hospital's `memberships`.

    - ledger: the ledger that is read
    - dataset: the dataset's name
    - policy: the site's policy, with the ceilings, δ, and the membership if the site is one
    - unit: "patient" or "record", as the site's file identifies them; None stands for the unit of
      each study, and no charge is then listed as unknown
    - columns: each dataset's column of patients, as the site's files are now (`patient_columns`);
      None: as last declared"""
    spent, cohorts = ledger.spending(dataset, columns), ledger.cohorts(dataset)
    unknown = {each.seq for each in spent if unit and not each.is_known_for(unit)}
    total = replace(find_heaviest_budget(dataset, cohorts, policy), known=not unknown)
    shared = dict[str, Any]()
    if policy.hospital:
        share = share_of(dataset, cohorts, policy, unknown)
        shared = {
            "membership": policy.membership,
            "share": asdict(share) | {"remaining": share.remaining},
            "memberships": [
                asdict(line) for line in membership_lines(dataset, cohorts, policy, unknown)
            ],
        }
    return {
        "dataset": dataset,
        "studies": [asdict(line) for line in study_lines(spent, policy.delta, unit)],
        "budget": asdict(total)
        | {"remaining": total.remaining, "fallback_remaining": total.fallback_remaining},
        "not_known": ledger.unknown(dataset, unit, columns) if unit else [],
        **shared,
        "declared": read_declarations(ledger),
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
        known=all(entry.is_known_for(unit or entry.charge.unit) for entry in group),
        fallback=_epsilon([c.fallback for c in charges], delta)
        if _is_noise_shared(group)
        else None,
    )


def _is_noise_shared(spent: Sequence[Spent]) -> bool:
    """Return whether some charge has secure aggregation, so that there are two ε: one with the
    noise of all honest sites, and the fallback ε with this site's own noise alone."""
    return any(entry.charge.sites > 1 for entry in spent)


def budget(dataset: str, spent: Sequence[Spent], policy: PolicyTable) -> DatasetBudget:
    """Compute a dataset's budget from charges.

    - dataset: the dataset's name
    - spent: the charges that count against it
    - policy: the site's policy, for δ and the ceilings"""
    charges = [entry.charge for entry in spent]
    events = [charge.event for charge in charges]
    orders, sampled = orders_of(charges), samples_first(charges)
    known = are_kinds_known(charges)
    total = total_epsilon(events, orders, policy.delta, sampled, known)
    pld = _epsilon(events, policy.delta)
    found = DatasetBudget(dataset, total.epsilon, total.how, pld, policy.ceiling, policy.delta)
    if not _is_noise_shared(spent):
        return found
    fallback = [charge.fallback for charge in charges]
    alone = total_epsilon(fallback, orders, policy.delta, sampled, known)
    ceiling = policy.fallback_ceiling
    return replace(found, fallback=alone.epsilon, fallback_ceiling=ceiling)


def find_heaviest_budget(
    dataset: str, cohorts: Sequence[Cohort], policy: PolicyTable
) -> DatasetBudget:
    """Return the budget of the cohort that has spent the most ε. Its `fallback` is the largest
    fallback ε of any cohort, which may be another one.

    - dataset: the dataset's name
    - cohorts: the dataset's cohorts (units that arrived together), each with its charges
    - policy: the site's policy, for δ and the ceilings"""
    budgets = [budget(dataset, cohort.spent, policy) for cohort in cohorts]
    most = max(budgets, key=lambda total: total.epsilon)
    shared = [total for total in budgets if total.fallback is not None]
    if not shared:
        return most
    alone = max(shared, key=lambda total: total.fallback or 0.0)
    return replace(most, fallback=alone.fallback, fallback_ceiling=alone.fallback_ceiling)


@dataclass(frozen=True)
class MembershipLine:
    """All charges of one membership of a hospital against a dataset's budget.

    - membership: its name; "" for charges that were made before several memberships shared the
      ledger, "*" for charges that a restore entered
    - studies: the number of its studies
    - charged: the number of its charges
    - epsilon: the ε of its charges, as the privacy filter bounds it, at 2 · policy.delta
    - fallback: the ε of this site's own noise alone; None without secure aggregation
    - known: whether every charge gives an ε for the unit that the caller named"""

    membership: str
    studies: int
    charged: int
    epsilon: float
    fallback: float | None = None
    known: bool = True


def membership_lines(
    dataset: str, cohorts: Sequence[Cohort], policy: PolicyTable, unknown: Collection[int] = ()
) -> list[MembershipLine]:
    """Build a line for each membership that has a charge against the dataset. The total ε of the
    dataset is not the sum of the lines' ε, since it composes all charges at once.

    - dataset: the dataset's name
    - cohorts: the dataset's cohorts (units that arrived together), each with its charges
    - policy: the site's policy, for δ
    - unknown: the numbers of the entries of charges whose ε is not known"""
    names = {spent.charge.membership: None for cohort in cohorts for spent in cohort.spent}
    return [_membership_line(dataset, cohorts, policy, name, unknown) for name in names]


def _membership_line(
    dataset: str,
    cohorts: Sequence[Cohort],
    policy: PolicyTable,
    name: str,
    unknown: Collection[int],
) -> MembershipLine:
    """Build the line of one membership.

    - dataset: the dataset's name
    - cohorts: its cohorts, with the charges of all memberships
    - policy: the policy whose δ holds
    - name: the membership's name, or "" or "*" as in `MembershipLine`
    - unknown: the numbers of the entries of charges whose ε is not known"""
    own = _paid_by(lambda charge: charge.membership == name, cohorts)
    total = find_heaviest_budget(dataset, own, policy)
    seen = {spent.number: spent for cohort in own for spent in cohort.spent}.values()
    return MembershipLine(
        membership=name,
        studies=len({spent.charge.study for spent in seen}),
        charged=len(seen),
        epsilon=total.epsilon,
        fallback=total.fallback,
        known=not any(spent.seq in unknown for spent in seen),
    )


def share_of(
    dataset: str, cohorts: Sequence[Cohort], policy: PolicyTable, unknown: Collection[int] = ()
) -> DatasetBudget:
    """Return the budget of one membership's share: its own charges, and policy.max_epsilon as the
    ceiling. Charges that a restore entered count as its own. So do charges that were made before
    several memberships shared the ledger, if policy.own_memberships contains "".

    - dataset: the dataset's name
    - cohorts: the dataset's cohorts (units that arrived together), each with its charges of all
      memberships
    - policy: the policy of the membership
    - unknown: the numbers of the entries of charges whose ε is not known"""
    own = _paid_by(lambda charge: charge.is_paid_by(policy.own_memberships), cohorts)
    total = find_heaviest_budget(dataset, own, policy)
    ceiling = policy.max_fallback_epsilon if total.fallback is not None else None
    known = not any(spent.seq in unknown for cohort in own for spent in cohort.spent)
    return replace(total, ceiling=policy.max_epsilon, fallback_ceiling=ceiling, known=known)


def _paid_by(is_own: Callable[[Charge], bool], cohorts: Sequence[Cohort]) -> list[Cohort]:
    return [
        replace(cohort, spent=[s for s in cohort.spent if is_own(s.charge)]) for cohort in cohorts
    ]


def _epsilon(events: Sequence[Steps], delta: float) -> float:
    if any(event.noise_multiplier == 0 for event in events):
        return math.inf
    return accountant.epsilon(events, delta)
