"""Single judgements of a preference set, and patients held back from the demo's hospitals."""

from __future__ import annotations

from pathlib import Path

from examples.hospitals.held_out import hold_back
from examples.preference import judged, prepare
from examples.write import read_jsonl
from fedtune.core.config import load_site, load_study
from fedtune.officer.site_files import load_sites


def test_each_pair_is_two_judgements_of_one_plan(tmp_path: Path) -> None:
    prepare.write("formulary", tmp_path, tmp_path, 0)
    plan = load_study(judged.write("formulary", tmp_path))
    dpo = load_study(tmp_path / "epsilon-8.toml")
    assert plan.objective.name == "kto" and plan.objective.options == {"beta": 0.1}
    assert (plan.training.rounds, plan.lora, plan.privacy) == (4, dpo.lora, dpo.privacy)
    assert plan.training.learning_rate == judged.RATE
    for name, declared in prepare.SOURCES["formulary"].declared.items():
        site = load_site(tmp_path / "judged" / name / "site.toml")
        pairs = read_jsonl(tmp_path / "sites" / name / "train.jsonl")
        rows = read_jsonl(site.data.path)
        assert site.site.declared_size == 2 * declared and len(rows) == 2 * len(pairs)
        assert site.data.declared == "generated"
        assert [row["completion"] for row in rows[:2]] == [pairs[0]["chosen"], pairs[0]["rejected"]]
        assert [row["desirable"] for row in rows[:2]] == [True, False]


def test_who_is_held_out_is_in_no_training_file(tmp_path: Path) -> None:
    plan = load_study(hold_back(tmp_path, patients=30, sigma=2.0))
    assert plan.queries == (8,)
    for site in load_sites(tmp_path / "sites"):
        assert site.evaluation is not None and site.policy.release == ("evaluation",)
        held, trained = (
            {row["patient"] for row in read_jsonl(data.path)}
            for data in (site.evaluation, site.data)
        )
        assert len(held) == 30 and trained and not held & trained
