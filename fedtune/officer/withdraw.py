"""Withdraw a patient's consent: leave the records out from now on, and list earlier releases."""

from __future__ import annotations

import calendar
import io
import json
import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedtune.core.config import Site, SiteData, load_site
from fedtune.core.config.load import load_hospital
from fedtune.core.config.patient_columns import patient_column, patient_columns
from fedtune.core.data.records import read_records, unit_member
from fedtune.core.errors import (
    ConfigError,
    FedtuneError,
    InfrastructureError,
    InputError,
    NotGenuine,
    describe,
)
from fedtune.core.files import reading
from fedtune.core.files.room import OFFICER
from fedtune.core.files.writing import replace
from fedtune.core.ledger.audit_log import AuditLog
from fedtune.core.ledger.chain import Entry
from fedtune.core.ledger.entries import Spent
from fedtune.core.ledger.ledger import Ledger, LedgerError, NoRoom
from fedtune.core.ledger.patient_column import describe_withdrawn_before, find_columns
from fedtune.core.ledger.spending import charges_with_columns, known_epsilon, known_fallback
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.wire.keys import canonical, verifies

log = logging.getLogger("fedtune.site")
T = TypeVar("T")
TIME = "%Y-%m-%dT%H:%M:%SZ"
RECEIPTS = "withdrawals"  # beside the ledger: a receipt for each withdrawal
_DIGITS = 16  # digits of the patient's salted hash in a receipt's file name


@dataclass(frozen=True)
class Release:
    """A study that sent updates from the dataset before the withdrawal.

    - name: the study's name
    - digest: the digest of its plan
    - rounds: the number of rounds whose updates were sent, or wait for a person's approval
    - epsilon: the ε of these rounds at the δ of the ledger; infinite if the study is not private,
      None if it is not known what they cost one patient
    - fallback: if a round shared its noise, the ε of these rounds by this site's own noise alone,
      which holds whatever other sites do; else None. None also if it is not known"""

    name: str
    digest: str
    rounds: int
    epsilon: float | None
    fallback: float | None = None

    @property
    def cost(self) -> str:
        """The release's ε in words, as a receipt and the screen state it: rounded up, or "not
        known"."""
        if self.epsilon is None:
            return "not known"
        if self.fallback is None:
            return rounded_up(self.epsilon)
        return (
            f"{rounded_up(self.epsilon)} if no more sites collude than the study's plan allows, "
            f"{rounded_up(self.fallback)} whatever happens"
        )


@dataclass(frozen=True)
class Withdrawal:
    """The result of a withdrawal.

    - in_file: number of the patient's records that the files still hold, None if a file cannot be
      read
    - trained_on: whether the patient was ever trained on here, or may have been under another key
    - releases: studies whose adapters may still reflect the patient
    - personal: files of the personal models that were trained on the patient's records; none of
      these models is used until it is trained again
    - receipt: the content of `receipt_file`, signed by the site, for the patient"""

    in_file: int | None
    trained_on: bool
    releases: list[Release]
    personal: list[Path]
    receipt: dict[str, Any]
    receipt_file: Path


class UnknownPatient(InputError):
    """No record and no study at this site has this patient's key. The message does not contain the
    key."""


class NotLogged(NotGenuine):
    """The audit log is damaged or cannot be written, so that a withdrawal could not be entered
    there. The withdrawal was entered in the ledger and has its receipt.

    - withdrawal: the result of `withdraw`
    - reason: the error of the audit log"""

    def __init__(self, withdrawal: Withdrawal, reason: FedtuneError) -> None:
        super().__init__(reason.happened, reason.expected, reason.todo)
        self.withdrawal, self.reason = withdrawal, reason


