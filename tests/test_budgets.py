"""Budgets of merged adapters: composed where the people may be the same, by dp-accounting alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from fedtune.accounting.composed_epsilon import (
    APART,
    DESCRIPTIONS,
    SAME,
    STATED,
    UNKNOWN,
    compose_reports,
)
from fedtune.report.merged import section
from tests.test_end_to_end import by_the_library

Event = tuple[float, float, int]  # σ, q, steps
A, B, C = (4.0, 1.0, 6), (3.0, 0.5, 5), (5.0, 0.25, 8)


def report(sites: dict[str, tuple[Event, str]], **more: Any) -> dict[str, Any]:
    """A report's body, as far as budgets go; each site with its event and its key."""
    common = {"delta": 1e-4, "unit": "patient", "relation": "add or remove one unit"} | more
    found = {
        name: common
        | {"noise_multiplier": s, "sampling_rate": q, "steps": n, "records_per_unit": 1, "key": key}
        for name, ((s, q, n), key) in sites.items()
    }
    return {"private": True, "privacy": common | {"epsilon": 1.0, "sites": found}}


def alone(*events: Event, delta: float = 1e-4) -> float:
    counts = Counter[tuple[float, float, int]]()
    for sigma, rate, steps in events:
        counts[sigma, rate, 1] += steps
    return by_the_library(tuple(counts.items()), delta)


def close(found: float, expected: float) -> bool:
    """The library's own grid is another."""
    return abs(found - expected) <= 2e-3 * expected


def test_the_same_site_pays_for_both() -> None:
    found = compose_reports([report({"north": (A, "k1")}), report({"north": (B, "k1")})])
    assert close(found["epsilon"], alone(A, B))
    assert found["epsilon"] > 1.1 * max(alone(A), alone(B))
    assert found["decided"] == [{"parents": [1, 2], "how": DESCRIPTIONS[SAME]}]


def test_one_key_under_two_names_is_one_site() -> None:
    found = compose_reports([report({"north": (A, "k1")}), report({"renamed": (B, "k1")})])
    assert close(found["epsilon"], alone(A, B))


def test_another_key_under_one_name_is_one_site_too() -> None:
    """A site that enrolled with new keys has the patients that it had."""
    found = compose_reports([report({"north": (A, "k1")}), report({"north": (B, "k2")})])
    assert close(found["epsilon"], alone(A, B))


def test_two_memberships_that_a_third_connects_are_one_hospital() -> None:
    """A person may be in the records of both memberships, so the larger is too little."""
    both = report({"north": (A, "k1"), "annexe": (B, "k2")})
    found = compose_reports([both, report({"north": (C, "k2")})])
    for name in ("north", "annexe"):
        assert close(found["sites"][name]["epsilon"], alone(A, B, C))
    assert "pays for all of them: annexe, north." in "\n".join(section({"method": "svd"}, found))
    known_as = {"names": ["annexe", "north"], "keys": ["k1", "k2"]}
    assert found["sites"]["north"]["known_as"] == known_as


def test_names_and_keys_are_followed_over_several_parents() -> None:
    parents = [report({name: (event, key)}) for name, event, key in (
        ("north", A, "k1"), ("annexe", B, "k2"), ("north", C, "k3"), ("annexe", A, "k3")
    )]  # fmt: skip
    found = compose_reports(parents)
    assert {*found["sites"]} == {"north", "annexe"}
    for site in found["sites"].values():
        assert close(site["epsilon"], alone(A, B, C, A))


@pytest.mark.parametrize("disjoint", [False, True])
def test_a_merged_adapter_knows_each_key_that_a_hospital_had(disjoint: bool) -> None:
    parents = [report({"north": (A, "k1")}), report({"north": (B, "k2")})]
    first = {"privacy": compose_reports(parents, disjoint=disjoint)}
    spent = [A] if disjoint else [A, B]  # A costs more than B
    for key in ("k1", "k2"):
        again = compose_reports([first, report({"renamed": (C, key)})])
        assert close(again["sites"]["renamed"]["epsilon"], alone(*spent, C))


def test_a_hospital_with_two_names_in_one_report_is_charged_once() -> None:
    parents = [report({"north": (A, "k1")}), report({"annexe": (B, "k1")})]
    first = {"privacy": compose_reports(parents)}
    again = compose_reports([first, report({"annexe": (C, "k1")})])
    assert close(again["epsilon"], alone(A, B, C))
    other = compose_reports([first, report({"south": (C, "k2")})])
    assert close(other["sites"]["north"]["epsilon"], alone(A, B))
    assert close(other["sites"]["south"]["epsilon"], alone(C))


