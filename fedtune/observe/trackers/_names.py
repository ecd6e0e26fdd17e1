"""Name a round's figures for trackers. A figure that trl's trainers also log gets their name.

| figure in fedtune         | tracked as                                              |
| quality.loss, .accuracy … | eval/loss, eval/accuracy …                              |
| quality.preference, margin | eval/rewards/accuracies, eval/rewards/margins (as DPO)  |
| selection.loss            | selection/loss                                          |
| ε of a site, the largest  | epsilon/NAME, epsilon                                   |
| bytes, sites, time        | bytes/up, bytes/down, participants, missing, seconds    |
The step is the round, as in Flower's results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TRL = {"preference": "rewards/accuracies", "margin": "rewards/margins"}


def figures(data: Mapping[str, Any]) -> dict[str, float]:
    """Return tracked name -> number for a round's figures. Figures that are None are left out.
    data: the fields of a "round" event.

    >>> figures({"round": 2, "quality": {"loss": 1.5}, "epsilon": {"north": 0.5, "south": None}})
    {'eval/loss': 1.5, 'epsilon/north': 0.5}
    """
    found: dict[str, Any] = {}
    for table, prefix in (("quality", "eval"), ("selection", "selection")):
        for name, value in (data.get(table) or {}).items():
            found[f"{prefix}/{TRL.get(name, name)}"] = value
    spent = data.get("epsilon") or {}
    found |= {f"epsilon/{name}": value for name, value in spent.items()}
    if spent and None not in spent.values():
        found["epsilon"] = max(spent.values())
    for way in ("up", "down"):
        if moved := data.get(f"bytes_{way}"):
            found[f"bytes/{way}"] = sum(moved.values())
    for name in ("participants", "missing"):
        if name in data:
            found[name] = len(data[name])
    found["seconds"] = data.get("seconds")
    return {name: float(value) for name, value in found.items() if value is not None}


def about(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run's "start" event says about the run: the study, the plan's digest, the
    number of rounds, and whether the run is private. data: the fields of this event."""
    keys = ("study", "plan_digest", "rounds", "private")
    return {key: data[key] for key in keys if key in data}
