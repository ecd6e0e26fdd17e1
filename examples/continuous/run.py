"""Simulate a staged change: rounds before it, new records and a new public file, rounds after it.

python -m examples.continuous.run --out DIR [--seed 0] [--nobody]

--nobody: the public file changes and no new patient arrives, so that the rounds after the change
add only noise. The last line of output is JSON: the released model's accuracy on the public records
before the change, directly after it, and at the end; the numbers of versions released and kept
back; and the largest ε of a patient by each hospital's own ledger."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from examples.continuous.prepare import LIFE, write
from fedtune import Ledger, Site, Versions, load_sites, load_study, simulate
from fedtune.core.ledger.spending import find_heaviest_budget
from fedtune.core.registry import process_cache
from fedtune.server.versions import Version


def run(out: Path, seed: int = 0, *, arrive: bool = True, patients: float = 1.0) -> dict[str, Any]:
    """Run the rounds before and after the change under `out`, and return the figures of the last
    line. Between them all processes' state is dropped, and the study is resumed."""
    plan = write(out / "data", seed, patients)
    study, sites = load_study(plan), load_sites(out / "data" / "sites")
    simulate(study, sites, out / "run", rounds=LIFE)
    process_cache.clear("workers")  # each site starts again from its files and its ledger
    later = plan.parent / "later"
    (later / "evaluation.jsonl").replace(plan.parent / "evaluation.jsonl")
    for site in sites if arrive else ():
        shutil.copy(later / f"{site.site.name}.jsonl", site.data.path)
    simulate(study, sites, out / "run", rounds=2 * LIFE, resume=True)
    return {"seed": seed, "arrive": arrive, **_outcome(out / "run"), "epsilon": _spent(sites)}


def _outcome(folder: Path) -> dict[str, Any]:
    index = Versions(folder).index()
    assert index is not None
    by = {version.number: version for version in index.versions}
    after = [v.decision for v in index.versions if v.number > LIFE]
    return {
        "before": _released(by[LIFE]),
        "at the change": by[LIFE + 1].champion_value,
        "at the end": _released(by[2 * LIFE]),
        "each round": [round(_released(by[n]), 3) for n in range(1, 2 * LIFE + 1)],
        "released after it": after.count("released"),
        "kept back after it": after.count("kept back"),
    }


def _released(version: Version) -> float:
    """Return the metric of the adapter in use after the decision about `version`."""
    value = version.value if version.decision == "released" else version.champion_value
    assert value is not None
    return value


def _spent(sites: list[Site]) -> float:
    epsilons = []
    for site in sites:
        cohorts = Ledger(site.site.state).cohorts(site.data.name)
        epsilons.append(find_heaviest_budget(site.data.name, cohorts, site.policy).epsilon)
    return max(epsilons)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/continuous"), help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="other hospitals, other letters")
    parser.add_argument("--nobody", action="store_true", help="after the change nobody arrives")
    chosen = parser.parse_args()
    print(json.dumps(run(chosen.out, chosen.seed, arrive=not chosen.nobody)))


if __name__ == "__main__":
    main()