def test_other_sites_are_apart_and_the_larger_counts() -> None:
    found = compose_reports([report({"north": (A, "k1")}), report({"south": (B, "k2")})])
    assert close(found["epsilon"], max(alone(A), alone(B)))
    for name, event in (("north", A), ("south", B)):
        assert close(found["sites"][name]["epsilon"], alone(event))
    assert found["decided"][0]["how"] == DESCRIPTIONS[APART]


@pytest.mark.parametrize("keys", [("", "k2"), ("k1", ""), ("", "")])
def test_what_is_not_known_is_composed(keys: tuple[str, str]) -> None:
    found = compose_reports([report({"north": (A, keys[0])}), report({"south": (B, keys[1])})])
    assert close(found["epsilon"], alone(A, B))
    assert found["decided"][0]["how"] == DESCRIPTIONS[UNKNOWN]


def test_a_report_without_sites_is_of_nobody_knows_whom() -> None:
    bare = report({"north": (A, "k1")})
    bare["privacy"] |= {"noise_multiplier": 4.0, "sampling_rate": 1.0, "steps": 6, "sites": {}}
    found = compose_reports([bare, report({"south": (B, "k2")})])
    assert close(found["epsilon"], alone(A, B))


def test_of_several_that_may_be_the_same_the_worst_is_added() -> None:
    """A site takes part in a study under one name, so not all of them are."""
    weak, strong = (1.5, 1.0, 4), (9.0, 1.0, 4)
    many = report({"x": (weak, ""), "y": (strong, "")})
    found = compose_reports([report({"north": (A, "")}), many])
    assert close(found["sites"]["north"]["epsilon"], alone(A, weak))
    assert close(found["sites"]["y"]["epsilon"], alone(A, strong))


@pytest.mark.parametrize("order", [1, -1])
def test_stated_disjoint_is_the_larger_by_a_sites_own_noise_too(order: int) -> None:
    """One of the two runs has the larger ε, and the other, whose sites share noise, the larger ε by
    a site's own noise alone. Twin: of two sites, the run's figure is the larger one's."""
    shared = (A[0] / 3, A[1], A[2])
    parents = [report({"north": (A, "k1")}), report({"north": (B, "k1"), "south": (B, "k2")})]
    for site in parents[1]["privacy"]["sites"].values():
        table = {"sites": 3, "colluding": 1, "own_noise_multiplier": shared[0]}
        site["secure_aggregation"] = table
    whatever = alone((shared[0], B[1], B[2]))
    assert alone(B) < alone(A) < whatever
    found = compose_reports(parents[::order], disjoint=True)
    for row in (found, found["sites"]["north"]):
        assert close(row["epsilon"], alone(A))
        assert close(row["secure_aggregation"]["fallback_epsilon"], whatever)
    assert close(found["sites"]["south"]["epsilon"], alone(B))


def test_stated_disjoint_is_the_larger_and_says_so() -> None:
    parents = [report({"north": (A, "k1")}), report({"north": (B, "k1")})]
    found = compose_reports(parents, disjoint=True)
    assert close(found["epsilon"], max(alone(A), alone(B)))
    assert found["decided"] == [{"parents": [1, 2], "how": DESCRIPTIONS[STATED]}]


def test_a_merged_adapter_may_be_merged_again() -> None:
    first = compose_reports([report({"north": (A, "k1")}), report({"north": (B, "k1")})])
    again = compose_reports([{"privacy": first}, report({"north": (A, "k1")})])
    assert close(again["epsilon"], alone(A, B, A))


def test_the_weakest_unit_and_the_smallest_delta_are_claimed() -> None:
    found = compose_reports([
        report({"north": (A, "k1")}, unit="record"), report({"north": (B, "k1")}, delta=1e-6)
    ])  # fmt: skip
    assert (found["unit"], found["delta"]) == ("record", 1e-6)
    assert close(found["epsilon"], alone(A, B, delta=1e-6))


def test_a_site_that_never_noised_a_step_spent_nothing() -> None:
    found = compose_reports([report({"north": ((4.0, 1.0, 0), "k")}), report({"north": (B, "k")})])
    assert close(found["epsilon"], alone(B))
