"""What a study without a last round does besides its rounds: waits, judges, releases.

The rule: a new adapter (the challenger) is released in place of the one in use (the champion) where
it is better on the public [evaluation] records in at least schedule.confidence of 1,000 resamples
of those records, both measured on the same ones (a paired bootstrap). The champion is measured
anew each time: where the public file was replaced, drift shows as its fall on the new one.
Training goes on from the newest adapter, released or not: what is kept back is not lost, only not
in use, and once it has become better than the champion it is released. All of it is post-processing
of noised sums, on public records: no ε.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.config import format_duration
from fedtune.errors import DataError
from fedtune.server import schedule
from fedtune.server.parts import Dependencies, Measures
from fedtune.server.store import Progress
from fedtune.server.versions import Version, Versions

Event = Callable[..., None]


class Continuous:
    """slot: of the last round that ran or was tried."""

    def __init__(self, out: Path, progress: Progress, parts: Dependencies, event: Event) -> None:
        assert progress.study.schedule is not None and progress.study.evaluation is not None
        self.table, self.evaluation = progress.study.schedule, progress.study.evaluation
        self.progress, self.parts, self.event = progress, parts, event
        self.versions = Versions(out)
        self.slot: int | None = progress.history[-1]["slot"] if progress.history else None
        self._evaluator: Measures | None = None
        self._public = ""

    # ------------------------------------------------------------------------------- the clock

    def wait(self) -> None:
        """Sleep until the next round's time; `slot` is then its own."""
        slot = schedule.next_slot(self.table, self.slot, self.parts.clock.now())
        at = schedule.shown(schedule.begins(self.table, slot))
        self.event("waiting", next=at, champion=self.champion, text=f"next round at {at}")
        schedule.wait(self.parts.clock, schedule.begins(self.table, slot))
        self.slot = slot

    # --------------------------------------------------------------------------- the public set

    @property
    def evaluator(self) -> Measures:
        """Over the public records as they are now; as they last were, where they cannot be read."""
        public = self.parts.fingerprint(self.evaluation.path)
        if self._evaluator is None or public != self._public:
            try:
                self._evaluator = self.parts.evaluator(self.progress.study, self.progress.frozen)
                self._public = public
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
        """Release what the study starts from; after a crash, judge what was not."""
        self.versions.begin(Version(self.progress.round, self._at, "first"), self._save)
        self.judge()

    def judge(self) -> None:
        """Decide about the newest adapter, once."""
        progress = self.progress
        while (index := self.versions.index()) is not None and index.judged < progress.round:
            evaluator = self.evaluator
            in_use = self.parts.load(self.versions.at(index.champion))
            champion = {name: in_use[name] for name in progress.adapter}
            found = evaluator.compare(champion, progress.adapter)
            better = found.sure >= self.table.confidence
            version = Version(
                number=progress.round,
                at=self._at,
                decision="released" if better else "kept back",
                metric=self.evaluation.metric,
                value=found.after,
                champion=index.champion,
                champion_value=found.before,
                sure=found.sure,
                public=self._public,
            )
            if done := self.versions.add(version, self._save):
                said = f"version {done.number}: {done.decision}"
                promoted = done.decision == "released"
                self.event("version", champion=self.champion, promoted=promoted, text=said)

    def body(self) -> dict[str, Any]:
        """What the report says of it."""
        index = self.versions.index()
        assert index is not None
        released = [v.number for v in index.versions if v.decision == "released"]
        return {
            "round every": f"{format_duration(self.table.every)}, from {self.table.start}",
            "version in use": index.champion,
            "chosen by a person": index.pinned,
            "versions released": released,
            "versions kept back": index.judged - len(released),
            "released where surer than": self.table.confidence,
        }

    def after(self) -> dict[str, float]:
        """The metric of the adapter in use, as last measured."""
        index = self.versions.index()
        last = index.versions[-1] if index else None
        if last is None or index is None:
            return {}
        value = last.value if last.number == index.champion else last.champion_value
        return {} if value is None else {last.metric: value}

    def _save(self, folder: Path) -> None:
        progress = self.progress
        self.parts.save(progress.study, progress.adapter, progress.frozen, folder)

    @property
    def _at(self) -> str:
        begun = None if self.slot is None else schedule.begins(self.table, self.slot)
        return "" if begun is None else schedule.shown(begun)
