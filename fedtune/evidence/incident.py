"""Keep evidence after an incident, which shows who did what: copy a site's or a coordinator's files
into a folder that nobody can change unnoticed.

    DIR/…                copies of the files below, each 0400
    DIR/manifest.json    when, by whom, sha256 and size of every copy, signed by the role's key

These are not copied: texts of records, keys, the salt, the proxy's password, and the vault's own
log, in which a library may quote a record. Nobody can tell without the salt whom the ledger's
entries are about. But the entries show, without noise, how many arrivals and withdrawals were
entered. The ledger and hospital.toml of a hospital's home concern all memberships, i.e. all sites
that are charged to this ledger. A damaged ledger or audit log is kept as far as it can be read; the
manifest and a warning say so.

Guarantee: `check` finds every copy that was changed, added or taken out, unless whoever did this
has the role's key, i.e. the site's or coordinator's signing key. So let somebody else note the
digest of the manifest, which `Kept` holds.

Errors: InputError, ConfigError, InfrastructureError; NotGenuine from `check`."""

from __future__ import annotations

import calendar
import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.core.config import Site
from fedtune.core.config.checked import CHECKED
from fedtune.core.errors import ConfigError, InfrastructureError, InputError, NotGenuine
from fedtune.core.files import reading
from fedtune.core.files.writing import drafted, replace
from fedtune.core.ledger.audit_log import AuditLog, login, person
from fedtune.core.ledger.files import DATABASE, KEY, LedgerError, NoRoom, traces
from fedtune.core.ledger.restore import copy_entries
from fedtune.core.wire.keys import SigningKey, canonical, verifies
from fedtune.evidence.sign import sha256
from fedtune.homes.known_homes import check_ledger_there
from fedtune.homes.opening import open_ledger

log = logging.getLogger("fedtune.site")
FORMAT, MANIFEST = "fedtune-incident-1", "manifest.json"
SETTINGS = "site.toml"
PURPOSE = b"fedtune incident\0"
TIME = "%Y-%m-%dT%H:%M:%SZ"
PASSWORD = re.compile(rb'(//[^/?#\s":@]*:)[^/?#\s"]*@')  # in a url, such as coordinator.proxy
NOTIFY_SECONDS = 72 * 3600  # GDPR, Art. 33(1): from when a controller has become aware
# Patterns of files, in a site's state folder and home, a coordinator's home, and a run.
OF_A_SITE = (
    *("ledger.head", "ledger.receipt", "steps.jsonl", "withdrawals/*.json", "hospital.toml"),
    *("audit.jsonl", "audit-*.jsonl", "plans/*.json", "studies/*", "keys/answer.json"),
    *("log.jsonl", "log.jsonl.1", "status.json", CHECKED),
)
OF_A_COORDINATOR = (
    *("audit.jsonl", "audit-*.jsonl", "nodes/*.json", "nodes/revoked/*.json", "leaves/*.pem"),
    *("plan.json", "address", "log.jsonl", "log.jsonl.1", "status.json"),
)
OF_A_RUN = (
    *("plan.json", "report.json", "report.md", "metrics.jsonl", "evidence.json"),
    *("signature.json", "log.jsonl", "log.jsonl.1", "status.json"),
)


@dataclass(frozen=True)
class Kept:
    """Describes evidence that was kept, and that `check` found unchanged.

    - folder, files: the folder in which it lies, and the number of its files
    - noticed: when somebody became aware of the incident
    - notify: 72 hours after `noticed`, the time until which a controller has to report a breach
      (GDPR)
    - made, by: when the evidence was kept, and by whom
    - signer: the public key of the site or coordinator that signed the manifest
    - digest: sha256 of the manifest, which somebody else should note"""

    folder: Path
    noticed: str
    notify: str
    made: str
    by: str
    files: int
    signer: str
    digest: str


