"""The groups of public records: each record's own, a row that cannot be used left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.core.config import load_study
from fedtune.core.errors import ConfigError, DataError
from fedtune.evaluation.evaluator import Evaluator, check_evaluation
from tests.continuous.world import SCHEDULE, lay_out, patients, write

PLAN = SCHEDULE.replace('every = "1h"', 'every = "1h"\ngroups = { ward = 0.2 }').replace(
    "[evaluation]\n", '[evaluation]\nmetric = "exact_match"\n'
)


def laid_out(folder: Path, base: Path, schedule: str = PLAN) -> Path:
    study = lay_out(folder, base, patients(12), schedule=schedule)
    rows = [
        {"q": row["q"], "a": row["a"], "ward": "ab"[n % 2]} for n, row in enumerate(patients(8))
    ]
    rows[3]["a"] = ""  # cannot be used
    del rows[5]["ward"]
    write(folder / "public.jsonl", rows)
    return study


def test_each_record_has_its_own_group(tmp_path: Path, tiny_base: Path) -> None:
    study = load_study(laid_out(tmp_path, tiny_base))
    evaluator = Evaluator(study)
    usable = [
        row
        for row in map(json.loads, (tmp_path / "public.jsonl").read_text().splitlines())
        if row["a"]
    ]
    assert len(evaluator) == len(usable) == 15
    assert evaluator.groups == {"ward": [row.get("ward", "(missing)") for row in usable]}


def test_a_column_that_is_not_there_is_named_before_the_study(
    tmp_path: Path, tiny_base: Path
) -> None:
    path = laid_out(tmp_path, tiny_base, PLAN.replace("ward =", "wards ="))
    with pytest.raises(DataError, match=r"no column 'wards', which schedule\.groups\.wards names"):
        check_evaluation(load_study(path))
    told = CliRunner().invoke(app, ["plan", str(path), "--size", "12"])
    assert told.exit_code == 2 and "wards" in told.stderr


def test_a_margin_of_what_is_no_share_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    path = laid_out(tmp_path, tiny_base, PLAN.replace('metric = "exact_match"\n', ""))
    with pytest.raises(ConfigError, match=r"schedule\.groups: cannot be tested for loss"):
        load_study(path)


def test_plan_says_what_so_few_records_resolve(tmp_path: Path, tiny_base: Path) -> None:
    told = CliRunner().invoke(app, ["plan", str(laid_out(tmp_path, tiny_base)), "--size", "12"])
    said = " ".join(told.stdout.split())
    assert told.exit_code == 0 and "in 16 looks at the 15 public records" in said
    assert "groups of fewer than 20 records decide nothing, here 3" in said
