"""Strangers' files: who has which records, and that a study of them loads."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

from benchmarks.presets import SITES, STRANGERS, divided, prepared, table, without_noise
from fedtune.core.config import load_study
from fedtune.officer.site_files import load_sites

ROWS = [{"unit": f"u{n // 3}", "site": "abc"[n % 9 // 3], "text": n} for n in range(90)]


def test_no_unit_is_on_two_sides() -> None:
    for by_site in (None, "site"):
        stranger = replace(STRANGERS["formulary"], unit="unit", by_site=by_site, sizes=(5, 9))
        own, public = divided(ROWS, stranger, 0)
        units = [{row["unit"] for row in side} for side in (*own, public)]
        assert len(own) == SITES and len(units[-1]) == 9
        assert sum(map(len, units)) == len(set().union(*units))
        assert by_site or [len(each) for each in units] == [5, 5, 5, 9]
        assert not by_site or all(len({row["site"] for row in rows}) == 1 for rows in own)
        assert divided(ROWS, stranger, 1)[1] != public


def test_a_study_of_them_loads_and_its_twin_has_no_noise(tmp_path: Path) -> None:
    folder = prepared("formulary", tmp_path, 0, tmp_path / "out")
    study, sites = load_study(folder / "study.toml"), load_sites(folder / "sites")
    assert len(sites) == SITES and study.private and not without_noise(study).private
    for site in sites:
        with Path(site.data.path).open(newline="") as file:
            assert len(list(csv.DictReader(file))) == 200


def test_a_row_for_each_arm_and_metric() -> None:
    figures = {"accuracy": 0.5, "loss": 1.25}
    row = {"metric": "accuracy", "before": figures, "start": figures, "after": figures,
           "gain": {"records": 9, "over_start": [-0.125, 0.25]}, "minutes": 2.0}  # fmt: skip
    told = table({"fsdd": {"preset-0": row, "preset-1": row, "off-0": row}})
    first = "| fsdd | preset | accuracy | 0.500, 0.500 | 0.500, 0.500 | 0.500, 0.500 | 9, 9 | "
    assert first + "-0.125 to +0.25; -0.125 to +0.25 | 2 |" in told
    assert told.count("| off |") == told.count("| loss |") == 2