def keep_of_site(site: Site, to: Path, noticed: str = "", run: Path | None = None) -> Kept:
    """Copy a site's evidence into the new folder `to`, and return a Kept, which describes it.

    - site: the site, with its state folder and the home of its ledger
    - to: the folder, which must not exist
    - noticed: when somebody became aware of the incident, UTC, as 2026-03-01T09:30:00Z; "" for now
    - run: the folder of a coordinator's run, as it was handed over; None for no run

    Errors: InputError if `to` exists, `noticed` is no time, or there is no such run; ConfigError if
    the site has no ledger or no signing key; InfrastructureError."""
    home, state = site.home, site.site.state
    if not traces(home):
        check_ledger_there(home)
        raise ConfigError(f"{home}: no ledger yet, so there is nothing to keep")
    if not (home / KEY).exists():  # no key is made here, since it would not be this ledger's
        raise ConfigError(f"{home}: no signing key", todo="put it back from a backup")
    # A membership that never ran has no state folder, and gets its key now.
    is_lost = state.exists() and not (state / KEY).exists()
    key = SigningKey.at((home if is_lost else state) / KEY)
    folders = {"state": (state, OF_A_SITE)}
    if home != state:
        folders["home"] = (home, OF_A_SITE)
    found = {SETTINGS: site.file} if site.file else {}
    return _keep(to, noticed, run, folders, found, key, home)


def keep_of_coordinator(home: Path, to: Path, noticed: str = "", run: Path | None = None) -> Kept:
    """Copy a coordinator's evidence into the new folder `to`, and return a Kept, which describes
    it.

    - home: the coordinator's home, with its signing key
    - to: the folder, which must not exist
    - noticed: when somebody became aware of the incident, UTC, as 2026-03-01T09:30:00Z; "" for now
    - run: the folder of one of the coordinator's runs; None for no run

    Errors: InputError if `to` exists, `noticed` is no time, or there is no such run; ConfigError if
    the home has no signing key; InfrastructureError."""
    path = home / "signing.key"
    if not path.exists():
        raise ConfigError(f"{home}: no signing key here", "a site.toml, or a coordinator's home")
    folders = {"coordinator": (home, OF_A_COORDINATOR)}
    return _keep(to, noticed, run, folders, {}, SigningKey.at(path), None)


def _keep(
    to: Path,
    noticed: str,
    run: Path | None,
    folders: Mapping[str, tuple[Path, tuple[str, ...]]],
    found: dict[str, Path],
    key: SigningKey,
    home: Path | None,
) -> Kept:
    """Copy evidence into the new folder `to`, and write its signed manifest. Return a Kept, the
    result of checking the folder.

    - to: the new folder
    - noticed: when somebody became aware of the incident, UTC, as 2026-03-01T09:30:00Z; "" for now
    - run: the folder of a run whose files are kept too; None for no run
    - folders: name of a folder in `to` -> a pair: the folder to copy from, and the patterns of the
      files to copy
    - found: path in `to` -> a single file to copy; the files of `folders` are added to it
    - key: the signing key of the site or coordinator; it signs the manifest
    - home: the folder of a site's ledger; None for a coordinator"""
    if os.path.lexists(to):
        raise InputError(
            f"{to}: exists", "a new folder", "choose another; a folder of evidence is never changed"
        )
    since = _seconds(noticed) if noticed else time.time()
    owner = home or next(iter(folders.values()))[0]
    acts, damaged = AuditLog(owner, SigningKey.at(home / KEY) if home else key), list[str]()
    try:
        acts.add("keep", "--to", folder=to)  # first, so that the copied log has this entry too
    except NotGenuine as error:
        damaged.append(error.happened)
    if run is not None:
        folders = {**folders, "run": (run, OF_A_RUN)}
    for name, (folder, patterns) in folders.items():
        found |= {
            f"{name}/{path.relative_to(folder)}": path for path in _matching(folder, patterns)
        }
    with drafted(to) as draft:
        for name, path in found.items():
            content = reading.content(path, "evidence", most=reading.LARGE)
            if name == SETTINGS or path.name == CHECKED:
                content = PASSWORD.sub(rb"\1...@", content)
            replace(draft / name, content, private=True)
        head = _copy_ledger(home, draft / "ledger" / DATABASE, damaged) if home else ""
        names = sorted(p.relative_to(draft).as_posix() for p in draft.rglob("*") if p.is_file())
        facts: dict[str, Any] = {
            "format": FORMAT,
            "made": time.strftime(TIME, time.gmtime()),
            "noticed": time.strftime(TIME, time.gmtime(since)),
            "notify": time.strftime(TIME, time.gmtime(since + NOTIFY_SECONDS)),
            "by": person() or login(),
            "signer": key.public,
            "ledger": head,
            "damaged": damaged,
            "files": {
                name: [sha256(draft / name), (draft / name).stat().st_size] for name in names
            },
        }
        signed = facts | {"signature": key.sign(PURPOSE + canonical(facts))}
        replace(draft / MANIFEST, canonical(signed), private=True)
        try:
            for path in draft.rglob("*"):
                if path.is_file():
                    path.chmod(0o400)
        except OSError as error:
            raise InfrastructureError(f"{error.filename}: {error.strerror}") from None
    for what in damaged:
        log.warning("%s; what can be read of it is kept", what)
    return check(to)


