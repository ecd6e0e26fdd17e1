"""A student's report names its teacher, and its ε is that of both trainings together."""

from __future__ import annotations

from typing import Any

import pytest

from fedtune.report.claim import best_guess
from fedtune.report.markdown import markdown
from fedtune.report.teacher import teacher_line
from fedtune.server.teacher import NOT_PRIVATE, UNKNOWN, with_teacher
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
    ],
)
def test_a_cost_that_is_not_known_is_said_not_to_be(teacher: dict[str, Any], cost: str) -> None:
    own = student({"north": (A, "k1")})
    found = with_teacher(own, teacher)
    assert found["privacy"] == own["privacy"] and found["teacher"]["cost"] == cost
    assert cost in markdown(found) and "adds to it" in markdown(found)
    assert "of this run's rounds alone" in teacher_line(found)


def test_held_out_patients_pay_for_the_teacher_too() -> None:
    own = student({"north": (A, "k1")})
    asked = {"noise_multiplier": 8.0, "steps": 2, "delta": 1e-4, "epsilon": 0.5}
    own["privacy"]["evaluation"] = asked | {"with_training": 1.0, "sites": {"north": asked}}
    found = with_teacher(own, run_of({"north": (B, "k1")}))
    total = found["privacy"]["evaluation"]["with_training"]
    assert close(total, alone(A, B, (8.0, 1.0, 2)))
