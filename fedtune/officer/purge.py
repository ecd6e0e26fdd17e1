"""Delete the files that a site's studies left beside the ledger.

Files of KINDS are deleted. Files of NEVER_DELETED stay: the ledger, the guarantee and the site's
enrolment need them. Files that fedtune did not write stay too, and are listed so that a person can
decide about them.
Guarantee: the ledger and its charges are unchanged. A deleted update cannot be sent again: if its
round is ordered again, it is trained and charged again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from fedtune.core.config import Site, study_from_json
from fedtune.core.config.checked import CHECKED
from fedtune.core.config.records import RECORDS
from fedtune.core.config.state_files import ACCEPTANCE, FIGURES, LOSSES, PAGE, RECORD
from fedtune.core.errors import ConfigError, FedtuneError, InfrastructureError, InputError
from fedtune.core.files import reading
from fedtune.core.files.room import ORDERS, ROOM
from fedtune.core.files.writing import DRAFT, is_abandoned, sync_folder
from fedtune.core.ledger.adopted import ADOPTED
from fedtune.core.ledger.audit_log import AuditLog
from fedtune.core.ledger.entries import owner_of
from fedtune.core.ledger.files import ASKED, DATABASE, OUTBOX, RUNS, outbox_prefix
from fedtune.core.processes import alone
from fedtune.core.secagg.draw import FOLDER as DRAWS
from fedtune.core.vault.budget import QUERIES_NAME
from fedtune.core.vault.budget_refusal import PLACES
from fedtune.core.vault.kept_plans import FOLDER as KEPT_PLANS
from fedtune.core.vault.studies import FOLDER as STUDIES
from fedtune.core.vault.studies import under_way
from fedtune.evidence.personal import FOLDER as PERSONAL
from fedtune.evidence.personal import SUFFIX
from fedtune.homes.opening import find_ledger
from fedtune.observe.status import LOCK
from fedtune.officer.freeze import check_not_frozen
from fedtune.officer.withdraw import RECEIPTS

RELEASED = "updates that were released"
ASKED_DRAWS = "draws that wait to be let go"
KINDS = {  # name for people -> patterns of paths in the state folder; "*" matches subfolders too
    "personal models": (f"{PERSONAL}/*{SUFFIX}",),
    RELEASED: (f"{OUTBOX}/*.bin",),
    "draws that an earlier release kept, with their keys": (f"{DRAWS}/*.bin",),
    ASKED_DRAWS: (f"{ASKED}/*.json",),
    "notes of studies under way": (f"{STUDIES}/*.json", f"{STUDIES}/*.ended"),
    "plans as they were asked": (f"{KEPT_PLANS}/*.request",),
    "plans that waited for a signature": ("plans/*.json",),
    "logs": ("log.jsonl", "log.jsonl.1", "rank-*.log", "vault.log", "vault-run.log"),
    "status": ("status.json",),
    "counts of records": ("counts.json",),
    "settings that were checked at the last start": (CHECKED,),
    "training losses by round": (LOSSES,),
    "what the data sheet attested": ("sheet.json",),
    "pages and figures of acceptances": (
        f"{ACCEPTANCE}/*/{FIGURES}",
        f"{ACCEPTANCE}/*/{PAGE}",
    ),
    "where runs on this machine lie": (PLACES,),
    "ledgers of runs of declared data": (f"{RUNS}/*",),
    "room for the ledger": (ROOM, ORDERS),
    "what Flower's processes left": ("flower/*", "ranks/*"),
    "drafts of a process that was killed": ("*.new",),
}
OF_A_STUDY = tuple(KINDS)[:7]
NEVER_DELETED = (
    "ledger.*",  # entries, anchor, receipts, and what a restore put aside
    *("site.key", "salt", "steps.jsonl"),  # from steps.jsonl a restore enters charges again
    ADOPTED,  # by which receipts of the ledger that a hospital's ledger adopted are recognised
    f"{RECEIPTS}/*",  # what patients were told of their withdrawals
    f"{ACCEPTANCE}/*/{RECORD}",  # what was decided about a model: signed, and without a row
    *("keys/*", "keys.old-*"),  # the site's way into its consortium
    *("audit*.jsonl", "audit.lock"),
    *(LOCK, "flower/lock", "ranks/lock"),
    *("site.toml", RECORDS),  # of a site that was made in memory
)


@dataclass
class Listing:
    """A state folder's files and, for a membership, the files of its studies in the hospital's
    home.

    - home: the folder of the ledger
    - deletable: kind -> the files of this kind, which may be deleted
    - unknown: files that fedtune did not write, and backups of ledgers
    - studies: digest -> name, if a study was chosen"""

    state: Path
    home: Path
    deletable: dict[str, list[Path]] = field(default_factory=dict)
    unknown: list[Path] = field(default_factory=list)
    studies: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        return [path for paths in self.deletable.values() for path in paths]


def listing(site: Site, study: str | None = None) -> Listing:
    """List the files that `purge` would delete. study: a study's name, its digest, or at least the
    first 8 digits of the digest; only the files of studies with this name or digest are listed.
    None lists the files of all studies, and files that belong to no study.

    Errors: ConfigError if there is no state folder; InputError if no study has that digest or name;
    LedgerError."""
    state = site.site.state
    if not state.is_dir():
        raise ConfigError(f"{state}: no such folder, so nothing is kept here yet")
    contents = Listing(state, site.home)
    for path in _walk(state):
        kind = _kind(path.relative_to(state).as_posix())
        if path.is_symlink() or kind is None:
            contents.unknown.append(path)
        elif kind and (is_abandoned(path) or not DRAFT.search(path.name)):
            contents.deletable.setdefault(kind, []).append(path)
    if site.hospital:
        _list_at_hospital(site, contents)
    if study is not None:
        contents.studies = _studies(site, contents.deletable.get(OF_A_STUDY[-1], []), study)
        contents.unknown = []
        files = contents.deletable
        of_study = {kind: _of(files.get(kind, []), contents.studies) for kind in OF_A_STUDY}
        contents.deletable = {kind: paths for kind, paths in of_study.items() if paths}
    return contents


def purge(contents: Listing) -> None:
    """Delete the files of a listing that `fedtune.purgeable` returned (`contents`), and the folders
    that become empty. This is safe even if the site's courier has removed the client's lock file,
    or has replaced a folder by a link.

    Errors: InfrastructureError if a client runs on this state, or a file cannot be deleted; Refused
    if the ledger is frozen, or LedgerError, before anything is deleted."""
    with (
        alone(contents.state / "flower", "fedtune client"),
        alone(contents.state / "ranks", "the vault of a client"),
    ):
        check_not_frozen(contents.home, "deleted")
        # Raises if the ledger is damaged: a restore of it may need the files.
        if book := find_ledger(contents.home):
            AuditLog(contents.home, book.key).add("purge", files=len(contents.files))
        try:
            for path in contents.files:
                in_state = path.is_relative_to(contents.state)
                _unlink(path, contents.state if in_state else contents.home)
            for folder in sorted({path.parent for path in contents.files}, reverse=True):
                if folder.is_relative_to(contents.state):
                    _remove_empty(folder, contents.state)
            sync_folder(contents.state)
        except OSError as error:
            raise InfrastructureError(
                f"{error.filename}: cannot be deleted ({error.strerror})",
                todo="fix the permissions, then run the command again",
            ) from None
    if book := find_ledger(contents.home):
        book.verify()


def _list_at_hospital(site: Site, contents: Listing) -> None:
    """Add to `contents` the files that the studies of a membership left in the hospital's home,
    beside the ledger: released updates, and notes of draws that wait for a person. Files of other
    memberships, which may run the same plan, are not added: if an update of theirs were deleted,
    its round would have to be paid again. site: the membership's site."""
    if (book := find_ledger(site.home)) is None:
        return
    own = site.policy.own_memberships
    mine, others = dict[str, str](), set[Path]()
    for spent in book.spending():
        slot = spent.charge.study, spent.charge.round, spent.adapter
        if spent.charge.membership in own:
            mine[spent.charge.study] = spent.charge.name
        if owner_of(slot) not in own:
            others.add(book.path_of(slot))
    released = [path for path in _of(_find(site.home, RELEASED), mine) if path not in others]
    asked = [path for path in _find(site.home, ASKED_DRAWS) if _owner_of_draw(path) in own]
    for kind, paths in ((RELEASED, released), (ASKED_DRAWS, asked)):
        if paths:
            contents.deletable.setdefault(kind, []).extend(paths)


