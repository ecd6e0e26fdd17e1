"""Parse the summary of its step log that a site sends to the coordinator, and check it against the
plan."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SIGMA_SLACK = 0.02  # allowed share of σ's difference, since accountants differ between releases
REPEATS = 100  # the most times the plan's steps that a log has: lost rounds are logged again
KINDS = 4  # kinds of steps in a log: a plan has one, but a new release in mid-study may change σ


@dataclass(frozen=True)
class Agreed:
    """What the plan lays down for a site's noised steps. The site's step log must fit it.

    - sampling_rate: the rate at which a step draws records or units
    - noise_multiplier: σ of the noise that the site itself adds
    - max_grad_norm: the clipping norm
    - records: k, the most records of one unit that count in a step
    - steps: the number of steps in the whole plan"""

    sampling_rate: float
    noise_multiplier: float
    max_grad_norm: float
    records: int
    steps: int


def parse(text: Any) -> list[dict[str, Any]]:
    """Parse the summary of a site's step log, a JSON text. Return a list with a dict for each kind
    of step, with the keys sigma, q (the sampling rate), max_grad_norm, records (the most that count
    of one unit) and steps (their number).

    Errors: ValueError, TypeError, KeyError, ArithmeticError or RecursionError if it is not a
    summary."""
    if not isinstance(text, str) or len(text) > 100_000:
        raise ValueError("not a summary of a step log")
    events = []
    for raw in json.loads(text):
        event = {key: float(raw[key]) for key in ("sigma", "q", "max_grad_norm")}
        finite = all(math.isfinite(value) and value > 0 for value in event.values())
        counts = {key: raw[key] for key in ("records", "steps")}
        counted = all(type(n) is int and 0 < n < 10**9 for n in counts.values())
        if not finite or event["q"] > 1 or not counted:
            raise ValueError("not a summary of a step log")
        events.append({**event, **counts})
    return events


def objection(log: Sequence[Mapping[str, Any]], agreed: Agreed) -> str:
    """Check whether a site's step log belongs to the plan. Return "" if it does, else the reason
    why not. No ε is computed, and the time that this takes does not depend on the numbers in the
    log.

    - log: the step log, as `parse` returns it. Its steps are also compared with its first ones:
      whoever verifies the run knows no other σ if the plan states ε
    - agreed: what the plan lays down for the site's steps"""
    for event in log:
        rates = (agreed.sampling_rate, log[0]["q"])
        sigmas = (agreed.noise_multiplier, log[0]["sigma"])
        same = (
            all(math.isclose(event["q"], rate, rel_tol=1e-9) for rate in rates)
            and math.isclose(event["max_grad_norm"], agreed.max_grad_norm, rel_tol=1e-9)
            and event["records"] == agreed.records
        )
        ratios = [event["sigma"] / sigma for sigma in sigmas]
        if not same or not all(1 - SIGMA_SLACK <= ratio <= 1 + SIGMA_SLACK for ratio in ratios):
            return "its step log shows other noise than the plan's"
    if len({(event["sigma"], event["q"]) for event in log}) > KINDS:
        return "its step log shows more kinds of steps than a plan has"
    if sum(event["steps"] for event in log) > REPEATS * agreed.steps:
        return "its step log shows far more steps than the plan has"
    return ""


def has_grown(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a site's step log `now` has all steps of its earlier step log `before`, and at
    least one more. Steps are equal if they are of the same kind: of the same σ, rate, clipping norm
    and number of records."""
    old, new = _count_steps(before), _count_steps(now)
    return old <= new and old.total() < new.total()


def _count_steps(log: Sequence[Mapping[str, Any]]) -> Counter[tuple[Any, ...]]:
    """Return how many steps of each kind a step log has."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for event in log:
        kind = (event["sigma"], event["q"], event["max_grad_norm"], event["records"])
        counts[kind] += event["steps"]
    return counts
