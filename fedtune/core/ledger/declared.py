"""Sign a site's declarations that a dataset is public or generated, as entries of its ledger.

The ledger keeps hashes of the declared records as well. Declared records do not become private
unless a person accepts it.
Guarantee: a dataset name that was ever charged as private can never be declared. Nor can a record
of a dataset that was so charged: the ledger recognises the record by the salted hashes of its
content, its file, its longest text and its patient. These hashes stay, also after a withdrawal.
| a ledger that lost charges and was restored | declares nothing: a lost charge may be of any name |
| a short text under other column names       | is not recognised                                  |
All this is done at the site alone, before it connects. A refusal ends the site's command.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

from fedtune.core.errors import ConfigError, PolicyRefused
from fedtune.core.ledger.account import NOT_PRIVATE
from fedtune.core.ledger.entries import EVERY

if TYPE_CHECKING:
    from fedtune.core.ledger.ledger import Ledger

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
    """Sign the declaration that `dataset` is public or generated; repeating a declaration adds
    no entry.

    - ledger: the site's lifetime ledger
    - dataset: the dataset's name in site.toml
    - what: what a person declares of the records, by `declared` in site.toml
    - records: for each record, the identifiers by which the ledger recognises it (`data.identity`),
      without a salt
    - sign: whether to enter the declaration; False to check only

    Errors: PolicyRefused if the name, or any of the records, was charged as private; nothing is
    entered."""
    with ledger._store.writing() as writer:
        charged = {spent.dataset for spent in ledger._account.spent()}
        check_name(charged, dataset, what)
        known = set().union(*(writer.hashes(name) for name in charged))
        private = sum(any(ledger._salt_member(m) in known for m in record) for record in records)
        if private:
            raise PolicyRefused(
                f"data.declared = {what!r}, and {private} of {len(records)} records of dataset "
                f"{dataset!r} were charged as private here: they, their text, file or patient",
                "records that no study here ever trained on as private",
                TODO,
            )
        if not sign:
            return
        name = NOT_PRIVATE + dataset
        writer.add_members(name, {ledger._salt_member(m) for record in records for m in record})
        entry = {"dataset": dataset, "what": what, "members": writer.members(name)}
        was = ledger._account.not_private.get(dataset), ledger._account.members.get(name)
        if was != (what, entry["members"]):
            writer.append("declaration", entry)


def check_private(ledger: Ledger, dataset: str, records: Sequence[Collection[bytes]]) -> None:
    """Check that no private record was ever declared public or generated. Declared runs are not
    charged to the lifetime ledger, so that a private file could otherwise be tried for free.

    records: for each record, the identifiers by which the ledger recognises it, but not the
    patient's key, since invented patients may have any keys. Errors: PolicyRefused, until a person
    accepts it (`Ledger.accept`)."""
    with ledger._store.writing() as writer:
        names = _not_accepted(ledger, dataset)
        known = set().union(*(writer.hashes(NOT_PRIVATE + name) for name in names))
        shared = sum(any(ledger._salt_member(m) in known for m in record) for record in records)
    if shared:
        raise PolicyRefused(
            f"{shared} of {len(records)} records of dataset {dataset!r} were declared public or "
            "generated here, and what was tried with them is in no budget",
            "private records that were never declared",
            "if they are not private, declare them again; if they are, a person decides: `fedtune "
            f"ledger SITE --accept {dataset} --reason TEXT`",
        )


def to_accept(ledger: Ledger, dataset: str) -> bool:
    """Return whether the ledger holds a declaration (that a dataset is public or generated) which
    is newer than a person's last acceptance for `dataset`, so that a person may have to accept
    it."""
    with ledger._store.writing():
        return bool(_not_accepted(ledger, dataset))


def check_acceptable(ledger: Ledger, dataset: str, unit: str) -> None:
    """Check that a person has something to accept for `dataset`: charges whose ε for one `unit` is
    unknown, or a declaration as public or generated that nobody accepted. Errors: ConfigError if
    there is neither."""
    if not (ledger.unknown(dataset, unit) or to_accept(ledger, dataset)):
        raise ConfigError(
            f"nothing of dataset {dataset!r} is unknown", "a dataset with such rounds"
        )


def _not_accepted(ledger: Ledger, dataset: str) -> list[str]:
    """List the datasets whose newest declaration as public or generated nobody has accepted for
    `dataset`."""
    account = ledger._account
    accepted = max((a.upto for a in account.accepted.get(dataset, [])), default=-1)
    return [name for name, entry in account.not_private_since.items() if entry > accepted]


def check_name(charged: Collection[str], dataset: str, what: Declared) -> None:
    """Check that a dataset may be declared as `what`, i.e. public or generated: its name is none of
    those `charged` as private, and no charge was lost in a restore. Errors: PolicyRefused."""
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


def read_declarations(ledger: Ledger) -> dict[str, str]:
    """Return as what each dataset is declared, "public" or "generated", by the dataset's name. The
    newest declaration of a dataset counts."""
    with ledger._store.writing():
        return dict(ledger._account.not_private)


def check_declared(ledger: Ledger, dataset: str, what: Declared) -> None:
    """Check that `dataset` was declared as `what`, and never charged as private since.

    The result follows from what a person declared, never from a record. Errors: PolicyRefused."""
    check_name({spent.dataset for spent in ledger.spending()}, dataset, what)
    if read_declarations(ledger).get(dataset) != what:
        raise PolicyRefused(
            f"data.declared = {what!r}, and this site's ledger has no such declaration",
            "a declaration that was signed before the site joined",
            "start the site with `fedtune client`, which checks the records and signs it",
        )
