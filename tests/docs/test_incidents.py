"""The tables of docs/incidents.md, played; what is noticed where a step is skipped or broken."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.cli.network import join
from fedtune.core.config import load_site
from fedtune.core.dp.accountant import Steps, epsilon
from fedtune.core.errors import NotGenuine, Refused
from fedtune.core.wire.keys import SigningKey, canonical
from fedtune.evidence import incident, sign
from fedtune.flower import enrol
from fedtune.officer.before_joining import check_before_joining
from fedtune.officer.leave import check_trusted, consortium_of
from tests.docs.incidents import HEAD, World, commands, make_world, tables, without
from tests.docs.pages import ROOT
from tests.verify_kit import write_report

PAGE = (ROOT / "docs" / "incidents.md").read_text(encoding="utf-8")
TABLES = tables(PAGE)
LEAK, WRONG, LEAVES, LOST, LIED = TABLES


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> World:
    return make_world(tmp_path_factory.mktemp("incidents") / "world", tiny_base)


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    return made.copied(tmp_path / "world")


def lie(world: World) -> None:
    """The coordinator leaves north's last update out of the run, and signs figures that fit."""
    run = world.root / "hub" / "runs" / "hub"
    content = json.loads((run / sign.EVIDENCE).read_text())
    last = max(entry["round"] for entry in content["updates"])
    content["updates"] = [
        e for e in content["updates"] if (e["site"], e["round"]) != ("north", last)
    ]
    (run / sign.EVIDENCE).write_bytes(canonical(content))
    (log,) = json.loads(
        [e for e in content["updates"] if e["site"] == "north"][-1]["said"]["events"]
    )
    report = json.loads((run / "report.json").read_text())
    report["rounds"][last - 1]["participants"].remove("north")
    steps = Steps(log["sigma"], log["q"], log["steps"], log["records"])
    spent = {"steps": log["steps"], "epsilon": epsilon([steps], 1e-4)}
    report["privacy"]["sites"]["north"] |= spent
    write_report(run, report)
    signed = json.loads((run / sign.SIGNATURE).read_text())
    sign.sign_files(run, SigningKey.at(world.root / "hub/coordinator/signing.key"), signed["ca"])


def was_frozen_while_kept(world: World, folder: str = "north-incident") -> None:
    """The log that was kept says that the ledger was frozen, and not yet lifted."""
    incident.check(world.root / folder)
    kept = [event for event, _ in world.events(f"{folder}/state")]
    assert kept[-2:] == ["freeze", "keep"]


def was_lifted(world: World) -> None:
    assert world.ledger().frozen is None
    assert ("lift", "--lift") in world.events("north/state")


def is_revoked(world: World, name: str) -> None:
    home = world.root / "hub" / "coordinator"
    assert [record.name for record in enrol.list_revoked(home)] == [name]


def is_distrusted(world: World) -> None:
    with pytest.raises(Refused, match="trusted no more"):
        check_trusted(world.ledger().folder, world.heard["consortium"])


def check_leak(world: World) -> None:
    was_frozen_while_kept(world)
    was_lifted(world)
    is_revoked(world, "north")
    hub = incident.check(world.root / "hub-incident")
    assert (hub.folder / "run" / sign.EVIDENCE).exists() and hub.files > 5
    assert "whole and signed by" in world.said("log north/site.toml --verify")
    assert "remains" in world.said("fedtune ledger north/site.toml").rpartition("FROZEN")[0]
    assert "as its own ledger has them" in world.said("verify", "--own")
    assert f"sha256       {hub.digest}" in world.said("evidence hub/coordinator")
    assert "as they were kept" in world.said("evidence north-incident")


def check_wrong(world: World) -> None:
    was_frozen_while_kept(world)
    was_lifted(world)
    told = re.search(r"states ε = (\S+) for it, this ledger paid ε = (\S+)", world.said("--own"))
    assert told and told[1] == told[2]
    assert json.loads((world.root / "audit" / "audit.json").read_text())["passed"]
    assert world.said("--event export") and world.said("--event release")


def check_leaves(world: World) -> None:
    is_revoked(world, "north")
    state = world.root / "north" / "state"
    assert not (state / "keys").exists() and not list(state.glob("outbox/*"))
    assert {"ledger.db", "steps.jsonl", "site.key"} <= {path.name for path in state.iterdir()}
    assert world.ledger().spending("records") and ("leave", "") in world.events("north/state")
    assert (world.root / "north-backup" / "ledger.db").exists()
    hospital = (world.root / "st-mary" / "hospital.toml").read_text()
    assert "[memberships.cardio]" not in hospital


