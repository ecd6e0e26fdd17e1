"""Remember on this machine, for this user's account, which home pays for which private records. A
home is a folder with a privacy ledger; it pays for records if their ε is charged to its ledger.

    homes.json    in $XDG_STATE_HOME/fedtune, else ~/.local/state/fedtune; 0600

If two homes paid for one dataset, each ledger would state only a part of what the patients have
paid. So a site is refused, before it joins or is simulated, if another home pays for its records.
The site is also refused if it declares these records public or generated, since only the other
home's ledger knows what was charged as private.

For each home they also name the newest entry of its ledger, as it was when a client last ran. If
the folder is put back to an earlier copy of itself, the ledger then lacks this entry, and nothing
is charged until it is restored (`check_head`).

A home whose ledger is missing is not forgotten, since perhaps only its volume is not mounted. No
site begins a new ledger for its records, in this home or in another, until a person says that the
old ledger is of no use any more (`forget`). A ledger is recognised by its public key. Simulations
and declared data are not noted.
| limit                                              | what follows                     |
| homes.json cannot be written, as in a container    | a warning; nothing is remembered |
| another account, or another machine                | knows nothing of these notes     |
| a database under another name of its server        | counts as another place          |
Guarantee: the result depends on settings and the places of files, never on a record."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from fedtune.core.config import Site, SiteData
from fedtune.core.config.database import FILES, databases_of, file_of, kind_of, redact_url
from fedtune.core.errors import ConfigError, InfrastructureError, InputError
from fedtune.core.files import locks, reading
from fedtune.core.files.writing import replace
from fedtune.core.ledger.adopted import ADOPTED
from fedtune.core.ledger.chain import does_account_for
from fedtune.core.ledger.files import (
    DATABASE,
    HEAD,
    KEY,
    RESTORE,
    Head,
    LedgerError,
    Mark,
    read_head,
    read_noted,
    traces,
)
from fedtune.core.wire.keys import SigningKey

if TYPE_CHECKING:
    from fedtune.core.ledger.ledger import Ledger

log = logging.getLogger("fedtune.site")
FILE = "homes.json"
NOT_REMEMBERED = (
    "%s; the home that pays for these records is not remembered, so this machine will not notice "
    "if a second home pays for them"
)
# A place: {path, device, inode}, or {url, databases}; a key: {key}; or the newest entry: {head,
# account}, where `account` tells these notes from those of another account.
Note = dict[str, Any]


def path_of_notes() -> Path:
    """Return the path of homes.json, the file in which this account's notes are kept. Errors:
    InfrastructureError if the account has no home folder."""
    named = os.environ.get("XDG_STATE_HOME", "")
    if Path(named).is_absolute():  # as the XDG specification asks
        return Path(named) / "fedtune" / FILE
    try:
        return Path.home() / ".local" / "state" / "fedtune" / FILE
    except RuntimeError:
        raise InfrastructureError("this account has no home folder") from None


def check_home(site: Site) -> None:
    """Check that no other home pays for the site's records, and note that this home pays for the
    private ones. If the notes cannot be read or written, a warning is logged instead.

    Errors: ConfigError if another home pays for them, if the site belongs to a hospital but its
    state folder holds a ledger that the hospital has not adopted, or if the ledger that was in this
    home is not there any more."""
    _check_adopted(site)
    tables = _tables(site)
    try:
        path = path_of_notes()
        with locks.hold(_made(path).with_suffix(".lock")):
            homes = _read(path)
            own = str(site.home.resolve())
            _check_same_ledger(site.home, homes)
            _check_places(tables, own, homes)
            notes = [_note(table) for table in tables if not table.declared]
            if not notes:
                return
            notes += _note_key(site.home)
            noted = [note for note in homes.get(own, []) if note not in notes]
            replace(path, _encode(homes | {own: noted + notes}), private=True)
    except (InfrastructureError, OSError) as error:
        log.warning(NOT_REMEMBERED, error)


def check_head(ledger: Ledger) -> None:
    """Check that a ledger has the entry that this machine's notes name as its newest, and note its
    present one. The ledger stores both as receipts: if the folder is put back, it is charged what
    was spent since. If the notes cannot be read, a warning is logged instead.

    Errors: LedgerError if the ledger lacks it, as when its folder was put back to an earlier copy
    of itself."""
    ledger.accept_noted(find_head(ledger.folder))
    note_head(ledger.folder)
    ledger.accept_noted(find_head(ledger.folder))


def find_head(home: Path) -> dict[str, Any] | None:
    """Return what this machine noted of the newest entry of the ledger in `home`: the statement
    that the anchor then held. None if nothing is noted, or the notes cannot be read."""
    try:
        noted = _read(path_of_notes()).get(str(home.resolve()), [])
        return next(({**note["head"], **_account(note)} for note in noted if "head" in note), None)
    except (InfrastructureError, OSError, TypeError, ValueError) as error:
        log.warning("%s; it is not known up to which entry the ledger in %s was", error, home)
        return None


def _is_newer(home: Path) -> bool:
    """Return whether the anchor of the ledger in `home` names a later entry than is noted. It does
    not if the ledger lacks the noted entry: the folder was put back, and went on with others."""
    new, noted = _read_heads(home)
    if new is None or noted is None:
        return noted is None
    return new.seq > noted.head.seq and does_account_for(home, noted) is True


def _account(note: Note) -> dict[str, Any]:
    return {"account": note["account"]} if "account" in note else {}


def note_head(home: Path) -> None:
    """Note the newest entry of the ledger in `home`, if this home is noted as one that pays for
    private records. An entry that the ledger lacks stays noted, and so does one with a larger
    number: the folder was put back since. Nothing is done if the notes cannot be written:
    `check_home` has warned."""
    with suppress(InfrastructureError, OSError, ValueError, AttributeError):
        if not _is_newer(home):
            return
        path, own = path_of_notes(), str(home.resolve())
        with locks.hold(_made(path).with_suffix(".lock")):
            homes = _read(path)
            if own in homes and _is_newer(home):  # another client may have noted one meanwhile
                anchor = json.loads((home / HEAD).read_bytes())
                statement = {key: value for key, value in anchor.items() if "named" not in key}
                key = _note_key(home)  # a home that adopted a site has none until its client runs
                others = [note for note in homes[own] if "head" not in note and note not in key]
                earlier = next((note for note in homes[own] if "head" in note), {})
                new_note = {"head": statement, "account": earlier.get("account", token_hex(8))}
                replace(path, _encode(homes | {own: [*others, *key, new_note]}), private=True)


def check_ledger_there(home: Path) -> None:
    """Check that the ledger which this machine's notes know in the folder `home`, if any, is still
    there. The folder may be empty because its volume is not mounted. Errors: ConfigError if the
    known ledger is not there."""
    try:
        _check_same_ledger(home, _read(path_of_notes()))
    except (InfrastructureError, OSError) as error:
        log.warning("%s; it is not known whether a ledger was in %s before", error, home)


def check_not_put_back(home: Path) -> None:
    """Check that the ledger which this machine's notes know in the folder `home`, if any, is still
    there (`check_ledger_there`), and that it has the entry that this machine noted. Its entries are
    not verified: this is asked often. `open_ledger` and `find_ledger` call this before they open a
    ledger. Errors: ConfigError if it is not there; LedgerError if it lacks the entry."""
    check_ledger_there(home)
    new, noted = _read_heads(home)
    if new is None or noted is None:
        return
    if new.seq < noted.head.seq or does_account_for(home, noted) is False:
        raise LedgerError(
            f"{home}: the ledger was put back to an earlier copy of itself: its newest entry is "
            f"{new.seq}, and this machine noted entry {noted.head.seq}, which it lacks",
            todo=RESTORE,
        )


def _read_heads(home: Path) -> tuple[Head | None, Mark | None]:
    """Return the newest entry of the ledger in `home`, by its anchor, and the one that this machine
    noted; each None if it is not known, or another key signed it."""
    with suppress(InfrastructureError, OSError):
        public = SigningKey.at(home / KEY).public if (home / KEY).exists() else ""
        noted = read_noted(find_head(home), public) if public else None
        if noted is not None:
            return read_head(home / HEAD, public), noted.mark
    return None, None


def move_notes(state: Path, home: Path) -> None:
    """After the hospital's home `home` has adopted the ledger in a site's state folder `state`,
    note that `home` pays for the records for which `state` paid. Call this before the ledger is
    removed from `state`: the notes of a folder that has only the ledger's key are forgotten."""
    try:
        path = path_of_notes()
        with locks.hold(_made(path).with_suffix(".lock")):
            homes = _read(path)
            pays, own = str(home.resolve()), homes.pop(str(state.resolve()), [])
            noted = homes.get(pays, [])
            own = [note for note in own if _is_of_records(note)]
            if added := [note for note in own if note not in noted]:
                replace(path, _encode(homes | {pays: noted + added}), private=True)
    except (InfrastructureError, OSError) as error:
        log.warning(NOT_REMEMBERED, error)
    note_head(home)  # a home that is put back to before the adoption is noticed


