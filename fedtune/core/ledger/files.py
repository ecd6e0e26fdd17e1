"""Sign and read the plain files of a ledger: the anchor (which names the newest entry), the
coordinators' receipts and the salt.

Guarantee: a head (number and hash of an entry) that this site's key did not sign is never returned,
nor is a count of charges (`Paid`) that it did not sign, or did not encrypt in a token.
Errors: LedgerError; OSError, which `chain.named` turns into a LedgerError.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import struct
from collections.abc import Callable, Mapping, Sequence
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
ASKED = "asked"  # folder beside a ledger: a file (0600) for each draw that waits for a person
BOUNDS = ">ddQ"  # how a token holds the fields of Costliest
ENTRY = ">Q32s"  # how a token holds the number and the hash of an entry
HERE = "this machine"  # in place of a coordinator's key: the head is one that this machine noted
SENT = 2  # how many of the heads that a coordinator was sent the anchor names
SENT_IN_ALL = 512  # and how many of all coordinators: each simulation is one with a key of its own
CHARGED = 16  # how many of the newest charging entries a statement names
FURTHER = 12  # and how many older ones, each at twice the distance of the one before
RUNS = "runs"  # in the state folder: a ledger for each run of declared data in a consortium
# The dataset of a charge that counts against all of them. It stands here, and not in entries.py,
# since chain.py needs it and must not import the accountant (tests/test_startup.py).
EVERY = "*"
RESTORE = (
    "`fedtune ledger --restore --from FOLDER` if a newer copy or a backup of this folder exists; "
    "otherwise `--restore` alone, which charges what cannot be read of the ledger as spent, "
    "perhaps all that is left of the budget"
)


class LedgerError(InfrastructureError):
    """The privacy ledger cannot be read, written or verified; nothing is trained until it can."""


class NoRoom(LedgerError):
    """The disk has no space for an entry, and nothing was entered."""


class NewerLedger(LedgerError):
    """The ledger has a format that this release does not know, written by a newer one. The ledger
    is intact, and nothing was written to it."""


class Head(NamedTuple):
    seq: int
    hash: str


class Paid(NamedTuple):
    """What all charges up to an entry amount to. Both counts follow from plans alone, unlike the
    number of entries, which also counts withdrawals, arrivals and declarations.

    - steps: the noised steps of all charges with noise
    - bare: the number of charges without noise (σ = 0), such as the one that a restore enters to
      exhaust the budget"""

    steps: int = 0
    bare: int = 0

    def plus(self, other: Paid) -> Paid:
        return Paid(self.steps + other.steps, self.bare + other.bare)

    def beyond(self, earlier: Paid) -> Paid | None:
        """Return what was charged after `earlier`; None if `earlier` is not a part of this."""
        more = Paid(self.steps - earlier.steps, self.bare - earlier.bare)
        return more if min(more) >= 0 else None


class Costliest(NamedTuple):
    """Bounds on the cost of a step, which all charges with noise up to an entry keep. By them a
    restore prices steps that were lost. All are 0 if nothing was charged with noise.

    - noise_multiplier: the smallest σ
    - sampling_rate: the largest q
    - records: the most records of a unit that one step may take"""

    noise_multiplier: float = 0.0
    sampling_rate: float = 0.0
    records: int = 0

    def plus(self, other: Costliest) -> Costliest:
        if not (self.records and other.records):
            return other if other.records else self
        return Costliest(
            min(self.noise_multiplier, other.noise_multiplier),
            max(self.sampling_rate, other.sampling_rate),
            max(self.records, other.records),
        )


class Mark(NamedTuple):
    """A head, and what the ledger had charged up to it.

    - head: the entry
    - paid: how much was charged; None if an older release signed the head
    - costliest: what a step of it cost at most; None if an older release signed the head
    - charged: entries up to this one that charge (`choose_charged`), newest first. By them a
      restore knows an entry that this one's chain has in common with another chain"""

    head: Head
    paid: Paid | None
    costliest: Costliest | None = None
    charged: tuple[Head, ...] = ()


