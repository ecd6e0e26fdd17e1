"""Before a run begins: budgets are checked before anything is computed, what was paid is said, and
what Ctrl-C keeps is told as it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from fedtune.core.config import load_site, load_study
from fedtune.core.errors import Refused
from fedtune.core.registry import process_cache
from fedtune.launch import simulate
from fedtune.public import start as start_module
from tests.cli_kit import SITE, at_a_terminal, run

Started = list[str]
LESS = ("--set", "privacy.epsilon=2")  # so that another run fits under the ceiling


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """The studies that anything was computed for."""
    names: Started = []
    real = start_module.start

    def start(study: Any) -> Any:
        names.append(study.study.name)
        return real(study)

    monkeypatch.setattr(start_module, "start", start)
    return names


def ceiling(study: Path, name: str, most: float) -> None:
    (study.parent / name / "site.toml").write_text(SITE.format(name=name, most=most, off="false"))


def test_budgets_are_checked_before_anything_is_loaded(study: Path, started: Started) -> None:
    for name in ("north", "south"):
        ceiling(study, name, 1)
    heard: list[Any] = []
    sites = [load_site(study.parent / name / "site.toml") for name in ("north", "south")]
    with pytest.raises(Refused, match=r"north, south: refused: .*max_epsilon") as refused:
        simulate.simulate(load_study(study), sites, on_event=lambda *event: heard.append(event))
    assert not heard and not started and "what fits" in "\n".join(refused.value.__notes__)
    found = run("simulate", study)
    assert found.exit_code == 3 and "loading" not in found.output and not Path("runs").exists()


def test_twin_without_that_check_the_refusal_comes_after_the_start(
    study: Path, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("north", "south"):
        ceiling(study, name, 1)
    monkeypatch.setattr(simulate, "check_budgets", lambda *given: [])
    assert run("simulate", study).exit_code == 3 and started == ["tiny"]


@pytest.mark.parametrize(
    ("policy", "rule"),
    [("max_delta = 1e-6", "policy.max_delta"), ("min_units = 100", "policy.min_units")],
)
def test_so_are_the_rules_about_the_plans_figures(
    study: Path, started: Started, policy: str, rule: str
) -> None:
    for name in ("north", "south"):
        path = study.parent / name / "site.toml"
        path.write_text(path.read_text() + f"{policy}\n")
    found = run("simulate", study)
    assert found.exit_code == 3 and rule in found.stderr and not started


def test_a_study_goes_on_with_the_sites_that_can_pay(study: Path, started: Started) -> None:
    ceiling(study, "north", 1)
    found = run("simulate", study)
    assert found.exit_code == 0 and started == ["tiny"], found.stderr
    assert "north: refused" in found.output


def test_what_the_records_have_paid_is_said_and_asked_about(study: Path, started: Started) -> None:
    assert "has paid" not in run("simulate", study, *LESS).output
    again = ("simulate", study, *LESS, "--out", "again")
    refused = at_a_terminal(*again, typed="n\n")
    assert refused.exit_code == 2 and "nothing was run, and nothing paid" in refused.stderr
    assert len(started) == 1 and not Path("again").exists()
    said = refused.output
    assert re.search(r"north: has paid ε = [\d.]+ for a study of this name already, in ", said)
    assert "and cost nothing, and other rounds are paid again: at most ε = " in said
    process_cache.clear("workers")
    in_a_pipe = run(*again)
    assert in_a_pipe.exit_code == 0 and "has paid ε = " in in_a_pipe.output
    agreed = at_a_terminal(*again[:-1], "third", typed="y\n")
    assert "pay again?" in agreed.output and len(started) == 3
    asked_for = at_a_terminal(*again[:-1], "fourth", "--yes", typed="")
    assert "pay again?" not in asked_for.output


def test_another_study_says_what_was_paid_and_asks_nothing(study: Path) -> None:
    assert run("simulate", study, *LESS).exit_code == 0
    study.write_text(study.read_text().replace('name = "tiny"', 'name = "other"'))
    found = at_a_terminal("simulate", study, *LESS, typed="")
    assert found.exit_code == 0, found.output
    assert re.search(r"north: has paid ε = [\d.]+ so far; at most ε = [\d.]+ of 8", found.output)
    assert "pay again?" not in found.output


def stopping(study: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> Result:
    """Ctrl-C as a run says `when`."""
    from fedtune.cli.watch import Watch

    heard: Callable[..., None] = Watch.__call__

    def hear(self: Watch, event: str, data: dict[str, Any]) -> None:
        heard(self, event, data)
        if event == when:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "__call__", hear)
        return run("simulate", study, *LESS)


def test_ctrl_c_before_the_first_round_and_after_it(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = stopping(study, monkeypatch, "records")
    assert early.exit_code == 130 and not Path("runs").exists()
    assert "before the first round: no site has paid anything" in early.stderr
    found = run("simulate", study, "--resume", *LESS, "--out", "none")
    assert found.exit_code == 0 and "no run to go on with: none begins" in found.output
    process_cache.clear("workers")
    late = stopping(study, monkeypatch, "round")
    assert late.exit_code == 130
    assert "runs/tiny keeps every whole round, and the same command with --resume" in late.stderr
    process_cache.clear("workers")
    resumed = run("simulate", study, "--resume", *LESS)
    assert resumed.exit_code == 0 and "going on with runs/tiny" in resumed.output


def test_each_step_before_the_rounds_is_named(study: Path) -> None:
    said = run("simulate", study).output.splitlines()
    steps = [line for line in said if line.startswith(("loading", "reading"))]
    assert steps[:3] == [
        "loading the libraries", "reading the records of north", "reading the records of south",
    ]  # fmt: skip


# ------------------------------------------------------------- what asks for a price and the rules


@pytest.fixture
def public(study: Path) -> Path:
    """The study, with an adapter's factor and a start from public text."""
    text = study.read_text().replace("rank = 2\n", 'rank = 2\na_init = "public"\n')
    table = '[public]\npath = "evaluation.jsonl"\nlicence = "CC0"\n[public.columns]\n'
    table += 'prompt = "prompt"\ncompletion = "completion"\n'
    study.write_text(text + table + "[start]\nsteps = 2\nlearning_rate = 1.0\n")
    return study


