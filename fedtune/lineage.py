"""Where a model comes from: the runs that it was made of, what they cost, and whether they may be
used beside private records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.errors import InputError, Refused
from fedtune.models.whole import PLAN, Whole

NOTE = (
    "Made from finished runs and public prompts alone. Whatever is computed from what the sites "
    "already released under (ε, δ) has at most the same (ε, δ): this step cost no ε of its own."
)


def require_private(model: Whole, what: str, accepted: Sequence[str] = ()) -> None:
    """Whether `model` may set targets for private records: a base, or a run under (ε, δ).

    A model that saw the records without noise makes each record's target depend on all the others.
    accepted: digests that the user declares to be public. Errors: Refused."""
    if model.study is None or model.study.private or model.digest in accepted:
        return
    raise Refused(
        f'the {what} is a run with privacy = "off" ({model.digest})',
        "a base, or a run that was trained under (ε, δ)",
        "if it never saw a private record, declare its digest as public",
    )


def parent(source: str | Path, model: Whole) -> dict[str, Any]:
    """What a report says of one model that another was made of."""
    run = Path(source)
    found: dict[str, Any] = {"name": model.base.name, "digest": model.digest}
    if model.study is None:
        return found | {"kind": "base"}
    report = _report(run)
    found |= {"name": model.study.study.name, "kind": "run", "plan": model.study.digest}
    found |= {"private": bool(report.get("private")), "privacy": report.get("privacy") or {}}
    return found


def carried_over(parents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The privacy of what was made of `parents`, as a report's body: `private` and `privacy`.

    ε and δ of all parents are added up site by site (basic composition: Dwork and Roth 2014,
    theorem 3.16), names of sites being what tells sites apart; the same parent counts once."""
    runs = {p["digest"]: p for p in parents if p["kind"] == "run"}
    if not runs:
        return {"private": False, "privacy": {"warning": "no run among the parents: a base"}}
    if not all(p["private"] for p in runs.values()):
        return {"private": False, "privacy": {"warning": "a parent was trained without privacy"}}
    spent: dict[str, tuple[float, float]] = {}
    for found in (p["privacy"] for p in runs.values()):
        for name, site in (found.get("sites") or {"all": found}).items():
            epsilon, delta = spent.get(name, (0.0, 0.0))
            spent[name] = epsilon + float(site["epsilon"]), delta + float(site["delta"])
    units = {found.get("unit", "record") for found in (p["privacy"] for p in runs.values())}
    common = {
        "unit": "patient" if units == {"patient"} else "record",
        "relation": "add or remove one unit",
        "accountant": "the parents' own, added up site by site",
    }
    worst = max(spent, key=lambda name: spent[name])
    sites = {n: {"epsilon": e, "delta": d} | common for n, (e, d) in sorted(spent.items())}
    return {"private": True, "privacy": {**sites[worst], "sites": sites}}


def _report(run: Path) -> dict[str, Any]:
    try:
        body = json.loads((run / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"{run}: has a {PLAN} and no readable report.json",
            "a finished run",
            "finish it with --resume",
        ) from None
    return body if isinstance(body, dict) else {}
