"""A site's summary of its step log, as it crosses the wire."""

from __future__ import annotations

import json
import math
from typing import Any


def parse(text: Any) -> list[dict[str, Any]]:
    """Parse a summary: {sigma, q, max_grad_norm, records, steps} for each kind of step.

    Errors: ValueError, TypeError, KeyError, ArithmeticError or RecursionError where it is not
    one."""
    if not isinstance(text, str) or len(text) > 100_000:
        raise ValueError("events")
    events = []
    for raw in json.loads(text):
        event = {key: float(raw[key]) for key in ("sigma", "q", "max_grad_norm")}
        finite = all(math.isfinite(value) and value > 0 for value in event.values())
        counts = {key: raw[key] for key in ("records", "steps")}
        counted = all(type(n) is int and 0 < n < 10**9 for n in counts.values())
        if not finite or event["q"] > 1 or not counted:
            raise ValueError("events")
        events.append({**event, **counts})
    return events