def choose_charged(charging: Sequence[Head]) -> tuple[Head, ...]:
    """Choose the entries that a statement of the newest one names: the newest CHARGED entries that
    charge, and older ones at distances that double, at most FURTHER, newest first. The distance is
    counted in entries that charge, since others follow from people, and no price may tell how many
    there were.

    charging: the entries of a chain that charge, oldest first

    >>> [head.seq for head in choose_charged([Head(seq, "") for seq in range(100)])][-3:]
    [84, 68, 36]
    """
    places = (len(charging) - CHARGED * 2**power for power in range(1, FURTHER + 1))
    older = (charging[place] for place in places if place >= 0)
    return (*reversed(charging[-CHARGED:]), *older)


def signed_head(seq: int, hash_: str) -> bytes:
    """Return the bytes that the site signs to state its newest entry, in the anchor file
    (ledger.head) and to the coordinator. seq: the entry's number; hash_: its hash."""
    return canonical({"ledger_hash": hash_, "ledger_seq": seq})


def signed_paid(mark: Mark) -> bytes:
    """Return the bytes that the site signs to state what was charged up to the entry `mark.head`.
    They have a signature of their own, so that older releases, which do not know them, still read
    the head. mark: with counts (`paid`); without `costliest` or `charged` for the bytes that an
    older release signed."""
    assert mark.paid is not None
    about = {"ledger_hash": mark.head.hash, "ledger_seq": mark.head.seq}
    counts = {"ledger_steps": mark.paid.steps, "ledger_bare": mark.paid.bare}
    return canonical({**about, **counts, **_fields_beside(mark)})


def _fields_beside(mark: Mark) -> dict[str, Any]:
    bounds = mark.costliest._asdict() if mark.costliest is not None else {}
    return bounds | ({"charged": [[*head] for head in mark.charged]} if mark.charged else {})


def state(key: SigningKey, mark: Mark) -> dict[str, Any]:
    """Return the signed statement of a ledger's newest entry, and of what was charged up to it: the
    content of the anchor file. key: the ledger's signing key."""
    return {
        **mark.head._asdict(),
        "signature": key.sign(signed_head(*mark.head)),
        **(mark.paid or Paid())._asdict(),
        **_fields_beside(mark),
        "paid_signature": key.sign(signed_paid(mark)),
    }


class Sent(NamedTuple):
    """A head that was sent to a coordinator.

    - coordinator: its public key (hexadecimal); "" if no plan was signed
    - membership: the membership of a hospital that sent it; "" for a site with a ledger of its own
    - seq, hash: the entry"""

    coordinator: str
    membership: str
    seq: int
    hash: str

    @property
    def head(self) -> Head:
        return Head(self.seq, self.hash)


class Named(NamedTuple):
    """Earlier entries that the anchor names beside the newest one. All are of the same chain, so
    what a restore charges for the anchor's entry is charged for them, too.

    sent: the newest heads that each coordinator was sent, by membership, at most SENT of each
    and SENT_IN_ALL together; oldest first. A receipt for a head that was dropped stops the site
    after a restore, which charges for it once more.
    orders: the Rényi orders that the ledger's charges may have fixed (`chain.list_fixed_orders`);
    none if nothing was charged. A restore takes them for the charges that it enters, of which any
    may have been the first"""

    sent: tuple[Sent, ...] = ()
    orders: tuple[float, ...] = ()

    def with_sent(self, new: Sent) -> Named:
        """Return these entries with a head added that a coordinator is sent."""
        whom = new[:2]
        same = [each for each in self.sent if each[:2] == whom and each != new]
        others = [each for each in self.sent if each[:2] != whom]
        return self._replace(sent=(*others, *same[1 - SENT :], new)[-SENT_IN_ALL:])


