"""A student's report names its teacher, and its ε is that of both trainings together."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.core.errors import NotGenuine, Refused
from fedtune.core.registry.rounding import rounded_up
from fedtune.derive.lineage import combined_lineage, require_private, warn_of_cost
from fedtune.derive.model_card import gguf_metadata, privacy_line
from fedtune.evidence import figures
from fedtune.report.claim import best_guess
from fedtune.report.declared import free_query_line
from fedtune.report.markdown import markdown
from fedtune.report.teacher import teacher_left_out_line, teacher_line
from fedtune.server.teacher import NOT_PRIVATE, TAUGHT, UNKNOWN, with_teacher
from tests.test_budgets import A, B, alone, close, report

NAMES = {"name": "before", "digest": "sha256:" + "5" * 64}


def student(sites: dict[str, Any], **more: Any) -> dict[str, Any]:
    made = report(sites)
    for site, (event, _) in sites.items():
        made["privacy"]["sites"][site]["epsilon"] = alone(event)
    worst = max(made["privacy"]["sites"].values(), key=lambda site: float(site["epsilon"]))
    made["privacy"]["epsilon"] = worst["epsilon"]
    return made | {"study": "student", "plan_digest": "sha256:1", **more}


def run_of(sites: dict[str, Any], **more: Any) -> dict[str, Any]:
    return NAMES | {"kind": "run", "report": student(sites) | more}


def taught(cost: str) -> dict[str, Any]:
    """A teacher that is a private run, whose report does not hold the cost of its own teacher."""
    return run_of({"north": (B, "k1")}, teacher=NAMES | {"cost": cost, "known": False})


def test_a_student_pays_for_its_teacher_too() -> None:
    """Its twin, whose teacher is a base, pays for itself alone."""
    own = student({"north": (A, "k1"), "south": (A, "k2")})
    found = with_teacher(own, run_of({"north": (B, "k1")}, plan_digest="sha256:2"))
    assert close(found["privacy"]["epsilon"], alone(A, B))
    assert close(found["privacy"]["sites"]["north"]["epsilon"], alone(A, B))
    assert close(found["privacy"]["sites"]["north"]["own_epsilon"], alone(A))
    assert close(found["privacy"]["sites"]["south"]["epsilon"], alone(A))
    assert found["privacy"]["sites"]["north"]["noise_multiplier"] == A[0]  # as its steps ran
    assert close(found["teacher"]["student_epsilon"], alone(A))
    assert best_guess(found["privacy"]) > best_guess(own["privacy"])
    said = markdown(found)
    for words in ("## Its teacher", "before", NAMES["digest"], "both trainings together", "same"):
        assert words in said, words
    assert "by this run alone" in teacher_line(found)

    base = with_teacher(own, NAMES | {"kind": "base"})
    assert base["privacy"] == own["privacy"]
    assert "no record of the sites: no ε" in markdown(base) and "its teacher" in teacher_line(base)


def share_noise(made: dict[str, Any], sigma: float) -> float:
    """Have the sites of a report share noise, of which each adds `sigma` by itself. Return the ε by
    a site's own noise alone."""
    whatever = 0.0
    for site in made["privacy"]["sites"].values():
        whatever = alone((sigma, site["sampling_rate"], site["steps"]))
        table = {"sites": 3, "colluding": 1, "own_noise_multiplier": sigma}
        site["secure_aggregation"] = table | {"fallback_epsilon": whatever}
        made["privacy"]["secure_aggregation"] = site["secure_aggregation"]
    return whatever