def _find(folder: Path, kind: str) -> list[Path]:
    return sorted(path for pattern in KINDS[kind] for path in folder.glob(pattern))


def _owner_of_draw(path: Path) -> str | None:
    """Return the name of the membership that is to make a draw of shared noise; "" if it is a site
    with a ledger of its own, and None if the note cannot be read. path: the note, which says that
    this draw waits for a person's approval."""
    try:
        return owner_of(("", 0, str(reading.json_in(path, "a draw that waits")["adapter"])))
    except (FedtuneError, KeyError, TypeError):
        return None


# ---------------------------------------------------------------------------------- one file


def _kind(name: str) -> str | None:
    """Return a file's kind, by its name: a key of KINDS if the file may be deleted, "" if it is
    never deleted, and None if fedtune did not write it."""
    if not DRAFT.search(name) and any(fnmatchcase(name, pattern) for pattern in NEVER_DELETED):
        return ""
    for kind, patterns in KINDS.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return kind
    return None


def _walk(state: Path) -> Iterator[Path]:
    """Yield the files of a state folder. A folder in it that holds a ledger is a backup: it is
    yielded itself, in place of its files. The folders of runs of declared data, which hold the
    run's ledger, are no backups."""
    for root, folders, files in os.walk(state):
        folder = Path(root)
        of_run = folder.parent == state / RUNS
        if folder != state and DATABASE in files and not of_run:
            folders.clear()
            yield folder
            continue
        links = [name for name in folders if (folder / name).is_symlink()]
        yield from (folder / name for name in sorted([*files, *links]))


