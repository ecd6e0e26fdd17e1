"""How often a version that is no better replaces the one in use: at most alpha for each public
file, over all looks at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from fedtune.evaluation import metrics
from fedtune.evaluation.metrics import Scores, chance_of, least_gain
from fedtune.server import looks
from fedtune.server.continuous import Continuous
from fedtune.server.versions import Index, Version, Versions
from tests.continuous.fakes import continuous, parts

RECORDS, LOOKS = 300, 16


def scores(right: np.ndarray) -> Scores:
    """Scores of a classifier that is right about these records."""
    n, gold = len(right), np.zeros(len(right), int)
    return Scores(np.ones(n), np.ones(n), right, np.where(right, 0, 1), gold, np.zeros(n))


class Drawn:
    """An evaluator to which a version is a draw of which records it gets right. gains: how much
    surer each version is of the records about which versions differ."""

    def __init__(self, seed: int, gains: Callable[[int], float] = lambda _: 0.0) -> None:
        self.random, self.gains = np.random.default_rng(seed), gains
        self.drawn: dict[int, Scores] = {}

    def of(self, adapter: dict[str, np.ndarray]) -> Scores:
        number = int(adapter["number"])
        if number not in self.drawn:
            sure = np.repeat([0.5, 1.0], [RECORDS * 2 // 5, RECORDS - RECORDS * 2 // 5])
            sure[: RECORDS * 2 // 5] += self.gains(number)
            self.drawn[number] = scores(self.random.random(RECORDS) < sure)
        return self.drawn[number]

    def compare(self, champion: Any, challenger: Any) -> Any:
        before, after = self.of(champion), self.of(challenger)
        pair = before.value("accuracy"), after.value("accuracy")
        return SimpleNamespace(
            before=pair[0], after=pair[1], p=chance_of(before, after, "accuracy")
        )


class Life:
    """A continuous study's versions, one after another, without training."""

    def __init__(self, out: Path, evaluator: Any, **schedule: Any) -> None:
        out.mkdir(parents=True)
        study = continuous().changed(schedule=schedule)
        self.public, self.records = "first", frozenset({"a"})
        self.progress: Any = SimpleNamespace(
            study=study, adapter={}, frozen={}, history=[], round=0
        )
        made = parts(
            0,
            evaluator=lambda study, frozen: evaluator,
            load=lambda folder: {"number": np.array(int((folder / "number").read_text()))},
            save=self.save,
            fingerprint=lambda path: self.public,
            contents=lambda table: self.records,
        )
        self.versions = Versions(out)
        self.judging = Continuous(out, self.progress, made, lambda kind, **data: None)
        self.judging.begin()

    def save(self, study: Any, adapter: Any, frozen: Any, folder: Path) -> None:
        folder.mkdir()
        (folder / "number").write_text(str(int(self.progress.round)))

    def go_on(self, versions: int) -> list[Version]:
        for _ in range(versions):
            self.progress.round += 1
            self.progress.adapter = {"number": np.array(self.progress.round)}
            self.judging.judge()
        index = self.versions.index()
        assert index is not None
        return list(index.versions[-versions:])


def share_that_releases(folder: Path, studies: int, gains: Callable[[int], float]) -> int:
    """How many of so many studies release a version in sixteen looks."""
    return sum(
        any(
            version.decision == "released"
            for version in Life(folder / str(seed), Drawn(seed, gains), looks=LOOKS).go_on(LOOKS)
        )
        for seed in range(studies)
    )


@pytest.fixture(autouse=True)
def fewer_swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "SWAPS", 2_000)


@pytest.mark.parametrize("studies", [60, pytest.param(2_000, marks=pytest.mark.long)])
def test_without_a_true_gain_hardly_any_study_releases_a_version(
    tmp_path: Path, studies: int
) -> None:
    """At most one in twenty does; more than this bound is seen once in 10⁵ runs. The twin below
    would be seen always."""
    most = int(binom.isf(1e-5, studies, 0.05))
    assert share_that_releases(tmp_path, studies, lambda _: 0.0) <= most


