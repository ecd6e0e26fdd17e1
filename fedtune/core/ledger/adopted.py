"""Recognise the entries of the ledger that a membership had before the hospital's ledger adopted
it.

    adopted.json    in the membership's state folder: number and hash of each entry of that ledger,
                    and of each for which a restore of it had charged (these also by themselves);
                    and the entry of the hospital's ledger at which the adoption was complete; 0600

A coordinator stores the newest receipt of each site by the site's public key, which an adoption
does not change, and sends it with each order of its next studies. Until this membership has
answered once, that receipt is for an entry of the adopted ledger.
| the adopted ledger                     | what follows                                            |
| had the entry                          | its charges are in the hospital's ledger: the order     |
|                                        | goes on                                                 |
| lacked it, as it had been put back     | LedgerError: charges are in no ledger                   |
| had it, but the hospital's ledger was  | LedgerError, whoever sends what: the hospital's ledger  |
| put back to before the adoption        | lost the charges (`check_has_adopted`)                  |
| was adopted by an earlier release,     | the receipt is refused as one for no ledger of the site |
| which did not write this file          |                                                         |
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fedtune.core.files import reading
from fedtune.core.files.writing import replace
from fedtune.core.ledger.files import (
    KEY,
    Head,
    LedgerError,
    head_in,
    is_countersigned,
    opened_token,
)
from fedtune.core.wire.keys import SigningKey, canonical

if TYPE_CHECKING:
    from fedtune.core.ledger.ledger import Ledger

ADOPTED = "adopted.json"
BY_HAND = (
    "lower max_epsilon in hospital.toml by what those rounds cost that the coordinator counts and "
    "`fedtune ledger` does not list; then end this membership and add another one"
)
NO_COMMAND = f"no command can enter them any more: {BY_HAND}"
PUT_BACK = (
    "put the file back from a backup; without one, nobody can tell whether charges are in no "
    f"ledger: {BY_HAND}"
)


def note_adopted(state: Path, known: Collection[Head], settled: Collection[Head], at: Head) -> None:
    """Write down which entries the ledger in a state folder accounts for, before the ledger is
    taken away.

    - state: the state folder
    - known: number and hash of each entry that the ledger has, or for which a restore charged
    - settled: the latter alone
    - at: the newest entry of the hospital's ledger, which has all its charges then

    Errors: InfrastructureError."""
    heads = {"heads": sorted(map(list, known)), "settled": sorted(map(list, settled))}
    content = {**heads, "at": list(at)}
    replace(state / ADOPTED, canonical(content), private=True)


def check_has_adopted(state: Path, home: Ledger | None) -> None:
    """Check that a hospital's ledger has what it adopted from the ledger that a membership had
    before. If it does not, the membership does nothing: its charges are in no ledger, and patients
    who withdrew there would take part. Whether the ledger was put back, or a restore lost the
    adoption, does not matter: a restore may have charged for the lost entry, but whether it also
    knows who had withdrawn must not decide what a coordinator is answered.

    - state: the membership's state folder
    - home: the hospital's ledger; None if there is none

    Errors: LedgerError."""
    if not (state / ADOPTED).exists():
        return
    at = _read(state / ADOPTED).at
    if home is None or not home.has_entry(at):
        where = home.folder if home else "the hospital's home"
        raise LedgerError(
            f"{where}: the hospital's ledger was put back to before it adopted the ledger of "
            f"{state}, or a restore lost the adoption, so that the adopted charges and withdrawals "
            "are not in it",
            "the ledger as it was after the adoption",
            "`fedtune ledger SITE --restore --from COPY`, with a copy that was made since; without "
            "one, withdraw again whoever withdrew before the adoption (the copy of the state "
            "folder that it kept has their receipts), and lower max_epsilon in hospital.toml by "
            "what was charged in that copy; then end this membership and add another one",
        )


def has_noted(state: Path, head: Head) -> bool:
    """Return whether `note_adopted` named an entry of the ledger that was in a state folder."""
    return (state / ADOPTED).exists() and head in _read(state / ADOPTED).known


def is_for_adopted(state: Path, receipt: Mapping[str, Any], coordinator: str) -> bool:
    """Return whether a receipt is for an entry that the adopted ledger accounted for; False if it
    is no receipt for that ledger, or this site never had a ledger of its own.

    - state: the membership's state folder, with its key, which was the adopted ledger's
    - receipt: the fields that the coordinator made (`wire.seal.receipt`)
    - coordinator: the public key (hexadecimal) that must have countersigned

    Errors: LedgerError if it is for an entry that the adopted ledger lacked."""
    if not (state / ADOPTED).exists():
        return False
    key = SigningKey.at(state / KEY)
    statement = opened_token(key, receipt.get("token"))
    head = head_in(statement, key.public)
    if head is None or not is_countersigned(receipt, coordinator):
        return False
    note = _read(state / ADOPTED)
    newest = [Head(*each) for each in statement.get("charged", ())][:1]
    if head not in note.known and note.settled.isdisjoint(newest):
        raise LedgerError(
            f"{state}: the ledger that the hospital's ledger adopted had been put back: the "
            f"coordinator holds a receipt for its entry {head.seq}, which was not in it, so that "
            "charges are in no ledger",
            "an adopted ledger that holds all that was charged",
            NO_COMMAND,
        )
    return True


class _Note(NamedTuple):
    known: set[Head]
    settled: set[Head]
    at: Head


def _read(path: Path) -> _Note:
    """Read what `note_adopted` wrote. Errors: LedgerError."""
    try:
        content = json.loads(
            reading.content(path, "a note of an adopted ledger", PUT_BACK, LedgerError)
        )
        heads, settled = _heads(content["heads"]), _heads(content.get("settled", []))
        (at,) = _heads([content["at"]])
        return _Note(heads, settled, at)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise LedgerError(f"{path}: damaged", "the note as it was written", PUT_BACK) from None


def _heads(pairs: list[list[Any]]) -> set[Head]:
    return {Head(int(seq), str(hash_)) for seq, hash_ in pairs}
