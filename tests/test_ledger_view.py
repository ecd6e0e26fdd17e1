"""What `fedtune ledger` prints is never more room than there is."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fedtune.cli.ledger_view import ledger_view
from fedtune.core.config import PolicyTable
from fedtune.core.dp import accountant
from fedtune.core.ledger.entries import RULES, Charge
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.ledger.spending import budget, study_lines

STUDY = "sha256:" + "5d" * 32


def charge(round_: int, study: str = STUDY, sigma: float = 1.1) -> Charge:
    return Charge(study, "gait [bold]", round_, sigma, 0.1, 3, 1, 1.0, "record", "first", 8.0)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "state")
    ledger.declare("notes", [], "sha256:0", [b"ann"])
    return ledger


def reserve(ledger: Ledger, done: Charge, release: bool = True) -> None:
    number = ledger.reserve("notes", done, str(done.round), lambda charges: None)
    if release:
        ledger.release(number, b"update")


def printed(ledger: Ledger, policy: PolicyTable) -> str:
    console = Console(width=160, record=True, file=io.StringIO())

    console.print(ledger_view(ledger, "notes", policy))
    return console.export_text()


def test_an_unused_ledger_has_the_whole_budget(ledger: Ledger) -> None:
    text = printed(ledger, PolicyTable(max_epsilon=8.0))
    assert "budget of notes" in text and "studies" not in text
    assert text.split("remains")[1].split()[0] == "8"


def test_a_study_is_one_line_with_its_own_epsilon(ledger: Ledger) -> None:
    for round_, release in ((1, True), (2, False), (2, True)):
        reserve(ledger, charge(round_), release)
    (line,) = study_lines(ledger.spending("notes"), 1e-5)
    assert (line.rounds, line.charged, line.released, line.steps) == (2, 3, 2, 9)
    assert line.epsilon == accountant.epsilon([accountant.Steps(1.1, 0.1, 9)], 1e-5)
    text = printed(ledger, PolicyTable())
    assert "gait [bold]" in text and "5d5d5d5d" in text


def test_what_nobody_knows_is_shown_so_until_and_after_somebody_accepts_it(ledger: Ledger) -> None:
    reserve(ledger, replace(charge(1), rules=RULES - 1))
    reserve(ledger, charge(2))
    text = " ".join(printed(ledger, PolicyTable()).split())
    assert "not known" in text and "1 of the rounds above cost one record" in text
    assert "charged by an earlier release" in text and "--accept notes" in text
    ledger.accept("notes", "officer", "nobody joined since")
    text = " ".join(printed(ledger, PolicyTable()).split())
    assert "not known" in text and "--accept" not in text
    assert "Accepted by officer" in text and "nobody joined since" in text


def test_what_remains_is_rounded_down_and_never_negative(ledger: Ledger) -> None:
    reserve(ledger, charge(1))
    spent = ledger.spending("notes")
    roomy = budget("notes", spent, PolicyTable(max_epsilon=8.0))
    assert roomy.remaining == 8.0 - roomy.epsilon > 0
    assert float(printed(ledger, PolicyTable()).split("remains")[1].split()[0]) <= roomy.remaining
    more = "one with a larger ε may fit"  # since ε of several studies is less than their sum
    assert more in " ".join(printed(ledger, PolicyTable()).split())
    assert budget("notes", spent, PolicyTable(max_epsilon=0.01)).remaining == 0
    spent_up = " ".join(printed(ledger, PolicyTable(max_epsilon=0.01)).split())
    assert "nothing more runs" in spent_up and more not in spent_up


def test_a_study_without_privacy_leaves_nothing(ledger: Ledger) -> None:
    reserve(ledger, charge(1, sigma=0.0))
    text = printed(ledger, PolicyTable())
    assert "∞ (not private)" in text and "nothing more runs" in text


def test_two_kinds_of_steps_are_held_by_the_filter(ledger: Ledger) -> None:
    pytest.importorskip("fedtune.core.dp.filter")
    reserve(ledger, charge(1))
    assert "planned at once" not in printed(ledger, PolicyTable())  # one ε, where there is one
    reserve(ledger, charge(1, "sha256:" + "ab" * 32, sigma=2.0))
    assert "planned at once" in printed(ledger, PolicyTable())
    found = budget("notes", ledger.spending("notes"), PolicyTable())
    assert "filter" in found.how and found.epsilon >= found.pld > 0
    assert len(study_lines(ledger.spending("notes"), 1e-3)) == 2
