"""Metrics: the right figures, nothing about records, and this machine alone can read them."""

from __future__ import annotations

import math
import socket
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import prometheus_client
import pytest

from fedtune.core.config import load_site
from fedtune.core.dp import accountant
from fedtune.core.dp.accountant import Steps
from fedtune.core.errors import ConfigError, InfrastructureError
from fedtune.core.ledger.entries import Charge
from fedtune.core.ledger.ledger import Ledger
from fedtune.homes.known_homes import check_home
from fedtune.observe import metrics
from fedtune.observe.metrics import LedgerFigures, Metrics, serve
from tests.client.hospital_kit import make_hospital
from tests.observe.test_log import NOTE, ROUND

SITE = """
[site]
name = "north"
declared_size = 20
[data]
path = "north.jsonl"
columns = { text = "t" }
[policy]
max_epsilon = 8.0
max_delta = 1e-3
"""
ELSEWHERE = "127.0.0.2"  # reached only by a socket that is bound to more than 127.0.0.1


def read(found: Metrics) -> dict[str, float]:
    """name{labels} -> value, as a scrape gets it over HTTP."""
    assert found.port is not None
    with urllib.request.urlopen(f"http://127.0.0.1:{found.port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in rows}


def answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "site.toml").write_text(SITE)
    return tmp_path / "site.toml"


def test_a_coordinators_rounds_are_counted() -> None:
    found = Metrics("coordinator", port=0)
    try:
        found("start", {"rounds": 8, "done": 1, "private": True})
        found("round", ROUND)
        found("round", {**ROUND, "round": 3, "seconds": 20.0})
        seen = read(found)
    finally:
        found.close()
    assert seen["fedtune_rounds_done"] == 3 and seen["fedtune_rounds_planned"] == 8
    assert seen["fedtune_participants"] == 2
    assert seen['fedtune_missing_total{reason="no answer in time"}'] == 2
    assert seen['fedtune_bytes_total{direction="up"}'] == 420
    assert seen['fedtune_bytes_total{direction="down"}'] == 400
    assert seen["fedtune_round_seconds_sum"] == 32.5
    assert seen['fedtune_epsilon{site="north"}'] >= 1.23456789


ANSWERED = {"site": "north", "status": "trained", "epsilon": {"north": 1.0}}  # as a vault tells


def test_a_sites_budget_is_the_ledgers(site: Path) -> None:
    found = Metrics("site", port=0, site=site)
    try:
        assert not (site.parent / "state").exists()
        before = read(found)
        assert not (site.parent / "state").exists()  # a scrape begins no ledger
        assert before["fedtune_epsilon_remaining"] == 8.0
        ledger = Ledger(site.parent / "state")
        ledger.declare("records", [], "sha256:0", [b"ann"])
        for number in (1, 2):
            charge = Charge("s", "n", number, 1.1, 0.1, 3, 1, 1.0, "record", "first", 8.0)
            reserved = ledger.reserve("records", charge, str(number), lambda charges: None)
            if number == 1:
                ledger.release(reserved, b"update")
        found("joined", {"text": "connected; waiting for work"})
        found("refused", {"kind": NOTE})
        found("answered", ANSWERED)
        seen = read(found)
        found("reconnecting", {"seconds": 2.0, "text": "connecting again"})
        after = read(found)
    finally:
        found.close()
    epsilon = accountant.epsilon([Steps(1.1, 0.1, 6)], 1e-3)
    assert seen["fedtune_epsilon_spent"] == pytest.approx(epsilon)
    assert seen["fedtune_epsilon_remaining"] == pytest.approx(8 - epsilon)
    assert seen["fedtune_rounds_released"] == 1
    assert (seen["fedtune_connected"], after["fedtune_connected"]) == (1, 0)
    assert seen["fedtune_tasks_refused_total"] == 1
    assert not any("Ackroyd" in name for name in seen)


def test_a_sites_budget_of_shared_noise_also_holds_whatever_happens(site: Path) -> None:
    """The site's own noise is a third of the variance that its plan counts on."""
    ledger, found = Ledger(site.parent / "state"), Metrics("site", port=0, site=site)
    ledger.declare("records", [], "sha256:0", [b"ann"])
    shared = Charge("s", "n", 1, 1.1, 0.1, 3, 1, 1.0, "record", "first", 8.0, sites=4, colluding=1)
    ledger.release(ledger.reserve("records", shared, "1", lambda charges: None), b"update")
    try:
        found("answered", ANSWERED)
        seen = read(found)
    finally:
        found.close()
    planned = accountant.epsilon([Steps(1.1 * math.sqrt(3), 0.1, 3)], 1e-3)
    alone = accountant.epsilon([Steps(1.1, 0.1, 3)], 1e-3)
    assert planned < alone
    assert seen["fedtune_epsilon_spent"] == pytest.approx(planned)
    assert seen["fedtune_epsilon_remaining"] == pytest.approx(8 - planned)
    assert seen["fedtune_fallback_epsilon_spent"] == pytest.approx(alone)
    assert seen["fedtune_fallback_epsilon_remaining"] == pytest.approx(8 - alone)