def encode_anchor(key: SigningKey, statement: Mapping[str, Any], named: Named) -> bytes:
    """Return the content of the anchor file.

    - key: the ledger's signing key
    - statement: the signed statement of the ledger's newest entry (`state`)
    - named: the earlier entries that it names"""
    listed: dict[str, Any] = {"sent": list(map(list, named.sent))}
    listed |= {"orders": list(named.orders)} if named.orders else {}
    signature = key.sign(_signed_names(statement["hash"], listed))
    return canonical({**statement, "named": listed, "named_signature": signature})


def _signed_names(hash_: str, listed: Mapping[str, Any]) -> bytes:
    return canonical({"ledger_hash": hash_, "ledger_named": listed})


def head_in(statement: Any, public: str) -> Head | None:
    """Return the ledger head (an entry's number and hash) that a signed statement holds.

    - statement: a dict with seq, hash and signature, or anything else that was received in its
      place
    - public: the public key, in hexadecimal, that must have signed it

    None if the statement is malformed or the signature is not by that key."""
    try:
        head = Head(statement["seq"], statement["hash"])
        if type(head.seq) is int and isinstance(head.hash, str):
            signed = verifies(public, signed_head(*head), statement["signature"])
            return head if signed else None
    except (ValueError, TypeError, KeyError):
        pass
    return None


def mark_in(statement: Any, public: str, head: Head) -> Mark:
    """Return the entry `head` with what was charged up to it, as a signed statement (`state`) or a
    row of the receipts holds it. The counts are None if an older release wrote the statement, which
    then has none, or if the key `public` did not sign them; a restore then counts entries, and
    charges no less."""
    try:
        mark = counts_of(statement, head)
        is_whole = all(type(count) is int for count in mark.paid or ())
        if is_whole and verifies(public, signed_paid(mark), statement["paid_signature"]):
            return mark
    except (ValueError, TypeError, KeyError):
        pass
    return Mark(head, None)


def counts_of(statement: Mapping[str, Any], head: Head) -> Mark:
    """Return what a statement of the entry `head`, or a token that was opened, says was charged,
    without a check of who signed it. Errors: KeyError if it has no counts, as that of an older
    release."""
    paid, bounds = Paid(statement["steps"], statement["bare"]), Costliest._fields
    named = all(name in statement for name in bounds)
    costliest = Costliest(*(statement[name] for name in bounds)) if named else None
    charged = tuple(Head(*each) for each in statement.get("charged", ()))
    return Mark(head, paid, costliest, charged)


def sealed_token(
    key: SigningKey, statement: dict[str, Any], audit: str = "", membership: str = ""
) -> str:
    """Encrypt a statement of the ledger's newest entry so that only this site can read it; return
    hexadecimal text of constant length.

    - key: the ledger's signing key, from which the cipher's key is derived
    - statement: seq, hash and signature of the newest entry, with what was charged up to it
      (`Database.statement`)
    - audit: the head of the site's audit log, as "SEQ:HASH"; "" if the log is empty
    - membership: the membership of a hospital that sends the token, and alone can open it; "" for a
      site with a ledger of its own

    A coordinator stores the token without being able to read it, and with it the heads of the
    ledger and of the audit log. In clear text the sequence number would reveal to the coordinator
    that the data changed, or that a patient withdrew. The cipher is AES-256-GCM. Only the same
    membership opens the token, so that nobody can use tokens to test whether two sites are one
    hospital."""
    head = f"{statement['seq']:012d}{statement['hash']}{statement['signature']}"
    counts = f"{statement['steps']:012d}{statement['bare']:012d}"
    bounds = struct.pack(BOUNDS, *(statement[name] for name in Costliest._fields)).hex()
    text = f"{head}{audit:>80}{counts}{bounds}".encode() + _pack_entries(
        statement.get("charged", ())
    )
    nonce = os.urandom(12)
    cipher = AESGCM(key.derive("ledger token"))
    return (nonce + cipher.encrypt(nonce, text, membership.encode() or None)).hex()


