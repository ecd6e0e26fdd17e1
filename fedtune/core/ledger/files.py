"""Sign and read the plain files of a ledger: the anchor, the receipts and the salt.

Guarantee: a head that this site's key did not sign is never returned.
Errors: LedgerError; OSError, which `chain.named` turns into a LedgerError.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedtune.core.errors import InfrastructureError
from fedtune.core.files import reading
from fedtune.core.files.room import LEDGER
from fedtune.core.files.writing import create, replace
from fedtune.core.wire.keys import SigningKey, canonical, verifies

if TYPE_CHECKING:
    from fedtune.core.ledger.entries import Slot

DATABASE = LEDGER  # the room beside it makes up for its length
HEAD = "ledger.head"
RECEIPT = "ledger.receipt"
NEW = "ledger.new"
KEY = "site.key"
SALT = "salt"
OUTBOX = "outbox"
STEPS = "steps.jsonl"
ASKED = "asked"  # beside a ledger: draws that wait for a person, a file each; 0600
RUNS = "runs"  # in the state folder: a ledger for each run of declared data in a consortium
RESTORE = "`fedtune ledger --restore` (it charges what cannot be read as spent)"


class LedgerError(InfrastructureError):
    """The privacy ledger cannot be read, written or verified; nothing is trained until it can."""


class NoRoom(LedgerError):
    """The disk has no space for an entry, and nothing was entered."""


class NewerLedger(LedgerError):
    """A whole ledger in a format that this release does not know; nothing was written to it."""


class Head(NamedTuple):
    seq: int
    hash: str


def signed_head(seq: int, hash_: str) -> bytes:
    """Return the bytes that are signed for a ledger head: in the anchor file (ledger.head), and in
    a statement to the coordinator."""
    return canonical({"ledger_hash": hash_, "ledger_seq": seq})


def head_in(statement: Any, public: str) -> Head | None:
    """Return the head in a statement {seq, hash, signature}; None if it is no such statement, or
    the key `public` did not sign it."""
    try:
        head = Head(statement["seq"], statement["hash"])
        if type(head.seq) is int and isinstance(head.hash, str):
            signed = verifies(public, signed_head(*head), statement["signature"])
            return head if signed else None
    except (ValueError, TypeError, KeyError):
        pass
    return None


def sealed_token(
    key: SigningKey, statement: dict[str, Any], audit: str = "", membership: str = ""
) -> str:
    """Encrypt a head statement so that only this site can read it; return hexadecimal text of
    constant length.

    - key: the ledger's signing key, from which the cipher's key is derived
    - statement: {seq, hash, signature} of the newest entry (`Database.statement`)
    - audit: the head of the site's audit log, as "SEQ:HASH"; "" if the log is empty
    - membership: the membership of a hospital that sends the token, and alone opens it; "" for a
      site with a ledger of its own

    A coordinator that stores the unread token stores both heads. In clear text the sequence number
    would reveal to the coordinator that the data changed, or that a patient withdrew. The cipher is
    AES-256-GCM. Only the same membership opens the token, so that nobody can use tokens to test
    whether two sites are one hospital."""
    text = f"{statement['seq']:012d}{statement['hash']}{statement['signature']}{audit:>80}".encode()
    nonce = os.urandom(12)
    cipher = AESGCM(key.derive("ledger token"))
    return (nonce + cipher.encrypt(nonce, text, membership.encode() or None)).hex()


def opened_token(key: SigningKey, token: object, *memberships: str) -> dict[str, Any]:
    """Decrypt a token that `sealed_token` made. Return its statement and the audit log's head as
    {seq, hash, signature, audit}; {} if the token is not from this site under one of `memberships`.
    Without memberships, a token of a site that is no membership is expected."""
    cipher = AESGCM(key.derive("ledger token"))
    for membership in memberships or ("",):
        with suppress(ValueError, InvalidTag):
            raw, bound = bytes.fromhex(str(token)), membership.encode() or None
            text = cipher.decrypt(raw[:12], raw[12:], bound).decode()
            statement = {"seq": int(text[:12]), "hash": text[12:76], "signature": text[76:204]}
            return statement | {"audit": text[204:].strip()}
    return {}


def read_head(path: Path, public: str) -> Head | None:
    """Return the head that the anchor file `path` holds; None if the file is torn or edited, or if
    the key `public` did not sign it."""
    try:
        return head_in(json.loads(_content(path)), public)
    except (ValueError, RecursionError):
        return None


def _content(path: Path) -> bytes:
    return reading.content(path, "a file of the ledger", RESTORE, LedgerError)


class Receipt(NamedTuple):
    """A head of this site's ledger that `coordinator` countersigned. signature: this site's own
    signature of the head."""

    coordinator: str
    head: Head
    signature: str


class ReceiptLog(NamedTuple):
    """Receipts of coordinators. accepted: each coordinator's newest receipt; refused: the receipts
    whose entry this chain lacks. Nothing is reserved until a restore has charged for the refused
    ones."""

    accepted: tuple[Receipt, ...] = ()
    refused: tuple[Receipt, ...] = ()

    @property
    def every(self) -> tuple[Receipt, ...]:
        return self.accepted + self.refused

    def plus(self, new: Receipt, in_chain: bool) -> ReceiptLog:
        """Return the log with `new` added: to `refused` if it is not `in_chain`, else to `accepted`
        if it is its coordinator's newest."""
        if not in_chain:
            return self._replace(refused=(*(r for r in self.refused if r != new), new))
        older = [r for r in self.accepted if r.coordinator == new.coordinator]
        if older and older[0].head.seq >= new.head.seq:
            return self
        others = (r for r in self.accepted if r.coordinator != new.coordinator)
        return self._replace(accepted=(*others, new))

    @property
    def packed(self) -> bytes:
        return canonical(
            {
                name: [
                    {"coordinator": r.coordinator, **r.head._asdict(), "signature": r.signature}
                    for r in listed
                ]
                for name, listed in self._asdict().items()
            }
        )


