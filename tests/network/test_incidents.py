"""The first table of docs/incidents.md while a study runs over Flower: the site's client and the
server go on, and nobody restarts anything."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from fedtune.core.ledger import audit_log
from fedtune.evidence import incident
from fedtune.flower.ports import free_port
from tests.docs.incidents import World, tables
from tests.docs.pages import ROOT
from tests.network.kit import PRIVATE, SITES, Consortium, consortium, until

ROUNDS = 9
PAGE = (ROOT / "docs" / "incidents.md").read_text(encoding="utf-8")
LEAK = tables(PAGE)["We suspect a leak"][0]


def typed(world: World, part: str) -> None:
    """Type the page's commands that have this part, where this consortium has its run."""
    rows = [words for row in LEAK for words in row.commands if part in " ".join(words)]
    assert rows
    for words in rows:
        done = world.type(*(word.replace("hub/runs/hub", "hub/run") for word in words))
        assert done.code == 0, done.said


def refusals(made: Consortium) -> Counter[str]:
    folder = made.root / "north" / "state"
    log = audit_log.verify(folder, audit_log.signer_at(folder)).entries
    return Counter(entry["rule"] for entry in log if entry["event"] == "refuse")


@pytest.mark.long  # without processes: tests/client/test_freeze.py, tests/docs/test_incidents.py
def test_a_site_is_frozen_and_lifted_and_another_is_revoked_in_the_midst_of_a_study(
    tmp_path: Path, tiny_base: Path
) -> None:
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        made.lay_out(tiny_base, PRIVATE, ROUNDS, min_sites=1)
        server = made.server()
        until(made.listens, 120, made.told)
        for name in SITES:
            made.join(name)
        for name in SITES:
            made.client(name)
        until(lambda: made.rounds() >= 1, 120, made.told)
        world = World(tmp_path, {"consortium": made.fingerprint})
        typed(world, "--freeze")
        paid, at = len(made.spending("north")), made.rounds()
        typed(world, "evidence north/site.toml")
        typed(world, "evidence hub/coordinator")
        until(lambda: made.rounds() >= at + 1, 120, made.told)
        assert len(made.spending("north")) == paid  # its client ran all the while
        assert set(refusals(made)) == {"has frozen its ledger"}
        typed(world, "--lift")
        revoked = world.type("fedtune", "revoke", "east", "--home", "hub/coordinator")
        assert revoked.code == 0, revoked.said
        assert server.wait(300) == 0, made.told()
        body = made.report()
        parts = [entry["participants"] for entry in body["rounds"]]
        assert ["east", "south"] in parts and parts[-1] == ["south"]  # north: not in this run
        typed(world, "log north/site.toml --verify")
        typed(world, "evidence north-incident")
        incident.check(tmp_path / "hub-incident")
        own = world.type(
            *("fedtune", "verify", "hub/run", "--trust", made.fingerprint),
            *("--own", "north/site.toml"),
        )
        assert own.code in (0, 3), own.said  # 3: a round under way at the freeze was paid for
        assert f"as north, {sum('north' in p for p in parts)} rounds" in own.said