def _pack_entries(charged: Sequence[Sequence[Any]]) -> bytes:
    """Return the number and hash of each entry, as bytes of constant length: entries that are not
    there are zeros."""
    packed = b"".join(struct.pack(ENTRY, seq, bytes.fromhex(hash_)) for seq, hash_ in charged)
    return packed.ljust((CHARGED + FURTHER) * struct.calcsize(ENTRY), b"\0")


def _unpack_entries(packed: bytes) -> list[list[Any]]:
    entries = ([seq, hash_.hex()] for seq, hash_ in struct.iter_unpack(ENTRY, packed))
    return [entry for entry in entries if int(entry[1], 16)]


def opened_token(key: SigningKey, token: object, *memberships: str) -> dict[str, Any]:
    """Decrypt a token that `sealed_token` made for a statement of the ledger's newest entry. Return
    that statement, the audit log's head and the membership that can open the token, as {seq, hash,
    signature, audit, membership} and the fields of Paid and Costliest, without those that an older
    release did not put into the token; {} if this site did not make the token, or made it for
    another membership.

    - key: the ledger's signing key
    - token: the token in hexadecimal, as it was received
    - memberships: the names of the memberships for which it may have been made; if none are given,
      it must be of a site with a ledger of its own"""
    cipher = AESGCM(key.derive("ledger token"))
    for membership in memberships or ("",):
        with suppress(ValueError, InvalidTag, struct.error):
            raw, bound = bytes.fromhex(str(token)), membership.encode() or None
            opened = cipher.decrypt(raw[:12], raw[12:], bound)
            text, entries = opened[:356].decode(), opened[356:]
            statement = {"seq": int(text[:12]), "hash": text[12:76], "signature": text[76:204]}
            counts = dict[str, Any]()
            if text[284:]:
                counts = {"steps": int(text[284:296]), "bare": int(text[296:308])}
            if text[308:]:
                bounds = struct.unpack(BOUNDS, bytes.fromhex(text[308:]))
                counts |= zip(Costliest._fields, bounds, strict=True)
                counts["charged"] = _unpack_entries(entries)
            audit = text[204:284].strip()
            return statement | {"audit": audit, "membership": membership} | counts
    return {}


def is_countersigned(receipt: Mapping[str, Any], coordinator: str) -> bool:
    """Return whether a coordinator countersigned the token in a receipt (`wire.seal.receipt`).
    coordinator: its public key, in hexadecimal."""
    token, counter = {"token": receipt.get("token")}, str(receipt.get("countersignature"))
    named = receipt.get("coordinator") == coordinator
    return named and verifies(coordinator, b"fedtune receipt\0" + canonical(token), counter)


def read_head(path: Path, public: str) -> Head | None:
    """Read the anchor file `path`, in which the site signed the number and hash of its ledger's
    newest entry. Return these two; None if the file is torn or edited, or if the key `public` did
    not sign it."""
    anchor = read_anchor(path, public)
    return anchor.head if anchor else None


def read_anchor(path: Path, public: str) -> Mark | None:
    """Read the anchor file `path` (`read_head`) with what was charged up to the entry that it
    names. None if the file is torn or edited, or if the key `public` did not sign it."""
    try:
        content = json.loads(_content(path))
        head = head_in(content, public)
        return mark_in(content, public, head) if head else None
    except (ValueError, RecursionError):
        return None


def read_named(path: Path, public: str) -> Named:
    """Read from the anchor file `path` which earlier entries it names. The result is empty if there
    is no such file, if it is torn, if an earlier release wrote it, or if the key `public` did not
    sign the names."""
    if not path.exists():
        return Named()
    try:
        content = json.loads(_content(path))
        listed = content["named"]
        if not verifies(public, _signed_names(content["hash"], listed), content["named_signature"]):
            return Named()
        sent = tuple(Sent(*each) for each in listed["sent"])
        return Named(sent, tuple(float(order) for order in listed.get("orders", ())))
    except (ValueError, TypeError, KeyError, RecursionError):
        return Named()


