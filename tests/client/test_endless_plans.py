"""A plan whose ε nobody can compute in time: whoever sends it must not keep a site from answering,
nor a person from reading what the plan means."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.core.config import Study, load_site, load_study, study_from_json
from fedtune.core.dp import accountant
from fedtune.core.dp.accountant import Steps
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.vault.answers import Place
from fedtune.core.vault.process import answer_and_tell
from fedtune.core.wire.arrays import pack_arrays
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.requests import Request
from fedtune.officer import doctor
from fedtune.officer.review import NOT_COMPUTED, review
from fedtune.public.start import start
from fedtune.server.admission import plan_message
from tests.guarantee.world import lay_out, patients

ENDLESS: dict[str, dict[str, Any]] = {
    "ε = 10⁶ in as many steps as a site allows": {
        "training": {"rounds": 10_000, "sampling_rate": 0.5},
        "privacy": {"epsilon": 1e6, "noise_multiplier": None},
    },
    "rounds that ε = 10⁶ pays for": {
        "training": {"rounds": None, "sampling_rate": 0.5},
        "privacy": {"epsilon": 1e6, "noise_multiplier": 1000.0},
    },
    "10⁶ rounds with σ": {
        "training": {"rounds": 10**6, "sampling_rate": 0.5},
        "privacy": {"epsilon": None, "noise_multiplier": 1000.0},
    },
    "10⁶ rounds with ε": {
        "training": {"rounds": 10**6, "sampling_rate": 0.5},
        "privacy": {"epsilon": 1e6, "noise_multiplier": None},
    },
}


@pytest.fixture(autouse=True)
def nothing_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail, instead of never ending, where ε of many more steps than a site allows is asked for, or
    an ε that is out of the question."""
    shipped = accountant.epsilon

    def bounded(events: Iterable[Steps], delta: float) -> float:
        events = list(events)
        cheap = all(accountant.at_least(event, delta) <= 200 for event in events)
        assert cheap and sum(e.steps for e in events) <= 20_000, "this would not end"
        return shipped(events, delta)

    monkeypatch.setattr(accountant, "epsilon", bounded)


@pytest.fixture(params=ENDLESS)
def plan(request: pytest.FixtureRequest, tmp_path: Path, tiny_base: Path) -> Study:
    study = load_study(lay_out(tmp_path, tiny_base, patients(12)))
    body = study.model_dump(mode="json")
    for table, values in ENDLESS[request.param].items():
        body[table] |= values
    return study_from_json(json.dumps(body))


@pytest.mark.parametrize("who", ["the coordinator", "somebody else"])
def test_a_site_answers(plan: Study, tmp_path: Path, who: str) -> None:
    path, own = tmp_path / "site-north.toml", SigningKey()
    Ledger(load_site(path).home)  # as after an enrolment: the screen shows what was spent
    begun = start(load_study(tmp_path / "study.toml"))
    key = own if who == "the coordinator" else SigningKey()
    table = dict(plan_message(plan, begun.frozen, key).config_records["plan"])
    told: list[dict[str, Any]] = []
    place = Place(site=str(path), coordinator=own.public)
    request = Request("prepare", {"plan": table}, pack_arrays(begun.frozen))
    answer_and_tell(place, request, lambda _, facts: told.append(facts))  # type: ignore[arg-type,return-value]
    assert told[-1]["status"] == "refused" and "planned" not in told[-1]


def test_a_person_reads_why(plan: Study, tmp_path: Path) -> None:
    site = load_site(tmp_path / "site-north.toml")
    why = r"above policy.max_steps|more than 10000 steps|past policy.max_epsilon_per_study"
    seen = review(plan, site, Ledger(site.home))
    assert any(re.search(why, refusal) for refusal in seen.refusals)
    assert dict(seen.sections)["What it costs"] == [NOT_COMPUTED]
    findings = {f.name: f for f in doctor.examine(tmp_path / "site-north.toml", plan)}
    for name in ("plan", "self-test"):
        assert not findings[name].good
        assert "steps" in findings[name].says or "max_epsilon_per_study" in findings[name].says


def test_the_guard_sees_it(plan: Study, tmp_path: Path) -> None:
    """Twin: the computation as it is without the policy's bound."""
    from fedtune.core.dp.plan import plan_for_site

    with pytest.raises(AssertionError, match="this would not end"):
        plan_for_site(plan, 12).epsilon  # noqa: B018


def test_a_site_computes_a_plan_in_one_place_alone() -> None:
    package = Path(fedtune.__file__).parent
    callers = {
        path.relative_to(package).as_posix()
        for folder in ("core/vault", "officer", "courier", "flower", "launch")
        for path in (package / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.alias | ast.Name) and "plan_for_site" in ast.dump(node)
    }
    assert callers == {"core/vault/policy.py"}
