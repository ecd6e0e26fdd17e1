"""Several studies of one coordinator, over fake sites: their order, and that none touches another.
With real sites and processes: tests/network/test_several.py."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtune.cli.several import deadlines_of
from fedtune.core.config import Study
from fedtune.core.errors import ConfigError, InfrastructureError, Refused
from fedtune.core.vault.prepared import Admission
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.seal import Header, seal
from fedtune.flower.ports import free_port
from fedtune.launch import side_by_side
from fedtune.launch.side_by_side import Entry, Outcome, check_together, serve_all
from fedtune.observe import observer
from fedtune.observe.home_status import HomeStatus
from fedtune.observe.status import read_status
from fedtune.server import rounds
from fedtune.server.turns import DeadlinePassed, Turn, Turns
from tests.server.fakes import FakeSite, Trial, make_parts, make_study

ROUNDS = 4  # of each study of make_study


@dataclass
class Particular(FakeSite):
    """Refuses the study of one name."""

    refuses: str = "greedy"

    def prepare(self, study: Study, frozen: dict[str, np.ndarray], coordinator: str) -> Admission:
        if study.study.name == self.refuses:
            return Admission(False, "policy.max_epsilon_per_study", self.name, self.size)
        return super().prepare(study, frozen, coordinator)


@dataclass
class Coordinator:
    """A server without a network: studies by name, over the sites of a trial.

    hear: called with the study's name, an event and its facts, in the study's thread."""

    make: Callable[..., Trial]
    hear: Callable[[str, str, dict[str, Any]], None] = lambda *_: None
    order: list[str] = field(default_factory=list)  # the study of each round that was kept
    ended: list[str] = field(default_factory=list)
    deadlines: dict[str, float] = field(default_factory=dict)
    link: Any = None  # the process of the SuperLink

    def sites(self, *sites: FakeSite) -> None:
        self.trial = self.make(*sites, folder=f"trial of {type(sites[1]).__name__}")

    @property
    def home(self) -> Path:
        return self.trial.folder / "coordinator"

    def run(self, *names: str, at_once: int = 1, resume: bool = False) -> dict[str, Outcome]:
        status = HomeStatus(self.home)
        entries = [self._entry(status, name, resume) for name in names]
        with status_of(status):
            outcomes = serve_all(
                entries,
                port=free_port(),
                home=self.home,
                at_once=at_once,
                on_event=status,
                on_end=lambda outcome: self.ended.append(outcome.entry.name),
            )
        return {outcome.entry.name: outcome for outcome in outcomes}

    def _entry(self, status: HomeStatus, name: str, resume: bool) -> Entry:
        study = make_study(min_sites=3)
        study = study.model_copy(update={"study": study.study.model_copy(update={"name": name})})
        out = self.trial.folder / "runs" / name
        row, then = status.study(name), partial(self._hear, name)
        opened = partial(observer, "coordinator", out, then=then, more=[row])
        deadline = self.deadlines.get(name, float("inf"))
        return Entry(study, out, opened, resume, deadline)

    def _hear(self, name: str, event: str, facts: dict[str, Any]) -> None:
        if event == "round":
            self.order.append(name)
        self.hear(name, event, facts)


@contextmanager
def status_of(status: HomeStatus) -> Iterator[None]:
    try:
        yield
    finally:
        status.close()


@pytest.fixture
def server(trial: Any, monkeypatch: pytest.MonkeyPatch) -> Coordinator:
    """A coordinator and three sites, of which one refuses the study named greedy."""
    made = Coordinator(trial)
    made.sites(Particular("a"), FakeSite("b"), FakeSite("c"))
    ended = InfrastructureError("flower-superlink ended by itself")
    made.link = SimpleNamespace(alive=True, build_end_error=lambda: ended)

    @contextmanager
    def consortium(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(child=made.link)

    def run_study(link: Any, home: Path, run: Any, study: Study, out: Path, **how: Any) -> Any:
        return run(made.trial.grid(), study, out, **how)

    def installed(home: Path, members: Any, terms: Any, turn: Turn) -> Any:
        key = SigningKey.at(home / "signing.key")
        parts = make_parts(key=key, turn=turn, receipts=home / "receipts.json")
        return partial(rounds.run, parts=parts)

    monkeypatch.setattr(side_by_side, "consortium", consortium)
    monkeypatch.setattr(side_by_side, "run_study", run_study)
    monkeypatch.setattr(side_by_side, "installed_rounds", installed)
    return made


def longest_wait(order: list[str]) -> int:
    """The most rounds of others between two rounds of a study."""
    places = {name: [n for n, found in enumerate(order) if found == name] for name in {*order}}
    return max(b - a - 1 for at in places.values() for a, b in pairwise(at))


def test_rounds_of_several_studies_take_turns(server: Coordinator) -> None:
    names = ["alpha", "beta", "gamma"]
    outcomes = server.run(*names, at_once=3)
    assert all(outcome.report for outcome in outcomes.values())
    assert server.order == names * ROUNDS and longest_wait(server.order) == 2
    assert server.ended == names


def test_studies_whose_threads_start_late_take_turns_in_the_order_given(
    server: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_slowly(thread: threading.Thread, start: Any = threading.Thread.start) -> None:
        start(thread)
        time.sleep(0.2)  # a study that need not wait for the others is done by then

    monkeypatch.setattr(threading.Thread, "start", start_slowly)
    server.run("alpha", "beta", at_once=2)
    assert server.order == ["alpha", "beta"] * ROUNDS


def test_the_twin_that_passes_no_turn_on_is_unfair(
    server: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.server.turns.SharedTurn.pass_on", lambda turn: None)
    server.run("alpha", "beta", at_once=2)
    assert server.order == ["alpha"] * ROUNDS + ["beta"] * ROUNDS


def test_a_queue_runs_in_the_order_given(server: Coordinator) -> None:
    server.run("gamma", "alpha", "beta")
    assert server.order == ["gamma"] * ROUNDS + ["alpha"] * ROUNDS + ["beta"] * ROUNDS


def test_the_next_of_a_queue_begins_when_one_has_ended(server: Coordinator) -> None:
    server.run("alpha", "beta", "gamma", at_once=2)
    assert server.order[: 2 * ROUNDS - 1] == (["alpha", "beta"] * ROUNDS)[:-1]
    assert server.order[-3:] == ["gamma"] * 3


def test_one_that_is_refused_or_raises_does_not_touch_the_others(server: Coordinator) -> None:
    def hear(name: str, event: str, facts: dict[str, Any]) -> None:
        if name == "faulty" and event == "round":
            raise ZeroDivisionError("a fault")

    server.hear = hear
    outcomes = server.run("alpha", "greedy", "faulty", "beta", at_once=4)
    assert isinstance(outcomes["greedy"].error, Refused)
    assert isinstance(outcomes["faulty"].error, ZeroDivisionError)
    whole = [name for name in server.order if name != "faulty"]
    assert whole == ["alpha", "beta"] * ROUNDS and server.order.count("faulty") == 1
    rows = read_status(server.home).studies
    assert list(rows) == ["alpha", "greedy", "faulty", "beta"]
    assert [row.state for row in rows.values()] == ["done", "stopped", "stopped", "done"]
    assert rows["greedy"].status["error"] == "Refused" and rows["alpha"].status["round"] == ROUNDS
    assert rows["greedy"].status["sites"] == {
        "a": {"status": "refused", "reason": "policy.max_epsilon_per_study"}
    }
    assert rows["alpha"].status["epsilon"] > 0


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_signal_ends_all_and_resume_goes_on_with_all(server: Coordinator, at_once: int) -> None:
    def stop(name: str, event: str, facts: dict[str, Any]) -> None:
        if len(server.order) == 2 and event == "round":
            os.kill(os.getpid(), signal.SIGINT)
            while threading.current_thread() is not threading.main_thread():
                time.sleep(0.001)  # until the signal is raised here

    names, server.hear = ["alpha", "beta", "gamma"], stop
    with pytest.raises(KeyboardInterrupt):
        server.run(*names, at_once=at_once)
    assert len(server.order) == 2 and server.ended == []
    rows = read_status(server.home).studies
    begun = ["alpha"] if at_once == 1 else names
    for name, row in rows.items():
        state = ("stopped", "stopped by SIGINT") if name in begun else ("queued", None)
        assert (row.state, row.status.get("reason")) == state
    assert not list(server.trial.folder.rglob("lock"))
    server.hear = lambda *_: None
    outcomes = server.run(*names, at_once=at_once, resume=True)
    assert all(outcome.report for outcome in outcomes.values())
    assert all(server.order.count(name) == ROUNDS for name in names)


@pytest.mark.parametrize("at_once", [1, 2])
def test_no_study_begins_once_the_superlink_has_ended(server: Coordinator, at_once: int) -> None:
    def end(name: str, event: str, facts: dict[str, Any]) -> None:
        server.link.alive = server.link.alive and event != "done"

    server.hear = end
    with pytest.raises(InfrastructureError, match="flower-superlink ended"):
        server.run("alpha", "beta", "gamma", "delta", at_once=at_once)
    assert not {"gamma", "delta"} & {*server.order} and server.ended[0] == "alpha"


def test_a_study_ends_at_its_deadline_and_its_rounds_are_kept(server: Coordinator) -> None:
    """Twin: with a later one it goes on."""
    moments = iter([0.0] * 5 + [2e9] * 99)
    server.deadlines["alpha"] = 1e9
    server.hear = lambda name, event, facts: None
    real = time.time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedtune.server.turns.time", SimpleNamespace(time=lambda: next(moments)))
        outcomes = server.run("alpha", "beta", at_once=2)
    error = outcomes["alpha"].error
    assert isinstance(error, DeadlinePassed) and "2001-09-09T01:46:40Z" in str(error)
    assert outcomes["beta"].report and 0 < server.order.count("alpha") < ROUNDS
    assert read_status(server.home).studies["alpha"].status["error"] == "DeadlinePassed"
    server.deadlines["alpha"] = real() + 3600
    assert server.run("alpha", resume=True)["alpha"].report
    assert server.order.count("alpha") == ROUNDS


@dataclass
class Counting(FakeSite):
    """Numbers its ledger's entries, over all studies, where a coordinator can read it."""

    entries: int = 0

    def sealed(self, digest: str, round_: int, nonce: str, body: str) -> dict[str, str]:
        self.entries += 1
        ledger = {"token": str(self.entries)}
        header = Header(digest, round_, self.base, self.name, self.coordinator, nonce, body, ledger)
        return seal(self.key, header)

    @property
    def sent(self) -> list[int]:
        """The entry of the receipt with each order, 0 if it had none."""
        return [int(json.loads(text)["token"]) if text else 0 for text in self.receipts]


