"""The picture of the gain against units a site is of measured figures, and so is what is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import units
from benchmarks.prototypes import Records

ROOT = Path(__file__).parents[2]
CURVES = json.loads(units.MEASURED.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("point", "arm", "said"),
    [
        ("mts_sections/3/30", "own/6", "+0.01 at ε = 6 with 30 patients each"),
        ("mts_sections/3/120", "own/6", "+0.03 with 120"),
        ("mts_sections/3/360", "own/6", "+0.06 with 360"),
        ("mts_sections/3/360", "own/1", "+0.02 with 360"),
        ("medmcqa_lacking/3/30", "own/1", "+0.09 at"),
        ("medmcqa_lacking/3/30", "own/6", "+0.19 at ε = 6"),
    ],
)
def test_what_the_readme_says_was_measured(point: str, arm: str, said: str) -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert said in readme
    assert said.startswith(f"{np.mean(CURVES[point][arm]):+.2f}")


def test_it_draws_what_there_is(tmp_path: Path) -> None:
    units.draw(CURVES, tmp_path / "units.png")
    assert (tmp_path / "units.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_is_read_as_it_was_written() -> None:
    assert units.as_lines(CURVES) == units.MEASURED.read_text(encoding="utf-8")


def test_a_larger_site_has_the_units_of_a_smaller_one_and_more() -> None:
    labels = np.arange(600) % 3
    mine = Records(np.zeros((600, 2)), labels, labels.astype(str), ["a", "b", "c"], None, [])
    few, many = (units.divided("mts_sections", mine, count, seed=0) for count in (60, 150))
    assert many.units[:60] == few.units
    assert len(few.public) == units.PUBLIC and len(few.test) == units.TEST
    everyone = [*many.public, *many.test, *(i for unit in many.units for i in unit)]
    assert len(everyone) == len({*everyone})
