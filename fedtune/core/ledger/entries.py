"""The entries of a ledger as objects: charges, acceptances and cohorts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedtune.core.dp.accountant import Steps
from fedtune.core.dp.shared_noise import joint_sigma
from fedtune.core.ledger.files import EVERY as EVERY

LOST = "restore"  # the study of a charge for lost steps of which no file says whose they were


# Version of the rules by which a unit's records are chosen. 1: the choice of a patient's records,
# and arrivals, could depend on other patients' records, so the ε of those rounds is not known. 2:
# they depend on the unit's own records alone.
RULES = 2
Slot = tuple[str, int, str]  # (study, round, adapter): at most one update leaves the site for it
Permit = Callable[[list["Charge"]], None]
PermitUnknown = Callable[[list["Spent"]], None]  # called with charges whose ε is not known
# dataset -> those declared disjoint from it; dataset -> its column of patients
PermitApart = Callable[[dict[str, list[str]], dict[str, str]], None]


def slot_of(slot: Slot, membership: str) -> Slot:
    """Return the slot (study, round, adapter) under which a membership of a hospital answers. Two
    memberships have two slots even with one plan: if both sent the same bytes, two coordinators
    would see that they know the same hospital.

    - slot: the slot without a membership
    - membership: the membership's name, which is added to the slot's third part; "" for a site with
      a ledger of its own, whose slot stays as it is"""
    study, round_, adapter = slot
    return study, round_, f"{adapter}@{membership}" if membership else adapter


def slot_fields(slot: Slot) -> dict[str, Any]:
    """Return a slot (study, round, adapter) as a dict of a ledger entry's fields: "study", "round"
    and "adapter"."""
    study, round_, adapter = slot
    return {"study": study, "round": round_, "adapter": adapter}


def owner_of(slot: Slot) -> str:
    """Return the name of the hospital's membership whose answer belongs in a slot (study, round,
    adapter); "" if the slot names no membership, as at a site with a ledger of its own."""
    return slot[2].partition("@")[2]


@dataclass(frozen=True)
class Charge:
    """The cost of one round: its noised steps, as they are reserved in the ledger. No value depends
    on a record: all follow from the plan, the site's settings and earlier charges.

    - study, name, round: the plan's digest, the study's name, and the number of the round
    - noise_multiplier: σ, the standard deviation of the noise that this site adds, in multiples of
      the clipping norm; 0.0 without privacy
    - sampling_rate: q, the probability with which a step draws a unit (or record)
    - steps: the number of noised steps
    - records: k, the most rows of one unit in a step
    - max_grad_norm: the clipping norm
    - unit: "patient" or "record"; "any" for a charge that a restore entered and that holds for both
    - cohort: the name that the site gave the units that arrived last; "any" after a restore
    - order: the Rényi order of the site's privacy filter at the time of the charge
    - other_orders: further orders that it may have been, for a charge that a restore entered
    - rules: the version of the rules by which records were chosen (RULES of the release that
      charged)
    - sites, colluding: n and t of secure aggregation. If at most t of the n sites collude, every
      sum that anybody opens has the noise of n - t sites. 1 and 0 without secure aggregation
    - membership: which of a hospital's memberships paid; "" at a site that has its own ledger
    - adopted: whether the charge was made, or may have been made, in another ledger, which the
      hospital's shared ledger adopted later. It may then be older than charges that come before it
      in the ledger
    - patient: the column whose values told patients apart (`patient_column`); "" for a charge per
      record, and for charges of an earlier release or a restore, for which no column is known
    - restored: whether a restore entered it, here or in an adopted ledger. It may then be older
      than every other charge. The entry says it by its kind or by its dataset, EVERY"""

    study: str  # plan digest
    name: str
    round: int
    noise_multiplier: float
    sampling_rate: float
    steps: int
    records: int
    max_grad_norm: float
    unit: str
    cohort: str
    order: float = 2.0
    rules: int = RULES
    sites: int = 1
    colluding: int = 0
    membership: str = ""
    adopted: bool = False
    patient: str = ""
    other_orders: tuple[float, ...] = ()
    restored: bool = field(default=False, compare=False)

    @classmethod
    def read(cls, fields: Mapping[str, Any], membership: str = "", patient: str = "") -> Charge:
        """Build a charge from the fields of a ledger entry. An entry without `rules` was written
        before that field existed, and gets version 1. If an entry of a membership has no `adopted`,
        as those of an earlier release or a restore, the charge counts as perhaps made in an adopted
        ledger.

        - fields: the fields by name, as `fields` returns them
        - membership: the membership that the entry names; "" if it names none
        - patient: the column of patients that the entry names; "" if it names none"""
        beside = {"membership": membership, "adopted": bool(membership), "patient": patient}
        known: dict[str, Any] = {"rules": 1, **beside, **fields}
        known["other_orders"] = tuple(known.get("other_orders", ()))
        known["restored"] = membership == EVERY
        return cls(**known)

    def fields(self) -> dict[str, Any]:
        """Return the charge as a dict of a ledger entry's fields, without membership and column,
        which the entry holds in fields of its own. So that the entry has the same fields as in
        earlier releases, `sites` and `colluding` are left out without secure aggregation,
        `adopted` without a membership, and `other_orders` if there are none."""
        fields = asdict(self)
        del fields["membership"], fields["patient"], fields["restored"]
        fields["other_orders"] = list(self.other_orders)
        if not self.other_orders:
            del fields["other_orders"]
        if not self.membership:
            del fields["adopted"]
        if self.sites == 1:
            del fields["sites"], fields["colluding"]
        return fields

    def is_paid_by(self, memberships: Collection[str]) -> bool:
        """Return whether the charge counts as paid by one of `memberships`, given by their names. A
        charge that a restore entered for lost ones (its membership is EVERY) counts as paid by
        each."""
        return self.membership == EVERY or self.membership in memberships

    def is_known_for(self, unit: str) -> bool:
        """Return whether the charge gives an ε for one `unit`, which is "patient" or "record", if
        the column of patients is still the same (`Spent.is_known_for`). It gives none if it was
        made for another unit, or by an earlier release that chose records by other rules."""
        return self.rules == RULES and self.unit in (unit, "any")

    @property
    def event(self) -> Steps:
        """Return the charge's steps for the accountant. Their σ is that of the site's own noise or,
        with secure aggregation, that of the noise of all honest sites together."""
        sigma = joint_sigma(self.noise_multiplier, self.sites - self.colluding)
        return self.fallback._replace(noise_multiplier=sigma)

    @property
    def fallback(self) -> Steps:
        """Return the charge's steps for the accountant, with the σ of this site's own noise
        alone."""
        return Steps(self.noise_multiplier, self.sampling_rate, self.steps, self.records)


def orders_of(charges: Iterable[Charge]) -> tuple[float, ...]:
    """Return the Rényi orders at which the privacy filter composes charges, sorted. Usually this is
    the one order that the first charge fixed. A ledger that was adopted had fixed an order of its
    own. If it did so before the hospital's ledger, results were known when the hospital's order was
    fixed. Nobody knows which was first, so both are returned. The same holds for a charge that a
    restore entered. Without charges the order does not matter, and the result is (2.0,). charges:
    in the ledger's order."""
    first = _first_charges(charges)
    orders = {order for charge in first for order in (charge.order, *charge.other_orders)}
    return tuple(sorted(orders)) or (2.0,)


