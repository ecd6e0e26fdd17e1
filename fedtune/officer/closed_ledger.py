"""Read the ledger of a site that a hospital takes over, while no process can write to it, so that
the hospital's ledger can enter its charges (`Ledger.enter_earlier`).

A doubtful charge counts against more datasets or units, never against fewer:
| in the old ledger                                      | in the hospital's ledger               |
| a charge that a restore entered, against every dataset | counts against every dataset and every |
|                                                         | unit, whenever the unit arrived        |
| the cohorts that a charge left out, when units came     | not taken over: every unit pays        |
| accepted charges of unknown ε, signed plans             | not taken over: a person decides anew  |
| the plans that a restore ended                          | stay ended, for every membership       |
| the column that told patients apart in a charge         | taken over, to be compared again; for  |
|                                                         | a charge without one, the column that  |
|                                                         | the site file names                    |
| the columns that a dataset had, and those of datasets   | remembered of the dataset, so that it  |
| not disjoint from it that the site file names no longer | has no study that protects records     |
Errors: Refused if a person froze the ledger; LedgerError."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from fedtune.core.ledger.chain import Transaction
from fedtune.core.ledger.entries import EVERY, Earlier, Gone, slot_of
from fedtune.core.ledger.files import Head
from fedtune.core.ledger.ledger import Ledger
from fedtune.officer.freeze import frozen

# Stands for an unknown column. It equals no dataset's column, since a ledger stores a name with a
# character that does not print, such as a tab, as a hash.
NO_COLUMN = "\tnot known"


class Closed:
    """The ledger of a site that a hospital takes over, to which no other process can write while
    `closed` holds it.

    - head: the ledger's newest entry, by its hash
    - withdrawn: hash of a unit's key → when the unit withdrew
    - patient_columns: each dataset's name → the columns of patients that it ever had, oldest first;
      [] if they are not known
    - refused: (study, round, adapter) of each answer that a person refused for good
    - ended: the digest of each plan that gets no further answer (`Ledger.ended_plans`)
    - charged_entries: the hash of each entry that is charged by itself -> how many steps
      (`Ledger.charged_entries`)
    - stored: (study, round, adapter) of each update that was released, and may be sent again
    - known: number and hash of each entry that it accounts for, by which receipts for it are
      recognised later
    - path_of: returns the path at which the update of such a triple is stored"""

    def __init__(self, ledger: Ledger, reader: Transaction) -> None:
        self._ledger, self._account, self._reader = ledger, ledger._account, reader
        self.head = ledger._store.head
        self.known = ledger._store.list_known(reader.sql)
        self.settled = ledger._store.settled
        self.refused, self.ended = frozenset(self._account.refused), frozenset(self._account.ended)
        self.charged_entries = dict(self._account.charged_entries)
        self.patient_columns = self._account.list_columns()
        self.stored, self.path_of = frozenset(self._account.sent), ledger.path_of
        charges = self._account.spent()
        paid = [spent.seq for spent in charges]
        # What a restore charged may be rounds that ran before a withdrawal, whenever it was.
        upto_restore = [n for n, each in enumerate(charges, 1) if each.kind == "restore"]
        self.withdrawn = {
            unit: Gone(
                since=int(entry.body.get("since", entry.body["time"])),
                paid=max([bisect_left(paid, entry.seq), *upto_restore]),
                columns=self._account.withdrawn_by[unit],
            )
            for unit, entry in self._account.withdrawn.items()
        }

    @property
    def datasets(self) -> list[str]:
        """The sorted names of all datasets that were declared or charged."""
        charged = {reserved.dataset for reserved in self._account.reserved.values()}
        return sorted({*self._account.declared, *charged})

    def has_entry(self, head: Head) -> bool:
        """Return whether an entry is in this ledger itself."""
        return self._reader.hash_at(head.seq) == head.hash

    def hashed(self, key: bytes) -> str:
        """Return the hash of a unit's key with this ledger's salt."""
        return self._ledger.hashed(key)

    def list_earlier(
        self, membership: str, names: Mapping[str, str], columns: Mapping[str, str]
    ) -> list[Earlier]:
        """List this ledger's charges, oldest first, as charges of `membership`.

        - membership: the name of the membership
        - names: this ledger's name of each dataset → the name under which its charges count
        - columns: the column of patients of each dataset in the site file. It is taken for charges
          for which the ledger names no column, since an earlier release of fedtune made them

        A charge that a restore entered stays a charge against every dataset. It also counts against
        units that arrive later: one of them may have arrived before, and the restore lost this."""
        listed = list[Earlier]()
        for spent in self._account.spent():
            charge = replace(spent.charge, membership=membership, adopted=True)
            origin = self._reader.hash_at(spent.seq) or ""
            if spent.kind == "restore":
                listed.append(Earlier(EVERY, charge, spent.adapter, origin=origin))
                continue
            if charge.unit != "record":
                column = self._account.column_of(spent) or columns.get(spent.dataset)
                charge = replace(charge, patient=column or NO_COLUMN)
            slot = charge.study, charge.round, spent.adapter
            sha256 = self._account.sent.get(slot, "") if spent.released else ""
            adapter = slot_of(slot, membership)[2]
            listed.append(Earlier(names[spent.dataset], charge, adapter, sha256, origin))
        return listed


@contextmanager
def closed(ledger: Ledger) -> Iterator[Closed]:
    """A context manager that keeps every other process from writing to a ledger while its block
    runs, and yields what the ledger holds. The block must not call the ledger's own methods.
    Errors: Refused if a person froze the ledger; LedgerError."""
    with ledger._store.writing() as reader:
        if ledger._account.frozen:
            raise frozen(ledger.folder, "adopted")
        yield Closed(ledger, reader)
