"""How often a version that should not replace the one in use does: at most alpha for each public
file, over all looks at it; and that what a plan calls resolvable is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy.stats import binom

from fedtune.core.config import ScheduleTable
from fedtune.report import paired
from fedtune.report.change_plan import Look, judge, look_left
from fedtune.report.paired import chance_above, chance_of, least_gain
from fedtune.report.scores import Scores
from fedtune.server.continuous import Continuous
from fedtune.server.versions import Version, Versions
from tests.continuous.fakes import continuous, parts

RECORDS, LOOKS = 300, 16
DIFFER = RECORDS * 2 // 5  # records about which versions may differ; a fifth of all do


def scores(right: np.ndarray) -> Scores:
    """Scores of a classifier that is right about these records."""
    n, gold = len(right), np.zeros(len(right), int)
    return Scores(np.ones(n), np.ones(n), right, np.where(right, 0, 1), gold, np.zeros(n))


class Drawn:
    """An evaluator to which a version is a draw of which records it gets right. gains: how much
    surer each version is of the records about which versions differ; of two wards, of which the
    smaller has a third of the records."""

    WARDS: ClassVar = {"ward": np.where(np.arange(RECORDS) % 3, "surgery", "icu").tolist()}

    def __init__(
        self,
        seed: int,
        gains: Callable[[int], float | np.ndarray] = lambda _: 0.0,
        groups: bool = False,
    ) -> None:
        self.random, self.gains = np.random.default_rng(seed), gains
        self.groups = self.WARDS if groups else {}
        self.drawn: dict[int, Scores] = {}

    def of(self, adapter: dict[str, np.ndarray]) -> Scores:
        number = int(adapter["number"])
        if number not in self.drawn:
            sure = np.repeat([0.5, 1.0], [DIFFER, RECORDS - DIFFER])
            sure[:DIFFER] += self.gains(number)
            self.drawn[number] = scores(self.random.random(RECORDS) < sure)
        return self.drawn[number]

    def look(self, champion: Any, challenger: Any) -> Look:
        return Look.at("accuracy", self.of(champion), self.of(challenger), self.groups)


class Life:
    """A continuous study's versions, one after another, without training."""

    def __init__(self, out: Path, evaluator: Any, **schedule: Any) -> None:
        out.mkdir(parents=True)
        study = continuous().changed(schedule=schedule, evaluation={"metric": "accuracy"})
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


def count_releasing(
    folder: Path, studies: int, gains: Callable[[int], float | np.ndarray], **plan: Any
) -> int:
    """How many of so many studies release a version in sixteen looks."""
    return sum(
        any(
            version.decision == "released"
            for version in Life(
                folder / str(seed), Drawn(seed, gains, "groups" in plan), looks=LOOKS, **plan
            ).go_on(LOOKS)
        )
        for seed in range(studies)
    )


@pytest.fixture(autouse=True)
def fewer_swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "SWAPS", 2_000)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # of thousands of studies


PLANS: list[dict[str, Any]] = [{}, {"groups": {"ward": 0.2}}, {"margin": 0.02}]


@pytest.mark.parametrize("plan", PLANS, ids=["alone", "groups", "margin"])
@pytest.mark.parametrize("studies", [30, pytest.param(2_000, marks=pytest.mark.long)])
def test_without_a_true_gain_hardly_any_study_releases_a_version(
    tmp_path: Path, studies: int, plan: dict[str, Any]
) -> None:
    """At most one in twenty does; more than this bound is seen once in 10⁵ runs. The twin below
    would be seen always."""
    most = int(binom.isf(1e-5, studies, 0.05))
    # Of a margin the gain is the margin itself: no more than it.
    shift = plan.get("margin", 0.0) * RECORDS / DIFFER
    found = count_releasing(tmp_path, studies, lambda n: shift * (n > 0), **plan)
    print(f"released in {found} of {studies} studies: {plan}")
    assert found <= most


