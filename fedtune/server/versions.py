"""Store the released adapters of a study without a last round, and the one that is in use.

    out/versions/index.json   the decision about every version, and the version in use (champion)
    out/versions/N/           version N, the adapter after round N, if it was ever released
    out/adapter               a link to the champion's folder

Guarantee: a version's files are on disk before the index names it, the index is on disk before the
link changes, and the link changes atomically. So out/adapter is always one complete released
version, also after a crash.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from fedtune.core.errors import InputError
from fedtune.core.files import locks, reading, writing
from fedtune.evidence.sign import INDEX, VERSIONS
from fedtune.report.change_plan import Group, Verdict
from fedtune.server.store import CheckpointError

FORMAT = "fedtune-versions-1"
LINK = "adapter"
Decision = Literal["first", "released", "kept back", "pinned", "not compared"]


@dataclass(frozen=True)
class Version:
    """One adapter and the decision about it.

    - number: the round that made it
    - at: when that round was scheduled (UTC)
    - decision: "first", "released" or "kept back"; "pinned" if it was not released because a person
      had pinned the champion; "not compared" if the plan allowed no comparison
    - metric: the name of the study's metric
    - value: this version's value of the metric on the public records
    - champion: the version that was in use when the decision was made
    - champion_value: the champion's value of the metric on the same records
    - p: the comparison's p-value, the probability of so large an advantage for a version that is no
      better
    - look: the number of this comparison, counted from 1 among the comparisons on the same public
      records
    - public: sha256 over name and content of the file of public records (`reading.fingerprint`); ""
      if not known
    - verdict: the result of the plan's tests (report.change_plan)
    - why: why the verdict is not "better"
    - groups: the changes of the metric in the plan's groups"""

    number: int
    at: str
    decision: Decision
    metric: str = ""
    value: float | None = None
    champion: int | None = None
    champion_value: float | None = None
    sure: float | None = None  # in place of p in versions that an earlier release of fedtune wrote
    p: float | None = None
    look: int | None = None
    public: str = ""
    verdict: Verdict | None = None
    why: str = ""
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A person's choice of the version in use.

    - after: the newest version at the time of the choice
    - version: the version that is in use from then on; None if the person ended a rollback, so that
      better versions are released again"""

    after: int
    version: int | None


@dataclass(frozen=True)
class Index:
    """The index of a run's versions, as out/versions/index.json holds it.

    - champion: the version in use
    - pinned: whether a person chose the champion, so that no other version replaces it
    - versions: every version with the decision about it, oldest first
    - choices: the choices that persons made, oldest first"""

    champion: int
    pinned: bool
    versions: tuple[Version, ...]
    choices: tuple[Choice, ...] = ()

    @property
    def judged(self) -> int:
        """The number of the newest version about which there is a decision."""
        return self.versions[-1].number

    @property
    def rollback_targets(self) -> list[int]:
        """The numbers of the versions that were ever released, which a rollback can choose."""
        return [v.number for v in self.versions if v.decision in ("first", "released")]


_INDEX = TypeAdapter(Index)


class Versions:
    """Stores the adapter versions of the run of a study without a last round. out: the run's
    folder. Several processes may use the folder at the same time; each change is atomic."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out / VERSIONS

    def index(self) -> Index | None:
        """Read the index; None if no version was ever released.

        Errors: CheckpointError if the index is damaged."""
        path, expected = self.folder / INDEX, "the file as it was written"
        if not os.path.lexists(path):
            return None
        todo = "restore it from a copy; the released adapters beside it are intact"
        document = reading.json_in(path, expected, todo, CheckpointError)
        try:
            if document.pop("format") != FORMAT:
                raise ValueError
            return _INDEX.validate_python({**document, "versions": tuple(document["versions"])})
        except (ValueError, TypeError, KeyError):
            raise CheckpointError(
                f"{path}: damaged, or written by another fedtune", expected, todo
            ) from None

    def at(self, number: int) -> Path:
        """Return the path of the folder of version `number`, which was released."""
        return self.folder / str(number)

    def begin(self, version: Version, save: Callable[[Path], None]) -> None:
        """Release `version` as the first version, unless a version was released before. In both
        cases make out/adapter a link to the champion, since a crash may have come after the index
        was written and before the link was. save: writes the version's adapter to a folder."""
        with self._alone():
            if (index := self.index()) is None:
                self._put(version.number, save)
                index = Index(version.number, False, (version,))
                self._write(index)
            self._settle(index)

    def add(self, version: Version, save: Callable[[Path], None]) -> Version | None:
        """Enter the decision about `version` in the index, and release the version if the decision
        is "released". While a champion is pinned, enter "pinned" in place of the decision.

        Returns the version as entered; None, with nothing changed, if the champion is no longer the
        one with which the version was compared. save: writes the version's adapter to a folder."""
        with self._alone():
            index = self.index()
            assert index is not None  # `begin` was called before any version is judged
            if index.champion != version.champion:
                return None
            if index.pinned:
                version = replace(version, decision="pinned")
            champion = index.champion
            if version.decision == "released":
                self._put(version.number, save)
                champion = version.number
            index = replace(index, champion=champion, versions=(*index.versions, version))
            self._write(index)
            self._settle(index)
            return version

    def roll_back(self, number: int) -> Index:
        """Make version `number` the champion, pin it until `unpin` is called, and return the new
        index.

        Errors: InputError if that version was never released."""
        with self._alone():
            index = self._require_index()
            if number not in index.rollback_targets:
                targets = ", ".join(map(str, index.rollback_targets))
                raise InputError(f"version {number} was never released", f"one of {targets}")
            choices = (*index.choices, Choice(index.judged, number))
            index = replace(index, champion=number, pinned=True, choices=choices)
            self._write(index)
            self._settle(index)
            return index

    def unpin(self) -> Index:
        """End a rollback, so that better versions are released again, and return the new index.
        Errors: InputError if there is no index."""
        with self._alone():
            index = self._require_index()
            choices = (*index.choices, Choice(index.judged, None))
            index = replace(index, pinned=False, choices=choices)
            self._write(index)
            return index

    # ------------------------------------------------------------------------------- helpers

    def _require_index(self) -> Index:
        if (index := self.index()) is None:
            raise InputError(f"{self.out}: no versions here", "a run of a study with a [schedule]")
        return index

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A context manager that holds the lock of the versions' folder while its block runs, since
        the coordinator and `fedtune versions` may run at the same time."""
        if not self.out.is_dir():
            self._require_index()
        self.folder.mkdir(exist_ok=True)
        with locks.hold(self.folder / "lock"):
            yield

    def _put(self, number: int, save: Callable[[Path], None]) -> None:
        """Write a version's adapter to a draft folder, flush it to disk, and rename it to the
        folder of version `number`. save: writes the adapter to a folder."""
        draft, place = self.folder / f"{number}.new", self.at(number)
        shutil.rmtree(draft, ignore_errors=True)
        save(draft)
        for path in draft.rglob("*"):
            if path.is_file():
                _sync(path)
        writing.sync_folder(draft)
        shutil.rmtree(place, ignore_errors=True)  # left by a crash; the index does not name it
        draft.rename(place)
        writing.sync_folder(self.folder)

    def _write(self, index: Index) -> None:
        document = {"format": FORMAT, **asdict(index)}
        writing.replace(self.folder / INDEX, json.dumps(document, indent=1).encode())

    def _settle(self, index: Index) -> None:
        """Make out/adapter a link to the champion's folder, if it is not one already."""
        link, target = self.out / LINK, Path(VERSIONS, str(index.champion))
        if link.is_symlink() and Path(os.readlink(link)) == target:
            return
        draft = self.out / f"{LINK}.new"
        draft.unlink(missing_ok=True)
        draft.symlink_to(target)
        os.replace(draft, link)
        writing.sync_folder(self.out)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
