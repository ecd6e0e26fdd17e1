"""What a private evaluation's answer will be worth is said beforehand, from public numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from fedtune.accounting.costs import query_lines
from fedtune.accounting.query_noise import HELD_OUT, TOO_NOISY, answer_sd, forecast
from fedtune.core.config import load_study
from fedtune.presets.templates import init
from tests.cli_kit import run


@pytest.mark.parametrize("sigma, sites, units", [(2.0, 3, 30), (2.0, 1, 30), (8.0, 3, 300)])
def test_the_forecast_bounds_what_is_drawn(sigma: float, sites: int, units: int) -> None:
    """Two standard deviations of real answers, at any likelihood, are within the forecast."""
    draw = np.random.default_rng(0)
    noise = draw.normal(0, sigma * math.sqrt(2), (4000, sites, 2)).sum(axis=1)
    n, stated = units * sites, forecast(sigma, sites)[units]
    assert stated is not None
    for likelihood in (0.1, 0.9):
        answers = (likelihood * n + noise[:, 0]) / (n + noise[:, 1])
        spread = 2 * float(np.std(answers))
        assert spread < 1.15 * stated
    assert spread > 0.7 * stated  # at 0.9, near the worst


def test_the_fewest_units_that_answer_are_named() -> None:
    for sigma in (2.0, 8.0):
        for sites in (1, 3):
            known = forecast(sigma, sites)
            fewest = min(units for units, spread in known.items() if spread is not None)
            variance = 2 * sigma**2 * sites
            assert answer_sd(variance, fewest * sites) is not None
            assert answer_sd(variance, (fewest - 1) * sites) is None
            assert set(HELD_OUT) <= known.keys()
    assert answer_sd(1.0, TOO_NOISY) is None and answer_sd(0.0, 0.0) is None


def with_queries(folder: Path, sigma: float) -> Path:
    study, _ = init(folder)
    extra = f"\n[private_evaluation]\nnoise_multiplier = {sigma}\nevery = 1000\n"
    study.write_text(study.read_text() + extra)
    return study


def test_a_plan_says_what_an_answer_is_worth(tmp_path: Path) -> None:
    """At the σ that `init` suggests, 30 patients at a site are answered; its twin says they are
    not."""
    suggested = re.search(r"# noise_multiplier = (\S+)", init(tmp_path / "new")[0].read_text())
    assert suggested
    for sigma, answered in ((float(suggested[1]), True), (8.0, False)):
        study = with_queries(tmp_path / str(sigma), sigma)
        (line,) = query_lines(load_study(study), 1)
        assert ("30: no answer, lost in the noise" not in line) == answered
        shown = " ".join(run("plan", study, "--size", 200).output.split())
        assert line in shown
        both = " ".join(run("plan", study, "--size", 200, "--size", 200).output.split())
        assert "at each of 2 sites" in both
    spread = forecast(float(suggested[1]), 3)[30]
    assert spread is not None and spread < 0.16  # as the file says


def test_a_plan_without_queries_says_nothing(tmp_path: Path) -> None:
    assert query_lines(load_study(init(tmp_path)[0]), 3) == []