def worse_in_one_ward(number: int) -> np.ndarray:
    """Each version is much better than the first but worse by 0.2 in the smaller ward, of which
    two records in five may differ."""
    icu = np.array(Drawn.WARDS["ward"][:DIFFER]) == "icu"
    return np.where(icu, -0.2 * 5 / 2, 0.5) * (number > 0)


@pytest.mark.parametrize("studies", [30, pytest.param(2_000, marks=pytest.mark.long)])
def test_a_version_that_is_worse_in_one_group_is_held_back(tmp_path: Path, studies: int) -> None:
    """At the margin itself, with a gain over all: at most one study in twenty releases one."""
    found = count_releasing(tmp_path, studies, worse_in_one_ward, groups={"ward": 0.2})
    print(f"released in {found} of {studies} studies")
    assert found <= int(binom.isf(1e-5, studies, 0.05))


def test_without_its_margin_many_studies_release_what_is_worse_there(tmp_path: Path) -> None:
    """The twin, by a plan without groups: two in five do, of the same draws each time."""
    assert count_releasing(tmp_path, 30, worse_in_one_ward) > binom.isf(1e-5, 30, 0.05)


def test_the_rule_of_before_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better in 90 % of resamples, at each look: about p ≤ 0.1. More than half of the studies
    release a version that is no better."""
    monkeypatch.setattr("fedtune.core.config.study.ScheduleTable.threshold", 0.1)
    studies = 60
    assert count_releasing(tmp_path, studies, lambda _: 0.0) > binom.isf(1e-5, studies, 0.05)


@pytest.mark.parametrize("plan", [*PLANS[:2], {"margin": 0.02, "groups": {"ward": 0.12}}])
@pytest.mark.parametrize("studies", [60, pytest.param(1_000, marks=pytest.mark.long)])
def test_the_gain_that_is_called_resolvable_is_found_four_times_in_five(
    tmp_path: Path, studies: int, plan: dict[str, Any]
) -> None:
    """By the first look. Versions differ about a fifth of the records, as the estimate has it."""
    wards = (RECORDS // 3, RECORDS * 2 // 3)
    groups = [(n, margin) for margin in plan.get("groups", {}).values() for n in wards]
    gain = least_gain(RECORDS, 0.05 / LOOKS, plan.get("margin", 0.0), groups)
    shift = gain / 0.4  # of the two fifths of the records about which versions may differ
    found = sum(
        Life(
            tmp_path / str(seed),
            Drawn(seed, lambda n: shift * (n > 0), bool(groups)),
            looks=LOOKS,
            **plan,
        )
        .go_on(1)[0]
        .decision
        == "released"
        for seed in range(studies)
    )
    print(f"a gain of {gain:.3f} was found in {found} of {studies}: {plan}")
    assert found >= binom.ppf(1e-5, studies, 0.8)


LEVEL = 0.05 / LOOKS


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("n", [20, 60, 150])
def test_a_group_passes_at_its_margin_no_oftener_than_its_level(n: int, rate: float) -> None:
    """Exactly: over all outcomes of n records, of which a share `rate` changes, and 0.1 more for
    the worse."""
    up, passing = (rate - 0.1) / 2, 0.0
    for changed in range(n + 1):
        weight = binom.pmf(changed, n, rate)
        if weight < 1e-9:
            continue
        for better in range(changed + 1):
            chance = weight * binom.pmf(better, changed, up / rate)
            if chance > 1e-9 and 2 * better - changed > -0.1 * n:
                parts = np.repeat([1.0, -1.0, 0.0], [better, changed - better, n - changed])
                passing += chance * (chance_above(parts, -0.1, LEVEL) <= LEVEL)
    assert passing <= LEVEL + 1e-6


def test_no_change_at_all_in_few_records_shows_nothing() -> None:
    """Of 20 records none got worse: 0.9²⁰ is 0.12, at a margin of 0.1."""
    assert chance_above(np.zeros(20), -0.1, LEVEL) > 0.12
    assert chance_above(np.zeros(200), -0.1, LEVEL) < LEVEL
    assert chance_above(np.full(200, -0.5), -0.4, LEVEL) == 1.0  # a broken tie counts as a whole


def test_a_group_of_few_records_decides_nothing() -> None:
    right = np.repeat([True, False], [200, 100])
    better = right.copy()
    better[200:260], better[:19] = True, False
    ward = ["small"] * 19 + ["large"] * 281
    table = ScheduleTable(every=60, groups={"ward": 0.1})
    look = Look.at("accuracy", scores(right), scores(better), {"ward": ward})
    found = judge(look, table)
    assert found.verdict == "better"
    assert {g.name: (g.records, g.p is None) for g in found.groups} == {
        "ward=large": (281, False),
        "ward=small": (19, True),
    }
    ward = ["small"] * 20 + ["large"] * 280
    held = judge(Look("accuracy", look.before, look.after, {"ward": ward}), table)
    assert held.verdict == "not better" and held.why.startswith("ward=small may be worse")


def test_what_taught_the_model_judges_no_version_and_files_are_as_many_as_planned() -> None:
    table = ScheduleTable(every=60, looks=2, files=2)
    files = {name: frozenset(name) for name in "abc"}
    assert look_left([], files, {"a"}, "a", table)[1].startswith("1 of these public records taught")
    assert look_left(["a", "b"], files, (), "a", table) == (1, "")
    assert "2 public files" in look_left(["a", "b"], files, (), "c", table)[1]


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
    assert again._looked.files == life.judging._looked.files  # a restart remembers
    kept = (life.versions.out / "versions" / "looked.json").read_text()
    assert '"a"' not in kept and '"c"' not in kept  # by keyed digest alone


def test_looks_are_counted_over_files_that_share_records() -> None:
    looked, table = ["a", "b", "d", "e"], ScheduleTable(every=60)
    files = {name: frozenset(text) for name, text in {"a": "12", "b": "23", "d": "9"}.items()}

    def count(public: str) -> int:
        return look_left(looked, files, (), public, table)[0]

    assert count("a") == count("b") == 2 and count("d") == count("e") == 1 and count("f") == 0
    files["c"] = frozenset("3")
    assert count("c") == 2


def test_scores_are_read_again_as_they_were_kept() -> None:
    random = np.random.default_rng(2)
    one = scores(random.random(50) < 0.5)
    one.loss, one.tokens = random.gamma(2, 1, 50), random.integers(1, 9, 50)
    for metric in ("loss", "perplexity", "exact_match", "preference", "accuracy", "f1"):
        again = Scores.of_columns(one.columns(metric))
        assert again.value(metric) == one.value(metric)
    with pytest.raises(ValueError, match="different lengths"):
        Scores.of_columns({"loss": [1.0, 2.0], "tokens": [1.0]})


METRICS = ["loss", "perplexity", "exact_match", "preference", "accuracy"]


@pytest.mark.parametrize("metric", METRICS)
def test_sums_over_records_are_the_exchanges_themselves(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast way of metrics that are sums gives what exchanging scores gives, within chance."""
    monkeypatch.setattr(paired, "SWAPS", 4_000)
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
    monkeypatch.setattr(paired, "_parts", lambda *_: None)
    assert chance_of(one, other, metric) == pytest.approx(fast, abs=0.05)


def test_f1_has_a_chance_too_and_a_tie_is_not_better() -> None:
    random = np.random.default_rng(0)
    right = random.random(60) < 0.6
    worse, better = scores(right & (random.random(60) < 0.4)), scores(right)
    assert chance_of(worse, better, "f1") < 0.01 < chance_of(better, worse, "f1") == 1.0
    assert chance_of(better, better, "f1") == 1.0