def samples_first(charges: Iterable[Charge]) -> bool:
    """Return whether the first step that was charged sampled (q < 1), or may have done so: after a
    restore this may not be known. Return True without charges. `core.dp.filter.total_epsilon` needs
    the result. charges: in the ledger's order."""
    charges = list(charges)
    first = _first_charges(charges)
    may = (charge.sampling_rate < 1 or charge.restored for charge in first)
    return any(may) or not first or not are_kinds_known(charges)


def are_kinds_known(charges: Iterable[Charge]) -> bool:
    """Return whether each charge states what its steps were. One that a restore priced by bounds
    does not: its steps may have been of several kinds, and before any other.
    `core.dp.filter.total_epsilon` needs the result."""
    return all(charge.study != LOST for charge in charges)


def _first_charges(charges: Iterable[Charge]) -> list[Charge]:
    """List the charges that may be the earliest of all: the first in the ledger, the first of each
    ledger that was adopted, and each that a restore entered."""
    first, memberships = list[Charge](), set[str]()
    for charge in charges:
        is_new = charge.membership not in memberships and (charge.adopted or not first)
        if charge.restored or is_new:
            first.append(charge)
        if is_new and not charge.restored:
            memberships.add(charge.membership)
    return first


@dataclass(frozen=True)
class Spent:
    """A charge as it stands in the ledger.

    - seq: the number of its entry
    - kind: "reserve" (entered before its round) or "restore" (entered when a damaged ledger was
      restored, for charges that it had lost)
    - dataset: the name of the dataset that was charged; "*" for a "restore", which counts against
      every dataset
    - charge: what the round cost
    - adapter: the digest of the adapter from which the round started, with the number of the
      attempt and the membership if there are any; "" for a "restore"
    - time: when it was entered, in UTC seconds
    - released: whether the round's update was released, or may have been: a restore may have lost
      the entry that says so. Always True for a "restore" charge
    - patient: the column that told patients apart in the round; "" if it is not known, and for a
      charge per record
    - patient_now: the column that tells the patients of this dataset apart now; "" if none does
    - place: which of its entry's charges it is, from 0; only the entry of a restore has several"""

    seq: int
    kind: str
    dataset: str
    charge: Charge
    adapter: str
    time: int
    released: bool
    patient: str = ""
    patient_now: str = ""
    place: int = 0

    @property
    def number(self) -> tuple[int, int]:
        """What no other charge of the ledger has: the number of its entry, and its place there."""
        return self.seq, self.place

    @property
    def slot(self) -> Slot:
        return self.charge.study, self.charge.round, self.adapter

    @property
    def has_other_column(self) -> bool:
        """Whether another column tells patients apart now than in the round. One patient may then
        have counted as several units in the round."""
        return bool(self.patient and self.patient_now) and self.patient != self.patient_now

    @property
    def own_dataset(self) -> str:
        """The name of the charged dataset in the site's or the hospital's file. A charge of an
        adopted ledger is entered under "MEMBERSHIP/NAME", a name that no file can have."""
        return self.dataset.rpartition("/")[2]

    def find_column(self, columns: Mapping[str, str], dataset: str) -> str:
        """Return the column that counts for this charge: that of its own dataset or, if that one
        has none, that of `dataset`, against which the charge counts; "" if neither has one.
        columns: dataset's name -> its column of patients, "" for none."""
        return columns.get(self.own_dataset) or columns.get(dataset, "")

    def is_known_for(self, unit: str) -> bool:
        """Return whether the charge gives an ε for one `unit`, which is "patient" or "record":
        whether it was made for this unit, by this release's rules, and its column of patients is
        still the one that counts. A charge that a restore entered gives none: what was lost may
        have been made for any unit, and by any column."""
        if self.dataset == EVERY or not self.charge.is_known_for(unit):
            return False
        return unit == "record" or not self.has_other_column


