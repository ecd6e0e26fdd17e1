"""The example's files: the same for a seed, one site file for each study, public words apart."""

from __future__ import annotations

import json
import re
from pathlib import Path

from examples.rlhf.prepare import SITES, write
from fedtune.core.config import load_site, load_study


def test_it_writes_the_same_and_shares_no_phrase(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert len(write(tmp_path / name, seed=3)) == 3 * len(SITES)
    for path in sorted((tmp_path / "a").rglob("*")):
        if path.is_file():
            twin = tmp_path / "b" / path.relative_to(tmp_path / "a")
            assert path.read_bytes() == twin.read_bytes()
    kinds = ("policy", "reward", "dpo")
    studies = [load_study(tmp_path / "a" / f"{kind}.toml") for kind in kinds]
    assert [each.objective.name for each in studies] == ["causal_lm", "reward", "dpo"]
    for name in SITES:
        tables = [load_site(tmp_path / "a/sites" / name / f"{kind}.toml") for kind in kinds]
        assert len({table.site.state for table in tables}) == 1  # one ledger for all studies
        assert tables[0].data.path == tables[1].data.path != tables[2].data.path
    lines = (tmp_path / "a" / "prompts.jsonl").read_text().splitlines()
    public = {json.loads(line)["prompt"] for line in lines}
    held_out = _answers(tmp_path / "a" / "pairs.jsonl")
    for name in SITES:
        own = tmp_path / "a/sites" / name / "pairs.jsonl"
        assert not public & {json.loads(line)["prompt"] for line in own.read_text().splitlines()}
        assert not held_out & _answers(own)


def test_without_privacy_the_clinics_admit_it(tmp_path: Path) -> None:
    sites = [load_site(path) for path in write(tmp_path, patients=5, epsilon=None)]
    assert not load_study(tmp_path / "reward.toml").private
    assert all(site.policy.allow_privacy_off for site in sites)
    assert {site.site.declared_size for site in sites} == {5}


def _answers(path: Path) -> set[str]:
    """Every sentence of an answer."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    text = ". ".join(row[key] for row in rows for key in ("better", "worse"))
    return {part.strip() for part in re.split(r"[.!?]", text)} - {""}
