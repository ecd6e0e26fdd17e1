"""Every field that leaves a site, or reaches it, in a round whose sum alone is opened; and none of
it tells how many patients there are, or what their records say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import Site
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry import process_cache
from fedtune.core.secagg.statement import Ready, parse
from fedtune.core.vault import secure_round
from fedtune.core.vault.prepared import Update
from fedtune.flower import api
from fedtune.flower.grid import InProcessGrid, decode
from fedtune.launch.in_one_process import app
from fedtune.server import rounds
from fedtune.server.parts import Dependencies, Settings
from tests.guarantee.test_wire_inventory import ALLOWED, FROM_THE_PLAN, HEADER
from tests.guarantee.world import leaves
from tests.secagg.world import lay_out

READY = {"plan", "round", "attempt", "adapter", "site", "size", "signing", "masking", "noise"}
READY |= {"signature"}
MORE = {
    "train.ready": {"site.ready": "str"},
    "train.masked": {"site.set": "str"},
    "query.prepare": {},
}
ORDERS = {
    "train.ready": {"order", "adapter", "set"},
    "train.masked": {"order", "set"},
    "query.prepare": {"plan", "frozen"},
}
SAID = {"train.ready": {"asked"}, "train.masked": {"statements"}}
ORDER = {"plan", "round", "nonce", "receipt", "beside", "attempt", "signature"}


class Recorder(InProcessGrid):
    def __init__(self, sites: list[Site]) -> None:
        keys = " ".join(Ledger(site.site.state).key.public for site in sites)
        super().__init__([site.file for site in sites if site.file], app, peers=keys)
        self.sent: list[tuple[Any, Any]] = []

    def _answer(self, message_bytes: bytes) -> Any:
        reply = super()._answer(message_bytes)
        self.sent.append((decode(message_bytes), reply))
        return reply


def run(folder: Path, base: Path, rows: list[Any] | None = None) -> Recorder:
    study, sites = lay_out(folder, base, epsilon=8.0)
    if rows is not None:
        text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
        (folder / "north.jsonl").write_text(text)
    process_cache.clear("workers")
    grid = Recorder(sites)
    parts = Dependencies(settings=Settings(patience=0.0, pause=0.0))
    rounds.run(grid, study, folder / "run", parts=parts)
    return grid


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Recorder:
    return run(tmp_path_factory.mktemp("usual"), tiny_base)


def test_nothing_leaves_but_what_the_list_names(usual: Recorder) -> None:
    dimension = None
    for asked, reply in usual.sent:
        kind = asked.metadata.message_type
        for path, what in leaves(reply):
            if path.startswith("update/"):
                assert kind == "train.masked" and path == "update/values"
                assert what.startswith("uint32 (") and what == (dimension := dimension or what)
            elif path != "metadata.message_type":
                assert (ALLOWED | MORE[kind]).get(path) == what, path
        if kind == "train.ready":
            assert set(json.loads(reply.content["site"]["ready"])) == READY
            assert not reply.content["ready"]
        if kind != "query.prepare":
            assert set(json.loads(reply.content["site"]["header"])) == HEADER
            for event in json.loads(reply.content["site"]["events"]):
                assert set(event) == FROM_THE_PLAN
    assert len(usual.sent) == 3 + 2 * 2 * 3 + 3  # the last: that the study has ended


def test_nothing_reaches_a_site_but_what_the_list_names(usual: Recorder) -> None:
    for asked, _ in usual.sent:
        kind = asked.metadata.message_type
        ended = kind == "query.prepare" and asked.content["plan"].get("finished")
        assert set(asked.content) == ({"plan"} if ended else ORDERS[kind])
        if kind in SAID:
            assert set(asked.content["order"]) == ORDER
            assert set(asked.content["set"]) == SAID[kind]


def shape(grid: Recorder) -> list[Any]:
    """What an observer sees but for keys, nonces, signatures and words: of those the size."""
    seen: list[Any] = []
    for asked, reply in grid.sent:
        facts: dict[str, Any] = dict(leaves(reply))
        facts["size"] = len(api.message_to_proto(reply).SerializeToString())
        for record in ("admission", "site"):
            for name, value in reply.content.get(record, {}).items():
                if name not in ("key", "header", "signature", "ready", "set"):
                    facts[f"{record}.{name}"] = str(value)
        if asked.metadata.message_type == "train.ready":
            facts["ready"] = said(parse(reply.content["site"]["ready"]))
        seen.append(facts)
    return seen


def said(ready: Ready) -> tuple[Any, ...]:
    return ready.draw.round, ready.draw.attempt, ready.site, ready.size, ready.noise


def patients(count: int) -> list[Any]:
    return [
        {"q": f"fever on day {n}", "a": f"answer {n % 5}", "who": f"p{n}"} for n in range(count)
    ]


VARIANTS: dict[str, Callable[[], list[Any]]] = {
    "nobody": lambda: [],
    "many more than declared": lambda: patients(90),
    "rejected records": lambda: [*patients(6), "not JSON", '{"q": NaN, "who": "p"}', {"who": "p"}],
}


@pytest.mark.parametrize("how", VARIANTS)
def test_the_wire_looks_the_same_whatever_the_records(
    usual: Recorder, tmp_path: Path, tiny_base: Path, how: str
) -> None:
    assert shape(run(tmp_path, tiny_base, VARIANTS[how]())) == shape(usual)


def test_a_site_that_counts_is_caught(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: one more field, with how many steps a site logged."""
    honest = secure_round._build_statement

    def stated(text: str, events: str) -> Update:
        told = honest(text, events)
        return Update(told.delta, told.events, {**told.said, "units": str(len(events))})

    monkeypatch.setattr(secure_round, "_build_statement", stated)
    with pytest.raises(AssertionError, match="units"):
        test_nothing_leaves_but_what_the_list_names(run(tmp_path, tiny_base))
