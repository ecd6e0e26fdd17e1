"""Compose the privacy cost of an adapter that was derived from several finished runs.

Deriving is post-processing and costs no ε of its own, but the result depends on every parent (one
of these runs): a person whose records trained several parents is charged the composition of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
    - names, keys: these, and the other names and keys that the report gives to the same hospital;
      without empty ones
    - events: the steps that ran on the site's records
    - fallback: the same steps with the σ of the site's own noise alone; equal to events if the
      sites did not share noise
    - assumptions: a pair (n, t) for each run with shared noise: the σ in `events` holds only if at
      most t of the n sites collude"""

    parent: int
    site: str
    key: str
    names: frozenset[str]
    keys: frozenset[str]
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
                _identities(name, site, "names"),
                _identities(site.get("key"), site, "keys"),
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


def _identities(own: Any, site: dict[str, Any], kind: str) -> frozenset[str]:
    """Return the names or the keys of the hospital that one entry of a report is of: its own, and
    those that `compose_reports` stored with the entry.

    - own: the entry's own name or key, or nothing
    - site: the site's entry in a report's "privacy"
    - kind: "names" or "keys"
    """
    more = (site.get("known_as") or {}).get(kind) or []
    return frozenset(str(found) for found in [own, *more] if found)


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


def relation(first: Share, second: Share) -> str:
    """Decide whether two sites of different parents (runs from which an adapter was derived)
    trained on the same people. Return the first of these texts that applies:

    | SAME | the two have a name or a key in common |
    | APART | both sites have a name and a key, and all of these differ |
    | UNKNOWN | a site's name or key is missing |
    """
    if first.names & second.names or first.keys & second.keys:
        return SAME
    return APART if first.names and first.keys and second.names and second.keys else UNKNOWN


def group_by_hospital(sites: Iterable[Share]) -> list[list[Share]]:
    """Group the entries that are of one hospital: of any two with a name or a key in common, and of
    any two that further entries connect. A hospital that enrolled again under another name or with
    other keys is so one group, if one of the entries shows both."""
    return _group(sites, lambda first, second: relation(first, second) == SAME)


def _group(sites: Iterable[Share], is_same: Callable[[Share, Share], bool]) -> list[list[Share]]:
    """Group entries: any two for which `is_same` holds, and any two that further ones connect."""
    groups: list[list[Share]] = []
    for site in sites:
        connected = [g for g in groups if any(is_same(site, other) for other in g)]
        groups = [group for group in groups if group not in connected]
        groups.append([*chain.from_iterable(connected), site])
    return groups