def check_simulated(site: Site) -> None:
    """Check that no other home pays for the records of a site that is simulated; nothing is noted.
    If the notes cannot be read, a warning is logged instead.

    Errors: ConfigError in the same cases as `check_home`."""
    _check_adopted(site)
    try:
        homes = _read(path_of_notes())
        _check_same_ledger(site.home, homes)
        _check_places(_tables(site), str(site.home.resolve()), homes)
    except (InfrastructureError, OSError) as error:
        log.warning("%s; it is not known whether another home pays for these records", error)


def _check_adopted(site: Site) -> None:
    """Check that the state folder of a hospital's membership (a site that is charged to the
    hospital's ledger) holds no ledger of its own. The hospital's home would first have to adopt
    such a ledger. Errors: ConfigError."""
    if site.hospital and (site.site.state / DATABASE).exists():
        raise ConfigError(
            f"{site.site.state}: holds a ledger of its own, whose charges the hospital's ledger "
            "does not count",
            "a membership whose ledger was adopted, or that never had one",
            "take the table [hospital] out of the site file, then give the command `fedtune "
            "memberships HOME --adopt SITE.toml --name NAME`; if this command was interrupted, "
            "give it again",
        )


def _tables(site: Site) -> list[SiteData]:
    return [table for table in (site.data, site.evaluation) if table]