@pytest.mark.parametrize("is_twin", [False, True])
def test_an_order_carries_a_sites_newest_receipt_of_all_studies(
    server: Coordinator, monkeypatch: pytest.MonkeyPatch, is_twin: bool
) -> None:
    """Twin: a study that knows its own alone. A site that was restored from an old copy would learn
    later what it lacks."""
    if is_twin:
        own = lambda run, name: run.progress.receipts.get(name)  # noqa: E731
        monkeypatch.setattr(rounds._Run, "_receipt", own)
    site = Counting("b")
    server.sites(Particular("a"), site, FakeSite("c"))
    server.run("alpha", "beta", at_once=2)
    assert (site.sent == list(range(2 * ROUNDS))) is not is_twin


def test_a_study_that_is_resumed_keeps_no_older_receipt(server: Coordinator) -> None:
    site = Counting("b")
    server.sites(Particular("a"), site, FakeSite("c"))

    def stop(name: str, event: str, facts: dict[str, Any]) -> None:
        if (name, event, facts.get("round")) == ("alpha", "round", 2):
            raise ZeroDivisionError("a fault")

    server.hear = stop
    server.run("alpha", "beta")
    newest = 2 + ROUNDS
    assert site.entries == newest
    server.hear = lambda *_: None
    server.run("alpha", resume=True)
    assert site.sent == list(range(newest + ROUNDS - 2))


