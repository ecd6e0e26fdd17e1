"""Explain a privacy guarantee in words and odds that need no statistics."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

from fedtune.core.registry.metrics import metric as known_metric
from fedtune.core.registry.rounding import number, rounded_up

RELATION = "add or remove one unit"  # what neighbouring data sets differ in
# Shown wherever two of these three ε appear together.
THREE_EPSILONS = (
    "ε planned is what all rounds of a plan cost, ε paid what the rounds entered in a site's "
    "ledger cost (each is entered before it trains, so an interrupted one counts), and ε reported "
    "what the updates that arrived cost: at one δ, reported ≤ paid, and paid is above planned only "
    "where a round was paid twice."
)


def assumption(sites: int, colluding: int) -> str:
    """State the assumption under which ε holds if sites share noise, as a clause to follow "if".

    >>> assumption(5, 2)
    'at most 2 of the 5 sites that share the noise collude with the coordinator'
    """
    verb = "colludes" if colluding == 1 else "collude"
    return f"at most {colluding} of the {sites} sites that share the noise {verb} with the \
coordinator"


def assumptions(site: dict[str, Any]) -> str:
    """State the assumption under which ε holds, as a clause to follow "if". site: a report's
    "privacy", or one site's entry in it. For a derived run, state the assumptions of all runs from
    which it was made. Return "" if no noise is shared."""
    table = site.get("secure_aggregation")
    if not isinstance(table, dict):
        return ""
    pairs = table.get("assumptions") or [[table.get("sites") or 0, table.get("colluding") or 0]]
    return " and ".join(assumption(int(sites), int(colluding)) for sites, colluding in pairs)


def fallback(privacy: dict[str, Any]) -> dict[str, Any] | None:
    """Return the privacy figures that hold even if all other sites collude with the coordinator,
    so that only a site's own noise protects it. The result is a copy of one site's entry in
    `privacy`, with the ε and the noise that this site's own noise alone gives. Of all sites, the
    one with the largest such ε is taken. Return None if the run had no secure aggregation.

    privacy: a report's "privacy"; if it lists no sites, it counts as the entry of one site.

    >>> table = {"sites": 3, "colluding": 1, "own_noise_multiplier": 2.0, "fallback_epsilon": 1.5}
    >>> fallback({"epsilon": 1.0, "secure_aggregation": table})["epsilon"]
    1.5
    """
    sites = list(privacy.get("sites", {}).values()) or [privacy]
    held = [_own_noise(site) for site in sites if isinstance(site.get("secure_aggregation"), dict)]
    return max(held, key=lambda site: float(site["epsilon"]), default=None)


def _own_noise(site: dict[str, Any]) -> dict[str, Any]:
    table = site["secure_aggregation"]
    told = number(table.get("fallback_epsilon"))
    figures = {"epsilon": math.inf if told is None else told}  # no figure means no guarantee
    if "own_noise_multiplier" in table:
        figures["noise_multiplier"] = table["own_noise_multiplier"]
    return site | figures


def shared_line(privacy: dict[str, Any]) -> str:
    """State in one line the assumption under which a report's ε holds, and the ε that holds without
    the assumption; "" if the run had no secure aggregation."""
    whatever = fallback(privacy)
    if whatever is None:
        return ""
    return (
        f"if {assumptions(whatever)}; whatever happens, by each site's own noise alone: "
        f"ε = {rounded_up(whatever['epsilon'])}"
    )


def best_guess(privacy: dict[str, Any]) -> float:
    """Return a bound on the probability that an attacker guesses correctly whether a unit took
    part; a coin reaches 0.5. privacy: a report's "privacy".

    The attacker knows every other record and sees everything that left the sites. The result is the
    largest of the sites' bounds. A site's bound is the smaller of (e^ε + δ) / (1 + e^ε) (Kairouz et
    al. 2015, region of an (ε, δ) test) and, if every step takes every unit (q = 1),
    Φ(k √steps / 2σ), which is exact for the Gaussian mechanism (Dong et al. 2019, Corollary 3.3).
    A unit moves a sum by up to kC: k is "records_per_unit", the most records of a unit where
    records are drawn, each clipped to C by itself; else 1."""
    sites = list(privacy.get("sites", {}).values()) or [privacy]
    return max(_site_guess(site) for site in sites)


def _site_guess(site: dict[str, Any]) -> float:
    epsilon, delta = number(site.get("epsilon")), number(site.get("delta"))
    if epsilon is None or delta is None:
        return 1.0
    bound = 1 / (1 + math.exp(-epsilon)) + delta / (1 + math.exp(min(epsilon, 700.0)))
    sigma, steps = number(site.get("noise_multiplier")), number(site.get("steps"))
    records = number(site.get("records_per_unit")) or 1.0
    only = "events" not in site  # "events" lists all steps of a derived run
    if only and site.get("sampling_rate") == 1 and sigma and steps:
        bound = min(bound, NormalDist().cdf(records * math.sqrt(steps) / (2 * sigma)))
    return min(bound, 1.0)


def judge_change(metric: str, change: Any) -> tuple[str, str] | None:
    """Judge how the later of two models compares with the earlier one, by the 95 % interval of a
    metric's change. Return two texts: "better than", "worse than" or "not told apart from"; and the
    interval in words. metric: the metric's name. change: the interval, [lower end, upper end]; for
    anything else, return None.

    >>> judge_change("accuracy", [0.25, 0.5])
    ('better than', 'change of accuracy +0.25 to +0.5')
    """
    low, high = map(number, change or (None, None))
    if low is None or high is None:
        return None
    better = known_metric(metric).higher_is_better
    worse = high < 0 if better else low > 0
    improved = low > 0 if better else high < 0
    claim = "worse than" if worse else "better than" if improved else "not told apart from"
    return claim, f"change of {metric} {low:+.3g} to {high:+.3g}"


def verdict(quality: dict[str, Any]) -> str:
    """Say how the trained model compares with the base, by the 95 % interval of the change on the
    evaluation records. The text is the end of a sentence, such as "better than the base: change of
    …"; "" if the change was not measured.

    A preference run with report.preference.alarms is never called better."""
    from fedtune.report.preference import alarms  # that module imports this one

    metric, gain = quality.get("metric"), quality.get("gain") or {}
    told = judge_change(metric, gain.get("change")) if metric else None
    if told is None:
        return ""
    claim, interval = told
    if claim == "better than" and alarms(quality):
        claim = "NOT shown to be better than"
    return f"{claim} the base: {interval}, 95 % over {gain['records']} records"


STRENGTHS = (  # the largest ε of each class of strength, and its name
    (1.0, "strong (at most 1)"),
    (3.0, "fair (above 1, at most 3)"),
    (10.0, "weak (above 3, at most 10)"),
    (math.inf, "hardly any (above 10)"),
)


def strength(epsilon: Any) -> str:
    """Name the strength of an ε, on the scale that every page uses (STRENGTHS); "not known" if
    `epsilon` is no number.

    Ponomareva et al. 2023 ("How to DP-fy ML", 5.2) give ε from 1 to 10 a single name. Here this
    range is divided at 3: above 3, ε alone allows an attacker to guess correctly with a probability
    of more than 95 %. If the plan's noise is known, `best_guess` is the closer figure.

    >>> strength(6.0)
    'weak (above 3, at most 10)'
    """
    n = number(epsilon)
    if n is None or math.isnan(n):
        return "not known"
    return next(name for most, name in STRENGTHS if n <= most)


def protects(unit: str) -> str:
    """Return a noun phrase that names whom ε protects. unit: "patient" or "record"."""
    return "all records of one patient" if unit == "patient" else f"one {unit}"


def limits(unit: str, shared: bool = False) -> list[str]:
    """Return sentences, for every report, that say what the guarantee does not cover. unit:
    "patient" or "record". shared: whether the run's sites shared noise."""
    several = "one patient at several hospitals: the ε of each adds up."
    if shared:
        several = (
            "one patient at several hospitals: over studies the ε of each adds up, and in this run "
            "it is worse, since all of the patient's records move one sum against one dose of "
            "noise."
        )
    common = [
        "What is true of the population. If these records show that a drug helps, the model may "
        "say so, and would have said so without any one of them.",
        f"The same records in other studies, or {several} Each site's step log keeps its own "
        "count.",
        "The base model, the public text and the held-out records that the coordinator evaluates "
        "on. They are taken to be public or released.",
        "Choices that people made after looking at private records, such as tuning settings on "
        "them outside this run.",
        "A site whose own computer is under an attacker's control, and what the duration of a "
        "round may reveal.",
    ]
    if unit == "record":
        return [
            "A patient with several records. The protected unit is one record; for a patient with "
            "k records ε is up to k times as large. Use the patient unit where there is a patient "
            "column.",
            *common,
        ]
    return common
