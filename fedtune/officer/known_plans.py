"""Find earlier plans of a study that this site knows, in which the digests are filled in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedtune.core.config import Site, Study, study_from_json
from fedtune.core.errors import FedtuneError
from fedtune.core.files import reading
from fedtune.core.run_folder import load_plan
from fedtune.core.vault.budget_refusal import places
from fedtune.runs.choice import with_digests_of


def known_plan(study: Study, site: Site, *runs: Path) -> Study:
    """Return the study as its complete plan: with the digests filled in from an earlier run of the
    study, or from a plan that a coordinator sent to this site. Return the study unchanged if
    neither is found. Only with its digests can the study's charges and signatures be found in the
    ledger. runs: the folders of runs that are searched first."""
    for plan in _plans(site, runs):
        filled = with_digests_of(study, plan)
        if filled.digest == plan.digest:
            return filled
    return study


def _plans(site: Site, runs: tuple[Path, ...]) -> Iterator[Study]:
    sent = sorted(site.site.plan_file("").parent.glob("*.json"))
    for folder in (*runs, *map(Path, reversed(places(site).values())), *sent):
        try:
            if folder.suffix == ".json":
                yield study_from_json(reading.text(folder, "a plan that was sent"))
            else:
                yield load_plan(folder)
        except FedtuneError:  # no run there any more, or a damaged one
            continue
