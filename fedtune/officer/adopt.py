"""Make a site with a ledger of its own a membership of a hospital's home, the folder with
hospital.toml and the one ledger from which all memberships pay.

The ledger of the first site that a home adopts becomes the hospital's, with its key, salt, audit
log and receipts. The charges of a later site are entered in this ledger as charges of the site's
membership (closed_ledger.py), and so are its withdrawals. The later site's old ledger holds hashes
under another salt, so the patients who withdrew are found by hashing the keys in the site's
records.

The adoption keeps a whole copy of the state folder, beside it, and a copy of site.toml. Each later
step leaves every ledger whole, and running the command again repeats no step that was done:
| the command was                     | then                                                       |
| killed before site.toml is replaced | the site still uses its own ledger; run the command again  |
| killed after that                   | the site is a membership; run again to remove old files    |
| completed, and then the first site  | run again: the home's ledger stays as it is, if it has all |
| was put back to before it           | that the site's own ledger has                             |
Meanwhile no other process can write to the old ledger. Its anchor, the signed head, is removed
first, so that a process which waited for the ledger is refused.
| of the site                           | what becomes of it                                       |
| what a later site paid                | counts against every dataset of the hospital, whether    |
|                                       | or not its patients are still in its files               |
| signed plans, accepted charges        | a person signs and accepts them anew                     |
| receipts that a later site gave       | stay in the copy, and new ones are written               |
| withdrawals that a restore entered    | stay in the copy, unless a key matches their hashes: who |
|   although the salt was lost          | was withdrawn again since is entered by that withdrawal  |
| receipts that coordinators gave it    | are recognised, as for entries of the adopted ledger     |
| consortia that it left as distrusted  | are entered in the hospital's audit log, for every       |
|                                       | membership                                               |
A site whose ledger is frozen is not adopted, and a home whose ledger is frozen adopts no site. A
site whose audit log was taken away is adopted only after a person has looked into the loss.
Errors: ConfigError, InputError, DataError, PolicyRefused, Refused, LedgerError, NotGenuine,
InfrastructureError."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from fedtune.core.config import Site, SiteData, load_site
from fedtune.core.config.hospital import FILE, CeilingTable, Hospital, RegisteredData, share_in
from fedtune.core.config.load import load_hospital
from fedtune.core.config.patient_columns import (
    disjoint_datasets,
    patient_column,
    shorten_column,
)
from fedtune.core.config.site import HomeTable
from fedtune.core.data.identity import identities
from fedtune.core.data.records import read_file, unit_member
from fedtune.core.dp.steplog import StepLog
from fedtune.core.errors import ConfigError, InfrastructureError, InputError, PolicyRefused
from fedtune.core.files import locks
from fedtune.core.files.room import ROOM
from fedtune.core.files.writing import is_abandoned, replace, sync_folder
from fedtune.core.ledger import audit_log
from fedtune.core.ledger.adopted import check_has_adopted, has_noted, note_adopted
from fedtune.core.ledger.audit_log import AuditLog, login
from fedtune.core.ledger.declared import list_not_accepted, options_to_accept
from fedtune.core.ledger.entries import EVERY, Earlier, Gone, slot_of
from fedtune.core.ledger.files import (
    ASKED,
    DATABASE,
    HEAD,
    KEY,
    OUTBOX,
    SALT,
    STEPS,
    read_head,
    traces,
)
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.ledger.restore import backup
from fedtune.core.vault.studies import under_way
from fedtune.core.wire.keys import SigningKey
from fedtune.homes.known_homes import check_head, move_notes
from fedtune.homes.opening import open_ledger
from fedtune.officer.closed_ledger import NO_COLUMN, Closed, closed
from fedtune.officer.freeze import check_not_frozen
from fedtune.officer.hospital_file import (
    check_text,
    keep_copy,
    load_hospital_text,
    today_suffix,
    with_key,
    write_data,
    write_home,
    write_hospital,
    write_membership,
)
from fedtune.officer.leave import DISTRUST, check_remembered, distrusted
from fedtune.officer.let_go import list_waiting
from fedtune.officer.memberships import EDIT_LOCK, check_new, site_of, still
from fedtune.officer.withdraw import RECEIPTS, list_of_old_salt, withdraw

OF_LEDGER = (  # in a state folder: what becomes the hospital's, its anchor first
    *(HEAD, DATABASE, "ledger.*", SALT, STEPS, "audit*.jsonl"),
    *(f"{RECEIPTS}/*", f"{OUTBOX}/*", f"{ASKED}/*"),
)
NOT_COPIED = (f"{ROOM}*", "*.lock", "*/lock", "*.new")
ACTS = 16  # an act is not entered again if it is among so many newest entries of the audit log


@dataclass(frozen=True)
class Adoption:
    """The result of an adoption.

    - copy, site_copy: the copies of the state folder and of site.toml; None if this call only
      finished an adoption that was interrupted
    - first: whether the site's ledger became the hospital's
    - charges: how many charges of a later site were entered now
    - datasets: each dataset's name in the site file → its name in hospital.toml
    - charged: each dataset's name in the site file → the name under which its charges count
    - receipts: the new receipts of patients who had withdrawn
    - restored: how many of the later site's charges a restore had entered; they count against every
      dataset of the hospital
    - unrecognised: how many of the later site's withdrawals were not entered, since a restore that
      made a new salt had left hashes that match no key"""

    home: Path
    name: str
    copy: Path | None
    site_copy: Path | None
    first: bool
    charges: int = 0
    datasets: dict[str, str] = field(default_factory=dict)
    charged: dict[str, str] = field(default_factory=dict)
    receipts: list[Path] = field(default_factory=list)
    restored: int = 0
    unrecognised: int = 0


def adopt(
    home: Path,
    site_file: Path,
    name: str,
    withdrawn: Sequence[str] = (),
    *,
    anyway: bool = False,
) -> Adoption:
    """Make the site of `site_file` the membership `name` of `home`. A home that does not exist is
    made.

    - home: the folder of the hospital's home
    - site_file: the site.toml of a site that has a ledger of its own; it is replaced, and a copy
      stays
    - name: the name of the membership in hospital.toml, which no other one of this home ever had
    - withdrawn: keys of patients who withdrew from the site and have no record there any more; they
      are read only if the home had a ledger already
    - anyway: whether to adopt a later site that once released without noise, after which no private
      study of the hospital is possible

    Called again after it was killed, it finishes what is left to do.
    Errors: ConfigError, InputError, DataError, PolicyRefused, Refused (a ledger is frozen, or an
    audit log was taken away), LedgerError, NotGenuine, InfrastructureError."""
    home, site_file = home.resolve(), site_file.resolve()
    check_not_frozen(home, "adopted")
    if load_site(site_file, alone=True).hospital:
        return _finish(home, site_file, name)
    site = load_site(site_file)
    _check(home, site, site_file)
    with still(home, site):
        book = open_ledger(site.site.state)
        check_head(book)  # what this machine noted of it is forgotten with the adoption
        book.verify()
        check_remembered(site.site.state)  # the home would not know that a log was taken away here
        if _is_first(home, site_file, name, book):
            with closed(book) as old:
                return _adopt_first(home, site, site_file, name, old)
        _check_no_copy(home, site, book)
        _check_nothing_waits(site, book)
        of_old_salt = list_of_old_salt(book)
        with closed(book) as old:
            return _adopt_later(
                home, site, site_file, name, old, withdrawn, of_old_salt, anyway=anyway
            )


def _check_no_copy(home: Path, site: Site, book: Ledger) -> None:
    """Check that a site's ledger is no copy of the home's, whose charges would count twice. Errors:
    ConfigError."""
    if not (home / DATABASE).exists():
        return
    there = open_ledger(home)
    if book.key.public != there.key.public:
        return
    if there.accounts_for(book.head):
        todo = "its charges are in the hospital's ledger: use the membership's site file"
    else:
        todo = (
            "it went on by itself, and the hospital's ledger lacks charges that it has: `fedtune "
            f"ledger SITE --restore --from {site.site.state}`, where SITE is the membership's site "
            "file, enters them. Then use that file"
        )
    raise ConfigError(
        f"{site.site.state}: is a copy of the ledger that is the hospital's already",
        "a site with a ledger of its own",
        todo,
    )


def _finish(home: Path, site_file: Path, name: str) -> Adoption:
    """Finish an adoption (a site with its own ledger becomes a membership of the hospital) that was
    interrupted after site.toml was replaced: remove what is left of the old ledger. Return the
    adoption without copies, charges, datasets and receipts, since an earlier call made these.

    - home: the folder of the hospital's home
    - site_file: the site.toml, which names this home already
    - name: the name of the membership

    Errors: ConfigError if the site is another membership, or its own ledger was never adopted;
    LedgerError if the hospital's ledger was put back to before it adopted the site's."""
    site = load_site(site_file)
    if (site.home, site.policy.membership) != (home, name):
        raise ConfigError(
            f"{site_file}: is the membership {site.policy.membership!r} of {site.home} already",
            "a site with a ledger of its own",
        )
    with still(home, site):
        book = open_ledger(home)
        check_head(book)
        book.verify()
        check_has_adopted(site.site.state, book)
        acts = audit_log.verify(home, book.key.public).entries
        adopted_here = [
            act for act in acts if act["event"] == "adopt" and act["facts"]["membership"] == name
        ]
        if not adopted_here:
            raise ConfigError(
                f"{site_file}: names {home} as its home, but its own ledger was never adopted",
                "a site file without the table [hospital]",
                "take the table out, then run the command again",
            )
        first, state = bool(adopted_here[-1]["facts"]["first"]), site.site.state
        # It is the first file to be removed: if it is there, the whole ledger may be.
        if (state / HEAD).exists() and not _has_all_of(state, book, first=first):
            raise ConfigError(
                f"{state}: its own ledger was adopted once, and holds now what the hospital's "
                "lacks",
                "a ledger of which the hospital's has each entry",
                "take the table [hospital] out of the site file, then run the command again",
            )
        move_notes(state, home)
        _take_away(state)
    return Adoption(home, name, None, None, first=first)


def _has_all_of(state: Path, book: Ledger, *, first: bool) -> bool:
    """Return whether the hospital's ledger has all of an adopted site's own one, as far as the
    newest entry that its anchor names shows it.

    - state: the site's state folder
    - book: the hospital's ledger
    - first: whether it began as a copy of this site's ledger, and so has this site's key"""
    if not (state / KEY).exists():
        return False
    head = read_head(state / HEAD, SigningKey.at(state / KEY).public)
    if head is None:
        return False
    return book.accounts_for(head) if first else has_noted(state, head)


def _check(home: Path, site: Site, site_file: Path) -> None:
    state = site.site.state.resolve()
    if site.data.declared or site.site.ledger:
        raise ConfigError(
            f"{site_file}: declares its data public or generated, and a hospital's ledger pays for "
            "private records only",
            "a site with private records",
        )
    if not traces(state):
        raise ConfigError(
            f"{state}: no ledger yet, so that there is nothing to adopt",
            "a site that was enrolled",
            "`fedtune memberships HOME --add NAME --site DIR` makes a new membership",
        )
    if traces(state) == [KEY]:
        raise ConfigError(
            f"{state}: its ledger is in a hospital's home already, by another site file",
            "a site with a ledger of its own",
            f"use that file, which {FILE} names for its membership, in place of {site_file}",
        )
    if link := next((p for p in _files_of(state) if p.is_symlink()), None):
        raise InputError(
            f"{link}: a symbolic link in place of a file of the ledger",
            "plain files, which an adoption copies and then removes",
            "put the file itself in the link's place, then run the command again",
        )
    if home == state or home.is_relative_to(state):
        raise ConfigError(f"{home}: lies in the site's state folder {state}", "a folder outside it")
    if home.exists() and not (home / FILE).exists() and any(home.iterdir()):
        raise ConfigError(f"{home}: has no {FILE}", "a hospital's home, or an empty folder")


def _files_of(state: Path) -> Iterator[Path]:
    """Yield the paths of all folders and files that a ledger has in a state folder: first the
    folders, also those that do not exist, then the files."""
    yield from (state / name for name in (RECEIPTS, OUTBOX, ASKED))
    yield from (path for pattern in (KEY, *OF_LEDGER) for path in sorted(state.glob(pattern)))


# --------------------------------------------------------------------------------- the first site


def _is_first(home: Path, site_file: Path, name: str, book: Ledger) -> bool:
    """Return whether the site's ledger becomes, or has become, the ledger of the home. That is so
    if no home exists yet, or if the home was made by an adoption of this same site: it was killed,
    or the site's folder and its site.toml were put back to before it.

    - home: the folder of the hospital's home, which need not exist
    - site_file: the absolute path of the site's site.toml
    - name: the name of the membership
    - book: the site's own ledger"""
    if not (home / FILE).exists():
        return True
    there = load_hospital(home).memberships.get(name)
    if there is None or not there.earlier or there.site.resolve() != site_file:
        return False
    return (home / KEY).exists() and SigningKey.at(home / KEY).public == book.key.public