def _unlink(path: Path, top: Path) -> None:
    """Delete a file below `top` without following a link. A missing file is no error. Errors:
    OSError."""
    folder = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in path.relative_to(top).parent.parts:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        os.unlink(path.name, dir_fd=folder)
    except FileNotFoundError:
        pass
    finally:
        os.close(folder)


def _remove_empty(folder: Path, top: Path) -> None:
    while folder != top and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


# ---------------------------------------------------------------------------------- one study


def _studies(site: Site, plans: list[Path], name_or_digest: str) -> dict[str, str]:
    """Return digest -> name of the studies that `name_or_digest` means: a study's name, its digest,
    or at least the first 8 digits of the digest. Studies are looked for among those under way, in
    the ledger and in `plans`, which are files of stored plans. Errors: InputError if no study
    matches."""
    state, home = site.site.state, site.home
    book = find_ledger(home)
    spent = book.spending() if book else []
    names = under_way(state) | {entry.charge.study: entry.charge.name for entry in spent}
    for path in plans:
        try:
            plan = study_from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, FedtuneError):
            continue
        names[plan.digest] = plan.study.name
    digest = name_or_digest.removeprefix("sha256:")
    matches = {
        study: name
        for study, name in names.items()
        if name_or_digest in (name, name.removesuffix(QUERIES_NAME))
        or (len(digest) >= 8 and study.removeprefix("sha256:").startswith(digest))
    }
    if not matches:
        raise InputError(
            f"{state}: no study {name_or_digest!r} here",
            "its name, or at least 8 digits of its digest",
            "`fedtune ledger SITE` lists them",
        )
    return matches


def _of(paths: list[Path], studies: dict[str, str]) -> list[Path]:
    """Select, of `paths`, the files that belong to these studies: their names begin with the start
    of a study's digest. studies: digest -> name."""
    starts = [outbox_prefix(digest) for digest in studies]
    return [path for path in paths if path.name.startswith(tuple(starts))]