def forget(place: str, home: Path) -> list[str]:
    """Delete the notes about `place`, and return the paths of the homes whose notes were deleted. A
    note says that a home pays for some records.

    - place: the path or url of some records, or the path of a home
    - home: the home for which the person acts. The notes of what this home itself pays for are
      deleted only if `place` is this home and its ledger is gone; a new ledger can then begin there

    Errors: InputError if no note about another home names `place`; ConfigError if the ledger in
    `home` is not the one that was there, and then nothing is forgotten; InfrastructureError."""
    path, own, names = path_of_notes(), str(home.resolve()), _names(place)
    with locks.hold(_made(path).with_suffix(".lock")):
        homes = _read(path)
        is_lost = not (traces(home) and _has_its_ledger(home, homes))
        stays = "" if own in names and is_lost else own
        if stays and traces(home):  # the audit log in this home gets an entry about it
            _check_same_ledger(home, homes)
        kept = {
            other: [note for note in notes if other == stays or not _is_named(names, other, note)]
            for other, notes in homes.items()
        }
        kept = {
            other: notes
            for other, notes in kept.items()
            if any(_is_of_records(note) for note in notes)  # a key alone is of no use
        }
        forgotten = [other for other in homes if kept.get(other) != homes[other]]
        if not forgotten:
            raise InputError(
                f"{place}: no note about another home names it",
                "the path or url of the records, or the path of the other home, as the error names "
                "it that refused the site",
            )
        replace(path, _encode(kept), private=True)
    return forgotten


def is_known(home: Path, place: str) -> bool:
    """Return whether this machine's notes have the home `home`, or any home that pays for the
    records at `place`. place: the path or url of the records, or the path of the home that pays for
    them. Errors: InfrastructureError."""
    homes, names = _read(path_of_notes()), _names(place)
    return str(home.resolve()) in homes or any(
        _is_named(names, other, note) for other, notes in homes.items() for note in notes
    )


def _names(place: str) -> set[str]:
    """Return the texts by which a note may name a place: as the person gave it, and as an absolute
    path."""
    return {place, str(Path(place).resolve())}


def _is_named(names: set[str], home: str, note: Note) -> bool:
    """Return whether one of `names` names the home, or the place of one of its notes."""
    return not names.isdisjoint({home, note.get("path"), note.get("url")})


def _made(path: Path) -> Path:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _read(path: Path) -> dict[str, list[Note]]:
    """Read the notes in the file `path`: home → the places of the records for which it pays, and
    the key of its ledger. A home is left out if its folder holds nothing but the ledger's key: then
    a hospital has adopted the ledger. Return {} if there are no notes, or they cannot be read."""
    if not path.exists():
        return {}
    try:
        homes = reading.json_in(path, "notes of homes, as fedtune writes them")["homes"]
        return {
            home: [dict(note) for note in notes]
            for home, notes in homes.items()
            if not _was_adopted(Path(home), homes)
        }
    except (InputError, KeyError, TypeError, ValueError, AttributeError):
        log.warning("%s: the notes cannot be read, and are begun anew", path)
        return {}


def _was_adopted(home: Path, homes: dict[str, list[Note]]) -> bool:
    """Return whether a hospital's home has adopted the ledger that was in `home`: the key alone is
    left, and either the note of an adopted ledger lies beside it, or another home has the ledger of
    this key. A folder with the key alone may also be one whose other files were lost."""
    with suppress(InfrastructureError, OSError):  # of a home that cannot be reached now
        if traces(home) != [KEY]:
            return False
        if (home / ADOPTED).exists():
            return True
        public = SigningKey.at(home / KEY).public
        others = [Path(other) for other in homes if other != str(home.resolve())]
        return any({"key": public} in homes[str(other)] for other in others)
    return False


