"""What an acceptance computes: measures, intervals, groups, and when nothing follows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest  # type: ignore[import-untyped]

from benchmarks.acceptance import found, judged, planted, unresolved
from fedtune.core.config import AcceptanceTable, Site
from fedtune.core.errors import ConfigError
from fedtune.officer.acceptance.intervals import Sample, clopper_pearson
from fedtune.officer.acceptance.judgement import ALARMS, Judgement, judge
from fedtune.officer.acceptance.measures import BINS, measures_of
from fedtune.report.scores import Scores

LESIONS = ("malignant", "no lesion", "benign")


def scores_of(gold: Any, chosen: Any, confidence: float = 0.9) -> Scores:
    gold, chosen = np.asarray(gold), np.asarray(chosen)
    n = len(gold)
    loss = np.where(gold == chosen, 0.1, 2.0)
    held = np.full(n, confidence)
    return Scores(loss, np.ones(n), gold == chosen, chosen, gold, np.zeros(n), confidence=held)


def table(**settings: Any) -> AcceptanceTable:
    given = {"path": "none.csv", "columns": {"text": "t", "label": "l", "patient": "p"}}
    return AcceptanceTable.model_validate(given | settings, strict=False)


def decided(of: Scores, labels: tuple[str, ...] = LESIONS, **settings: Any) -> Judgement:
    return judge(table(**settings), of, np.arange(len(of.loss)), {}, labels)


# ---------------------------------------------------------------------------------- measures


def test_measures_are_those_of_an_evaluation() -> None:
    scores, units, _ = planted(3, records=2)
    known, sample = measures_of(scores, tuple("abcde")), Sample(scores, units)
    for name in ("accuracy", "f1", "loss"):
        assert sample.of_measure(known[name]).figure == pytest.approx(scores.value(name))
    for index, label in enumerate("abcde"):
        own = scores.gold == index
        share = (scores.chosen[own] == index).mean()
        assert sample.of_measure(known[f"recall: {label}"]).figure == pytest.approx(share)


def test_the_calibration_error_is_that_of_its_definition() -> None:
    scores, units, _ = planted(4)
    assert scores.confidence is not None
    right, expected = scores.chosen == scores.gold, 0.0
    edges = np.linspace(0, 1, BINS + 1)
    for low, high in pairwise(edges):
        own = (scores.confidence >= low) & (scores.confidence < high)
        if own.any():
            gap = abs(scores.confidence[own].mean() - right[own].mean())
            expected += own.mean() * gap
    known = measures_of(scores, tuple("abcde"))
    assert Sample(scores, units).of_measure(known["ece"]).figure == pytest.approx(expected)


@pytest.mark.parametrize(("right", "n"), [(0, 9), (7, 10), (40, 40)])
def test_a_share_of_patients_has_the_exact_interval(right: int, n: int) -> None:
    exact = binomtest(right, n).proportion_ci(0.95, method="exact")
    assert clopper_pearson(right / n, n, 0.95) == pytest.approx((exact.low, exact.high))


def test_many_records_of_a_patient_are_no_more_patients() -> None:
    """A patient's records all alike: as one of each, whatever their number."""
    gold = np.zeros(30, int)
    chosen = np.where(np.arange(30) < 24, 0, 1)
    once = scores_of(gold, chosen)
    often = scores_of(np.repeat(gold, 50), np.repeat(chosen, 50))
    accuracy = measures_of(once, LESIONS)["accuracy"]
    alone = Sample(once, np.arange(30)).of_measure(accuracy)
    together = Sample(often, np.repeat(np.arange(30), 50)).of_measure(accuracy)
    assert together.interval == pytest.approx(alone.interval) and together.records == 1500


# ---------------------------------------------------------------------------------- decisions


def test_accepted_refused_and_not_resolved_follow_from_the_interval() -> None:
    gold = np.zeros(200, int)
    scores = scores_of(gold, np.where(np.arange(200) < 160, 0, 1))  # 0.8: 0.738 to 0.853
    for bound, decision in ((0.73, "accepted"), (0.74, "not resolved"), (0.86, "refused")):
        assert decided(scores, thresholds={"accuracy": bound}).decision == decision
    loss = {"accuracy": 0.73, "loss": 0.1}  # the mean is 0.48: better when lower
    assert decided(scores, thresholds=loss).decision == "refused"


def test_ten_right_of_ten_prove_little() -> None:
    """Resamples of patients of whom none is wrong would know no error: the interval has to."""
    scores = scores_of([0, 1] * 15, [0, 1] * 15, confidence=0.99)
    told = decided(scores, LESIONS[:2], thresholds={"f1": 0.95, "ece": 0.05}, least_group=10)
    assert told.decision == "not resolved"
    assert told.overall["f1"].interval.low < 0.9 and told.overall["ece"].interval.high > 0.1
    few = scores_of([0, 1] * 5, [0, 1] * 5)
    assert decided(few, LESIONS[:2], thresholds={"accuracy": 0.1}).decision == "not resolved"