def withdraw(site: Site, patient: str, ledger: Ledger, unseen: bool = False) -> Withdrawal:
    """Enter the withdrawal in the ledger and list the releases that it cannot undo.

    - site: the site; in a hospital's home any of its memberships
    - patient: the patient's key, as the patient column has it; spaces around it do not count
    - ledger: the ledger of the site, or of the hospital's home
    - unseen: whether to accept a key that is in no record yet

    From the next round on, the patient's records are left out, and their states in memory are
    dropped. Nothing on the wire changes, since batch, noise and divisor do not depend on the true
    count. Earlier releases cannot be undone: the adapters of `releases` were trained with the
    patient's records, and reveal about them at most what their ε allows. In a hospital's home the
    withdrawal holds for every membership, whichever membership's site is given.

    Each withdrawal has a receipt in the folder RECEIPTS beside the ledger, signed by the ledger's
    key and readable by this user alone, with the time and the releases, but without the patient's
    key. The receipt names only what was charged before the withdrawal. If the same key is withdrawn
    again, a receipt that is there stays as it is, unless a round that was under way at the
    withdrawal has been sent since: then it is written anew, with this round.
    Guarantee: a receipt and its file's name follow from this patient's withdrawal and from the
    releases. They do not reveal the number of the ledger's entries, which grows with each
    withdrawal and each change of the records.
    Errors:
    - UnknownPatient if no record and no study here has the key, and `unseen` is false. Nothing is
      entered: with a mistyped key, the patient's records would still be used. The same if no record
      has it, and other columns told the patients of these studies apart: it may be the patient's
      key in such a column, and their records have another key by now
    - ConfigError if site.toml names no patient column
    - the error of reading a file, if the key is found neither in another file nor in the ledger
    - NotLogged if the audit log is damaged or cannot be written; the withdrawal is entered, and its
      receipt written
    - LedgerError"""
    if not site.data.columns.patient:
        raise ConfigError(
            "this site names no patient column, so nobody can tell whose record is whose",
            "data.columns.patient in site.toml",
            "name the column again"
            if find_columns(ledger, site, site.data.name)
            else "take the patient's records out of the file",
        )
    key = unit_member(patient.strip())
    datasets = {name for name in ledger.datasets if ledger.holds(name, key)}
    sites, unread = _memberships(site)
    counts = dict[tuple[str, Path | str], int]()  # two memberships may read one dataset
    found_by = set[str]()  # the columns in which the key stands
    for table in (table for each in sites for table in _tables(each)):
        try:
            count = _count(table, patient.strip())
            at = table.name, table.where
            counts[at] = max(counts.get(at, 0), count)
            found_by |= {patient_column(table)} if count else set()
        except FedtuneError as error:
            unread = error
    found = sum(counts.values())
    in_files = {name for (name, _), count in counts.items() if count}
    had, now = ledger.patient_columns, patient_columns(site)
    present = {column for column in now.values() if column}
    earlier = set[str]()
    for name in datasets:
        earlier |= {*had.get(name, ())} - ({now[name]} if name in now else present)
    is_again = ledger.hashed(key) in ledger.withdrawn()
    is_known = bool(found or unseen or is_again or (datasets and not earlier))
    if unread and not is_known:
        raise unread
    if datasets and not is_known:
        raise UnknownPatient(
            "no usable record has this key; it is known from earlier studies, in which "
            f"{' and '.join(map(repr, sorted(earlier)))} told patients apart; nothing was entered",
            f"the key that this patient has in the column {site.data.columns.patient!r} now",
            "withdraw that key. If the patient has no record left, --unseen enters this one",
        )
    # What no record has, and other columns had, is not known to be of a present column.
    known_by = present if found or not earlier else earlier
    if not is_known:
        raise UnknownPatient(
            "no usable record and no study here has this key; nothing was entered",
            f"a key as it is written in the column {site.data.columns.patient!r}",
            "type it again; --unseen enters it all the same, for a patient who has "
            "no usable record yet",
        )

    from fedtune.runs.personal import models_of  # imports PyTorch

    def enter() -> Withdrawal:
        is_new = ledger.hashed(key) not in ledger.withdrawn()
        entry = ledger.withdraw(key, known_by if is_new else found_by)
        releases = _releases(site, ledger, datasets, in_files, entry.seq)
        path = site.home / RECEIPTS / f"withdrawal-{entry.body['unit'][:_DIGITS]}.json"
        receipt = _receipt_there(path, ledger, entry, releases)
        if receipt is None:
            receipt = _receipt(site, ledger, entry, releases)
            replace(path, json.dumps(receipt, indent=1).encode(), private=True)
        personal = [path for each in sites for path in models_of(each, ledger, entry.body["unit"])]
        in_file = None if unread else found
        return Withdrawal(in_file, bool(datasets or releases), releases, personal, receipt, path)

    done = in_reserved_space(site, enter)
    acts, rule = AuditLog(ledger.folder, ledger.key), "--unseen" if unseen else ""
    try:
        in_reserved_space(site, lambda: acts.add("withdraw", rule, receipt=done.receipt_file))
    except (NotGenuine, InfrastructureError) as error:
        raise NotLogged(done, error) from None
    return done


def read_keys(path: Path) -> list[str]:
    """Read patients' keys from a file, one a line. A line ends as on a terminal, and not at the
    other characters at which `str.splitlines` ends one, since a key may contain them. Errors:
    InputError."""
    text = reading.text(path, "patient keys, one a line")
    return [key for line in io.StringIO(text, newline=None) if (key := line.strip())]


def _memberships(site: Site) -> tuple[list[Site], FedtuneError | None]:
    """Return two things: a list of the site and of those other memberships of its home whose site
    files can be read, and the error of a membership whose file cannot be read (None if all can be
    read)."""
    sites, unread = [site], None
    others = load_hospital(site.home).memberships if site.hospital else {}
    for name, membership in others.items():
        if name != site.policy.membership:
            try:
                sites.append(load_site(membership.site, keys_may_differ=True))
            except FedtuneError as error:
                unread = error
    return sites, unread


