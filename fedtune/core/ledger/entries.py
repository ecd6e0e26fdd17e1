"""The entries of a ledger as objects: charges, acceptances and cohorts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedtune.core.dp.accountant import Steps
from fedtune.core.dp.shared_noise import joint_sigma

EVERY = "*"  # the dataset of a charge that counts against all of them


# Version of the rules by which a unit's records are chosen. 1: the choice of a patient's records,
# and arrivals, could depend on other patients' records, so the ε of those rounds is not known. 2:
# they depend on the unit's own records alone.
RULES = 2
Slot = tuple[str, int, str]  # (study, round, adapter): at most one update leaves the site for it
Permit = Callable[[list["Charge"]], None]
PermitUnknown = Callable[[list["Spent"]], None]  # of charges whose ε is not known
PermitApart = Callable[[dict[str, list[str]]], None]  # dataset -> those declared disjoint from it


def slot_of(slot: Slot, membership: str) -> Slot:
    """Return the slot (study, round, adapter) under which a hospital's membership answers. Two
    memberships have two slots, even with one plan: if both sent the same bytes, two coordinators
    would see that they know the same hospital."""
    study, round_, adapter = slot
    return study, round_, f"{adapter}@{membership}" if membership else adapter


def slot_fields(slot: Slot) -> dict[str, Any]:
    """Return a slot as the fields of a ledger entry: "study", "round" and "adapter"."""
    study, round_, adapter = slot
    return {"study": study, "round": round_, "adapter": adapter}


def owner_of(slot: Slot) -> str:
    """Return the membership whose answer belongs in a slot (study, round, adapter); "" for a site
    that is no membership of a hospital."""
    return slot[2].partition("@")[2]


@dataclass(frozen=True)
class Charge:
    """The cost of one round: its noised steps, as they are reserved in the ledger. Every value is
    public: it follows from the plan.

    - noise_multiplier: σ that this site adds, in multiples of C; 0.0 without privacy
    - sampling_rate: q
    - records: k, the most rows of one unit in a step
    - order: the Rényi order of the site's filter at the time of the charge
    - rules: the version of the rules by which records were chosen (RULES of the release that
      charged)
    - sites, colluding: n and t of secure aggregation; under its assumption every sum that anybody
      opens has the noise of n - t sites
    - membership: which of a hospital's memberships paid; "" at a site that has its own ledger"""

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

    @classmethod
    def read(cls, fields: Mapping[str, Any], membership: str = "") -> Charge:
        """Read a charge from the fields of a ledger entry. An entry without `rules` was written
        before that field existed, and gets version 1. membership: the one that the entry names; ""
        if it names none."""
        return cls(**{"rules": 1, "membership": membership, **fields})

    def fields(self) -> dict[str, Any]:
        """Return the charge as fields of a ledger entry, without the membership, which is another
        field of the entry. Without secure aggregation the fields are those of earlier releases."""
        fields = asdict(self)
        del fields["membership"]
        if self.sites == 1:
            del fields["sites"], fields["colluding"]
        return fields

    def is_paid_by(self, memberships: Collection[str]) -> bool:
        """Return whether the charge counts as paid by one of `memberships`. A charge that a restore
        entered (EVERY) counts as paid by each."""
        return self.membership == EVERY or self.membership in memberships

    def is_known_for(self, unit: str) -> bool:
        """Return whether the charge's ε holds for one `unit`, which is "patient" or "record". It
        does not if the charge is for another unit, or if an earlier release's RULES chose the
        records."""
        return self.rules == RULES and self.unit in (unit, "any")

    @property
    def event(self) -> Steps:
        """The charge as an event for the accountant. Its σ is that of the site's own noise or, with
        secure aggregation, that of the honest sites' noise together."""
        sigma = joint_sigma(self.noise_multiplier, self.sites - self.colluding)
        return self.fallback._replace(noise_multiplier=sigma)

    @property
    def fallback(self) -> Steps:
        """The charge as an event for the accountant, with this site's own noise only."""
        return Steps(self.noise_multiplier, self.sampling_rate, self.steps, self.records)


@dataclass(frozen=True)
class Spent:
    """A charge in the ledger.

    - seq: the number of its entry
    - kind: "reserve" (entered before its round) or "restore" (entered when a damaged ledger was
      restored, for charges that it had lost)
    - dataset, charge, adapter: what was charged, as for `Ledger.reserve`; a "restore" counts
      against every dataset, and has no adapter
    - time: when it was entered, in UTC seconds
    - released: whether its update was released"""

    seq: int
    kind: str
    dataset: str
    charge: Charge
    adapter: str
    time: int
    released: bool


@dataclass(frozen=True)
class Earlier:
    """A charge of another ledger, to be entered in this one. sha256: the hash of the update that
    was released for the charge; "" if none was."""

    dataset: str
    charge: Charge
    adapter: str
    sha256: str = ""


@dataclass(frozen=True)
class Held:
    """A released answer that waits for a person at the site.

    - charge: the charge for the answer
    - adapter: the third part of its slot, after the charge's study and round
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
    """A person's decision to continue although the ε of charges up to entry `upto` is not known.

    time: UTC seconds; why: in that person's words."""

    upto: int
    who: str
    why: str
    time: int


@dataclass(frozen=True)
class Freeze:
    """A person's decision that nothing is charged or answered until a person lifts it.

    time: UTC seconds; why: in that person's words."""

    who: str
    why: str
    time: int


@dataclass(frozen=True)
class Standing:
    """Decisions of people that a restored ledger must have, read from files beside the ledger. A
    restore enters each decision again whose entry was lost.

    - withdrawn: hash of a unit's key → when the unit withdrew, in UTC seconds
    - frozen: a freeze that nobody lifted, or None
    - refused: slots (study, round, adapter) whose answer a person refused for good"""

    withdrawn: Mapping[str, int]
    frozen: Freeze | None
    refused: Collection[Slot] = ()


@dataclass(frozen=True)
class Cohort:
    """The units of a dataset that arrived together, and the charges that count against each of
    them.

    arrival: the number of the entry with which they arrived; 0 if there is none: every charge then
    counts against them, and `units`, their number, is 0, too."""

    arrival: int
    name: str
    time: int
    units: int
    spent: list[Spent]

    @property
    def charges(self) -> list[Charge]:
        return [spent.charge for spent in self.spent]