@pytest.mark.parametrize("shares", ["student", "teacher", "both"])
def test_epsilon_by_a_sites_own_noise_alone_is_of_both_trainings(shares: str) -> None:
    """And the assumption of either is one of the total. What the student's own says is kept, by
    which `verify` compares it with the step logs; a stated total below it is refused."""
    own, teacher = student({"north": (A, "k1")}), run_of({"north": (B, "k1")})
    parts = {"student": (own, A), "teacher": (teacher["report"], B)}
    steps = []
    for name, (made, (_, rate, count)) in parts.items():
        sigma = A[0] if name == "student" else B[0]
        if shares in (name, "both"):
            sigma /= 1.5
            share_noise(made, sigma)
        steps.append((sigma, rate, count))
    found = with_teacher(own, teacher)
    for table in (found["privacy"], found["privacy"]["sites"]["north"]):
        shared = table["secure_aggregation"]
        assert close(shared["fallback_epsilon"], alone(*steps))
        assert shared["assumptions"] == [[3, 1]]
    assert rounded_up(found["privacy"]["secure_aggregation"]["fallback_epsilon"]) in markdown(found)
    plan: Any = SimpleNamespace(objective=SimpleNamespace(resolved=SimpleNamespace(teacher_spec=1)))
    terms: Any = SimpleNamespace(delta=1e-4, unit="patient")

    def take_out() -> dict[str, Any]:
        return figures._without_teacher(Path("report.json"), plan, found, terms)

    left, before = take_out(), own["privacy"]
    assert left.get("secure_aggregation") == before.get("secure_aggregation")
    north, north_before = left["sites"]["north"], before["sites"]["north"]
    assert north.get("secure_aggregation") == north_before.get("secure_aggregation")
    if shares != "teacher":
        found["privacy"]["sites"]["north"]["secure_aggregation"]["fallback_epsilon"] = 0.01
        with pytest.raises(NotGenuine, match="fallback"):
            take_out()


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_the_weaker_unit_stands_beside_each_epsilon_of_both_trainings(unit: str) -> None:
    """`verify` compares the student's own ε for the unit of its plan. Twin: a teacher per
    patient."""
    teacher = run_of({"north": (B, "k1")})
    for table in (teacher["report"]["privacy"], teacher["report"]["privacy"]["sites"]["north"]):
        table["unit"] = unit
    found = with_teacher(student({"north": (A, "k1"), "south": (A, "k2")}), teacher)
    tables = (found["privacy"], *found["privacy"]["sites"].values())
    assert [table["unit"] for table in tables] == [unit] * 3
    plan: Any = SimpleNamespace(objective=SimpleNamespace(resolved=SimpleNamespace(teacher_spec=1)))
    terms: Any = SimpleNamespace(delta=1e-4, unit="patient")
    own = figures._without_teacher(Path("report.json"), plan, found, terms)
    assert [table["unit"] for table in (own, *own["sites"].values())] == ["patient"] * 3


def test_a_site_that_trained_the_teacher_alone_is_listed() -> None:
    found = with_teacher(student({"north": (A, "k1")}), run_of({"west": (B, "k3")}))
    assert close(found["privacy"]["sites"]["west"]["epsilon"], alone(B))
    assert close(found["privacy"]["epsilon"], max(alone(A), alone(B)))


@pytest.mark.parametrize(
    "teacher, cost",
    [
        (NAMES | {"kind": "unknown"}, UNKNOWN),
        (NAMES | {"kind": "run", "report": None}, UNKNOWN),
        (NAMES | {"kind": "run", "report": {"private": True, "privacy": {}}}, UNKNOWN),
        (run_of({"north": (B, "k1")}, private=False), NOT_PRIVATE),
        (taught(UNKNOWN), f"{TAUGHT} has a cost that is {UNKNOWN}"),
        (taught(NOT_PRIVATE), f"{TAUGHT} {NOT_PRIVATE}"),
        (taught(f"{TAUGHT} {NOT_PRIVATE}"), f"{TAUGHT} {NOT_PRIVATE}"),
    ],
)
def test_a_cost_that_is_not_known_is_said_not_to_be(teacher: dict[str, Any], cost: str) -> None:
    own = student({"north": (A, "k1")})
    found = with_teacher(own, teacher)
    assert found["privacy"] == own["privacy"] and found["teacher"]["cost"] == cost
    assert cost in markdown(found) and "adds to it" in markdown(found)
    assert teacher_line(found) == "its teacher: before"
    said = teacher_left_out_line(found)
    assert cost in said and "of this run's rounds alone" in said
    base: Any = SimpleNamespace(name="tiny")
    assert said in markdown(found) and said.removesuffix(".") in privacy_line(found)
    assert said.removesuffix(".") in gguf_metadata(found, base)["description"]
    for other in (found | {"private": False}, own, with_teacher(own, NAMES | {"kind": "base"})):
        assert not teacher_left_out_line(other) and "alone" not in privacy_line(other)