def _tables(site: Site) -> list[SiteData]:
    """List those tables of records in a site file that name a patient column. [acceptance] is left
    out if its file is gone."""
    tables = [table for table in (site.data, site.evaluation) if table]
    if (judged := site.acceptance) and (judged.url or judged.path.exists()):
        tables.append(judged)
    return [table for table in tables if table.columns.patient]


def in_reserved_space(site: Site, enter: Callable[[], T]) -> T:
    """Call `enter`, which writes what a person decided, and return its result. If writing fails,
    free the space that is reserved for such entries and call `enter` again. Errors: those of
    `enter`. A LedgerError other than NoRoom is raised without a second call. site: the site whose
    reserved space is used."""
    try:
        return enter()
    except InfrastructureError as error:
        if isinstance(error, LedgerError) and not isinstance(error, NoRoom):
            raise
        log.warning("%s; this entry uses the space reserved for the ledger", describe(error))
        with site.room.of(OFFICER).give_up():
            return enter()


def check_receipt(path: Path, ledger: Ledger) -> str:
    """Check that this site signed a patient's receipt of withdrawal and that its ledger holds the
    withdrawal; return the time of the withdrawal.

    A unit withdraws once, so its hash and the time identify the entry. Receipts of earlier releases
    also name the entry's number, and are checked in the same way.
    Errors: InputError if this is not a receipt of this site, or its ledger has no such entry."""
    receipt = _genuine(path, ledger.key.public)
    entry = ledger.withdrawn().get(receipt["unit"])
    if entry is None or _time_of(entry) != receipt["time"]:
        raise InputError(
            f"{path}: this site's ledger does not have this withdrawal",
            f"the withdrawal of {receipt['time']}",
            "if the ledger was restored from an earlier backup, withdraw the patient again",
        )
    return str(receipt["time"])


def describe_receipts_column(path: Path, ledger: Ledger, site: Site) -> str:
    """Say that the patient of a receipt withdrew before a present column told patients apart
    (`describe_withdrawn_before`); "" if not. Errors: InputError if this is not a receipt of this
    site."""
    unit = _genuine(path, ledger.key.public)["unit"]
    return describe_withdrawn_before(ledger, patient_columns(site), [unit])


def list_of_old_salt(ledger: Ledger) -> set[str]:
    """Return the hashes of patients who withdrew that a restore entered although the ledger's salt
    was lost. They may have been made with another salt, and then match no key any more."""
    return {unit for unit, entry in ledger.withdrawn().items() if entry.body.get("old_salt")}


def describe_receipts_salt(path: Path, ledger: Ledger) -> str:
    """Say that the ledger may not recognise the patient of a receipt, since a restore has made a
    new salt since; "" if this is not so. Errors: InputError if this is not a receipt of this
    site."""
    if _genuine(path, ledger.key.public)["unit"] not in list_of_old_salt(ledger):
        return ""
    return (
        "the ledger was restored with a new salt since, so that it may not recognise the patient "
        "by this withdrawal. If the patient was not withdrawn again since then, withdraw the "
        "patient now: `fedtune withdraw SITE`"
    )


def withdrawn_by_receipts(home: Path, public: str) -> dict[str, int]:
    """Return, for each unit that withdrew, the hash of its key → when it withdrew, in UTC seconds.
    Both are read from the receipts in `home`, the folder of a ledger; files that the key `public`
    did not sign are skipped. A hash matches a key only under the salt with which it was made."""
    since: dict[str, int] = {}
    for path in sorted((home / RECEIPTS).glob("*.json")):
        with suppress(InputError, KeyError, ValueError):
            receipt = _genuine(path, public)
            since[receipt["unit"]] = calendar.timegm(time.strptime(receipt["time"], TIME))
    return since


def _receipt_there(
    path: Path, ledger: Ledger, entry: Entry, releases: Sequence[Release]
) -> dict[str, Any] | None:
    """Read the receipt that was given for a withdrawal before; None if there is none that this site
    signed, or if it lists fewer rounds than are known now: a round that was under way when the
    patient withdrew may have been sent since.

    - ledger: the ledger whose key signed it
    - entry: the ledger's entry of the withdrawal
    - releases: the earlier releases that are known now"""
    with suppress(InputError):
        receipt = _genuine(path, ledger.key.public)
        listed = {each["digest"]: each["rounds"] for each in receipt["releases"]}
        is_whole = all(listed.get(each.digest, 0) >= each.rounds for each in releases)
        of_it = (receipt["unit"], receipt["time"]) == (entry.body["unit"], _time_of(entry))
        if of_it and is_whole:
            return reading.json_in(path, "a receipt of a withdrawal")
    return None


