"""With shared noise a person lets a draw go before it is made, so that no other site is left with
one that nobody masks."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import Site, load_site
from fedtune.core.ledger.files import ASKED
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry import process_cache
from fedtune.core.secagg.statement import parse, set_text
from fedtune.core.vault import airlock
from fedtune.core.vault.answers import Place, answer
from fedtune.core.vault.worker import worker
from fedtune.core.wire.arrays import bodies, pack_arrays
from fedtune.core.wire.codec import encode
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.protocol import version_fields
from fedtune.core.wire.requests import Answer, Request
from fedtune.core.wire.seal import digest_beside, order, sign_plan
from fedtune.officer.let_go import DRAW, decide, list_waiting
from fedtune.public.start import Start, start
from tests.secagg.world import lay_out


@dataclass
class Round:
    """A coordinator's first round with sites that pin each other; north's answers wait."""

    made: Start
    sites: list[Path]
    key: SigningKey = field(default_factory=SigningKey)
    attempt: int = 1

    def prepare(self, path: Path) -> str:
        study = self.made.study
        plan = {"study": study.model_dump_json(), "digest": study.digest}
        plan |= {**sign_plan(self.key, study.digest), **version_fields()}
        arrays = pack_arrays(self.made.frozen)
        return answer(Place(str(path)), Request("prepare", {"plan": plan}, arrays)).status

    def ready(self, path: Path) -> Answer:
        asked = json.dumps([Ledger(load_site(p).site.state).key.public for p in self.sites])
        arrays = pack_arrays(encode(self.made.adapter, self.made.study.wire.adapter))
        return self._ask("ready", path, {"asked": asked}, arrays)

    def masked(self, path: Path, statements: list[str]) -> Answer:
        text = set_text([parse(statement) for statement in statements])
        return self._ask("masked", path, {"statements": text}, {})

    def _ask(self, kind: Any, path: Path, table: dict[str, str], arrays: Any) -> Answer:
        plan = f"{self.made.study.digest}:{kind}"
        beside = digest_beside(bodies(arrays), table)
        signed = order(self.key, plan, 1, "0" * 32, "", self.attempt, beside=beside)
        return answer(Place(str(path)), Request(kind, {"order": signed, "set": table}, arrays))


@pytest.fixture
def round_(tmp_path: Path, tiny_base: Path) -> Round:
    study, sites = lay_out(tmp_path, tiny_base, epsilon=8.0)
    process_cache.clear("workers")
    keys = [Ledger(site.site.state).key.public for site in sites]
    paths = []
    for site in sites:
        assert site.file
        text = site.file.read_text().replace("[policy]\n", f"[policy]\npeers = {keys}\n")
        if site.site.name == "north":
            text = text.replace("[policy]\n", '[policy]\nanswers = "held"\n')
        site.file.write_text(text)
        paths.append(site.file)
    made = Round(start(study), paths)
    assert [made.prepare(path) for path in paths] == ["admitted"] * 3
    return made


def at(path: Path) -> Site:
    return load_site(path)


def test_a_draw_waits_before_it_is_made_and_paid_for(round_: Round) -> None:
    """Twin: the other two, whose answers do not wait, are ready at once."""
    north, *others = round_.sites
    statements = [str(round_.ready(path).fields["ready"]) for path in others]
    ledger, log = Ledger(at(north).site.state), worker(str(north)).log
    for _ in range(2):
        reply = round_.ready(north)
        assert reply.status == "waiting" and "ready" not in reply.fields
    assert ledger.charges("records") == [] and log.steps() == []
    (shown,) = list_waiting(at(north))
    assert (shown.kind, shown.round, shown.study) == (DRAW, 1, round_.made.study.study.name)
    decide(at(north), [shown.name], refuse=False)
    reply = round_.ready(north)
    assert reply.status == "ready" and list_waiting(at(north)) == []
    statements.insert(0, str(reply.fields["ready"]))
    words = [round_.masked(path, statements) for path in round_.sites]
    assert [sent.status for sent in words] == ["masked"] * 3
    assert len(Ledger(at(north).site.state).charges("records")) == 1
    assert abs(shown.size - len(words[0].arrays["values"].data)) < 1000  # a header besides


def test_another_attempt_is_another_draw_and_waits_anew(round_: Round) -> None:
    north = round_.sites[0]
    round_.ready(north)
    decide(at(north), [], refuse=False, every=True)
    assert round_.ready(north).status == "ready"
    round_.attempt = 2
    assert round_.ready(north).status == "waiting"
    assert len(Ledger(at(north).site.state).charges("records")) == 1


def test_a_refused_draw_costs_nothing_and_is_never_made(round_: Round) -> None:
    north = round_.sites[0]
    round_.ready(north)
    decide(at(north), [], refuse=True, every=True)
    assert round_.ready(north).status == "void" and list_waiting(at(north)) == []
    assert Ledger(at(north).site.state).charges("records") == []


def test_a_restart_keeps_what_waits_and_what_was_let_go(round_: Round) -> None:
    north = round_.sites[0]
    round_.ready(north)
    process_cache.clear("workers")
    assert round_.prepare(north) == "admitted" and len(list_waiting(at(north))) == 1
    decide(at(north), [], refuse=False, every=True)
    process_cache.clear("workers")
    assert round_.prepare(north) == "admitted" and round_.ready(north).status == "ready"


def test_draws_that_nobody_pays_for_take_no_more_than_their_room(
    round_: Round, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any number may be asked for: the oldest notes go, and the ledger grows by nothing."""
    monkeypatch.setattr(airlock, "MOST", 3)
    north = round_.sites[0]
    before = Ledger(at(north).site.state).head
    for attempt in range(1, 7):
        round_.attempt = attempt
        assert round_.ready(north).status == "waiting"
        for age, path in enumerate(sorted((at(north).site.state / ASKED).iterdir())):
            assert path.stat().st_mode & 0o777 == 0o600
            os.utime(path, (age, age))
    assert len(list_waiting(at(north))) == 3
    assert Ledger(at(north).site.state).head == before
