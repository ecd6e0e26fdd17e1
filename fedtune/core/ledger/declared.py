"""Sign a site's declarations that a dataset is public or generated, as entries of its ledger.

The ledger also keeps hashes of the declared records, so that nobody can use them as private records
later unless a person accepts it.
Guarantee: a dataset whose name was ever charged as private cannot be declared, and no dataset can
be declared that contains a record which was charged as private. The ledger recognises such a record
by the salted hashes of its content, its file, its longest text and its patient. These hashes stay,
also after a withdrawal.
| ledger that lost charges and was restored | declares nothing: any dataset may have been charged |
| ledger that lost entries and was restored | any private record may have been declared, until a  |
|                                           | person accepts this by the name EVERY               |
| short text under other column names       | its record is not recognised                        |
All this is done at the site alone, before it connects. A refusal ends the site's command.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
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
    """Sign the declaration that `dataset` is public or generated. If the ledger holds the same
    declaration already, no entry is added.

    - ledger: the site's lifetime ledger
    - dataset: the dataset's name in site.toml
    - what: "public" or "generated", as a person wrote in site.toml (`declared`)
    - records: for each record, the identifiers by which the ledger recognises it (`data.identity`),
      without a salt
    - sign: whether to enter the declaration; False to check only

    Errors: PolicyRefused if the name, or any of the records, was charged as private; nothing is
    entered."""
    with ledger._store.writing() as writer:
        charged = {spent.dataset for spent in ledger._account.spent()}
        check_name(charged, dataset, what, at_site=True)
        known = set().union(*(writer.hashes(name) for name in charged))
        private = sum(any(ledger._salt_member(m) in known for m in record) for record in records)
        if private:
            raise PolicyRefused(
                f"data.declared = {what!r}, and for {private} of {len(records)} records of dataset "
                f"{dataset!r} the record, its text, its file or its patient was charged as private "
                "here",
                "records that no study here ever used as private, in any of these respects",
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
    """Check that none of these private records was ever declared public or generated. A run on
    declared data is not charged to the lifetime ledger, so what it learned from a private record
    would be in no budget. After a restore that may have lost a declaration, each may have been.

    - ledger: the site's lifetime ledger
    - dataset: the dataset that the records belong to
    - records: for each record, the identifiers by which the ledger recognises it, except the
      patient's key, since an invented patient may happen to have the key of a real one

    Errors: PolicyRefused if a record was, or may have been, declared, until a person accepts this
    for `dataset` (`Ledger.accept`)."""
    if not (shared := find_shared(ledger, dataset, records)):
        return
    declared = [name for name in shared if name != EVERY]
    count = len(set().union(*(shared[name] for name in declared)))
    found = (
        f"{count} of {len(records)} records of dataset {dataset!r} were declared public or "
        f"generated here, in {', '.join(map(repr, declared))}"
    )
    raise PolicyRefused(
        f"{found if declared else describe_shared(dataset, shared)}, and what was tried with them "
        "is in no budget",
        "private records that were never declared",
        "if they are not private, declare them again; if they are, a person decides: `fedtune "
        f"ledger SITE --accept {dataset} {options_to_accept(shared)} --reason TEXT`",
    )


def find_shared(
    ledger: Ledger, dataset: str, records: Sequence[Collection[bytes]]
) -> dict[str, set[int]]:
    """Find private records of `dataset` that were declared public or generated, and that nobody has
    accepted. Return a dict: name of each declared dataset that has such records -> the positions of
    these records in `records`. It has EVERY, with all records, if a restore may have lost what was
    declared. records: for each record, the identifiers by which the ledger recognises it, as in
    `check_private`."""
    with ledger._store.writing() as writer:
        declared = {
            name: writer.hashes(NOT_PRIVATE + name) for name in _not_accepted(ledger, dataset)
        }
    found = {EVERY: {*range(len(records))}} if EVERY in declared else dict[str, set[int]]()
    for number, record in enumerate(records if declared else ()):
        salted = {ledger._salt_member(member) for member in record}
        for name, hashes in declared.items():
            if salted & hashes:
                found.setdefault(name, set()).add(number)
    return found


def check_acceptable(
    ledger: Ledger,
    dataset: str,
    unit: str,
    columns: Mapping[str, str] | None = None,
    shared: Collection[str] = (),
    named: Collection[str] = (),
    upto: int | None = None,
) -> None:
    """Check that a person has something to accept for `dataset`: charges whose ε for one `unit`
    ("patient" or "record") is not known, or records that were declared public or generated.

    - columns: each dataset's column of patients, as the site's files are now; None: as last
      declared
    - shared: the declared datasets that share records with `dataset` (`find_shared`)
    - named: the declared datasets that the person names. Their records are accepted by name alone,
      since a person who accepts charges need not have such records in mind. A dataset that shares
      no record now may be named, too: before a hospital adopts the site, all must be accepted
    - upto: the number of the newest entry that the person may have seen; None: the newest

    Errors: ConfigError if there is nothing, or if `named` has a dataset that was not declared, or
    that was accepted before."""
    waiting = list_not_accepted(ledger, dataset) if named else []
    if unknown := sorted({*named} - {*waiting}):
        raise ConfigError(
            f"no record of {unknown[0]!r} is to be accepted for {dataset!r}",
            options_to_accept(sorted(waiting)) if waiting else "no --accept-declared",
        )
    charges = ledger.unknown(dataset, unit, columns)
    if named or any(upto is None or spent.seq <= upto for spent in charges):
        return
    if shared:
        raise ConfigError(
            f"no round of dataset {dataset!r} is to be accepted, and "
            + describe_shared(dataset, shared),
            "the names of the declared datasets whose records shall count as private",
            f"add {options_to_accept(shared)}",
        )
    raise ConfigError(
        f"there is nothing to accept for dataset {dataset!r}",
        "rounds of unknown cost, or records that were declared public or generated",
    )


def describe_shared(dataset: str, shared: Collection[str]) -> str:
    """Say that private records of `dataset` are in the declared datasets `shared`, which may
    contain EVERY (`find_shared`)."""
    says, declared = "private records that were declared public or generated here", {*shared}
    parts = []
    if named := sorted(declared - {EVERY}):
        parts.append(f"{dataset} has {says}, in {', '.join(named)}")
    if EVERY in declared:
        parts.append(
            f"{dataset} may have {says}: a restore of the ledger may have lost which ones were"
        )
    return "; and ".join(parts)


def options_to_accept(shared: Collection[str]) -> str:
    """Return the options by which a person accepts, for a shell, that private records are in the
    declared datasets `shared` (`find_shared`)."""
    return " ".join(f"--accept-declared {shlex.quote(name)}" for name in shared)


def describe_accepted(dataset: str, named: Collection[str]) -> str:
    """Say that the records of the declared datasets `named`, which may contain EVERY, may be
    private records of `dataset`."""
    records = [f"those of {name}" for name in sorted({*named} - {EVERY})]
    if EVERY in named:
        records.append("those of which a restore of the ledger may have lost the declaration")
    return (
        f"records that were declared public or generated here may be private ones of {dataset}: "
        + ", ".join(records)
    )


def list_not_accepted(ledger: Ledger, dataset: str) -> list[str]:
    """List what a person may have to accept for `dataset`: the datasets that were declared public
    or generated and that no acceptance for `dataset` covers; among them EVERY, if a restore may
    have lost what was declared."""
    with ledger._store.writing():
        return _not_accepted(ledger, dataset)


def _not_accepted(ledger: Ledger, dataset: str) -> list[str]:
    """List the datasets, of all in the ledger, that were declared public or generated and that no
    acceptance for `dataset` covers (`Accepted.covers_declared`)."""
    account = ledger._account
    accepted = account.accepted.get(dataset, [])
    return [
        name
        for name, entry in account.not_private_since.items()
        if not any(each.covers_declared(name, entry) for each in accepted)
    ]


def check_name(
    charged: Collection[str], dataset: str, what: Declared, *, at_site: bool = False
) -> None:
    """Check that a dataset may be declared public or generated.

    - charged: the names of all datasets that were charged as private
    - dataset: the dataset's name
    - what: "public" or "generated", for the error's text
    - at_site: whether the error is shown to a person at the site and to no coordinator. Only then
      does the error name the dataset, since the name is the site's own setting

    Errors: PolicyRefused if `charged` contains the name, or a restore of the ledger lost charges,
    which may have been for any name."""
    if EVERY in charged:
        raise PolicyRefused(
            f"data.declared = {what!r}, but this ledger was restored and lost charges, so any "
            "dataset may have been charged as private",
            "a ledger that lost no charge",
            TODO,
        )
    if dataset in charged:
        named = f"dataset {dataset!r}" if at_site else "this dataset"
        raise PolicyRefused(
            f"data.declared = {what!r}, and {named} was charged as private here",
            "the name of a dataset that was never charged as private here",
            TODO,
        )


def read_declarations(ledger: Ledger) -> dict[str, str]:
    """Return a dict: each declared dataset's name -> its newest declaration, "public" or
    "generated"."""
    with ledger._store.writing():
        return dict(ledger._account.not_private)


def check_declared(ledger: Ledger, dataset: str, what: Declared) -> None:
    """Check that `dataset` was declared as `what` ("public" or "generated"), and was never charged
    as private. The result follows from what a person declared, never from a record.

    Errors: PolicyRefused if either does not hold."""
    check_name({spent.dataset for spent in ledger.spending()}, dataset, what)
    if read_declarations(ledger).get(dataset) != what:
        raise PolicyRefused(
            f"data.declared = {what!r}, and this site's ledger has no such declaration",
            "a declaration that was signed before the site joined",
            "start the site with `fedtune client`, which checks the records and signs it",
        )