def test_studies_that_cannot_run_together_are_refused() -> None:
    plain = make_study()
    endless = SimpleNamespace(study=SimpleNamespace(name="watch"), continuous=True)
    with pytest.raises(ConfigError, match="two studies are named trial"):
        check_together([plain, plain], 2)
    with pytest.raises(ConfigError, match=r"watch has a \[schedule\] .*--at-once 2"):
        check_together([plain, endless], 1)  # type: ignore[list-item]
    check_together([plain, endless], 2)  # type: ignore[list-item]


def test_deadlines_are_of_one_study_or_of_all() -> None:
    names, day = ["gait", "ward"], datetime(2031, 5, 4, 9, 30, tzinfo=UTC).timestamp()
    assert deadlines_of([], names) == dict.fromkeys(names, math.inf)
    given = ["2031-05-05T09:30Z", "ward=2031-05-04T11:30+02:00"]
    assert deadlines_of(given, names) == {"gait": day + 86_400, "ward": day}
    for wrong in ("tomorrow", "2031-05-04T09:30", "else=2031-05-04T09:30Z"):
        with pytest.raises(ConfigError, match="TIME or STUDY=TIME"):
            deadlines_of([wrong], names)


def test_who_pauses_keeps_nobody_waiting_and_comes_back_last() -> None:
    turns, seen = Turns(), list[str]()
    first, second = turns.line_up(), turns.line_up()

    def work() -> None:
        with second as turn:
            seen.append("second")
            turn.pass_on()
            seen.append("second again")

    with first as turn:
        other = threading.Thread(target=work)
        other.start()
        seen.append("first")
        turn.pause(0.0)
        seen.append("first again")
    other.join()
    assert seen == ["first", "second", "first again", "second again"]
