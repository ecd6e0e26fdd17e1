"""What an adapter that was made from others has spent: their budgets, put together by caution.

Making it is post-processing and free. But whoever holds it holds something of every parent, and a
person whose records went into several parents is charged by all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.dp.accountant import ACCOUNTANT, Steps, cross_check, merged
from fedtune.errors import InputError

SAME, APART, UNKNOWN, STATED = "same", "apart", "unknown", "stated"
SAYS = {
    SAME: "the same site took part in both (by name or signing key): composed",
    APART: "sites of other names and other signing keys: the larger",
    UNKNOWN: "sites of other names, keys not known: composed, to be cautious",
    STATED: "stated to share no person by whoever made this: the larger",
}


@dataclass(frozen=True)
class Share:
    """One site's part in one parent. key: the site's public signing key, "" where the report has
    none; events: what ran there."""

    parent: int
    site: str
    key: str
    events: tuple[Steps, ...]


def shares(report: dict[str, Any], parent: int) -> list[Share]:
    """The sites of a parent's report.json; one of an unknown name where it names none.

    Errors: InputError where the report does not say what ran."""
    privacy = report["privacy"]
    try:
        sites = privacy.get("sites") or {"": privacy}
        found = [
            Share(parent, name, str(site.get("key") or ""), merged(_events(site)))
            for name, site in sorted(sites.items())
        ]
        if not 0 < float(privacy["delta"]) < 1:
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            f"parent {parent + 1}: its report.json does not say what its privacy cost",
            "the report of a finished run, as it was written",
            "copy the run's folder again",
        ) from None
    return found


def _events(site: dict[str, Any]) -> tuple[Steps, ...]:
    """Of an adapter that was itself made from others, all that its own parents ran."""
    if "events" in site:
        return tuple(Steps(*event) for event in site["events"])
    if not site.get("steps"):
        return ()
    sigma, rate = float(site["noise_multiplier"]), float(site["sampling_rate"])
    return (Steps(sigma, rate, int(site["steps"]), int(site.get("records_per_unit") or 1)),)


def relation(one: Share, other: Share, disjoint: bool = False) -> str:
    """Whether two sites of two parents may have trained on the same people."""
    if disjoint:
        return STATED
    if (one.site and one.site == other.site) or (one.key and one.key == other.key):
        return SAME
    return APART if one.key and other.key and one.site and other.site else UNKNOWN


def composed(reports: Sequence[dict[str, Any]], *, disjoint: bool = False) -> dict[str, Any]:
    """The "privacy" of a report, from those of its parents, all of them private.

    For each site, what ran there in every parent: of another parent, its site that is the same, or
    else the worst of those that may be. ε by PLD at the smallest of the parents' δ; the weakest of
    their units. disjoint: somebody states that no person is in two parents.
    Guarantee: at least the ε of everything that any one person, at any one site, took part in."""
    everywhere = [shares(report, number) for number, report in enumerate(reports)]
    privacy = [report["privacy"] for report in reports]
    delta = min(float(each["delta"]) for each in privacy)
    common = {
        "delta": delta,
        "unit": "patient" if all(p.get("unit") == "patient" for p in privacy) else "record",
        "relation": privacy[0].get("relation"),
        "accountant": ACCOUNTANT,
        "clipping": " or ".join(sorted({str(p.get("clipping")) for p in privacy})),
    }
    sites: dict[str, dict[str, Any]] = {}
    decided: set[tuple[int, int, str]] = set()
    for own in (share for each in everywhere for share in each):
        events = list(own.events)
        for other in everywhere:
            if other[0].parent != own.parent:
                more, why = _of_another(own, other, delta, disjoint)
                events += more
                first, second = sorted((own.parent, other[0].parent))
                decided.add((first, second, why))
        found = common | {
            "epsilon": cross_check(events, delta),
            "steps": sum(event.steps for event in events),
            "events": [list(event) for event in events],
            "key": own.key or None,
        }
        name = own.site or f"parent {own.parent + 1}"
        if found["epsilon"] >= sites.get(name, {"epsilon": -1.0})["epsilon"]:
            sites[name] = found
    worst = max(sites.values(), key=lambda site: float(site["epsilon"]))
    how = [{"parents": [a + 1, b + 1], "how": SAYS[why]} for a, b, why in sorted(decided)]
    kept = {key: value for key, value in worst.items() if key not in ("events", "key")}
    return {**kept, "sites": sites, "decided": how}


def _of_another(
    own: Share, other: Sequence[Share], delta: float, disjoint: bool
) -> tuple[tuple[Steps, ...], str]:
    """What another parent may have run on the people of `own`, and how that was decided."""
    by = [(relation(own, share, disjoint), share) for share in other]
    for wanted in (SAME, UNKNOWN):  # a site takes part in a study under one name
        if found := [share for why, share in by if why == wanted]:
            return max((s.events for s in found), key=lambda e: cross_check(e, delta)), wanted
    return (), STATED if disjoint else APART