def test_the_port_says_nothing_of_what_the_ledger_enters_of_records(site: Path) -> None:
    """Twin: a charge, which a plan and a person decide, is seen."""
    ledger, found = Ledger(site.parent / "state"), Metrics("site", port=0, site=site)
    try:
        ledger.declare("records", [], "sha256:0", [b"ann", b"bob"])
        before, entries = read(found), ledger.head.seq
        ledger.declare("records", [], "sha256:1", [b"ann", b"bob", b"eve"])
        ledger.withdraw(b"bob")
        assert ledger.head.seq == entries + 2
        found("answered", ANSWERED)
        assert read(found) == before | {"fedtune_connected": 1}
        charge = Charge("s", "n", 1, 1.1, 0.1, 3, 1, 1.0, "record", "first", 8.0)
        ledger.reserve("records", charge, "1", lambda charges: None)
        found("answered", ANSWERED)
        assert read(found) != before | {"fedtune_connected": 1}
    finally:
        found.close()


def test_a_memberships_port_shows_no_other_memberships_spending(tmp_path: Path) -> None:
    """Its courier would subtract what its own coordinator's studies cost, and so learn that the
    hospital is in another consortium, and when a round ran there. Twin: its own charge is seen."""
    files = make_hospital(tmp_path, shares=(8.0, 3.0))
    ledger, found = Ledger(tmp_path), Metrics("site", port=0, site=files["onco"])
    ledger.declare("records", [], "sha256:0", [b"ann"])
    charge = Charge("s", "n", 1, 1.1, 0.1, 3, 1, 1.0, "patient", "first", 8.0)
    try:
        before = read(found)
        assert before["fedtune_epsilon_remaining"] == 3.0  # of its share

        def pay(membership: str) -> dict[str, float]:
            paid = replace(charge, study=membership, membership=membership)
            reserved = ledger.reserve("records", paid, "1", lambda charges: None)
            ledger.release(reserved, b"update")
            found("answered", ANSWERED)
            return read(found) | {"fedtune_connected": before["fedtune_connected"]}

        assert pay("cardio") == before
        after = pay("onco")
    finally:
        found.close()
    assert after["fedtune_rounds_released"] == 1
    epsilon = accountant.epsilon([Steps(1.1, 0.1, 3)], load_site(files["onco"]).policy.delta)
    assert after["fedtune_epsilon_spent"] == pytest.approx(epsilon)
    assert after["fedtune_epsilon_remaining"] == pytest.approx(3 - epsilon)


def test_the_port_says_that_the_ledger_is_not_mounted(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that nothing was spent."""
    monkeypatch.setenv("XDG_STATE_HOME", str(site.parent / "xdg"))
    state = site.parent / "state"
    Ledger(state)
    check_home(load_site(site))
    state.rename(site.parent / "volume")
    state.mkdir()
    found = Metrics("site", port=0, site=site)
    try:
        seen = read(found)
    finally:
        found.close()
    assert seen["fedtune_ledger_readable"] == 0 and "fedtune_epsilon_spent" not in seen
    assert not any(state.iterdir())


def test_a_scrape_does_not_read_the_ledger(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it takes would tell of an entry more. Twin: after an answer it was read."""
    Ledger(site.parent / "state").declare("records", [], "sha256:0", [b"ann"])
    found, honest = Metrics("site", port=0, site=site), LedgerFigures._figures
    reads: list[int] = []

    def figures(self: LedgerFigures) -> dict[str, tuple[str, float]]:
        reads.append(1)
        return honest(self)

    monkeypatch.setattr(LedgerFigures, "_figures", figures)
    try:
        for _ in range(3):
            read(found)
            found("answered", {"kind": "train", "text": "by a courier, of nothing"})
        assert not reads
        found("answered", ANSWERED)
        assert len(reads) == 1
    finally:
        found.close()


def test_a_ledger_that_cannot_be_believed_gives_no_figure(site: Path) -> None:
    Ledger(site.parent / "state")
    (site.parent / "state" / "ledger.head").write_bytes(b"{}")
    found = Metrics("site", port=0, site=site)
    try:
        seen = read(found)
    finally:
        found.close()
    assert seen["fedtune_ledger_readable"] == 0 and "fedtune_epsilon_spent" not in seen


@pytest.mark.parametrize("role", ["coordinator", "site"])
def test_nothing_that_counts_records_is_exported(role: Any, site: Path) -> None:
    found = Metrics(role, site=site)
    names = {family.name for family in found.registry.collect()}
    assert names
    for word in ("reject", "record", "sample", "loss", "norm", "units", "size", "batch"):
        assert not any(word in name for name in names)


def check_loopback() -> None:
    found = Metrics("coordinator", port=0)
    try:
        assert found.port and answers("127.0.0.1", found.port)
        assert not answers(ELSEWHERE, found.port)
    finally:
        found.close()


def test_metrics_are_on_loopback_alone() -> None:
    check_loopback()
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(ConfigError, match="no password"):
            serve(prometheus_client.CollectorRegistry(), 0, host)


def test_twin_a_server_on_every_address_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = prometheus_client.start_http_server
    monkeypatch.setattr(
        prometheus_client,
        "start_http_server",
        lambda port, addr, registry: real(port, addr="0.0.0.0", registry=registry),
    )
    with pytest.raises(AssertionError):
        check_loopback()


def test_a_port_that_is_taken_and_a_library_that_is_missing_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = Metrics("coordinator", port=0)
    try:
        with pytest.raises(InfrastructureError, match="metrics-port"):
            Metrics("coordinator", port=first.port)
    finally:
        first.close()
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"fedtune\[metrics\]"):
        metrics.Metrics("coordinator", port=0)