def check_network_keys(world: World) -> None:
    home = world.root / "hub" / "coordinator"
    is_revoked(world, "north")
    now, (then,) = enrol.lookup(home, "north"), enrol.list_revoked(home)
    assert now and now.node != then.node and now.tls != then.tls and now.signing == then.signing


def check_signing_key(world: World) -> None:
    home = world.root / "hub" / "coordinator"
    is_revoked(world, "cardio-north")
    (then,) = enrol.list_revoked(home)
    assert all(record.signing != then.signing for record in enrol.registry(home).values())
    assert len(enrol.registry(home)) == 3
    site = load_site(world.site("cardio-2"))
    assert site.home == world.root / "st-mary"
    assert "[memberships.cardio]" not in (site.home / "hospital.toml").read_text()
    assert not (world.root / "cardio" / "state" / "keys").exists()
    incident.check(world.root / "cardio-incident")


def check_coordinator_key(world: World) -> None:
    incident.check(world.root / "hub-incident")
    was_lifted(world)
    is_distrusted(world)
    assert not (world.root / "north" / "state" / "keys").exists()


def check_lied(world: World) -> None:
    was_frozen_while_kept(world)
    was_lifted(world)
    is_distrusted(world)
    assert "lacks what this site released in rounds 2" in world.said("verify", "--own")
    assert (world.root / "north-incident" / "run" / sign.SIGNATURE).exists()
    assert "whole and signed by" in world.said("log", "--run")
    assert world.said("sha256sum")


PLAYS: dict[str, tuple[str, int, dict[str, int], Callable[[World], None], str]] = {
    "a leak": (LEAK, 0, {}, check_leak,
               "--freeze,revoke,evidence north/,evidence hub,--own,evidence north-,--lift"),
    "a wrong ε": (WRONG, 0, {}, check_wrong, "--freeze,evidence,--own,audit,--event,--lift"),
    "a site leaves": (LEAVES, 0, {}, check_leaves, "leave,revoke,--backup,purge,--end"),
    "lost network keys": (LOST, 0, {}, check_network_keys, "revoke,--new-keys,admit"),
    "a lost signing key": (LOST, 1, {}, check_signing_key, "revoke,evidence,--end,--add,enroll"),
    "the coordinator's key": (LOST, 2, {}, check_coordinator_key, "evidence,--distrust,--lift"),
    "a liar": (LIED, 0, {"--own": 3}, check_lied,
               "--freeze,evidence,--own,log,sha256sum,--distrust,--lift"),
}  # fmt: skip
SKIPPED = [(name, part) for name, play in PLAYS.items() for part in play[4].split(",")]


def test_every_table_of_the_page_is_played() -> None:
    """Twin: a table more is noticed, and a row with an empty cell."""
    there = [(heading, n) for heading, found in TABLES.items() for n, _ in enumerate(found)]
    assert there == [(heading, n) for heading, n, *_ in PLAYS.values()]
    more = tables(
        PAGE + f"\n## Another\n\n{HEAD}\n|---|---|---|---|---|\n| 1 h | a | b | c | d |\n"
    )
    assert len(more) == len(TABLES) + 1
    with pytest.raises(AssertionError, match="an empty cell"):
        tables(PAGE.replace("| the head that it prints |", "|  |"))


@pytest.mark.parametrize("name", PLAYS)
def test_a_scenario_is_played_by_the_pages_own_commands(name: str, world: World) -> None:
    heading, number, codes, check, _ = PLAYS[name]
    if heading == LIED:
        lie(world)
    world.play(TABLES[heading][number], codes)
    check(world)
    for done in world.done:  # for `pytest -rP`
        print(f"{done.seconds:5.1f} s  {' '.join(done.words)}")


@pytest.mark.long
@pytest.mark.parametrize(("name", "part"), SKIPPED)
def test_twin_a_step_that_is_skipped_is_noticed(name: str, part: str, world: World) -> None:
    heading, number, codes, check, _ = PLAYS[name]
    if heading == LIED:
        lie(world)
    with pytest.raises((AssertionError, FileNotFoundError, NotGenuine, pytest.fail.Exception)):
        world.play(without(TABLES[heading][number], part), codes)
        check(world)