@dataclass(frozen=True)
class Earlier:
    """A charge of another ledger, to be entered in this one.

    - dataset: the name of the dataset that is charged here
    - charge: what the round cost
    - adapter: the digest of the adapter from which the round started, with the number of the
      attempt and the membership
    - sha256: the hash of the update that was released for the charge; "" if none was
    - origin: the hash of its entry in the other ledger, by which it is told from a like charge of
      another branch of that ledger; "" if it is not known"""

    dataset: str
    charge: Charge
    adapter: str
    sha256: str = ""
    origin: str = ""


@dataclass(frozen=True)
class Gone:
    """When a unit withdrew in another ledger.

    - since: in UTC seconds
    - paid: how many of that ledger's charges, oldest first, may be of rounds before the withdrawal
    - columns: the columns that told patients apart then; none if they are not known"""

    since: int
    paid: int = 0
    columns: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Held:
    """A released answer that leaves the site only when a person there approves it.

    - charge: the charge for the answer
    - adapter: the digest of the adapter from which the round started, with the number of the
      attempt and the membership if there are any
    - size: the answer's length in bytes
    - since: when it was released, in UTC seconds"""

    charge: Charge
    adapter: str
    size: int
    since: int

    @property
    def slot(self) -> Slot:
        return self.charge.study, self.charge.round, self.adapter


