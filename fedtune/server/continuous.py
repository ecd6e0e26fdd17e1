"""Schedule the rounds of a study without a last round, and decide which adapters to release.

A new adapter (the challenger) replaces the one in use (the champion) if it is better on the public
[evaluation] records by the test that [schedule] sets (report.change_plan). One file of records
allows schedule.looks comparisons. After these nothing is compared until the file is replaced by one
that shares no record with it. At most schedule.files files are used. looks.py stores the result of
each comparison.

The champion is measured again in each comparison, since the public file may have been replaced: a
champion that no longer fits newer records then measures worse. Training continues from the
newest adapter, released or not, so a later adapter may still replace the champion. All of this is
post-processing of noised sums, on public records, and costs no ε.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.core.config import format_duration
from fedtune.core.errors import DataError
from fedtune.evaluation.selection import taught_by
from fedtune.report.change_plan import judge, look_left
from fedtune.server import schedule
from fedtune.server.looks import Looked
from fedtune.server.parts import Dependencies, Measures
from fedtune.server.store import Progress
from fedtune.server.version_report import figures, in_use
from fedtune.server.versions import Index, Version, Versions

Emit = Callable[..., None]


class Continuous:
    """The schedule and versions of a continuous study.

    - out: the run's folder, in which the versions are stored
    - progress: the run's state, which other parts of the run change from round to round
    - parts: the functions with which the run computes, and its settings
    - event: called with an event's kind and, as named arguments, its data

    The attribute slot is the slot of the newest round that was started, whether or not the round
    succeeded; None before the first round."""

    def __init__(self, out: Path, progress: Progress, parts: Dependencies, event: Emit) -> None:
        assert progress.study.schedule is not None and progress.study.evaluation is not None
        self.table, self.evaluation = progress.study.schedule, progress.study.evaluation
        self.progress = progress
        self.parts = parts
        self.event = event
        self.versions = Versions(out)
        self.slot: int | None = progress.history[-1]["slot"] if progress.history else None
        self._evaluator: Measures | None = None
        self._public = ""
        self._looked = Looked(out)

    # ------------------------------------------------------------------------------- the clock

    def wait(self) -> None:
        """Sleep until the next round's slot begins, and set `slot` to the number of this slot."""
        slot = schedule.next_slot(self.table, self.slot, self.parts.settings.clock.now())
        at = schedule.format_utc(schedule.slot_start(self.table, slot))
        self.event("waiting", next=at, champion=self.champion, text=f"next round at {at}")
        schedule.wait(self.parts.settings.clock, schedule.slot_start(self.table, slot))
        self.slot = slot

    # --------------------------------------------------------------------------- the public set

    @property
    def evaluator(self) -> Measures:
        """The evaluator that measures adapters on the public [evaluation] records. If their file
        was replaced, the new records are read first. If the file cannot be read, the records that
        were read last are used. Errors: DataError if the file cannot be read and no records were
        read before."""
        public = self.parts.fingerprint(self.evaluation.path)
        if self._evaluator is None or public != self._public:
            try:
                self._evaluator = self.parts.evaluator(self.progress.study, self.progress.frozen)
                self._public = public
                contents = self.parts.contents(self.evaluation)
                self._looked.files[public] = self._looked.key_digests(contents)
            except DataError:
                if self._evaluator is None:
                    raise
        return self._evaluator

    # ---------------------------------------------------------------------------- the champion

    @property
    def champion(self) -> int:
        index = self.versions.index()
        return index.champion if index else 0

    def begin(self) -> None:
        """Release the study's first adapter, unless a version was released already. Then judge the
        newest adapter, if an interruption came before its decision."""
        self.versions.begin(Version(self.progress.round, self._at, "first"), self._save)
        self.judge()

    def judge(self) -> None:
        """Compare the newest adapter with the champion, and release it if it is better. Do nothing
        if there is a decision about it already."""
        progress = self.progress
        while (index := self.versions.index()) is not None and index.judged < progress.round:
            version = self._compare(index)
            if entered := self.versions.add(version, self._save):
                text = f"version {entered.number}: {entered.decision}"
                text += f": {entered.why}" if entered.why else ""
                promoted = entered.decision == "released"
                self.event("version", champion=self.champion, promoted=promoted, text=text)

    def _compare(self, index: Index) -> Version:
        """Compare the newest adapter with the champion on the present public records, and return
        the version with its decision. If the plan allows no further comparison on these records,
        nothing is compared, and the decision is "not compared"."""
        evaluator, progress = self.evaluator, self.progress
        self._note()
        version = Version(
            progress.round, self._at, "not compared", champion=index.champion, public=self._public
        )
        seen = {v.public for v in index.versions if v.public} | {self._public}
        taken, why = look_left(
            [v.public for v in index.versions if v.p is not None or v.sure is not None],
            {public: self._looked.files.get(public, frozenset()) for public in seen},
            self._looked.apart or (),
            self._public,
            self.table,
        )
        if why:
            return replace(version, verdict="outside the plan", why=why)
        in_use = self.parts.load(self.versions.at(index.champion))
        champion = {name: in_use[name] for name in progress.adapter}
        look = evaluator.look(champion, progress.adapter)
        about = {"plan": progress.study.digest, "version": version.number, "look": taken + 1}
        about |= {"champion": index.champion, "public": self._public}
        self._looked.keep(version.number, look, about)
        judged = judge(look, self.table)
        return replace(
            version,
            decision="released" if judged.verdict == "better" else "kept back",
            metric=look.metric,
            value=judged.after,
            champion_value=judged.before,
            p=judged.p,
            look=taken + 1,
            verdict=judged.verdict,
            why=judged.why,
            groups=judged.groups,
        )

    def _note(self) -> None:
        """Store the keyed digests of the public records on which versions are compared, and of the
        public records that trained the model."""
        if self._looked.apart is None:
            public = taught_by(self.progress.study)
            taught = self.parts.contents(public) if public else ()
            self._looked.apart = self._looked.key_digests(taught)
        self._looked.note()

    def report(self) -> dict[str, Any]:
        """Return the rows of the report's table "continuous", which is about the schedule and the
        versions: name -> value."""
        index = self.versions.index()
        assert index is not None
        return {
            "round every": f"{format_duration(self.table.every)}, from {self.table.start}",
            **in_use(index),
            "released where p is at most": self.table.threshold,
            "chance of a false release": f"at most {self.table.alpha:g} for each public file, of "
            f"which there are at most {self.table.files}",
        }

    def quality(self) -> dict[str, Any]:
        """Measure the base, the public start (if there is one) and the champion on the present
        public records. Return the figures as the report's "quality"."""
        evaluator, champion = self.evaluator, self.champion
        arrays = self.parts.load(self.versions.at(champion))
        adapter = {name: arrays[name] for name in self.progress.adapter}
        start = self.progress.origin or None
        return {
            "before": evaluator.follow(None),
            **({"start": evaluator.follow(start)} if start else {}),
            "after": evaluator.follow(adapter),
            "gain": evaluator.gain(adapter, start),
            **figures(champion, self._public),
        }

    def _save(self, folder: Path) -> None:
        progress = self.progress
        self.parts.save(progress.study, progress.adapter, progress.frozen, folder)

    @property
    def _at(self) -> str:
        begun = None if self.slot is None else schedule.slot_start(self.table, self.slot)
        return "" if begun is None else schedule.format_utc(begun)
