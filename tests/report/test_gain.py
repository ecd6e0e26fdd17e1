"""What the sites' records added to public text stands wherever a run's quality is shown, in the
same words, and so does what is released."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from starlette.testclient import TestClient

from fedtune import report as reports
from fedtune.cli.console import closing
from fedtune.dashboard.kinds import page_of
from fedtune.dashboard.server import app_of
from fedtune.evidence.dossier import content as dossier_content
from fedtune.evidence.dossier.card import card
from fedtune.evidence.dossier.facts import documents, find_contradiction
from fedtune.evidence.dossier.markdown import markdown
from fedtune.evidence.dossier.page import page
from fedtune.report import gain, plot
from fedtune.runs.run import Run

WORDS = {
    "better than": [0.25, 0.5],
    "not told apart from": [-0.5, 0.25],
    "worse than": [-0.5, -0.25],
}
DECISION = {"model": "start", "why": "it is better", "metric": "accuracy", "records": 40}
DECISION |= {"start": 0.5, "trained": 0.25}


def quality(
    change: list[float], start: bool = True, decision: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A report's quality: by how much the trained model is better than its public start."""
    found: dict[str, Any] = {
        "metric": "accuracy",
        "before": {"accuracy": 0.125},
        "after": {"accuracy": 0.75},
        "gain": {"records": 60, "change": [0.25, 0.875], "over_start": change},
    }
    found |= {"start": {"accuracy": 0.5}} if start else {}
    if decision:
        found |= {"released": decision, "after": found["start"], "trained": found["after"]}
    return found


def with_quality(run: Path, folder: Path, said: dict[str, Any]) -> Path:
    """A copy of a run whose report says this of its quality."""
    out = shutil.copytree(run, folder / "run")
    body = json.loads((out / "report.json").read_text())
    body["quality"] = {"by_round": body["quality"]["by_round"]} | copy.deepcopy(said)
    reports.write(out, body)
    return out


def on_screen(run: Path) -> str:
    console = Console(width=10_000, record=True)
    closing(console, run, json.loads((run / "report.json").read_text()))
    return console.export_text()


def on_dashboard(path: Path) -> str:
    browser = TestClient(app_of(page_of(path), "token"), base_url="http://127.0.0.1")
    browser.get("/?token=token")
    return browser.get("/").text


def in_dossier(run: Path) -> dict[str, Any]:
    found = documents(run)
    content = dossier_content.build(found, {})
    assert not find_contradiction(content, found)
    return content


PLACES: dict[str, Callable[[Path], str]] = {
    "screen": on_screen,
    "report.md": lambda run: (run / "report.md").read_text(),
    "report.json": lambda run: "\n".join(
        json.loads((run / "report.json").read_text())["quality"]["headline"]
    ),
    "progress.png": lambda run: plot._caption(json.loads((run / "report.json").read_text())),
    "dossier.md": lambda run: markdown(in_dossier(run)),
    "dossier.html": lambda run: page(in_dossier(run)),
    "card": lambda run: card(in_dossier(run), documents(run), run),
    "dashboard": on_dashboard,
}


def silent(run: Path, said: str) -> list[str]:
    """The places that do not say it."""
    return [name for name, read in PLACES.items() if said not in " ".join(read(run).split())]


@pytest.mark.parametrize("claim", WORDS)
def test_what_was_added_to_public_text_is_said_everywhere(
    signed: Any, tmp_path: Path, claim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: where the one function that composes it hides it, every place is found to be silent."""
    run = with_quality(signed[0], tmp_path, quality(WORDS[claim]))
    said = f"he trained model is {claim} what public text alone gives (0.5, for no ε)"
    assert silent(run, said) == []
    assert silent(run, "he trained model is better than the base") == []
    assert f"{claim} what public text alone gives" in Run(run)._repr_html_()
    assert claim.rpartition(" ")[0] in on_dashboard(run.parent)
    helps = "more records a site" in on_screen(run)
    assert helps is (claim != "better than")
    assert [
        name
        for name in ("screen", "report.md", "dashboard")
        if helps != ("What would help" in PLACES[name](run))
    ] == []
    monkeypatch.setattr(gain, "_over_start", lambda quality: None)
    reports.write(run, json.loads((run / "report.json").read_text()) | {"quality": quality([1, 1])})
    assert silent(run, said) == [*PLACES]


def test_the_gain_over_public_text_is_said_before_that_over_the_base(
    signed: Any, tmp_path: Path
) -> None:
    """Twin: without a public start the base stands alone."""
    run = with_quality(signed[0], tmp_path / "one", quality(WORDS["worse than"]))
    for name, read in PLACES.items():
        text = " ".join(read(run).split())
        assert text.index("what public text alone gives (") < text.index("than the base: "), name
    without = with_quality(signed[0], tmp_path / "two", quality([0, 0], start=False))
    assert silent(without, "he trained model is better than the base") == []
    assert silent(without, "what public text alone gives") == [*PLACES]
    assert "What would help" not in on_screen(without)


def test_what_is_released_is_said_everywhere_with_both_figures(signed: Any, tmp_path: Path) -> None:
    """Twin: where the trained model is released, no place says the other."""
    said = quality(WORDS["worse than"], decision=DECISION)
    run = with_quality(signed[0], tmp_path / "one", said)
    line = (
        "eleased: what public text alone gives; the trained model (accuracy 0.75), which was worse "
        "on the 40 [selection] records (0.25 for it, 0.5 for public text), is kept in trained/; "
        "the ε that it cost stays spent"
    )
    escaped = line.replace("[selection]", "\\[selection\\]")
    assert [n for n in silent(run, line) if escaped not in " ".join(PLACES[n](run).split())] == []
    assert silent(run, "hat is released is better than the base") == []
    table = (run / "report.md").read_text()
    assert "| base alone | trained, not released | released: public text alone |" in table
    screen = on_screen(run)
    assert "accuracy: 0.125 → 0.5" in screen  # the headline figure is what is handed out
    assert screen.index("What would help") < screen.index("fedtune predict")
    kept = DECISION | {"model": "trained", "why": "on the selection records it is better"}
    other = with_quality(
        signed[0], tmp_path / "two", quality(WORDS["better than"]) | {"released": kept}
    )
    assert silent(other, "eleased: the trained model; on the selection records it is better") == []
    assert silent(other, "eleased: what public text alone gives") == [*PLACES]


def test_what_would_help_follows_from_the_run() -> None:
    body: dict[str, Any] = {"quality": quality(WORDS["worse than"]), "private": True}
    body["privacy"] = {"unit": "patient", "sites": {"a": {}, "b": {}}}
    assert "more patients a site" in gain.advice(body)
    assert "[secure_aggregation], from three sites on" in gain.advice(body)
    body["privacy"]["sites"] |= {"c": {}}
    assert "from three sites on" not in gain.advice(body)
    body["privacy"]["sites"]["a"] = {"secure_aggregation": {"sites": 3}}
    assert "secure_aggregation" not in gain.advice(body)
    assert "ε" not in gain.advice(body | {"private": False})
    assert gain.advice(body | {"quality": quality(WORDS["better than"])}) == ""
    assert gain.advice({"quality": {}}) == gain.advice({}) == ""
