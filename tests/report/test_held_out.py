"""The coordinator's table: no figure that is lost in noise, no order where intervals overlap."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.report.held_out import (
    LEVEL,
    NOT_TOLD_APART,
    TOO_NOISY,
    interval,
    make_table,
    write_shown,
)
from fedtune.report.markdown import markdown
from tests import chance
from tests.held_out_kit import Row, lay_out, of_classes
from tests.simulated import noise_from, simulate

CELLS = (("", ""), ("class", "benign"), ("class", "malignant"))
BENIGN = {"a": 0, "b": 1, "c": 2, "d": 5, "e": 12}


def table_of(folder: Path, base: Path, sites: dict[str, list[Row]], **more: Any) -> dict[str, Any]:
    """The table of a study that was run, at the suggested noise; the model as it is trained."""
    apart = 'classes = true\nscore = "accuracy"\n'
    study, files = lay_out(folder, base, sites, 2.0, apart)
    if more.get("secure"):
        study.write_text(study.read_text() + "[secure_aggregation]\n")
    with noise_from(more.get("seed", 0)):
        report = simulate(study, files, folder / "run")
    table: dict[str, Any] = report["held_out"]
    return table


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_with_next_to_no_record_of_a_class_resolve_nothing(
    tmp_path: Path, tiny_encoder: Path, seed: int
) -> None:
    """Five splits, as in KatherLab/MediSwarm#533, with 0 to 12 benign cases: whatever figures came
    out, they say which records a split got, and no site, class or figure stands above another. All
    hold the same notes, since a model that tells the sites' names apart, as the sampled records may
    make it, would be rightly said to be worse at one of them."""
    sites = {name: of_classes("all", benign, 40) for name, benign in BENIGN.items()}
    table = table_of(tmp_path, tiny_encoder, sites, seed=seed)
    assert len(table["rows"]) == 3 * (1 + len(BENIGN)) and table["resolved"] == []
    benign = {r["site"]: r for r in table["rows"] if r["value"] == "benign"}
    hidden = [name for name in BENIGN if benign[name]["score"] is None]
    assert {"a", "b", "c", "d"} <= {*hidden}
    shown = write_shown({"held_out": {"round": 1, **table}, "privacy": {"unit": "patient"}})
    assert shown is not None and shown.lines[-1] == "No difference is resolved."
    rows = [row for row in shown.rows if row[0] == "class: benign"]
    assert [row[1] for row in rows] == ["all sites together", *sorted(BENIGN)]
    assert ("class: benign", "a", "", NOT_TOLD_APART, "") in rows


def test_a_difference_of_many_patients_is_resolved(tmp_path: Path, tiny_encoder: Path) -> None:
    """The twin: a model that calls everything one class is said to be worse on the other."""
    sites = {name: of_classes("both", 150, 150) for name in "ab"}
    table = table_of(tmp_path, tiny_encoder, sites)
    at = {line.partition(":")[0] for line in table["resolved"]}
    assert at == {"class at a", "class at all sites together", "class at b"}
    assert all(line.endswith(("benign", "malignant")) for line in table["resolved"])


def test_with_secure_aggregation_no_site_has_a_figure_of_its_own(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    sites = {name: of_classes(name, 30, 30) for name in "abc"}
    table = table_of(tmp_path, tiny_encoder, sites, secure=True)
    assert {row["site"] for row in table["rows"]} == {""}
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rounds"][-1]["private_quality"]["sites"] == ["a", "b", "c"]


def tables(draw: np.random.Generator, number: int, truth: np.ndarray, counts: np.ndarray) -> Any:
    """Tables of two sites with noise and with patients drawn: truth, counts (sites, cells)."""
    sd = 2.0 * math.sqrt(2 * 2)
    for _ in range(number):
        right = draw.binomial(counts, truth).astype(float)
        noised = np.stack([right, counts], axis=-1) + draw.normal(0, sd, (*counts.shape, 2))
        sums = {name: row.ravel().tolist() for name, row in zip("ab", noised, strict=True)}
        sums[""] = noised.sum(axis=0).ravel().tolist()
        yield make_table("accuracy", CELLS, sums, {"a": sd**2, "b": sd**2, "": 2 * sd**2})


def test_all_intervals_of_a_table_hold_together() -> None:
    """Where everything is equal, and where classes and sites differ; of few patients and many."""
    draw, number = np.random.default_rng(5), 400
    few = chance.count_of(number, 1 - LEVEL)
    for truth in ([[0.7] * 3] * 2, [[0.9, 0.95, 0.5], [0.6, 0.99, 0.2]], [[0.98] * 3] * 2):
        for size in (25, 300):
            counts = np.array([[2 * size, size, size]] * 2)
            wrong, alarms = 0, 0
            rates = np.array(truth)
            rates[:, 0] = rates[:, 1:].mean(axis=1)
            for table in tables(draw, number, rates, counts):
                expected = {"a": rates[0], "b": rates[1], "": rates.mean(axis=0)}
                wrong += any(
                    row["interval"] is not None
                    and not row["interval"][0] - 1e-3
                    <= expected[row["site"]][CELLS.index((row["by"], row["value"]))]
                    <= row["interval"][1] + 1e-3
                    for row in table["rows"]
                )
                alarms += bool(table["resolved"])
            assert wrong <= few.high, (truth, size, wrong)
            if len({*rates.ravel()}) == 1:
                assert alarms <= few.high


def test_an_interval_without_noise_is_wilsons() -> None:
    for right, count in ((0, 20), (7, 20), (20, 20), (450, 500)):
        z, p = 1.96, right / count
        middle = (p + z**2 / (2 * count)) / (1 + z**2 / count)
        half = z / (1 + z**2 / count) * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
        expected = [middle - half, middle + half]
        assert interval(right, count, 0.0, z) == pytest.approx(expected, abs=1e-3)


def test_a_sum_beyond_its_count_is_a_share_all_the_same() -> None:
    for score in (-30.0, 130.0, 1e9):
        low, high = interval(score, 100.0, 16.0, 3.0)
        assert 0 <= low < high <= 1


def test_a_count_within_four_deviations_of_nothing_is_not_told_apart() -> None:
    for count, is_shown in ((TOO_NOISY * 2 - 0.01, False), (TOO_NOISY * 2 + 0.01, True)):
        (row,) = make_table("accuracy", CELLS[:1], {"": [1.0, count]}, {"": 4.0})["rows"]
        assert (row["score"] is not None) == is_shown
        assert is_shown or row["units"] is row["interval"] is None
    (row,) = make_table("accuracy", CELLS[:1], {"": [1.0, math.nan]}, {"": 4.0})["rows"]
    assert row["score"] is None


def test_rows_stand_by_name_whatever_the_figures() -> None:
    sums = {name: [score, 500.0] for name, score in (("", 900.0), ("b", 100.0), ("a", 490.0))}
    table = make_table("accuracy", CELLS[:1], sums, dict.fromkeys(sums, 1.0))
    assert [row["site"] for row in table["rows"]] == ["", "a", "b"]
    assert table["resolved"] == ["all: b is below a"]


def test_a_report_that_cannot_be_read_shows_no_table() -> None:
    for broken in (None, [], {}, {"rows": 3}, {"rows": [{}], "round": 1, "score": "accuracy"}):
        assert write_shown({"held_out": broken}) is None


def test_a_report_shows_the_table_as_inert_text() -> None:
    """A plan's words are the coordinator's, and a page is read elsewhere."""
    cells = (("", ""), ("ward", "<b>|x"))
    table = make_table("accuracy", cells, {"": [400.0, 500.0, 1.0, 500.0]}, {"": 1.0})
    report = {
        "private": True,
        "study": "s",
        "privacy": {"epsilon": 1.0, "delta": 1e-3, "evaluation": {"steps": 1}},
        "quality": {},
        "rounds": [{"round": 1, "private_quality": {"accuracy": 0.8, "missing": {}}}],
        "held_out": {"round": 1, **table},
    }
    text = markdown(report)
    assert "<b>" not in text and "ward: \\<b\\>\\|x" in text
    assert "| all | all sites together | 500 | 0.80 | " in text
    assert "No difference is resolved." in text and NOT_TOLD_APART in text.lower()