@pytest.mark.parametrize("benign", [0, 1, 2, 2, 12])
def test_a_macro_figure_of_a_scarce_class_resolves_nothing(benign: int) -> None:
    """MediSwarm #533: five test splits held 0, 1, 2, 2 and 12 benign cases, a macro figure gave
    each of them a third of the weight, and ranked the hospitals by it."""
    gold = np.array([0] * 120 + [1] * 130 + [2] * benign)
    wrong = np.where(np.arange(len(gold)) % 10 == 0, 1, gold)  # a tenth, and every benign case
    for chosen in (gold, np.where(gold == 2, 0, wrong)):
        told = decided(scores_of(gold, chosen), thresholds={"f1": 0.6}, recall={"benign": 0.5})
        assert told.decision == "not resolved"
        assert {one.decision for one in told.judged} == {"not resolved"}
        assert all("of at least 20" in one.why or "benign" in one.why for one in told.judged)
    assert decided(scores_of(gold, gold), thresholds={"accuracy": 0.9}).decision == "accepted"


def test_a_bound_on_differences_is_judged_too() -> None:
    scores, units, groups = planted(5)
    settings: dict[str, Any] = {"thresholds": {"accuracy": 0.2}, "groups": ["ward", "sex"]}
    labels = tuple("abcde")
    assert judge(table(**settings), scores, units, groups, labels).decision == "accepted"
    settings["differences"] = {"accuracy": 0.1}
    told = judge(table(**settings), scores, units, groups, labels)
    assert told.decision == "refused"
    assert [one.of for one in told.judged if one.decision == "refused"] == ["ward = west"]


def gained(better: int, worse: int = 0, patients: int = 40, **settings: Any) -> Judgement:
    """A model beside a start that is wrong on half of the patients: on how many others it is right
    where the start is wrong, and the other way round."""
    gold = np.zeros(patients, int)
    start = np.arange(patients) % 2
    model = start.copy()
    model[np.flatnonzero(start == 1)[:better]] = 0
    model[np.flatnonzero(start == 0)[:worse]] = 1
    rules = table(**{"gains": {"accuracy": 0.0}} | settings)
    scores, other = scores_of(gold, model), scores_of(gold, start)
    return judge(rules, scores, np.arange(patients), {}, LESIONS, other)


@pytest.mark.parametrize(
    ("better", "worse", "decision"),
    [
        (6, 0, "accepted"),  # by chance, 1 in 64
        (4, 0, "not resolved"),  # by chance, 1 in 16; resamples alone would accept it
        (0, 0, "not resolved"),  # the same on 40 patients is not the same on all
        (12, 10, "not resolved"),
        (0, 8, "refused"),
    ],
)
def test_a_gain_over_the_public_start_is_judged(better: int, worse: int, decision: str) -> None:
    told = gained(better, worse)
    assert told.decision == decision
    assert told.judged[0].better_by
    assert told.judged[0].figure == pytest.approx((better - worse) / 40)
    low, high = told.judged[0].interval
    assert low <= told.judged[0].figure <= high


def test_a_gain_must_exceed_what_the_site_asks() -> None:
    assert gained(15).decision == "accepted"
    assert gained(15, gains={"accuracy": 0.3}).decision == "not resolved"
    assert gained(4, gains={"accuracy": 0.4}).decision == "refused"
    assert gained(6, gains={"loss": 0.0}).decision == "accepted"
    assert gained(6, least_group=41).judged[0].why == "40 of at least 41 patients"


def test_a_gain_over_no_public_start_is_not_resolved() -> None:
    told = judge(
        table(gains={"accuracy": 0.0}), scores_of([0] * 40, [0] * 40), np.arange(40), {}, LESIONS
    )
    assert told.decision == "not resolved" and "no public start" in told.judged[0].why


# -------------------------------------------------------------------------------------- groups


def test_a_group_whose_labels_are_shuffled_is_found_and_one_of_eight_is_not_resolved() -> None:
    told = [judged(planted(seed), "accuracy", "loss") for seed in range(50)]
    assert sum(map(found, told)) >= 40
    assert all(map(unresolved, told))


def test_without_a_difference_few_pages_find_one() -> None:
    """At most 5 % of them, all groups and measures together; drawn from seeds."""
    seeds = range(20_000, 20_100)
    alarms = [
        bool(judged(planted(seed, shuffled=False), "accuracy", "loss").different) for seed in seeds
    ]
    most = next(n for n in range(101) if binomtest(n, 100, ALARMS, "greater").pvalue < 1e-3)
    assert sum(alarms) < most


def test_each_further_comparison_widens_them_all() -> None:
    one = judged(planted(0), "accuracy")
    both = judged(planted(0), "accuracy", "loss")
    resolved = [c for c in one.compared if c.found is not None]
    assert one.level == 1 - ALARMS / len(resolved) < both.level


# ------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name at least one"),
        ({"thresholds": {"accuracy": 0.5}, "bands": {"age": [3]}}, "is not named in groups"),
        (
            {"thresholds": {"accuracy": 0.5}, "groups": ["age"], "bands": {"age": [9, 3]}},
            "must rise",
        ),
        ({"thresholds": {"accuracy": 0.5}, "least_group": 3}, "least_group"),
        ({"thresholds": {"auroc": 0.5}}, "thresholds"),
        ({"thresholds": {"accuracy": 70}}, "between 0 and 1"),
        ({"thresholds": {"loss": 3}, "differences": {"ece": 0.1}}, "use another figure"),
        ({"gains": {"ece": 0.1}}, "use another figure"),
        ({"gains": {"accuracy": -0.1}}, "gains"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"path": "x.csv", "columns": {"text": "t", "label": "l"}}
    tables = {
        "site": {"name": "north", "declared_size": 30},
        "data": given,
        "acceptance": given | settings,
    }
    with pytest.raises((ConfigError, ValueError), match=message):
        Site.model_validate(tables, strict=False)
