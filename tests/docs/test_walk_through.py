"""A consortium from its first line to a model, by the coordinator's and the hospital's doors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.core.config import load_site
from fedtune.core.errors import Refused
from fedtune.core.ledger.ledger import Ledger
from fedtune.evidence.verify import verify
from fedtune.flower import membership
from fedtune.flower.ports import free_port
from tests.docs.pages import ROOT, Block
from tests.docs.walk_through import SITES, WalkThrough, consortium_block

COORDINATOR = (ROOT / "docs" / "coordinator.md").read_text(encoding="utf-8")
HOSPITAL = (ROOT / "docs" / "hospital.md").read_text(encoding="utf-8")


@pytest.mark.long  # by default: the same steps by commands (tests/network/test_from_nothing.py)
def test_the_consortium_of_both_doors_trains(tmp_path: Path, tiny_encoder: Path) -> None:
    walk = WalkThrough(tmp_path, tiny_encoder, free_port())
    try:
        walk.run(consortium_block(COORDINATOR, HOSPITAL))
        shown = walk.running["coordinator"].done(300)
        assert "accuracy" in shown
        run = tmp_path / "coordinator" / "hub" / "runs" / "hub"
        report = json.loads((run / "report.json").read_text())
        rounds = len(report["rounds"])
        assert [each["participants"] for each in report["rounds"]] == rounds * [list(SITES)]
        told = {name: walk.heard[name] for name in SITES}
        found = verify(run, walk.heard["consortium"], told)
        assert found.trusted and not found.simulated and found.updates == rounds * len(SITES)
        with pytest.raises(Refused, match="'north' signed with keys of"):
            verify(run, sites=told | {"north": told["south"]})
        for name in SITES:
            walk.running[name].until(f"round {rounds} of ")
            assert "NOT the plan" not in walk.running[name].shown
            folder = tmp_path / name / name
            site = load_site(folder / "site.toml")
            assert site.coordinator is None  # nobody edited a file for the link
            ledger = Ledger(site.site.state)
            assert len(ledger.spending("records")) == rounds
            assert site.policy.admission == "reviewed" and ledger.admitted(report["plan_digest"])
            kept = membership.load_answer(membership.keys_folder(site), name)
            assert kept and membership.read_reviewed_plan(kept) == report["plan_digest"]
    finally:
        walk.end()
    counts = {m: sum(machine == m for machine, _ in walk.commands) for m, _ in walk.commands}
    assert counts == {"coordinator": 2, "north": 2, "south": 2, "west": 2}


def test_twin_a_line_that_does_not_work_is_found(tmp_path: Path, tiny_encoder: Path) -> None:
    walk = WalkThrough(tmp_path, tiny_encoder, free_port())
    broken = HOSPITAL.replace("--target section --data", "--target section --date")
    with pytest.raises(AssertionError, match="No such option"):
        walk.run(Block(0, "sh", sites_part(consortium_block(COORDINATOR, broken)), ""))


def sites_part(block: Block) -> str:
    """The first lines that sites run."""
    return "# each site" + block.text.split("# each site")[1].split("# coordinator")[0]


@pytest.mark.long
def test_twin_another_fingerprint_on_the_telephone_lets_nobody_in(
    tmp_path: Path, tiny_encoder: Path
) -> None:
    """A site that heard another consortium's, and a coordinator who heard another site's."""
    walk = WalkThrough(tmp_path, tiny_encoder, free_port())
    try:
        walk.run(Block(0, "sh", sites_part(consortium_block(COORDINATOR, HOSPITAL)), ""))
        hub = tmp_path / "coordinator"
        (hub / "hub" / "coordinator").mkdir(mode=0o700, parents=True)
        (hub / "hub" / "coordinator" / "address").write_text("127.0.0.1:9")
        (hub / "hub" / "coordinator" / "plan.json").write_text("{}")
        words = ["fedtune", "admit", *("north.request", "south.request", "west.request")]
        words += ["--home", "hub/coordinator"]
        right = walk.heard["south"]
        walk.heard["south"] = "0000 0000 0000 0000 0000"
        with pytest.raises(AssertionError, match="nobody compared the fingerprint"):
            walk._admit("coordinator", words)
        assert not (hub / "hub" / "coordinator" / "nodes").exists()  # nor was north admitted
        walk.heard["south"] = right
        walk._admit("coordinator", words)
        walk.heard["consortium"] = "0000 0000 0000 0000 0000"
        with pytest.raises(AssertionError, match="somebody may have replaced the file"):
            last = consortium_block(COORDINATOR, HOSPITAL).text.split("# each site")[-1]
            walk.run(Block(0, "sh", "# each site" + last, ""))
        site = load_site(tmp_path / "north" / "north" / "site.toml")
        assert membership.load_answer(membership.keys_folder(site), "north") is None
    finally:
        walk.end()
