"""Check the versions of a study that has no last round. Each version's verdict must follow from
the stored comparison, its decision from the verdict and from people's choices, and the version in
use from the decisions and choices.

    report.json                 holds the record of versions, signed with the run
    versions/index.json         holds a copy of this record, which the running study reads. The two
                                must be equal
    versions/looked.json        keyed digests of the records of each public file, which show which
                                files share records
    versions/look-N.json        the records' scores in the comparison of version N

Only the coordinator vouches that these scores are the models' own on the public records.
Errors: NotGenuine."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedtune.core.config import ScheduleTable, Study
from fedtune.core.errors import NotGenuine
from fedtune.core.files import reading
from fedtune.evidence.sign import INDEX, VERSIONS
from fedtune.evidence.signed_files import fail, signed_json
from fedtune.report.change_plan import Look, judge, look_left

FORMAT = "fedtune-looks-1"
LOOKED = "looked.json"
LARGE = 1 << 28  # largest size in bytes of the file of one comparison (a look)
FIRST, RELEASED, KEPT, PINNED, NOT_COMPARED = (
    "first", "released", "kept back", "pinned", "not compared",
)  # fmt: skip


def look_file(version: int) -> str:
    """Return the path, in the run's folder, of the file that stores a version's comparison.
    version: its number."""
    return f"{VERSIONS}/look-{version}.json"


def check_versions(
    run: Path, study: Study, report: dict[str, Any], files: Collection[str]
) -> dict[str, int]:
    """Check the versions of a study without a last round: compute every verdict again, apply all
    decisions and choices in order, and compare the result with the version that the report states
    to be in use. Return a dict from each verdict to how many versions have it; {} for a plan
    without [schedule], for which there is nothing to check.

    - run: the run's folder
    - study: the run's plan
    - report: the content of report.json
    - files: the files that the run's signature covers, by their paths in the folder

    Earlier releases, with a plan that has [schedule] `confidence`, stored no comparisons. The
    verdicts of their versions cannot be computed and are taken from the record.

    Errors: NotGenuine."""
    if study.schedule is None or study.evaluation is None:
        return {}
    said, path = report["continuous"], run / "report.json"
    record = said.get("record")
    if not isinstance(record, dict):
        if study.schedule.confidence is not None:
            return {}
        fail(path, "has no record of its versions", "every version with its verdict")
    index = run / VERSIONS / INDEX
    if index.exists():
        here = reading.json_in(index, "the versions as they were signed", kind=NotGenuine)
        if {name: value for name, value in here.items() if name != "format"} != record:
            fail(index, "says otherwise than the signed report", "the same versions")
    replay = _Replay(run, study, files)
    for version in record["versions"]:
        replay.add(version, record["choices"])
    replay.choose(record["choices"], math.inf)
    released = [v["number"] for v in record["versions"] if v["decision"] == RELEASED]
    for what, stated, follows in (
        ("the version in use", record["champion"], replay.champion),
        ("the version in use", said["version in use"], replay.champion),
        ("whether a person chose it", record["pinned"], replay.pinned),
        ("whether a person chose it", said["chosen by a person"], replay.pinned),
        ("the versions released", said["versions released"], released),
    ):
        if stated != follows:
            fail(path, f"{what} is {str(stated)[:64]}", f"{follows}, by the verdicts and choices")
    return replay.verdicts


class _Replay:
    """Goes through a study's versions, one after the other, to find which is in use at the end. It
    checks each version's verdict and decision, and applies the decisions and the choices of
    persons.

    - run: the run's folder
    - study: the run's plan, with [schedule] and [evaluation]
    - files: the files that the run's signature covers, by their paths in the folder"""

    def __init__(self, run: Path, study: Study, files: Collection[str]) -> None:
        assert study.schedule is not None and study.evaluation is not None
        self._run = run
        self._study = study
        self._signed = files
        self._table: ScheduleTable = study.schedule
        self._metric = study.evaluation.metric
        self.champion: int | None = None
        self.pinned, self.verdicts = False, dict[str, int]()
        self._numbers, self._released = list[int](), list[int]()
        self._looked, self._seen = list[str](), list[str]()
        self._chosen = 0
        known = f"{VERSIONS}/{LOOKED}"
        self._files, self._apart = dict[str, frozenset[str]](), frozenset[str]()
        if known in files:
            content = reading.json_in(run / known, "as it was signed", kind=NotGenuine)
            self._files = {name: frozenset(each) for name, each in content["files"].items()}
            self._apart = frozenset(content["apart"])

    def choose(self, choices: list[dict[str, Any]], until: float) -> None:
        """Apply the choices that persons made before version `until` was judged. choices: all
        choices by persons of a version to use, oldest first; until: the version's number, or
        infinity for all choices. Errors: NotGenuine if a version was chosen that was never
        released."""
        while self._chosen < len(choices) and choices[self._chosen]["after"] < until:
            choice = choices[self._chosen]
            if choice["version"] is not None:
                if choice["version"] not in self._released:
                    self._refuse_version(
                        choice["after"], "a version was chosen that was never released"
                    )
                self.champion = choice["version"]
            self.pinned = choice["version"] is not None
            self._chosen += 1

    def add(self, version: dict[str, Any], choices: list[dict[str, Any]]) -> None:
        """Check the verdict and the decision on one version, and apply them: `champion`, the
        version in use, may change. Before that, apply the choices that were made before this
        version was judged. Errors: NotGenuine.

        - version: the version's entry in the record
        - choices: all choices by persons of a version to use, oldest first"""
        number = int(version["number"])
        if self._numbers and number != self._numbers[-1] + 1:
            self._refuse_version(number, "a version before it is missing")
        self.choose(choices, number)
        self._numbers.append(number)
        if self.champion is None:
            if version["decision"] != FIRST:
                self._refuse_version(number, "its decision is not that of the first version", FIRST)
            self.champion = number
            self._released.append(number)
            return
        if version["champion"] != self.champion:
            self._refuse_version(number, "it was compared with another version", str(self.champion))
        verdict = self._verdict(number, version)
        expected = {"better": RELEASED, "not better": KEPT}.get(verdict, NOT_COMPARED)
        expected = PINNED if self.pinned else expected
        if version["decision"] != expected:
            self._refuse_version(number, f"its decision is {version['decision'][:24]!r}", expected)
        if version["decision"] == RELEASED:
            self._released.append(number)
            self.champion = number
        self.verdicts[verdict] = self.verdicts.get(verdict, 0) + 1

    def _verdict(self, number: int, version: dict[str, Any]) -> str:
        """Compute a version's verdict and check that the record states the same. Return it:
        "better", "not better" or "outside the plan". If an earlier release judged the version and
        stored no comparison, the verdict is taken from the decision, unchecked.

        number: the version's number; version: its entry in the record. Errors: NotGenuine."""
        public = version["public"]
        if version["sure"] is not None and self._table.confidence is not None:
            self._looked.append(public)  # judged by an earlier release, without a stored comparison
            return "better" if version["decision"] == RELEASED else "not better"
        self._seen.append(public)
        known = {name: self._files[name] for name in self._seen}
        taken, why = look_left(self._looked, known, self._apart, public, self._table)
        if why:
            self._require_equal(
                number, version, verdict="outside the plan", why=why, p=None, look=None
            )
            return "outside the plan"
        self._looked.append(public)
        content = self._content(number)
        about = {"plan": self._study.digest, "version": number, "champion": self.champion}
        about |= {"public": public, "look": taken + 1, "metric": self._metric}
        for name, value in about.items():
            if content[name] != value:
                self._refuse_version(number, f"its comparison has another {name}", str(value)[:64])
        judged = judge(
            Look(*(content[name] for name in ("metric", "before", "after", "groups"))), self._table
        )
        self._require_equal(
            number, version, verdict=judged.verdict, why=judged.why, p=judged.p, look=taken + 1,
            value=judged.after, champion_value=judged.before,
            groups=[asdict(group) for group in judged.groups],
        )  # fmt: skip
        return judged.verdict

    def _content(self, number: int) -> dict[str, Any]:
        name = look_file(number)
        if name not in self._signed:
            self._refuse_version(number, "no signed file stores its comparison", name)
        return signed_json(self._run / name, FORMAT, LARGE)[0]

    def _require_equal(self, number: int, version: dict[str, Any], **follows: Any) -> None:
        for name, value in follows.items():
            if not _same(version[name], value):
                self._refuse_version(
                    number, f"its {name} is {str(version[name])[:64]!r}", str(value)[:200]
                )

    def _refuse_version(self, number: int, happened: str, expected: str = "") -> None:
        follows = f"{expected}, by what the run holds" if expected else ""
        fail(self._run / "report.json", f"version {number}: {happened}", follows)


def _same(stated: Any, follows: Any) -> bool:
    """Return whether the value that a record states equals the value that follows from the run,
    where numbers may differ by the rounding of different machines. Lists and dicts are compared
    entry by entry."""
    if isinstance(follows, float) and isinstance(stated, int | float):
        return math.isclose(stated, follows, rel_tol=1e-6, abs_tol=1e-12)
    if isinstance(follows, list) and isinstance(stated, list):
        return len(stated) == len(follows) and all(map(_same, stated, follows))
    if isinstance(follows, dict) and isinstance(stated, dict):
        return {*stated} == {*follows} and all(_same(stated[k], follows[k]) for k in follows)
    return bool(stated == follows)