def read_noted(statement: Any, public: str) -> Receipt | None:
    """Read a statement that this machine noted of the ledger's newest entry (`state`). None if it
    was altered, or the key `public` did not sign it, as where another ledger was there."""
    if (head := head_in(statement, public)) is None:
        return None
    mark = mark_in(statement, public, head)
    by = statement["paid_signature"] if mark.paid else ""
    account = str(statement.get("account", ""))
    return Receipt(HERE, mark, statement["signature"], by, account)


def _content(path: Path) -> bytes:
    return reading.content(path, "a file of the ledger", RESTORE, LedgerError)


class Receipt(NamedTuple):
    """A head of this site's ledger that a coordinator countersigned, or that this machine noted
    outside the ledger's folder.

    - coordinator: the public key of the coordinator that countersigned, or HERE
    - mark: the entry, and what was charged up to it
    - signature: this site's own signature of the head
    - paid_signature: this site's own signature of what was charged; "" if an older release made the
      token, which then does not say it
    - membership: the membership of a hospital that sent the head; "" for a site with a ledger of
      its own. For a note of this machine: the id of the account's notes"""

    coordinator: str
    mark: Mark
    signature: str
    paid_signature: str = ""
    membership: str = ""

    @property
    def head(self) -> Head:
        return self.mark.head

    @property
    def holder(self) -> tuple[str, str]:
        """Who sends it: each holder's newest one is kept."""
        return self.coordinator, self.membership

    @property
    def evidence(self) -> str:
        """What shows that the ledger had the entry, for the text of an error."""
        named = f"entry {self.head.seq}"
        by = (
            "this machine noted"
            if self.coordinator == HERE
            else "the coordinator holds a receipt for"
        )
        return f"{by} {named}"

    @property
    def row(self) -> dict[str, Any]:
        """The receipt as it is stored, for `head_in` and `mark_in` to read."""
        row = {"coordinator": self.coordinator, **self.head._asdict(), "signature": self.signature}
        row |= {"membership": self.membership} if self.membership else {}
        if self.mark.paid is None:
            return row
        counts = {**self.mark.paid._asdict(), **_fields_beside(self.mark)}
        return {**row, **counts, "paid_signature": self.paid_signature}


class ReceiptLog(NamedTuple):
    """The receipts that coordinators gave this site.

    - accepted: the newest receipt of each coordinator, by membership
    - refused: the receipts for an entry that this site's ledger lacks. Until the ledger is
      restored, and so charges for the lost entries, it reserves nothing"""

    accepted: tuple[Receipt, ...] = ()
    refused: tuple[Receipt, ...] = ()

    @property
    def every(self) -> tuple[Receipt, ...]:
        return self.accepted + self.refused

    def plus(
        self, new: Receipt, is_accounted_for: bool, in_chain: Callable[[Head], bool]
    ) -> ReceiptLog:
        """Return a log with the receipt `new` added. A receipt whose entry the ledger does not
        account for is added to `refused`. Any other replaces its holder's receipt in `accepted`,
        unless that is as new or newer. Numbers tell so only between two entries of the chain: an
        entry of a branch that was lost, and charged for, may have any number.

        - is_accounted_for: whether the ledger has the entry, or a restore charged for it
        - in_chain: tells of an entry whether the ledger's chain itself has it"""
        if not is_accounted_for:
            return self._replace(refused=(*(r for r in self.refused if r != new), new))
        for old in self.accepted:
            is_comparable = old.holder == new.holder and in_chain(old.head)
            if is_comparable and (not in_chain(new.head) or old.head.seq >= new.head.seq):
                return self
        others = (r for r in self.accepted if r.holder != new.holder)
        return self._replace(accepted=(*others, new))

    @property
    def packed(self) -> bytes:
        return canonical({name: [r.row for r in listed] for name, listed in self._asdict().items()})