def test_twin_evidence_that_was_changed_is_noticed(world: World) -> None:
    """By a byte, a file more, a file less, another key."""
    world.ok("evidence", "north/site.toml", "--to", "kept")
    kept = world.root / "kept"
    assert all(path.stat().st_mode & 0o777 == 0o400 for path in kept.rglob("*.jsonl"))
    assert not [p for p in kept.rglob("*") if p.name in ("salt", "site.key", "node.key", "tls.key")]
    log = kept / "state" / "audit.jsonl"

    def edited(copy: Path) -> None:
        (copy / "state" / "audit.jsonl").chmod(0o600)
        (copy / "state" / "audit.jsonl").write_bytes(log.read_bytes().replace(b"keep", b"kept"))

    def signed_anew(copy: Path) -> None:
        facts = json.loads((copy / incident.MANIFEST).read_text()) | {"noticed": "never"}
        (copy / incident.MANIFEST).chmod(0o600)
        (copy / incident.MANIFEST).write_bytes(canonical(facts))

    breaks = {
        "was changed": edited,
        "was added": lambda copy: (copy / "more").write_text(""),
        "is missing": lambda copy: (copy / "state" / "steps.jsonl").unlink(),
        "does not fit": signed_anew,
    }
    for number, (words, change) in enumerate(breaks.items()):
        copy = shutil.copytree(kept, world.root / f"copy-{number}")
        change(copy)
        done = world.type("fedtune", "evidence", copy.name)
        assert done.code == 2 and words in done.said, done.said
    assert world.type("fedtune", "evidence", "kept", "--signer", "00" * 32).code == 2
    assert world.type("fedtune", "evidence", "north/site.toml", "--to", "kept").code == 2
    noticed = ("--noticed", "2026-03-01T09:30:00Z")
    assert "72 hours     2026-03-04T09:30:00Z" in world.ok(
        "evidence", "north/site.toml", "--to", "more", *noticed
    )


def test_a_run_of_others_is_not_taken_for_ones_own(world: World) -> None:
    """Somebody else's key under this site's name, and an update that this ledger never released,
    contradict it. Twin: south's own run is its own."""
    verify = ("fedtune", "verify", "hub/runs/hub", "--trust", world.heard["consortium"], "--own")
    assert world.type(*verify, "south/site.toml").code == 0
    state = world.root / "south" / "state"
    (state / "ledger.db").unlink()
    world.ok("ledger", "south/site.toml", "--restore")  # by the step log, which has the rounds
    assert world.type(*verify, "south/site.toml").code == 0
    for path in (state / "ledger.db", state / "steps.jsonl"):
        path.unlink()
    world.ok("ledger", "south/site.toml", "--restore")  # exhausted: it knows no round any more
    done = world.type(*verify, "south/site.toml")
    assert done.code == 2 and "and its ledger released none" in done.said
    shutil.rmtree(state)
    world.ok("enroll", "south/site.toml", "--out", "again.request")
    done = world.type(*verify, "south/site.toml")
    assert done.code == 2 and "with a key that is not this site's" in done.said


def test_a_distrusted_consortium_is_not_joined_again(world: World) -> None:
    """By any answer of it, named on the command line or in site.toml. Twin: a site that only left
    may come back."""
    for extra, code in (((), 0), (("--distrust",), 3)):
        world.ok("leave", "north/site.toml", *extra)
        world.ok("revoke", "north", "--home", "hub/coordinator")
        world.ok("enroll", "north/site.toml", "--out", "north.request")
        world.ok("admit", "north.request", "--home", "hub/coordinator",
                 "--fingerprint", world.heard["request"])  # fmt: skip
        site = load_site(world.site())
        if code:
            with pytest.raises(Refused, match="trusted no more"):
                join(site, world.root / "north.answer", world.heard["consortium"])
        else:
            join(site, world.root / "north.answer", world.heard["consortium"])
            assert consortium_of(site) == world.heard["consortium"]
    world.site().write_text(
        world.site().read_text() + '\n[coordinator]\nanswer = "../north.answer"\n'
    )
    for cut in (0, 1):  # the log of a machine that lost power
        log = world.root / "north" / "state" / "audit.jsonl"
        log.write_bytes(log.read_bytes() + cut * b'{"event":"rel')
        with pytest.raises(Refused, match="trusted no more"):
            check_before_joining(load_site(world.site()))
    check_trusted(world.root / "north" / "state", "0000 0000 0000 0000 0000")


def test_the_page_names_no_command_twice_differently() -> None:
    """Each command of a table is one that `fedtune --help` knows, which playing it shows too."""
    assert {words[0] for words in commands(PAGE)} == {"fedtune", "sha256sum"}
