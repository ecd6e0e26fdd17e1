"""A site's declarations that a dataset is public or generated, as signed entries of its ledger.

Guarantee: a name that was ever charged as private can never be declared, and neither can a record
that is in a dataset so charged, by the salted hashes that the ledger keeps of each: what it says,
its file, its longest text, its patient. The hashes stay, also of patients who withdrew.
| a ledger that lost charges and was restored | nothing is declared: any name may be among them |
| a short text under other column names       | is not known again                              |
Read and written at the site alone, before it connects: a refusal ends the command here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

from fedtune.errors import PolicyRefused
from fedtune.ledger.entries import EVERY

if TYPE_CHECKING:
    from fedtune.ledger.ledger import Ledger

Declared = Literal["public", "generated"]
TODO = (
    "private records are paid for: take `declared` out of site.toml; or name files in which no "
    "record was ever private, under a name of their own"
)


def declare(
    ledger: Ledger,
    dataset: str,
    what: Declared,
    records: Sequence[Collection[bytes]],
    sign: bool = True,
) -> None:
    """Sign the declaration that `dataset` is public or generated; the same one again is no entry.

    records: of each record, the members by which the ledger knows it again (`data.identity`); sign:
    False to check alone.
    Errors: PolicyRefused where the name, or any of the records, was charged as private; nothing is
    entered."""
    with ledger._store.writing() as writer:
        charged = {spent.dataset for spent in ledger._account.spent()}
        check_name(charged, dataset, what)
        known = set().union(*(writer.hashes(name) for name in charged))
        private = sum(any(ledger._salted(m) in known for m in record) for record in records)
        if private:
            raise PolicyRefused(
                f"data.declared = {what!r}, and {private} of {len(records)} records of dataset "
                f"{dataset!r} were charged as private here: they, their text, file or patient",
                "records that no study here ever trained on as private",
                TODO,
            )
        if sign and ledger._account.not_private.get(dataset) != what:
            writer.append("declaration", {"dataset": dataset, "what": what})


def check_name(charged: Collection[str], dataset: str, what: Declared) -> None:
    """Refuse a name among those `charged` as private. Errors: PolicyRefused."""
    if EVERY in charged:
        raise PolicyRefused(
            f"data.declared = {what!r}, and this ledger was restored: of the charges that it lost "
            "every dataset may have been charged as private",
            "a ledger that lost no charge",
            TODO,
        )
    if dataset in charged:
        raise PolicyRefused(
            f"data.declared = {what!r}, and dataset {dataset!r} was charged as private here",
            "a name that no private study here ever had",
            TODO,
        )


def declared(ledger: Ledger) -> dict[str, str]:
    """Return what each dataset is declared to be, by name, newest declaration first to count."""
    with ledger._store.writing():
        return dict(ledger._account.not_private)


def check_declared(ledger: Ledger, dataset: str, what: Declared) -> None:
    """Check that `dataset` was declared as `what`, and never charged as private since.

    It follows from what a person declared, never from a record. Errors: PolicyRefused."""
    check_name({spent.dataset for spent in ledger.spending()}, dataset, what)
    if declared(ledger).get(dataset) != what:
        raise PolicyRefused(
            f"data.declared = {what!r}, and this site's ledger has no such declaration",
            "a declaration that was signed before the site joined",
            "start the site with `fedtune client`, which checks the records and signs it",
        )
