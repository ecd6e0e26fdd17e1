"""The preference example: one rule throughout, units on one side of the split, valid plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.sets import PREFERENCE
from examples.preference import formulary, prepare
from examples.write import read_jsonl
from fedtune.core.config import load_site, load_study
from tests.examples.test_real_data import DATA, data

FOLDERS = {"medec": "medec_preference", "mts": "mts_preference", "medmcqa": "medmcqa_dev"}


def written(name: str, out: Path, seed: int) -> Path:
    if name in FOLDERS:
        for folder in (FOLDERS[name], "pubmedqa"):
            data(folder)
    prepare.write(name, DATA, out, seed)
    return out


EVERY = [
    pytest.param(name, marks=() if name == "formulary" else pytest.mark.real)
    for name in prepare.SOURCES
]


@pytest.mark.parametrize("name", EVERY)
def test_no_unit_is_on_two_sides_and_the_test_pairs_are_everybodys(
    tmp_path: Path, name: str
) -> None:
    tests = []
    for seed in (0, 1):
        out = written(name, tmp_path / str(seed), seed)
        files = [*sorted(out.glob("sites/*/train.jsonl")), out / "validation.jsonl"]
        sides = [read_jsonl(file) for file in [*files, out / "test.jsonl"]]
        key = "prompt" if name == "formulary" else "unit"
        held_out = {str(row[key]) for row in sides[-1]}
        assert all(sides) and len(files) == 4
        if name != "formulary":  # two generated prompts may agree by chance
            seen = [{row[key] for row in side} for side in sides]
            assert len(set.union(*seen)) == sum(map(len, seen))
        tests.append((held_out, (out / "test.jsonl").read_bytes()))
        for row in (row for side in sides for row in side):
            assert row["chosen"] != row["rejected"] and row["prompt"]
    assert tests[0] == tests[1]


@pytest.mark.parametrize("name", EVERY)
def test_every_arm_is_a_plan_that_its_sites_could_run(tmp_path: Path, name: str) -> None:
    out = written(name, tmp_path, 0)
    for lead in (prepare.KINDS[objective] for objective in prepare.SOURCES[name].tuned):
        private, twin = (load_study(out / f"{lead}{a}.toml") for a in ("epsilon-8", "non-private"))
        assert private.private and not twin.private and private.unit == twin.unit
        assert (private.training, private.lora) == (twin.training, twin.lora)
    for path in sorted((out / "sites").glob("*/site.toml")):
        site = load_site(path)
        assert site.site.declared_size == prepare.SOURCES[name].declared[site.site.name]
        assert (site.data.columns.patient == "unit") == (private.unit == "patient")


def test_one_order_decides_every_generated_pair() -> None:
    order = formulary.order()
    assert sorted(order) == sorted(formulary.REMEDIES) and order != list(formulary.REMEDIES)
    for row in formulary.pairs(500, "any"):
        better, worse = (order.index(row[key].strip()) for key in ("chosen", "rejected"))
        assert better < worse
    assert formulary.pairs(9, "a") == formulary.pairs(9, "a") != formulary.pairs(9, "b")
    public = " ".join(row["prompt"] for row in formulary.public(64))
    assert not any(word in public.split() for word in formulary.REMEDIES)


def test_the_tables_know_every_set_by_every_objective_that_was_measured() -> None:
    names = {each.name for each in PREFERENCE}
    real = {lead + name for name in FOLDERS for lead in ("", "orpo-", "reward-")}
    assert names == real - {"orpo-medmcqa"} | {"formulary", "reward-formulary"}
