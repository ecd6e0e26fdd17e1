"""The example's files: the same for a seed, one site file for each study, public words apart."""

from __future__ import annotations

import json
from pathlib import Path

from examples.rlhf.prepare import SITES, write
from fedtune.config import load_site, load_study


def test_it_writes_the_same_and_shares_no_phrase(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert len(write(tmp_path / name, seed=3)) == 2 * len(SITES)
    for path in sorted((tmp_path / "a").rglob("*")):
        if path.is_file():
            twin = tmp_path / "b" / path.relative_to(tmp_path / "a")
            assert path.read_bytes() == twin.read_bytes()
    policy, reward = (load_study(tmp_path / "a" / f"{kind}.toml") for kind in ("policy", "reward"))
    assert (policy.objective.name, reward.objective.name) == ("causal_lm", "reward")
    for name in SITES:
        tables = [
            load_site(tmp_path / "a/sites" / name / f"{k}.toml") for k in ("policy", "reward")
        ]
        assert tables[0].site.state == tables[1].site.state  # one ledger for both studies
        assert tables[0].data.name == tables[1].data.name
    lines = (tmp_path / "a" / "prompts.jsonl").read_text().splitlines()
    public = {json.loads(line)["prompt"] for line in lines}
    for name in SITES:
        own = (tmp_path / "a/sites" / name / "pairs.jsonl").read_text().splitlines()
        assert not public & {json.loads(line)["prompt"] for line in own}
