"""Compose the privacy cost of an adapter that was derived from several finished runs.

Deriving is post-processing and costs no ε of its own, but the result depends on every parent (one
of these runs): a person whose records trained several parents is charged the composition of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from fedtune.accounting.cross_check import ACCOUNTANT, cross_check
from fedtune.core.dp.accountant import Steps, merge_events
from fedtune.core.errors import InputError

SAME = "same"
APART = "apart"
UNKNOWN = "unknown"
STATED = "stated"
DESCRIPTIONS = {
    SAME: "the same site took part in both (by name or signing key): composed",
    APART: "sites of other names and other signing keys: the larger",
    UNKNOWN: "sites of other names, keys not known: composed, to be cautious",
    STATED: "stated to share no person by whoever made this: the larger",
}


@dataclass(frozen=True)
class Share:
    """What one site's records cost in one parent, i.e. in one of the runs from which an adapter was
    derived.

    - parent: the parent's number, from 0
    - site: the site's name, "" if the report names no site
    - key: the site's public signing key, "" if the report has none
    - events: the steps that ran on the site's records
    - fallback: the same steps with the σ of the site's own noise alone; equal to events if the
      sites did not share noise
    - assumptions: a pair (n, t) for each run with shared noise: the σ in `events` holds only if at
      most t of the n sites collude"""

    parent: int
    site: str
    key: str
    events: tuple[Steps, ...]
    fallback: tuple[Steps, ...]
    assumptions: frozenset[tuple[int, int]] = frozenset()


def shares(report: dict[str, Any], parent: int) -> list[Share]:
    """List what each site's records cost in one parent (one of the runs from which an adapter was
    derived), from the parent's report.json. If the report names no site, the list has one share,
    whose `site` is "".

    - report: the content of report.json
    - parent: the parent's number, from 0

    Errors: InputError if the report lacks the figures of the steps that ran, or its δ is not
    between 0 and 1."""
    privacy = report["privacy"]
    try:
        sites = privacy.get("sites") or {"": privacy}
        site_shares = [
            Share(
                parent,
                name,
                str(site.get("key") or ""),
                merge_events(_events(site)),
                merge_events(_fallback(site)),
                _assumptions(site),
            )
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
    return site_shares


def _events(site: dict[str, Any]) -> tuple[Steps, ...]:
    """Return the steps that ran on one site's records, as its run's report gives them. In the
    report of a derived adapter, these are the steps in all runs from which it was derived.

    site: the site's entry in a report's "privacy"."""
    if "events" in site:
        return tuple(Steps(*event) for event in site["events"])
    if not site.get("steps"):
        return ()
    sigma, rate = float(site["noise_multiplier"]), float(site["sampling_rate"])
    return (Steps(sigma, rate, int(site["steps"]), int(site.get("records_per_unit") or 1)),)


def _fallback(site: dict[str, Any]) -> tuple[Steps, ...]:
    """Return the steps that `_events` returns for a site, each with the σ of the site's own noise
    alone. This σ is smaller only if the sites shared noise; otherwise the steps are the same.

    site: the site's entry in a report's "privacy"."""
    table = site.get("secure_aggregation")
    if not table:
        return _events(site)
    if "fallback_events" in table:
        return tuple(Steps(*event) for event in table["fallback_events"])
    own = float(table["own_noise_multiplier"])
    return tuple(event._replace(noise_multiplier=own) for event in _events(site))


def _assumptions(site: dict[str, Any]) -> frozenset[tuple[int, int]]:
    table = site.get("secure_aggregation")
    if not table:
        return frozenset()
    pairs = table.get("assumptions") or [[table["sites"], table["colluding"]]]
    return frozenset((int(sites), int(colluding)) for sites, colluding in pairs)


def relation(first: Share, second: Share, disjoint: bool = False) -> str:
    """Decide whether two sites of different parents (runs from which an adapter was derived)
    trained on the same people. Return the first of these texts that applies:

    | STATED | if `disjoint`: the caller states that no person is in two parents |
    | SAME | the two names are equal, or the two keys are equal |
    | APART | both sites have a name and a key, and both differ |
    | UNKNOWN | a site's name or key is missing |
    """
    if disjoint:
        return STATED
    if (first.site and first.site == second.site) or (first.key and first.key == second.key):
        return SAME
    return APART if first.key and second.key and first.site and second.site else UNKNOWN


def compose_reports(reports: Sequence[dict[str, Any]], *, disjoint: bool = False) -> dict[str, Any]:
    """Compute the privacy cost of a derived adapter from the reports of its parents, all of which
    must be private. Return the entry "privacy" of the adapter's own report.

    Each site is charged for its own steps and also, for every other parent, for the steps of the
    same site in that parent. If the same site is not in that parent, the charge is for the steps of
    a site of that parent that may share people with it, namely of the costliest. The largest ε of
    any site is the adapter's. Every ε is computed by PLD at the smallest of the parents' δ. The
    unit is the patient only if it is the patient in all parents, else the record. If the sites of a
    parent shared noise, a second ε is composed from the noise that each site added itself.

    disjoint: whether the caller states that no person is in two parents. If so, each site is
    charged for its own steps only.
    Guarantee: the result is at least the ε of all steps in which a person at one site took part.
    Errors: InputError if a report lacks these figures; AccountantsDisagree from `cross_check`."""
    by_parent = [shares(report, number) for number, report in enumerate(reports)]
    privacy = [report["privacy"] for report in reports]
    delta = min(float(p["delta"]) for p in privacy)
    common = {
        "delta": delta,
        "unit": "patient" if all(p.get("unit") == "patient" for p in privacy) else "record",
        "relation": privacy[0].get("relation"),
        "accountant": ACCOUNTANT,
        "clipping": " or ".join(sorted({str(p.get("clipping")) for p in privacy})),
    }
    sites: dict[str, dict[str, Any]] = {}
    decided: set[tuple[int, int, str]] = set()
    for share in chain.from_iterable(by_parent):
        events, alone = list(share.events), list(share.fallback)
        for other in by_parent:
            if other[0].parent != share.parent:
                more, more_alone, why = _events_in_parent(share, other, delta, disjoint)
                events += more
                alone += more_alone
                first, second = sorted((share.parent, other[0].parent))
                decided.add((first, second, why))
        site = common | {
            "epsilon": cross_check(events, delta),
            "steps": sum(event.steps for event in events),
            "events": [list(event) for event in events],
            "key": share.key or None,
        }
        if assumed := sorted(frozenset().union(*(s.assumptions for p in by_parent for s in p))):
            site["secure_aggregation"] = {
                "assumptions": [list(pair) for pair in assumed],
                "fallback_epsilon": cross_check(alone, delta),
                "fallback_events": [list(event) for event in alone],
            }
        name = share.site or f"parent {share.parent + 1}"
        if site["epsilon"] >= sites.get(name, {"epsilon": -1.0})["epsilon"]:
            sites[name] = site
    worst = max(sites.values(), key=lambda row: float(row["epsilon"]))
    how = [{"parents": [a + 1, b + 1], "how": DESCRIPTIONS[why]} for a, b, why in sorted(decided)]
    total = {key: value for key, value in worst.items() if key not in ("events", "key")}
    if table := total.get("secure_aggregation"):
        total["secure_aggregation"] = {k: v for k, v in table.items() if k != "fallback_events"}
    return {**total, "sites": sites, "decided": how}


def _events_in_parent(
    site: Share, other: Sequence[Share], delta: float, disjoint: bool
) -> tuple[tuple[Steps, ...], tuple[Steps, ...], str]:
    """Find the steps that another parent may have run on the people of `site`. Return three things:
    these steps; the same steps, each with the σ of its site's own noise alone; and a word that says
    why these steps were chosen (`relation`): SAME, UNKNOWN, APART or STATED. With APART and STATED
    there are no steps.

    - site: one site's share in one parent
    - other: the shares of all sites in the other parent
    - delta: the δ at which ε is computed, to find the costliest of several sites
    - disjoint: whether the caller states that the two parents share nobody"""

    def find_worst(runs: list[tuple[Steps, ...]]) -> tuple[Steps, ...]:
        return max(runs, key=lambda events: cross_check(events, delta))

    by_relation = [(relation(site, share, disjoint), share) for share in other]
    for why in (SAME, UNKNOWN):  # the people of the same site are at no other site of a parent
        if matching := [share for kind, share in by_relation if kind == why]:
            return (
                find_worst([s.events for s in matching]),
                find_worst([s.fallback for s in matching]),
                why,
            )
    return (), (), STATED if disjoint else APART