def _encode(homes: dict[str, list[Note]]) -> bytes:
    return json.dumps({"homes": homes}, indent=1).encode()


def _note_key(home: Path) -> list[Note]:
    """Return the note of the public key of the ledger in `home`, in a list; [] if there is no
    ledger. Errors: InfrastructureError."""
    if not (home / KEY).exists():
        return []
    return [{"key": SigningKey.at(home / KEY).public}]


def _has_its_ledger(home: Path, homes: dict[str, list[Note]]) -> bool:
    """Return whether `home` still holds the ledger that the notes know there. If the key's file is
    missing, any other part of a ledger counts. Return True if no ledger is known: a site may have
    been refused before its ledger began. Errors: InfrastructureError."""
    noted = homes.get(str(home.resolve()), [])
    keys = [note for note in noted if "key" in note]
    here = _note_key(home)
    if keys and here:
        return here[0] in keys
    is_known = bool(keys) or any("head" in note for note in noted)
    return bool(traces(home)) if is_known else True


def _check_same_ledger(home: Path, homes: dict[str, list[Note]]) -> None:
    if not _has_its_ledger(home, homes):
        name = shlex.quote(str(home))
        raise ConfigError(
            f"{home}: the ledger that pays for this site's records is not there",
            "the folder as it was: with another ledger, what was spent would be forgotten",
            "mount the volume on which the folder lies; if the ledger is lost, restore it: "
            "`fedtune ledger SITE --restore --from FOLDER`; if it is of no use any more and its "
            f"figures are known, `fedtune memberships {name} --forget {name}` lets a new one begin",
        )


def _check_places(tables: list[SiteData], own: str, homes: dict[str, list[Note]]) -> None:
    for table, other in itertools.product(tables, homes):
        noted = next((note for note in homes[other] if _is_place(note, table)), None)
        if other == own or noted is None:
            continue
        where = redact_url(table.url) if table.url else str(table.path.resolve())
        is_there = "" if traces(Path(other)) else " (it is not there now: is its volume mounted?)"
        raise ConfigError(
            f"{where}: another ledger, in {other}{is_there}, pays for these records already, and "
            "two ledgers would each state a part of what their patients have paid",
            "one home for all studies of the same records",
            "make both sites memberships of one hospital: `fedtune memberships HOME --adopt "
            "SITE.toml --name NAME`, once for each; or, if the other ledger is of no use any more "
            f"and its figures are known, `fedtune memberships {shlex.quote(own)} --forget "
            f"{shlex.quote(_named(noted))}`",
        )


def _is_of_records(note: Note) -> bool:
    """Return whether a note is about the place of records, and not about the ledger."""
    return "path" in note or "url" in note


def _named(note: Note) -> str:
    """Return the path or url of the records that a note is about, by which `forget` finds the
    note."""
    return str(note.get("path") or note.get("url"))


def _is_place(note: Note, table: SiteData) -> bool:
    """Return whether a note is about the place of the table's records: the same file, folder or
    database; a folder in which the table's file lies; or a file in the table's folder."""
    if "path" in note:
        return any(_is_same_file(note, path) for path in _path(table))
    if not _is_of_records(note):
        return False
    # An earlier version of fedtune noted only the url of a database.
    there = note.get("databases") or databases_of(note["url"])
    return table.url is not None and not databases_of(table.url).isdisjoint(there)


def _path(table: SiteData) -> Iterator[Path]:
    if table.url is None:
        yield table.path.resolve()
    elif kind_of(table.url) in FILES:
        yield file_of(table.url).resolve()


def _is_same_file(note: Note, path: Path) -> bool:
    """Return whether the noted path is `path`, leads to it, or led to it before it was renamed. The
    noted path may also be a folder above `path`, at any depth. Conversely, `path` may be a folder
    above the noted path, but then only their names are compared."""
    noted = Path(note["path"])
    if path.is_relative_to(noted) or noted.is_relative_to(path):
        return True
    for place in (path, *path.parents):
        with suppress(OSError):
            found = place.stat()
            if [found.st_dev, found.st_ino] == [note["device"], note["inode"]]:
                return True  # though another file may have its old name by now
            if noted.exists() and os.path.samestat(found, noted.stat()):
                return True
    return False


def _note(table: SiteData) -> Note:
    """Make the note about the place of a table's records. It holds the path, device and inode of
    their file or folder or, for a database server, the url and the databases."""
    for path in _path(table):
        with suppress(OSError):
            found = path.stat()
            return {"path": str(path), "device": found.st_dev, "inode": found.st_ino}
        return {"path": str(path), "device": 0, "inode": 0}
    assert table.url is not None
    return {"url": redact_url(table.url), "databases": sorted(databases_of(table.url))}
