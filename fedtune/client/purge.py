"""What a site keeps of its studies beside the ledger, and how it is deleted after them.

Deleted: what KINDS lists. Never: what KEPT lists, which the ledger, the guarantee and this site's
enrolment need; nor anything that fedtune does not know, which is listed for a person to look at.
Guarantee: the ledger and what it charges are as before. An update that was deleted cannot be sent
again: who asks for its round again has it trained, and paid for, again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from fedtune.config import Site, study_from_json
from fedtune.config.records import RECORDS
from fedtune.errors import ConfigError, FedtuneError, InfrastructureError, InputError
from fedtune.files.writing import sync_folder
from fedtune.flower.processes import alone
from fedtune.ledger.files import DATABASE, OUTBOX, outbox_prefix, traces
from fedtune.ledger.ledger import Ledger
from fedtune.observe.status import LOCK

KINDS = {  # what people call it -> patterns of paths in the state folder; "*" goes into folders too
    "updates that were released": (f"{OUTBOX}/*.bin",),
    "plans that waited for a signature": ("plans/*.json",),
    "logs": ("log.jsonl", "log.jsonl.1", "rank-*.log"),
    "status": ("status.json",),
    "what Flower's processes left": ("flower/*", "ranks/*"),
    "drafts of a process that was killed": ("*.new",),
}
OF_A_STUDY = ("updates that were released", "plans that waited for a signature")
KEPT = (
    "ledger.*",  # entries, anchor, receipts, and what a restore put aside
    *("site.key", "salt", "steps.jsonl"),  # steps.jsonl: a restore charges by it
    *("keys/*", "keys.old-*"),  # the site's way into its consortium
    *(LOCK, "flower/lock"),
    *("site.toml", RECORDS),  # of a site that was made in memory
)
DRAFT = re.compile(r"\.(\d+)\.new")


@dataclass
class Listing:
    """What is in a state folder. found: the files of each kind; unknown: what fedtune did not
    write, a ledger's backup included; studies: digest -> name, where one was chosen."""

    state: Path
    found: dict[str, list[Path]] = field(default_factory=dict)
    unknown: list[Path] = field(default_factory=list)
    studies: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        return [path for paths in self.found.values() for path in paths]


def listing(site: Site, study: str | None = None) -> Listing:
    """What `purge` would delete: of every study, or of those whose digest or name is `study`.

    Errors: ConfigError where there is no state folder; InputError where no study is called so;
    LedgerError."""
    state = site.site.state
    if not state.is_dir():
        raise ConfigError(f"{state}: no such folder", todo="nothing was kept here as yet")
    found = Listing(state)
    for path in _walk(state):
        kind = _kind(path.relative_to(state).as_posix())
        if path.is_symlink() or kind is None:
            found.unknown.append(path)
        elif kind and not _being_written(path):
            found.found.setdefault(kind, []).append(path)
    if study is not None:
        found.studies = _studies(site, found.found.get(OF_A_STUDY[1], []), study)
        found.unknown = []
        own = {kind: _of(found.found.get(kind, []), found.studies) for kind in OF_A_STUDY}
        found.found = {kind: paths for kind, paths in own.items() if paths}
    return found


def purge(found: Listing) -> None:
    """Delete what was listed, and the folders that it leaves empty.

    Errors: InfrastructureError where a client runs on this state, or the disk refuses."""
    with alone(found.state / "flower", "fedtune client"):
        try:
            for path in found.files:
                path.unlink(missing_ok=True)
            for folder in sorted({path.parent for path in found.files}, reverse=True):
                _remove_empty(folder, found.state)
            sync_folder(found.state)
        except OSError as error:
            raise InfrastructureError(
                f"{error.filename}: cannot be deleted ({error.strerror})",
                todo="fix the permissions and run it again",
            ) from None
    if traces(found.state):
        Ledger(found.state).verify()


# ---------------------------------------------------------------------------------- one file


def _kind(name: str) -> str | None:
    """What a file is; "" for what is kept, None for what is not known."""
    if not DRAFT.search(name) and any(fnmatchcase(name, pattern) for pattern in KEPT):
        return ""
    for kind, patterns in KINDS.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return kind
    return None


def _walk(state: Path) -> Iterator[Path]:
    """Every file; of a folder with a ledger in it, a backup, its name alone."""
    for place, folders, files in os.walk(state):
        here = Path(place)
        if here != state and DATABASE in files:
            folders.clear()
            yield here
            continue
        links = [name for name in folders if (here / name).is_symlink()]
        yield from (here / name for name in sorted([*files, *links]))


def _being_written(path: Path) -> bool:
    """Whether it is the draft of a process that lives."""
    draft = DRAFT.search(path.name)
    try:
        if draft:
            os.kill(int(draft[1]), 0)
        return draft is not None
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True


def _remove_empty(folder: Path, top: Path) -> None:
    while folder != top and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


# ---------------------------------------------------------------------------------- one study


def _studies(site: Site, plans: list[Path], asked: str) -> dict[str, str]:
    """Digest and name of the studies that `asked` may mean. Errors: InputError where none is."""
    state = site.site.state
    spent = Ledger(state).spending() if traces(state) else []
    known = {each.charge.study: each.charge.name for each in spent}
    for path in plans:
        try:
            plan = study_from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, FedtuneError):
            continue
        known[plan.digest] = plan.study.name
    digest = asked.removeprefix("sha256:")
    found = {
        each: name
        for each, name in known.items()
        if asked in (name, name.removesuffix(" (evaluation)"))
        or (len(digest) >= 8 and each.removeprefix("sha256:").startswith(digest))
    }
    if not found:
        raise InputError(
            f"{state}: no study {asked!r} here",
            "its name, or at least 8 digits of its digest",
            "`fedtune ledger SITE` lists them",
        )
    return found


def _of(paths: list[Path], studies: dict[str, str]) -> list[Path]:
    """Those that carry one of the digests in their names."""
    starts = [outbox_prefix(digest) for digest in studies]
    return [path for path in paths if path.name.startswith(tuple(starts))]
