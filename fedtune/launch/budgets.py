"""Explain why sites' budgets refused a simulation. So that the explanation can name earlier runs,
store the path of each run in the state folders of its sites."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fedtune.core.config import Site, Study
from fedtune.core.errors import FedtuneError, Refused
from fedtune.core.files.writing import replace
from fedtune.core.run_folder import load_plan
from fedtune.core.vault.budget_refusal import CEILINGS, PLACES, TODO, explain, is_within, places
from fedtune.homes.opening import find_ledger


def remember(sites: Sequence[Site], run: Path) -> None:
    """Store the path of a run in each site's state folder, under the digest of the run's plan. The
    path is only shown to people, so errors of the disk and a damaged plan are ignored. sites: the
    sites of the simulation."""
    with suppress(FedtuneError, OSError):
        digest = load_plan(run).digest
        for site in sites:
            runs = places(site) | {digest: str(run.absolute())}
            replace(site.site.state / PLACES, json.dumps(runs, indent=1).encode(), private=True)


def count_charges(sites: Sequence[Site]) -> dict[str, Counter[str]]:
    """Count the charges in each site's own ledger: site's name -> plan's digest -> how many. A site
    whose records are declared public or generated is left out: each run has a ledger of its own.

    sites: the sites of the simulation. Errors: LedgerError."""
    counts = dict[str, Counter[str]]()
    for site in sites:
        if not site.data.declared:
            ledger = find_ledger(site.home)
            spent = ledger.spending(site.data.name) if ledger else []
            counts[site.site.name] = Counter(one.charge.study for one in spent)
    return counts


def say_what_was_free(run: Path, sites: Sequence[Site], before: dict[str, Counter[str]]) -> str:
    """Say which sites paid nothing for a run, since they sent again what they had stored of an
    earlier run of the same plan; "" if each site paid.

    - run: the run's folder
    - sites: the sites of the simulation
    - before: what `count_charges` returned before the run

    Errors: LedgerError, InputError."""
    plan, after = load_plan(run).digest, count_charges(sites)
    free = [name for name in after if after[name][plan] == before[name][plan] > 0]
    if not free:
        return ""
    return (
        f"{', '.join(free)}: what was stored of an earlier run of this plan was sent again, as it "
        "was; this run cost no ε beyond that one's"
    )


def explain_refusal(refusal: Refused, study: Study, sites: Sequence[Site]) -> Refused:
    """Explain why sites refused a study if a budget was the reason: return a refusal with notes
    that name the studies on which the sites' budgets were spent. The notes are made from the sites'
    ledgers on this machine. Return `refusal` itself if no budget was the reason.

    study: the plan that was refused; sites: the sites of the simulation."""
    if not any(ceiling in str(refusal) for ceiling in CEILINGS):
        return refusal
    told: list[str] = []
    for site in sites:
        if site.data.declared:
            continue
        with suppress(FedtuneError):
            ledger = find_ledger(site.home)
            charges = ledger.charges(site.data.name) if ledger else []
            if not is_within(study, site, charges):
                paid, *more = explain(study, site, ledger)
                told += [f"  {site.site.name}: {paid}", *(f"    {line}" for line in more)]
    if not told:
        return refusal
    fuller = type(refusal)(refusal.happened, refusal.expected, TODO)
    for line in told:
        fuller.add_note(line)
    return fuller