def test_review_and_doctor_compute_nothing_from_public_text(public: Path, started: Started) -> None:
    site = "north/site.toml"
    found = run("review", public, "--site", site)
    assert found.exit_code == 0 and "This site would take part" in found.output, found.output
    assert "its digest takes the base and public text: --digest" in found.output
    assert "This study: ε = 7.9" in found.output, found.output
    checked = run("doctor", site, "--study", public)
    assert checked.exit_code == 0 and "ok   plan: σ" in checked.output, checked.output
    assert checked.output.index("plan: σ") < checked.output.index("versions: ")  # first
    assert not started
    whole = run("review", public, "--site", site, "--digest")
    assert started == ["tiny"] and whole.exit_code == 0
    digest = re.search(r"tiny +(sha256:[0-9a-f]{64})", whole.output)
    assert digest
    signed = run("review", public, "--site", site, "--sign")
    assert signed.exit_code == 0 and digest[1] in signed.output and len(started) == 2
    # From now on this site knows what the study.toml comes to.
    again = run("review", public, "--site", site)
    assert digest[1] in again.output and len(started) == 2


def test_a_plan_that_was_sent_without_its_digests_is_refused(public: Path) -> None:
    """Only a study.toml may leave open what is filled in when the study starts."""
    sent = public.parent / "sent.json"
    sent.write_text(load_study(public).model_dump_json())
    found = run("review", sent, "--site", "north/site.toml")
    assert "This site refuses it" in found.output, found.output
    assert "the plan does not pin lora.a_digest" in found.output and "sha256:" in found.output
    checked = run("doctor", "north/site.toml", "--study", sent)
    assert checked.exit_code == 2 and "BAD  plan: the plan does not pin" in checked.output


def test_a_budget_that_does_not_reach_is_the_first_thing_that_doctor_says(
    public: Path, started: Started
) -> None:
    ceiling(public, "north", 1)
    found = run("doctor", "north/site.toml", "--study", public)
    bad = [line for line in found.output.splitlines() if line.startswith(("ok", "BAD"))]
    assert found.exit_code == 2 and bad[1].startswith("BAD  plan: the study would take"), bad
    assert not started
