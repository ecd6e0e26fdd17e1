"""Enter in a hospital's ledger what one of its memberships had paid from a ledger of its own.

Guarantee: each charge of the other ledger is in the hospital's afterwards, with its rules, unit and
order, as a charge of the membership; whatever is in doubt counts against more, never less.
| a charge that a restore entered, against every dataset | is entered against each of them        |
| left out cohorts, and arrivals                          | are not carried: every unit pays       |
| accepted charges of unknown ε, signed plans             | are not carried: a person decides anew |
All of it is one transaction: a crash leaves every charge entered, or none. The same charges are
entered once, however often it is tried.
Errors: LedgerError.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedtune.core.ledger.entries import EVERY, Charge, Slot
from fedtune.core.ledger.files import LedgerError

if TYPE_CHECKING:
    from fedtune.core.ledger.chain import Transaction
    from fedtune.core.ledger.ledger import Ledger


@dataclass(frozen=True)
class Earlier:
    """A charge of another ledger. sha256: of the update that was released for it; "" of none."""

    dataset: str
    charge: Charge
    adapter: str
    sha256: str = ""


class Closed:
    """Another site's ledger, to which no process can write meanwhile.

    withdrawn: hash of a unit's key → when it withdrew, in UTC seconds; refused: slots whose answer
    a person refused for good."""

    def __init__(self, ledger: Ledger, reader: Transaction) -> None:
        self._ledger, self._reader, self._account = ledger, reader, ledger._account
        self.head = ledger._store.head
        self.refused = frozenset(self._account.refused)
        self.withdrawn = {
            unit: int(entry.body.get("since", entry.body["time"]))
            for unit, entry in self._account.withdrawn.items()
        }

    @property
    def datasets(self) -> list[str]:
        """Every dataset that was declared or charged."""
        charged = {reserved.dataset for reserved in self._account.reserved.values()}
        return sorted({*self._account.declared, *charged})

    def hashed(self, key: bytes) -> str:
        """Hash a unit's key with this ledger's salt."""
        return self._ledger.hashed(key)

    def list_earlier(self, membership: str, names: Mapping[str, str]) -> list[Earlier]:
        """List the charges as those of a membership, oldest first, each against the dataset to
        which `names` maps its own."""
        listed = list[Earlier]()
        for spent in self._account.spent():
            charge = replace(spent.charge, membership=membership)
            if spent.kind == "restore":
                every = [names[dataset] for dataset in self.datasets] or [EVERY]
                listed += [Earlier(name, charge, spent.adapter) for name in every]
                continue
            slot = charge.study, charge.round, spent.adapter
            sha256 = self._account.sent[slot] if spent.released else ""
            listed.append(Earlier(names[spent.dataset], charge, spent.adapter, sha256))
        return listed

    def is_apart_from_start(self, dataset: str) -> bool:
        """Return whether no charge counts both against `dataset` and against another that is
        declared disjoint from it."""
        apart = self._account.apart_since
        return not any(since for pair, since in apart.items() if dataset in pair)

    def is_whole(self, dataset: str, members: Collection[bytes]) -> bool:
        """Return whether `members` hold all that the dataset ever had."""
        known = {self._ledger._salt_member(member) for member in members}
        return self._reader.hashes(dataset) <= known


@contextmanager
def closed(ledger: Ledger) -> Iterator[Closed]:
    """Keep every other process from writing to a ledger while the block runs; nor may the block
    call it. Errors: LedgerError."""
    with ledger._store.writing() as reader:
        yield Closed(ledger, reader)


def enter(
    ledger: Ledger,
    membership: str,
    earlier: Sequence[Earlier],
    withdrawn: Mapping[bytes, int],
    refused: Collection[Slot],
    who: str,
) -> int:
    """Enter a membership's earlier charges, and return how many were not there yet.

    withdrawn: the key of each unit that withdrew, and when, in UTC seconds; refused: slots whose
    answer a person refused for good. Errors: LedgerError if the membership has other charges."""
    with ledger._store.writing() as writer:
        account = ledger._account
        there = [
            (paid.charge, paid.adapter)
            for paid in account.reserved.values()
            if paid.charge.membership == membership
        ]
        planned = [(one.charge, one.adapter) for one in earlier]
        if there != planned[: len(there)]:
            raise LedgerError(
                f"{ledger.folder}: membership {membership!r} has paid for other rounds here",
                "a name under which nothing was paid yet",
                "choose another name",
            )
        for one in earlier[len(there) :]:
            body = {"dataset": one.dataset, "charge": one.charge.fields(), "adapter": one.adapter}
            number = writer.append("reserve", body | {"membership": membership})
            if one.sha256:
                writer.append("release", {"reservation": number, "sha256": one.sha256})
        for study, round_, adapter in sorted(set(refused) - account.refused):
            slot = {"study": study, "round": round_, "adapter": adapter}
            writer.append("refuse", slot | {"by": who})
        since = {ledger._salt_member(key).hex(): time for key, time in withdrawn.items()}
        for unit in sorted(set(since) - set(account.withdrawn)):
            writer.append("withdraw", {"unit": unit, "since": since[unit]})
    return len(earlier) - len(there)