def _adopt_first(home: Path, site: Site, site_file: Path, name: str, old: Closed) -> Adoption:
    """Make a home whose ledger is this site's, and make the site the first membership of the home.
    Return the adoption, with the copies of the old state folder and site.toml.

    - home: the folder of the home. It need not exist; an earlier adoption of the site may have made
      it. It may have gone on since then, but must have all that the site's own ledger has.
    - site: the site as its site file states it now
    - site_file: the absolute path of that file, which is replaced
    - name: the name of the membership
    - old: the site's own ledger, to which no other process can write meanwhile

    Errors: ConfigError, also if the site's ledger has something that the home's lacks."""
    state, text = site.site.state, _hospital_text(site, site_file, name)
    is_new = not (home / FILE).exists()
    hospital = load_hospital_text(home.parent, text) if is_new else load_hospital(home)
    share_in(_as_membership(site, home, name, hospital, {}), hospital, site_file)
    site_text = _site_text(home, site, site_file, name, hospital, {})
    if not is_new:
        _check_home_has_all(home, site, site_file, hospital, old)
    copy = _keep_state(state)
    if is_new:
        _make_home(home, state, text)
    _enter_distrusted(home, state, name)
    _enter_act(home, name, first=True)
    site_copy = _switch(site_file, name, site_text)
    move_notes(state, home)
    _take_away(state)
    return Adoption(home, name, copy, site_copy, first=True)