def _copy_ledger(home: Path, to: Path, damaged: list[str]) -> str:
    """Copy the entries of a ledger, and return the hash of its newest entry. If the ledger is
    damaged, copy the rows that can be read, add a text on the damage to `damaged`, and return "".

    - home: the folder of the ledger
    - to: the file to which the entries are copied
    - damaged: a list of texts, which this function may extend"""
    try:
        book = open_ledger(home)
    except NoRoom:
        raise
    except (ConfigError, LedgerError) as error:  # also if it is not the ledger that was there
        damaged.append(error.happened)
    else:
        book.copy_entries(to)
        return book.head.hash
    if (home / DATABASE).exists():
        try:
            copy_entries(home, to)
        except NoRoom:
            raise
        except LedgerError:
            if not _has_rows(to):
                to.unlink(missing_ok=True)
    return ""


def _has_rows(path: Path) -> bool:
    """Return whether a copy of a ledger holds at least one entry. It holds none if the copying
    failed before the first entry. path: the file of the copy."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(path)) as copy:
        return bool(copy.execute("SELECT EXISTS (SELECT 1 FROM entries)").fetchone()[0])
    return False


def check(folder: Path, signer: str = "") -> Kept:
    """Check that kept evidence is as it was signed, and return a Kept, i.e. what its manifest says.
    folder: where the evidence lies; signer: the public key that must have signed it, or "" for the
    key that the manifest names. Errors: NotGenuine if a copy was changed, added or taken out, or
    the signature does not fit."""
    facts = reading.json_in(folder / MANIFEST, "evidence that fedtune kept", kind=NotGenuine)
    content = {name: value for name, value in facts.items() if name != "signature"}
    try:
        genuine = facts["format"] == FORMAT and signer in ("", facts["signer"])
        signed = PURPOSE + canonical(content)
        genuine = genuine and verifies(facts["signer"], signed, facts["signature"])
        files = {str(name): (str(pair[0]), pair[1]) for name, pair in facts["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        genuine = False
    if not genuine:
        raise NotGenuine(
            f"{folder / MANIFEST}: its signature does not fit",
            f"one by {signer[:16]}…" if signer else "the signature of the key that it names",
        )
    inside = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    there = {p.relative_to(folder).as_posix() for p in inside}
    for name in sorted(there ^ {MANIFEST, *files}):
        what = "was added" if name in there else "is missing"
        raise NotGenuine(f"{folder / name}: {what}", "the files that were kept, and no others")
    for name, (digest, size) in files.items():
        path = reading.regular(folder / name, "a file as it was kept", kind=NotGenuine)
        # The size first, since a file may be endless.
        if path.is_symlink() or path.stat().st_size != size or sha256(path) != digest:
            raise NotGenuine(f"{path}: was changed after it was kept", f"sha256 {digest[:16]}…")
    return Kept(
        folder,
        noticed=str(facts["noticed"]),
        notify=str(facts["notify"]),
        made=str(facts["made"]),
        by=str(facts["by"]),
        files=len(files),
        signer=facts["signer"],
        digest=sha256(folder / MANIFEST),
    )


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    for pattern in patterns:
        yield from (p for p in sorted(folder.glob(pattern)) if p.is_file() and not p.is_symlink())


def _seconds(noticed: str) -> float:
    try:
        return calendar.timegm(time.strptime(noticed, TIME))
    except ValueError:
        raise InputError(
            f"--noticed {noticed[:40]}", "a time in UTC: 2026-03-01T09:30:00Z"
        ) from None