def _genuine(path: Path, public: str) -> dict[str, Any]:
    """Read a receipt, and return it without its signature. Errors: InputError if the key `public`
    did not sign it."""
    receipt = reading.json_in(path, "a receipt of a withdrawal")
    signature = str(receipt.pop("signature", ""))
    try:
        genuine = verifies(public, _encode_receipt(receipt), signature)
    except ValueError:  # the file has NaN or Infinity, which cannot be signed
        genuine = False
    if not genuine:
        raise InputError(f"{path}: not signed by this site", "a receipt as this site gave it")
    return receipt


def _receipt(site: Site, ledger: Ledger, entry: Entry, releases: list[Release]) -> dict[str, Any]:
    """Build and sign the receipt that a patient may keep. The receipt names the patient by a salted
    hash, by which nobody without this site's salt can identify the patient. The ledger's key signs,
    and in a hospital's home not the membership's own key: a withdrawal holds in every membership,
    and must be provable after a membership has ended. The receipt is for patient and hospital, and
    goes to no coordinator.

    - site: the site whose name the receipt states
    - ledger: the ledger whose key signs
    - entry: the ledger's entry of the withdrawal, with the hash and the time
    - releases: the earlier releases that the receipt lists

    Returns: the content of the receipt, with its signature."""
    receipt: dict[str, Any] = {
        "what": "withdrawal of consent: no later round of this site reads the patient's records",
        "site": site.site.name,
        "time": _time_of(entry),
        "unit": entry.body["unit"],
        "releases": [
            {
                "name": release.name,
                "digest": release.digest,
                "rounds": release.rounds,
                "epsilon": release.cost,
            }
            for release in releases
        ],
        "key": ledger.key.public,
    }
    return receipt | {"signature": ledger.key.sign(_encode_receipt(receipt))}


def _time_of(entry: Entry) -> str:
    """Return the time at which a unit withdrew, as a text in the form that receipts have. If the
    withdrawal was entered again in a restored ledger, it is still the time of the withdrawal
    itself."""
    return time.strftime(TIME, time.gmtime(entry.body.get("since", entry.body["time"])))


def _encode_receipt(receipt: dict[str, Any]) -> bytes:
    return b"fedtune withdrawal\0" + canonical(receipt)


def _count(table: SiteData, patient: str) -> int:
    """Count the records of a patient in a table's files, also those that data.consent leaves
    out."""
    everybody = table.model_copy(update={"consent": None})
    records, _ = read_records(everybody, unit="patient")
    return sum(record.unit == patient for record in records)


def _releases(
    site: Site,
    ledger: Ledger,
    datasets: Collection[str],
    in_files: Collection[str],
    withdrawn: int,
) -> list[Release]:
    """List the studies that sent updates which may reflect the patient, or may send such updates
    once a person approves them. An update that a person refused for good is not listed.

    - site: the site, with the columns of patients that its files name now
    - ledger: the ledger with the charges
    - datasets: the datasets in which the ledger has the patient's key
    - in_files: the datasets whose files have it
    - withdrawn: the number of the entry of the patient's withdrawal, after which no round reads the
      patient's records

    Of the rounds that were charged before it against one of all these datasets, a round counts if
    it fulfils one of these conditions. So does a round that a restore charged after it: the folder
    may have been put back to before the withdrawal, and gone on with the patient's records.
    - it was charged to one of `datasets`
    - or the ledger does not have the keys of all whom it charged: a restore does not know which
      dataset was charged, and of an adopted ledger only the keys in the files were taken over
    - or it was charged by another patient column, or record by record, so that the ledger cannot
      know whether this patient took part; this is asked only if the patient is in a dataset"""
    names, known = {*datasets, *in_files}, {*ledger.datasets}
    by_study: dict[str, list[Spent]] = {}
    for spent in charges_with_columns(
        ledger, names or {*known, site.data.name}, patient_columns(site)
    ):
        may_leave = spent.released and not ledger.is_refused(spent.slot)
        sent = may_leave or not spent.charge.noise_multiplier
        other_key = names and (spent.has_other_column or spent.charge.unit == "record")
        may_have_it = spent.dataset in datasets or spent.dataset not in known
        may_be_before = spent.kind == "restore" or spent.seq < withdrawn
        if may_be_before and sent and (may_have_it or other_key):
            by_study.setdefault(spent.charge.study, []).append(spent)
    return [
        Release(
            name=rounds[0].charge.name,
            digest=digest,
            rounds=len(rounds),
            epsilon=known_epsilon(rounds, site.policy.delta, "patient"),
            fallback=known_fallback(rounds, site.policy.delta, "patient"),
        )
        for digest, rounds in by_study.items()
    ]