def _check_home_has_all(
    home: Path, site: Site, site_file: Path, hospital: Hospital, old: Closed
) -> None:
    """Check that the home's ledger has all that the ledger of its first site has, which is taken
    away. The error says to delete the home only if this loses nothing: no other site is a
    membership of it, and each of its entries is in the site's own ledger.

    - home: the folder of the home
    - site: the site as its site file states it now
    - site_file: the absolute path of that file
    - hospital: the content of hospital.toml
    - old: the site's own ledger, to which no other process can write meanwhile

    Errors: ConfigError, LedgerError."""
    book, state = open_ledger(home), site.site.state
    # What a restore of the home charged for may have held a decision of a person, too.
    has_withdrawals = {*old.withdrawn} <= {*book.withdrawn()}
    has_decisions = has_withdrawals and all(book.is_refused(slot) for slot in old.refused)
    if book.accounts_for(old.head) and has_decisions:
        return
    if old.has_entry(book.head) and len(hospital.memberships) == 1:
        todo = f"delete {home}, which holds nothing that {state} lacks, and run the command again"
    else:
        todo = (
            f"write the table [hospital], with the keys home and membership, into {site_file}; "
            f"`fedtune ledger {site_file} --restore --from {state}` enters what the home lacks; "
            "then take the table out, and run the command again. Do not delete the home: it has "
            f"entries or memberships that {state} lacks"
        )
    raise ConfigError(
        f"{home}: was begun by an adoption of this site, and the site went on since by itself",
        "a home whose ledger has all that the site's own has",
        todo,
    )