def read_receipts(path: Path, public: str) -> ReceiptLog | None:
    """Read the receipts of coordinators from the file `path`. Return an empty log if there is no
    file; None if the file was altered, or the key `public` did not sign the heads in it."""
    if not path.exists():
        return ReceiptLog()
    lists: list[tuple[Receipt, ...]] = []
    try:
        content = json.loads(_content(path))
        for name in ReceiptLog._fields:
            receipts = [_read_receipt(row, public) for row in content[name]]
            lists.append(tuple(receipt for receipt in receipts if receipt))
            if None in receipts:
                return None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return ReceiptLog(*lists)


def readable_receipts(path: Path, public: str) -> ReceiptLog:
    """Read those receipts of the file `path`, which may be damaged, that the key `public` signed.
    All of them count as refused: whether the ledger has their entries is not asked."""
    found = list[Receipt]()
    content = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for start in re.finditer(r"\{\"", content):
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            row, _ = json.JSONDecoder().raw_decode(content, start.start())
            found += [receipt] if (receipt := _read_receipt(row, public)) else []
    return ReceiptLog(refused=tuple(dict.fromkeys(found)))


def _read_receipt(row: Any, public: str) -> Receipt | None:
    """Return the receipt in a row (`Receipt.row`); None if the key `public` did not sign its head.
    Errors: KeyError, TypeError if it is no row of a receipt."""
    if (head := head_in(row, public)) is None:
        return None
    mark = mark_in(row, public, head)
    by = row["paid_signature"] if mark.paid else ""
    given, membership = str(row["coordinator"]), str(row.get("membership", ""))
    return Receipt(given, mark, row["signature"], by, membership)


def traces(folder: Path) -> list[str]:
    """List the names of the ledger's files that are in the folder, and the name of the folder of
    updates if it holds one."""
    names = [n for n in (DATABASE, HEAD, RECEIPT, KEY, SALT, STEPS) if (folder / n).exists()]
    if any((folder / OUTBOX).glob("*.bin")):
        names.append(OUTBOX)
    return names


def prepare(folder: Path) -> None:
    """Prepare a ledger's folder. An empty folder is marked as a new ledger's; in any other, check
    that no file of the ledger is missing. Errors: LedgerError if one is."""
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
    """Return a file name for a digest: the part after its last ":", if that is 16 to 64 hexadecimal
    digits; else the sha256 of `digest`, in hexadecimal. All digits are used, since a coordinator
    who chooses the hashed content can find two digests with the same first 16."""
    tail = digest.rpartition(":")[2]
    good = 16 <= len(tail) <= 64 and all(c in "0123456789abcdef" for c in tail)
    return tail if good else hashlib.sha256(digest.encode()).hexdigest()


def outbox_prefix(digest: str) -> str:
    """Return the first 16 digits of the file name of a digest (`outbox_name`). For a study's
    digest, the names of all files of the study begin with these digits."""
    return outbox_name(digest)[:16]


def newer_name(new: Path, old: Path) -> Path:
    """Return the path of a file to which an earlier release gave another name: `old` if only the
    file `old` exists, else `new`."""
    return old if old.exists() and not new.exists() else new


def waiting_draw_path(folder: Path, slot: Slot) -> Path:
    """Return the path of the file, beside the ledger in `folder`, that notes a draw for which a
    person's approval is awaited. slot: the (study, round, adapter) of the draw."""
    start, name = folder / ASKED / outbox_prefix(slot[0]), name_of(slot)
    return newer_name(Path(f"{start}-{name}.json"), Path(f"{start}-{name[:12]}.json"))


def name_of(slot: Slot) -> str:
    """Return the name by which a person names a slot (study, round, adapter) in a command: 32
    hexadecimal digits. It is so long that nobody who chooses the requests can find two slots with
    the same name."""
    return hashlib.sha256(json.dumps(slot).encode()).hexdigest()[:32]