@pytest.mark.parametrize("known", [True, False])
def test_a_run_whose_teacher_is_not_paid_for_is_no_private_parent(
    monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Neither a model that is made of it, nor as a judge of private records. Twin: a teacher whose
    cost is in the report."""
    teacher = NAMES | {"cost": NOT_PRIVATE, "known": known}
    own = student({"north": (A, "k1")}, teacher=teacher)
    made = combined_lineage([{"digest": "sha256:1", "name": "student", "report": own}])
    assert made["private"] is known and ("warning" in made["privacy"]) is not known
    assert bool(warn_of_cost([own])) is not known
    run = SimpleNamespace(private=True, report=own)
    monkeypatch.setattr("fedtune.derive.lineage.Run", lambda source: run)
    base, study = SimpleNamespace(path=Path("base")), SimpleNamespace(private=True)
    model: Any = SimpleNamespace(study=study, base=base, digest="sha256:1")
    with nullcontext() if known else pytest.raises(Refused, match="was trained without privacy"):
        require_private(model, "judge", "run")


def test_sites_whose_records_a_query_selected_for_the_teacher_are_named_by_the_student() -> None:
    teacher = run_of({"north": (A, "k1"), "south": (A, "k2")}, free_query=["south"])
    made = with_teacher(student({"north": (B, "k1")}), teacher)
    assert made.get("free_query") == ["south"] and "south" in free_query_line(made)
    made = with_teacher(student({"north": (B, "k1")}) | {"free_query": ["north"]}, teacher)
    assert made["free_query"] == ["north", "south"]


def test_held_out_patients_pay_for_the_teacher_too() -> None:
    own = student({"north": (A, "k1")})
    asked = {"noise_multiplier": 8.0, "steps": 2, "delta": 1e-4, "epsilon": 0.5}
    own["privacy"]["evaluation"] = asked | {"with_training": 1.0, "sites": {"north": asked}}
    found = with_teacher(own, run_of({"north": (B, "k1")}))
    total = found["privacy"]["evaluation"]["with_training"]
    assert close(total, alone(A, B, (8.0, 1.0, 2)))


def test_held_out_patients_are_told_what_they_pay_whatever_happens() -> None:
    """As of the student alone, whose figure counts each site's own noise: `verify` refuses a total
    below it. The site whose own noise is least decides, though another one's ε is larger."""
    own = student({"north": (A, "k1"), "south": (A, "k2")})
    share_noise(own, A[0] / 3)
    del own["privacy"]["sites"]["south"]["secure_aggregation"]
    own["privacy"]["sites"]["south"]["noise_multiplier"] = A[0] / 1.5
    asked = {"noise_multiplier": 8.0, "steps": 2, "delta": 1e-4, "epsilon": 0.5}
    rows = {"north": asked, "south": asked}
    own["privacy"]["evaluation"] = asked | {"with_training": 1.0, "sites": rows}
    found = with_teacher(own, run_of({"west": (B, "k3")}))
    alone_there = (A[0] / 3, A[1], A[2])
    total = found["privacy"]["evaluation"]["with_training"]
    assert close(total, alone(alone_there, (8.0, 1.0, 2)))