def _make_home(home: Path, state: Path, text: str) -> None:
    """Make a home with a copy of a site's ledger, as a whole or not at all. state: the site's state
    folder, which holds the ledger. text: the content of hospital.toml. Errors:
    InfrastructureError."""
    draft = home.with_name(f"{home.name}.{os.getpid()}.new")
    _remove_drafts(home.parent, f"{home.name}.*.new")
    try:
        draft.mkdir(mode=0o700, parents=True)
        _copy_ledger(state, draft)
        replace(draft / FILE, text.encode(), private=True)
        draft.rename(home)
        sync_folder(home.parent)
    except OSError as error:
        raise _cannot(home, error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _hospital_text(site: Site, site_file: Path, name: str) -> str:
    """Compose hospital.toml from the site file's datasets and ceilings. name: the name of the
    membership, which also owns the charges that were made before. site_file: the absolute path of
    the site file."""
    names = {table.name: table.name for table in _tables(site)}
    data = {table.name: _registered(table, names) for table in _tables(site)}
    keys = ("max_epsilon", "max_fallback_epsilon", "max_delta", "max_rounds")
    ceilings = CeilingTable(**{key: getattr(site.policy, key) for key in keys})
    text = write_hospital(site.site.name, site.site.declared_size, ceilings, data)
    return text + write_membership(name, site_file, earlier=True)


# ----------------------------------------------------------------------------------- a later site


def _check_nothing_waits(site: Site, book: Ledger) -> None:
    """Check that no answer waits for a person, and that a person accepted everything that the site
    declared public or generated: the hospital's ledger cannot take these over. Whether the site's
    present files have such a record does not matter, since they may have one later. book: the
    site's own ledger. Errors: InputError, PolicyRefused."""
    if waiting := list_waiting(site):
        raise InputError(
            f"{len(waiting)} answers wait at {site.site.name}",
            "a site where none waits",
            "`fedtune let-go SITE` lists them: let each go, or refuse it",
        )
    for table in _tables(site):
        if names := list_not_accepted(book, table.name):
            raise PolicyRefused(
                f"records at {site.site.name} were declared public or generated, or may have been, "
                f"in {_list_declared(names)}; what was tried with them is in no budget, and the "
                "hospital's ledger would not recognise them as private records",
                "a person's acceptance that they may be private records of each dataset here",
                f"`fedtune ledger SITE --accept {table.name} {options_to_accept(names)} "
                "--reason TEXT`",
            )


def _check_home_declared(site: Site, book: Ledger, datasets: Mapping[str, str]) -> None:
    """If a study is under way at a later site, check that a person accepted, for each of its
    datasets, everything that was declared public or generated at the home. The study's rounds would
    train on such records unasked, since the site joins while a study is under way, whatever its
    records are (`check_before_joining`). Without a study, the client asks before it joins.

    - site: the site as its site file states it now
    - book: the hospital's ledger
    - datasets: each dataset's name in the site file → its name in hospital.toml

    Errors: PolicyRefused."""
    if not (studies := under_way(site.site.state)):
        return
    for table in _tables(site):
        dataset = datasets[table.name]
        if names := list_not_accepted(book, dataset):
            raise PolicyRefused(
                f"records were declared public or generated at {book.folder}, or may have been, in "
                f"{_list_declared(names)}, and a study is under way at {site.site.name}: "
                f"{', '.join(studies.values())}. It would train on such records unasked",
                "a person's acceptance that they may be private records of each dataset here, or "
                "no study under way",
                f"`fedtune ledger SITE --accept {dataset} {options_to_accept(names)} --reason "
                "TEXT`, where SITE is the site file of a membership; or wait until the study is "
                "over",
            )


def _list_declared(names: Collection[str]) -> str:
    """List declared datasets for an error's text. `names` may contain EVERY."""
    listed = [repr(name) for name in names if name != EVERY]
    if EVERY in names:
        listed.append("datasets that a restore of the ledger may have lost")
    return ", ".join(listed)


def _adopt_later(
    home: Path,
    site: Site,
    site_file: Path,
    name: str,
    old: Closed,
    withdrawn: Sequence[str],
    of_old_salt: Collection[str],
    *,
    anyway: bool,
) -> Adoption:
    """Enter a site's charges and withdrawals in the ledger of a home that has one already, and make
    the site a membership there.

    - home: the folder of the home
    - site: the site as its site file states it now
    - site_file: the absolute path of that file, which is replaced
    - name: the name of the membership
    - old: the site's own ledger, to which no other process can write meanwhile
    - withdrawn: keys of patients who withdrew from this site and have no record there any more
    - of_old_salt: hashes of patients who withdrew from it that may match no key any more
    - anyway: whether to adopt it even if no private study of the hospital is possible then"""
    state, before_it = site.site.state, (home / FILE).read_text(encoding="utf-8")
    text, hospital = before_it, load_hospital_text(home, before_it)
    there = hospital.memberships.get(name)
    if there is None:
        check_new(home, hospital, name)
    elif there.site.resolve() != site_file:
        raise ConfigError(f"{home / FILE}: has a membership {name!r} already", "another name")
    book = open_ledger(home)
    check_head(book)
    datasets = _names(site, hospital, name, book)
    _check_home_declared(site, book, datasets)
    for table in _tables(site):
        if datasets[table.name] not in hospital.datasets:
            text += write_data(datasets[table.name], _registered(table, datasets))
    if there is None:
        text += write_membership(name, site_file)
    hospital = load_hospital_text(home, text)
    charged = _charged(name, old, datasets, {*hospital.datasets, *book.datasets})
    columns = {table.name: patient_column(table) for table in _tables(site)}
    earlier = old.list_earlier(name, charged, columns)
    if not anyway:
        _check_budget_remains(site, earlier)
    site_text = _site_text(home, site, site_file, name, hospital, datasets)
    as_membership = _as_membership(site, home, name, hospital, datasets)
    membership = share_in(as_membership, hospital, site_file)
    keys = _keys_of_withdrawn(site, old, withdrawn, of_old_salt)
    copy = _keep_state(state)
    with locks.hold(home / EDIT_LOCK):
        if (home / FILE).read_text(encoding="utf-8") != before_it:
            raise ConfigError(
                f"{home / FILE}: was changed while this site was adopted",
                "a file that nobody changes meanwhile, since the change would be lost",
                "run the command again: nothing was adopted yet",
            )
        replace(home / FILE, text.encode(), private=True)
    for table in _tables(site):
        _declare(book, hospital, datasets[table.name], table, _list_columns(site, old, table))
    by_member = {unit_member(key): gone for key, gone in keys.items()}
    _copy_stored(old, name, book)
    refused = [slot_of(slot, name) for slot in old.refused]
    entered = book.enter_earlier(
        name, earlier, by_member, refused, login(), old.ended, old.charged_entries
    )
    StepLog(home / STEPS, name).join(state / STEPS)  # not of an adoption that was refused
    receipts = [withdraw(membership, key, book, unseen=True).receipt_file for key in sorted(keys)]
    acts = AuditLog(home, book.key)
    _enter_distrusted(home, state, name)
    for study, round_, adapter in refused:  # by which a restore of the home refuses them again
        acts.add("refuse", "--adopt", plan=study, round=round_, adapter=adapter)
    _enter_act(home, name, first=False, charges=len(earlier), withdrawals=len(keys))
    note_adopted(state, old.known, old.settled, book.head)
    site_copy = _switch(site_file, name, site_text)
    move_notes(state, home)
    _take_away(state)
    return Adoption(
        home,
        name,
        copy,
        site_copy,
        first=False,
        charges=entered,
        datasets=datasets,
        charged=charged,
        receipts=receipts,
        restored=sum(one.dataset == EVERY for one in earlier),
        unrecognised=len(old.withdrawn) - len(keys),
    )


def _list_columns(site: Site, old: Closed, table: SiteData) -> list[str]:
    """List the columns of patients that the hospital's ledger must remember of a later site's
    table, oldest first: those that the dataset ever had there, and those of datasets that the site
    file no longer names and does not declare disjoint from it. Otherwise a study that protects
    records could read whoever withdrew, once the table names no column any more.

    old: the site's own ledger"""
    named, apart = {each.name for each in _tables(site)}, disjoint_datasets(site)
    others = {*old.patient_columns} - named - {*apart.get(table.name, ())}
    had = [old.patient_columns.get(name) for name in (table.name, *sorted(others))]
    columns = [column for columns in had for column in columns or ()]
    is_unknown = [] in had and not table.columns.patient
    return [*dict.fromkeys(columns), *([NO_COLUMN] if is_unknown else [])]


def _declare(
    book: Ledger, hospital: Hospital, name: str, table: SiteData, columns: Sequence[str]
) -> None:
    """Declare a later site's dataset in the hospital's ledger, with all that it remembers of it.

    - book: the hospital's ledger
    - hospital: the content of hospital.toml
    - name: the dataset's name in hospital.toml
    - table: the table of the site file that names its records
    - columns: the columns of patients that it had in the site's own ledger"""
    data = hospital.datasets[name]
    now = {key: shorten_column(each.patient) for key, each in hospital.datasets.items()}
    # The present column comes first, as the one of charges here that name none, and stays the last.
    there = book.patient_columns.get(name, [])
    earlier = [column for column in columns if column not in (now[name], *there)]
    for column in (now[name], *earlier) if earlier else ():
        at_this_time = {**now, name: column}
        book.declare(name, data.disjoint_from, None, (), data.cohort, columns=at_this_time)
    known = {member for record in identities(_of_everybody(table)) for member in record}
    book.declare(name, data.disjoint_from, None, known, data.cohort, columns=now)


def _check_budget_remains(site: Site, earlier: Sequence[Earlier]) -> None:
    """Check that none of a later site's charges was without noise, since each of them counts
    against every dataset of the hospital. Errors: InputError."""
    if without := sum(one.charge.noise_multiplier <= 0 for one in earlier):
        raise InputError(
            f"{without} charges of {site.site.name} are without noise, and what it paid counts "
            "against every dataset of the hospital: no private study of the hospital would be "
            "possible any more",
            "a site whose charges all have noise",
            f"`fedtune ledger` shows {site.site.name}'s charges. If the hospital shall take part "
            "in no private study again, add --anyway",
        )


def _names(site: Site, hospital: Hospital, name: str, book: Ledger) -> dict[str, str]:
    """Return each dataset's name in the site file → its name in hospital.toml. That is the name
    under which the same file or table is registered there or, if it is not registered, a new name
    that neither hospital.toml nor the ledger has.

    - site: the site as its site file states it now
    - hospital: the content of hospital.toml
    - name: the name of the membership, with which a new name begins if the site's own is taken
    - book: the ledger in the home"""
    names = dict[str, str]()
    charged = {spent.own_dataset for spent in book.spending()}
    for table in _tables(site):
        at = [key for key, data in hospital.datasets.items() if data.is_place_of(table)]
        taken = {*hospital.datasets, *book.datasets, *charged, *names.values()}
        names[table.name] = at[0] if at else _find_free(table.name, name, taken)
    return names


def _find_free(wanted: str, name: str, taken: Collection[str]) -> str:
    """Return the dataset's name `wanted` or, if `taken` has it, a name that begins with that of the
    membership, `name`."""
    free = (wanted, f"{name}-{wanted}"[:64], *(f"{name[:59]}-{n}" for n in range(1000)))
    return next(each for each in free if each not in taken)


def _charged(
    name: str, old: Closed, datasets: Mapping[str, str], taken: Collection[str]
) -> dict[str, str]:
    """Return each dataset's name in a later site's ledger or file → the name under which its
    charges are entered in the hospital's ledger. No dataset can have such a name, so the charges
    count against every dataset: whether they need not would follow from who is still in the files.

    - name: the name of the membership
    - old: the site's own ledger
    - datasets: each dataset's name in the site file → its name in hospital.toml
    - taken: the hospital's names of datasets. A dataset that the site file no longer names gets
      none of them, since its charges would be compared with another dataset's column of patients"""
    names = dict(datasets)
    for dataset in sorted({*old.datasets} - {*datasets}):
        names[dataset] = _find_free(dataset, name, {*taken, *names.values()})
    return {dataset: f"{name}/{there}" for dataset, there in sorted(names.items())}


def _keys_of_withdrawn(
    site: Site, old: Closed, given: Sequence[str], of_old_salt: Collection[str]
) -> dict[str, Gone]:
    """Return the key of each patient who withdrew → when that was. The keys are those in the site's
    records and those that are given.

    - site: the site as its site file states it now
    - old: the site's own ledger, which has their hashes
    - given: keys of patients without a record; keys of patients who did not withdraw are left out
    - of_old_salt: hashes that a restore entered although the salt was lost. No key need match them:
      a person lifted the freeze of that restore, and withdrew these patients again first

    Errors: InputError if the keys of other patients who withdrew are neither in a record nor given.
    The error states how many."""
    keys = set(given)
    if old.withdrawn:
        for table in (*_tables(site), *([site.acceptance] if site.acceptance else [])):
            if table.columns.patient and (table.url or table.path.exists()):
                read = read_file(_of_everybody(table), unit="patient")
                keys |= {record.unit for record in read.records}
    found = {key: old.hashed(unit_member(key)) for key in keys}
    if left := set(old.withdrawn) - set(found.values()) - set(of_old_salt):
        raise InputError(
            f"{len(left)} patients withdrew from {site.site.name}, and no record has their keys "
            "any more; the ledger holds only hashes of the keys",
            "the keys of these patients, so that they stay left out",
            "give the keys, one a line, with --withdrawn FILE",
        )
    return {key: old.withdrawn[unit] for key, unit in found.items() if unit in old.withdrawn}


def _copy_stored(old: Closed, name: str, book: Ledger) -> None:
    """Copy the updates that may be sent again to the folder where the hospital's ledger looks for
    them. old: the site's own ledger. name: the name of the membership. book: the hospital's
    ledger."""
    for slot in old.stored:
        to = book.path_of(slot_of(slot, name))
        if old.path_of(slot).exists() and not to.exists():
            replace(to, old.path_of(slot).read_bytes(), private=True)


# -------------------------------------------------------------------------------------- both


def _tables(site: Site) -> list[SiteData]:
    return [table for table in (site.data, site.evaluation) if table]


def _of_everybody(table: SiteData) -> SiteData:
    """Return the table without its consent rules, so that everybody's records are read."""
    return table.model_copy(update={"consent": None})


def _registered(table: SiteData, names: Mapping[str, str]) -> RegisteredData:
    """Return the entry of a site's dataset in hospital.toml. names: each dataset's name in the site
    file → its name in hospital.toml. A dataset that is not in it is left out of disjoint_from."""
    place = {"url": table.url} if table.url else {"path": table.path.resolve()}
    return RegisteredData(
        **place,
        patient=table.columns.patient,
        disjoint_from=tuple(names[other] for other in table.disjoint_from if other in names),
        cohort=table.cohort,
        consent=table.consent,
    )


def _as_membership(
    site: Site, home: Path, name: str, hospital: Hospital, names: Mapping[str, str]
) -> Site:
    """Return the site's settings as its new site file will state them.

    - site: the site as its site file states it now
    - home: the folder of the hospital's home
    - name: the name of the membership
    - hospital: the content of hospital.toml, in which the site's datasets are registered
    - names: each dataset's name in the site file → its name in hospital.toml; a dataset that is not
      in it keeps its name

    Errors: ConfigError if site file and hospital.toml differ in a table of consent."""
    changes: dict[str, object] = {"hospital": HomeTable(home=home, membership=name)}
    for key, table in _by_key(site).items():
        given = table.model_copy(update={"name": names.get(table.name, table.name)})
        given.model_fields_set.difference_update(_differing(table, hospital, names))
        changes[key] = given
    return site.model_copy(update=changes)


def _site_text(
    home: Path, site: Site, site_file: Path, name: str, hospital: Hospital, names: Mapping[str, str]
) -> str:
    """Return the text of the membership's site file: the present file with the datasets under the
    hospital's names, without each disjoint_from and cohort that has another value in hospital.toml,
    and with the table [hospital].

    - home: the folder of the hospital's home
    - site: the site as its site file states it now
    - site_file: the present site file
    - name: the name of the membership
    - hospital: the content of hospital.toml, in which the site's datasets are registered
    - names: each dataset's name in the site file → its name in hospital.toml; a dataset that is not
      in it keeps its name

    Errors: ConfigError if the two files differ in a table of consent."""
    text = site_file.read_text(encoding="utf-8")
    for key, table in _by_key(site).items():
        if names.get(table.name, table.name) != table.name:
            text = with_key(text, key, "name", names[table.name])
        for field_name in _differing(table, hospital, names):
            text = with_key(text, key, field_name, None)
    return text + "\n" * (not text.endswith("\n")) + write_home(home, name)


def _by_key(site: Site) -> dict[str, SiteData]:
    tables = {"data": site.data, "evaluation": site.evaluation}
    return {key: table for key, table in tables.items() if table}


def _differing(table: SiteData, hospital: Hospital, names: Mapping[str, str]) -> list[str]:
    """List the declarations (disjoint_from, cohort) that the site file makes with another value
    than hospital.toml. table: a dataset of the site file. names: each dataset's name in the site
    file → its name in hospital.toml; a dataset that is not in it keeps its name. Errors:
    ConfigError if the two files differ in the table of consent."""
    data = hospital.datasets[names.get(table.name, table.name)]
    if table.consent != data.consent:
        raise ConfigError(
            f"consent of {table.name!r}: the site file and hospital.toml differ",
            "one table of consent for the same records",
            "have both say the same, then run the command again",
        )
    keys = ("disjoint_from", "cohort")
    given = [key for key in keys if key in table.model_fields_set]
    return [key for key in given if getattr(table, key) != getattr(data, key)]


def _switch(site_file: Path, name: str, text: str) -> Path:
    """Replace the site file, after a check that the new text can be read as that of the membership
    `name`. Return the path of the copy of the old file. text: the new content. Errors:
    ConfigError."""
    check_text(site_file, text, lambda draft: site_of(draft, name, site_file))
    copy = keep_copy(site_file)
    replace(site_file, text.encode(), private=True)
    return copy


def _enter_distrusted(home: Path, state: Path, name: str) -> None:
    """Enter in the home's audit log which consortia the site left as distrusted, for every
    membership. state: the site's state folder, with its own audit log. name: the name of the
    membership."""
    acts = AuditLog(home, SigningKey.at(home / KEY))
    for consortium in sorted(set(distrusted(state)) - set(distrusted(home))):
        acts.add("leave", DISTRUST, consortium=consortium, membership=name, files=0)


def _enter_act(home: Path, name: str, **facts: int) -> None:
    key = SigningKey.at(home / KEY)
    AuditLog(home, key).add("adopt", "--adopt", once=ACTS, membership=name, **facts)


def _keep_state(state: Path) -> Path:
    """Copy a state folder beside itself, as a whole or not at all, and return the copy's path. A
    copy of the same ledger from today is used again. Errors: InfrastructureError."""
    for number in range(1, 1000):
        copy = state.with_name(f"{state.name}.{today_suffix()}{f'-{number}' * (number > 1)}")
        if not copy.exists():
            break
        if (copy / HEAD).exists() and (copy / HEAD).read_bytes() == (state / HEAD).read_bytes():
            return copy
    draft = copy.with_name(f"{copy.name}.{os.getpid()}.new")
    _remove_drafts(state.parent, f"{state.name}.*.new")
    try:
        draft.mkdir(mode=0o700)
        _copy_ledger(state, draft)
        for root, _, files in os.walk(state):
            for path in (Path(root) / name for name in files):
                inside = path.relative_to(state)
                skipped = any(fnmatchcase(inside.as_posix(), each) for each in NOT_COPIED)
                if not (skipped or path.is_symlink() or (draft / inside).exists()):
                    _copy(path, draft / inside)
        draft.rename(copy)
        sync_folder(copy.parent)
    except OSError as error:
        raise _cannot(copy, error) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return copy


def _remove_drafts(folder: Path, pattern: str) -> None:
    """Remove incomplete copies: the folders to which a process that was killed had begun to copy.
    folder: where they lie. pattern: the pattern of their names, in which * stands for any text."""
    for draft in folder.glob(pattern):
        if is_abandoned(draft):
            shutil.rmtree(draft, ignore_errors=True)


def _copy_ledger(state: Path, to: Path) -> None:
    """Copy a ledger with its key into an empty folder. SQLite copies the database, because closing
    the file here would give up this process's lock on it. state: the folder of the ledger. to: the
    empty folder."""
    backup(state, to, key=True)
    for pattern in OF_LEDGER:
        for path in state.glob(pattern):
            if path.name != DATABASE and path.is_file() and not path.is_symlink():
                _copy(path, to / path.relative_to(state))


def _copy(path: Path, to: Path) -> None:
    if path.is_file():
        replace(to, path.read_bytes(), private=True)


def _take_away(state: Path) -> None:
    """Remove a ledger's files from a state folder. The key stays, since it becomes the membership's
    own key."""
    try:
        for pattern in OF_LEDGER:
            for path in sorted(state.glob(pattern)):
                path.unlink()
        # The length of this file says that a log was begun here. If the file stayed, the log, which
        # now lies in the home, would count as taken away.
        (state / audit_log.LOCK).unlink(missing_ok=True)
        for folder in (RECEIPTS, OUTBOX, ASKED):
            if (state / folder).is_dir() and not any((state / folder).iterdir()):
                (state / folder).rmdir()
        sync_folder(state)
    except OSError as error:
        raise _cannot(state, error) from None


def _cannot(path: Path, error: OSError) -> InfrastructureError:
    return InfrastructureError(
        f"{error.filename or path}: {error.strerror}",
        todo="free disk space or fix the permissions, then run the command again",
    )