def compose_reports(reports: Sequence[dict[str, Any]], *, disjoint: bool = False) -> dict[str, Any]:
    """Compute the privacy cost of a derived adapter from the reports of its parents, all of which
    must be private. Return the entry "privacy" of the adapter's own report.

    A hospital is charged for the steps of all its entries: of those with a name or a key in common,
    also by way of further entries (`group_by_hospital`). For a parent in which it has no entry, it
    is charged for the steps of a site that may be the same hospital, namely of the costliest. The
    largest ε of any hospital is the adapter's. Every ε is computed by PLD at the smallest of the
    parents' δ. The unit is the patient only if it is the patient in all parents, else the record.
    If the sites of a parent shared noise, a second ε is composed from the noise that each site
    added itself. Each name of a hospital has an entry of its own in the result, with the cost of
    the whole hospital and, if there are several names or keys, with all of them in "known_as".

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
    everyone = list(chain.from_iterable(by_parent))
    hospitals = group_by_hospital(everyone)
    assumed = sorted(frozenset().union(*(site.assumptions for site in everyone)))
    sites: dict[str, dict[str, Any]] = {}
    decided: set[tuple[int, int, str]] = set()
    charged = [(hospital, hospital) for hospital in hospitals]
    if disjoint:
        charged = [(hospital, [site]) for hospital in hospitals for site in hospital]
    for hospital, entries in charged:
        events, alone = _own_cost(entries, delta)
        parents = {site.parent for site in entries}
        for other in range(len(reports)):
            why = STATED if disjoint else SAME if other in parents else APART
            if why == APART and (unknown := _may_be_same(hospital, hospitals, other)):
                why = UNKNOWN
                costs = [_own_cost(entries_there, delta) for entries_there in unknown]
                events += _worst([cost for cost, _ in costs], delta)
                alone += _worst([cost for _, cost in costs], delta)
            decided |= {(min(n, other), max(n, other), why) for n in parents - {other}}
        composed = common | {
            "epsilon": cross_check(events, delta),
            "steps": sum(event.steps for event in events),
            "events": [list(event) for event in events],
        }
        if assumed:
            composed["secure_aggregation"] = {
                "assumptions": [list(pair) for pair in assumed],
                "fallback_epsilon": cross_check(alone, delta),
                "fallback_events": [list(event) for event in alone],
            }
        names = sorted(frozenset[str]().union(*(site.names for site in hospital)))
        keys = sorted(frozenset[str]().union(*(site.keys for site in hospital)))
        if len(names) > 1 or len(keys) > 1:
            composed["known_as"] = {"names": names, "keys": keys}
        for site in entries:
            name = site.site or f"parent {site.parent + 1}"
            sites[name] = _costlier(sites.get(name), composed | {"key": site.key or None})
    worst = max(sites.values(), key=lambda row: float(row["epsilon"]))
    how = [{"parents": [a + 1, b + 1], "how": DESCRIPTIONS[why]} for a, b, why in sorted(decided)]
    total = {key: value for key, value in worst.items() if key not in ("events", "key", "known_as")}
    if assumed:
        table = max((row["secure_aggregation"] for row in sites.values()), key=_fallback_epsilon)
        total["secure_aggregation"] = {k: v for k, v in table.items() if k != "fallback_events"}
    return {**total, "sites": sites, "decided": how}


def _costlier(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """Return the one of two entries with the larger ε. By the sites' own noise alone the other may
    cost more; then that figure, and the steps it is of, are the other's. first: None if there is
    only `second`."""
    if first is None:
        return second
    worst = max(second, first, key=lambda row: float(row["epsilon"]))
    tables = [row["secure_aggregation"] for row in (second, first) if "secure_aggregation" in row]
    if tables:
        worst = worst | {"secure_aggregation": max(tables, key=_fallback_epsilon)}
    return worst


def _fallback_epsilon(table: dict[str, Any]) -> float:
    return float(table["fallback_epsilon"])


def _own_cost(
    hospital: Sequence[Share], delta: float
) -> tuple[tuple[Steps, ...], tuple[Steps, ...]]:
    """Return the steps that ran on one hospital's records, and the same steps with the σ of the
    sites' own noise alone.

    Entries of one parent that only another parent connects were charged apart, so both count. Those
    that are stored as one hospital's (have a name in common by "known_as") were composed when their
    report was made, and each has the cost of all: the costliest counts.

    - hospital: all entries of one hospital
    - delta: the δ at which ε is computed, to find the costliest"""
    events: tuple[Steps, ...] = ()
    alone: tuple[Steps, ...] = ()
    for parent in sorted({site.parent for site in hospital}):
        entries = [site for site in hospital if site.parent == parent]
        for composed in _group(entries, lambda first, second: bool(first.names & second.names)):
            events += _worst([site.events for site in composed], delta)
            alone += _worst([site.fallback for site in composed], delta)
    return events, alone


def _may_be_same(
    hospital: Sequence[Share], hospitals: Iterable[Sequence[Share]], parent: int
) -> list[list[Share]]:
    """Return, for each other hospital of which it is not known whether it is the same, its entries
    in one parent.

    - hospital: the entries of one hospital, which has none in this parent
    - hospitals: the entries of all hospitals
    - parent: the parent's number"""
    unknown = [
        [site for site in other if site.parent == parent]
        for other in hospitals
        if any(relation(a, b) == UNKNOWN for a in hospital for b in other)
    ]
    return [sites for sites in unknown if sites]


def _worst(runs: Sequence[tuple[Steps, ...]], delta: float) -> tuple[Steps, ...]:
    """Return those of several steps that cost most at δ = `delta`."""
    return runs[0] if len(runs) == 1 else max(runs, key=lambda run: cross_check(run, delta))