def test_the_rule_of_before_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better in 90 % of resamples, at each look: about p ≤ 0.1. More than half of the studies
    release a version that is no better."""
    monkeypatch.setattr("fedtune.config.study.ScheduleTable.threshold", 0.1)
    studies = 60
    assert share_that_releases(tmp_path, studies, lambda _: 0.0) > binom.isf(1e-5, studies, 0.05)


@pytest.mark.parametrize("studies", [60, pytest.param(1_000, marks=pytest.mark.long)])
def test_the_gain_that_is_called_resolvable_is_found_four_times_in_five(
    tmp_path: Path, studies: int
) -> None:
    """By the first look. Versions differ about a fifth of the records, as the estimate has it."""
    gain = least_gain(RECORDS, 0.05 / LOOKS)
    shift = gain / 0.4  # of the two fifths of the records about which versions may differ
    found = sum(
        Life(tmp_path / str(seed), Drawn(seed, lambda n: shift * (n > 0)), looks=LOOKS)
        .go_on(1)[0]
        .decision
        == "released"
        for seed in range(studies)
    )
    assert found >= binom.ppf(1e-5, studies, 0.8)


def test_a_look_that_the_plan_does_not_have_is_not_taken(tmp_path: Path) -> None:
    """Until the file is replaced by one that shares no record with it."""
    life = Life(tmp_path / "run", Drawn(0), looks=3)
    decisions = [version.decision for version in life.go_on(5)]
    assert decisions[3:] == ["not compared"] * 2 and "not compared" not in decisions[:3]
    life.public, life.records = "second", frozenset({"a", "b"})  # a record more
    assert life.go_on(1)[0].decision == "not compared"
    life.public, life.records = "third", frozenset({"b"})  # linked by the second
    assert life.go_on(1)[0].decision == "not compared"
    life.public, life.records = "fourth", frozenset({"c"})
    versions = life.go_on(4)
    assert [version.look for version in versions] == [1, 2, 3, None]
    again = Continuous(life.versions.out, life.progress, life.judging.parts, lambda *_, **__: None)
    assert again._files == life.judging._files  # a restart remembers


def test_looks_are_counted_over_files_that_share_records() -> None:
    def of(public: str, p: float | None) -> Version:
        return Version(1, "", "kept back", p=p, public=public)

    before = Version(1, "", "released", sure=0.97, public="e")  # by a release without looks
    index = Index(1, False, (of("a", 0.2), of("b", 0.3), of("c", None), of("d", 0.5), before))
    files = {name: frozenset(text) for name, text in {"a": "12", "b": "23", "d": "9"}.items()}
    assert looks.count_looks(index, files, "a") == looks.count_looks(index, files, "b") == 2
    assert looks.count_looks(index, files | {"c": frozenset("3")}, "c") == 2
    assert looks.count_looks(index, files, "d") == 1
    assert looks.count_looks(index, files, "unseen") == 0
    assert looks.count_looks(index, files, "e") == 1


METRICS = ["loss", "perplexity", "exact_match", "preference", "accuracy"]


@pytest.mark.parametrize("metric", METRICS)
def test_sums_over_records_are_the_exchanges_themselves(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast way of metrics that are sums gives what exchanging scores gives, within chance."""
    monkeypatch.setattr(metrics, "SWAPS", 4_000)
    random = np.random.default_rng(3)
    one, other = (
        Scores(
            random.gamma(2, 1, 80) - better,
            tokens=np.full(80, 7.0),
            exact=random.random(80) < 0.5 + better,
            chosen=(random.random(80) < 0.5 - better).astype(int),
            gold=np.zeros(80, int),
            margin=random.normal(better, 1, 80),
        )
        for better in (0.0, 0.15)
    )
    fast = chance_of(one, other, metric)
    monkeypatch.setattr(metrics, "_parts", lambda *_: None)
    assert chance_of(one, other, metric) == pytest.approx(fast, abs=0.05)


def test_f1_has_a_chance_too_and_a_tie_is_not_better() -> None:
    random = np.random.default_rng(0)
    right = random.random(60) < 0.6
    worse, better = scores(right & (random.random(60) < 0.4)), scores(right)
    assert chance_of(worse, better, "f1") < 0.01 < chance_of(better, worse, "f1") == 1.0
    assert chance_of(better, better, "f1") == 1.0