def read_receipts(path: Path, public: str) -> ReceiptLog | None:
    """Return the receipts in the file `path`: an empty log if there is no file, None if the file
    was altered or the key `public` did not sign its heads."""
    if not path.exists():
        return ReceiptLog()
    lists: list[tuple[Receipt, ...]] = []
    try:
        content = json.loads(_content(path))
        for name in ReceiptLog._fields:
            receipts = []
            for row in content[name]:
                if (head := head_in(row, public)) is None:
                    return None
                receipts.append(Receipt(str(row["coordinator"]), head, row["signature"]))
            lists.append(tuple(receipts))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return ReceiptLog(*lists)


def traces(folder: Path) -> list[str]:
    """List the names of the ledger's files that are in the folder."""
    names = [n for n in (DATABASE, HEAD, RECEIPT, KEY, SALT, STEPS) if (folder / n).exists()]
    if any((folder / OUTBOX).glob("*.bin")):
        names.append(OUTBOX)
    return names


def prepare(folder: Path) -> None:
    """Mark an empty folder as a new ledger's, or check that the ledger in the folder is complete.
    Errors: LedgerError if a file of it is missing."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    present = traces(folder)
    if not present:
        # Nothing is charged before this file is gone again.
        replace(folder / NEW, b"", private=True)
    begun = (folder / NEW).exists() and not {HEAD, RECEIPT, OUTBOX, STEPS} & set(present)
    if begun:
        os.close(os.open(folder / DATABASE, os.O_WRONLY | os.O_CREAT, 0o600))
    for name in (DATABASE, KEY, SALT):
        if name not in traces(folder) and not begun:
            raise LedgerError(
                f"{folder / name}: missing, but {', '.join(present)} is there",
                expected="the ledger whole, or nothing of it",
                todo=RESTORE,
            )


def salt_at(path: Path) -> bytes:
    if not os.path.lexists(path):
        create(path, secrets.token_bytes(32), private=True)
    salt = _content(path)
    if len(salt) != 32:
        raise LedgerError(f"{path}: torn: not a salt of 32 bytes", todo=RESTORE)
    return salt


def outbox_name(digest: str) -> str:
    """Return a file name for a digest: its 16 to 64 hexadecimal digits, or the digits of the
    string's sha256 if it has no such digits. All digits are used, since a coordinator who chooses
    the hashed content can find two digests with the same first 16."""
    tail = digest.rpartition(":")[2]
    good = 16 <= len(tail) <= 64 and all(c in "0123456789abcdef" for c in tail)
    return tail if good else hashlib.sha256(digest.encode()).hexdigest()


def outbox_prefix(digest: str) -> str:
    """Return the first 16 digits of `outbox_name`. The names of all files of a study begin with
    those of the study's digest."""
    return outbox_name(digest)[:16]


def newer_name(new: Path, old: Path) -> Path:
    """Return the path `new`; but if only the file `old` exists, whose name an earlier release gave,
    return `old`."""
    return old if old.exists() and not new.exists() else new


def asked_path(folder: Path, slot: Slot) -> Path:
    """Return the path of the file about a draw that waits for a person. The file is beside the
    ledger in `folder`. slot: the (study, round, adapter) for which the draw is made."""
    start, name = folder / ASKED / outbox_prefix(slot[0]), name_of(slot)
    return newer_name(Path(f"{start}-{name}.json"), Path(f"{start}-{name[:12]}.json"))


def name_of(slot: Slot) -> str:
    """Return a name by which a person's command calls a slot (study, round, adapter). It has 32
    hexadecimal digits, so that nobody who chooses the requests can find two slots with the same
    name."""
    return hashlib.sha256(json.dumps(slot).encode()).hexdigest()[:32]