@dataclass(frozen=True)
class Accepted:
    """A person's decision to go on with a dataset although the ε of some charges is not known. It
    holds for all entries up to number `upto`.

    - who: the person's login
    - why: in that person's words
    - time: when, in UTC seconds
    - patients: the column of patients that each dataset had at this time; None for an entry of an
      earlier release, which did not say so
    - declared: the datasets that were declared public or generated and that shared records with
      this one, as the person was shown; None for an entry of an earlier release, which did not say
      so and was for all of them
    - against: each dataset whose charges counted against this one at this time -> the number of the
      newest of them; None for an entry of an earlier release, which did not say so"""

    upto: int
    who: str
    why: str
    time: int
    patients: Mapping[str, str] | None = None
    declared: Collection[str] | None = None
    against: Mapping[str, int] | None = None

    def covers_declared(self, name: str, entry: int) -> bool:
        """Return whether the person accepted that records of the dataset `name`, which was declared
        public or generated, are private here. entry: the number of its newest declaration."""
        return self.upto >= entry and (self.declared is None or name in self.declared)

    def covers(self, spent: Spent, dataset: str) -> bool:
        """Return whether the person accepted a charge against `dataset`, the dataset about which
        the person decided. The column that tells patients apart now must have been in the site's
        files at the decision, since by that column the person saw what the charge cost one
        patient. The charge must have counted against `dataset` then: a person who did not see it,
        because its dataset was declared disjoint, has not accepted it."""
        if self.against is not None and spent.seq > self.against.get(spent.dataset, -1):
            return False
        if self.patients is None:
            return self.upto >= spent.seq and not spent.has_other_column
        seen = spent.find_column(self.patients, dataset)
        return self.upto >= spent.seq and seen == spent.patient_now


@dataclass(frozen=True)
class Freeze:
    """A person's decision that nothing is charged or answered until a person lifts it.

    who: the person's login; why: in that person's words; time: when, in UTC seconds."""

    who: str
    why: str
    time: int


@dataclass(frozen=True)
class Standing:
    """Decisions of people that a restored ledger must hold, read from files beside the ledger. If
    the entry of a decision was lost, the restore enters the decision again.

    - withdrawn: hash of a unit's key → when the unit withdrew, in UTC seconds
    - frozen: the freeze that is in force; None if the ledger is not frozen
    - refused: slots (study, round, adapter) whose answer a person refused for good"""

    withdrawn: Mapping[str, int]
    frozen: Freeze | None
    refused: Collection[Slot] = ()


@dataclass(frozen=True)
class Cohort:
    """The units of a dataset that arrived together, and the charges that count against each of
    them.

    - arrival: the number of the entry that records their arrival; 0 if none does, and all charges
      against the dataset then count against them
    - name: the name that a person gave the cohort; "first" if `arrival` is 0
    - time: when they arrived, in UTC seconds; 0 if `arrival` is 0
    - units: how many units; 0 if `arrival` is 0
    - spent: the charges, oldest first"""

    arrival: int
    name: str
    time: int
    units: int
    spent: list[Spent]

    @property
    def charges(self) -> list[Charge]:
        return [spent.charge for spent in self.spent]

    @property
    def entries(self) -> tuple[int, ...]:
        """The number of the ledger's entry for each charge in `spent`. Two cohorts for which these
        numbers are equal have the same charges."""
        return tuple(spent.seq for spent in self.spent)
