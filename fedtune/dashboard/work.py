"""Compute, in a child process, the parts of a page that take seconds: `python -m
fedtune.dashboard.work WHAT PATH TRUST`.

The accountant's libraries take 100 MB, which the server should not hold while it waits. Only the
child holds a ledger's locks, for as long as `fedtune ledger` does. The child prints the result as
JSON, or {"error": …}. It enters nothing in an audit log, since a person who looks at a page does
not review a plan."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedtune.core.errors import FedtuneError

LATEST = 60  # number of newest entries of an audit log that a page shows


def budget(site_path: Path, _: str) -> dict[str, Any]:
    """Return the figures of `fedtune ledger` for the site file `site_path`: the studies, the total
    ε, and the ε that remains. Return {"none": True, "ceiling": …} if there is no ledger yet."""
    from fedtune.core.config import load_site
    from fedtune.core.config.patient_columns import patient_columns
    from fedtune.core.ledger.spending import facts
    from fedtune.homes.opening import find_ledger

    site = load_site(site_path)
    if (ledger := find_ledger(site.site.ledger or site.home)) is None:
        return {"none": True, "ceiling": site.policy.ceiling}
    unit = "patient" if site.data.columns.patient else "record"
    return facts(ledger, site.data.name, site.policy, unit, patient_columns(site))


def plans(site_path: Path, _: str) -> dict[str, Any]:
    """Return {"plans": a list} with a dict for each plan that waits for a signature at this site:
    "study" (its name), "path" (of the plan's file), and the figures that `fedtune review` shows."""
    from fedtune.homes.opening import find_ledger
    from fedtune.officer.review import is_unsigned, load_running, read_plan, review

    site, _changed = load_running(site_path)
    if (ledger := find_ledger(site.home)) is None:
        return {"plans": []}
    found = []
    for path in sorted((site.site.state / "plans").glob("*.json")):
        study = read_plan(path, site)
        if is_unsigned(study, site, ledger):
            result = asdict(review(study, site, ledger))
            found.append({"study": study.study.name, "path": str(path), **result})
    return {"plans": found}


def acts(path: Path, _: str) -> dict[str, Any]:
    """Check all entries of the audit log, and return a dict:

    - "entries": the newest entries, at most LATEST
    - "refusals": the newest entries about refusals, at most LATEST
    - "count": the number of all entries
    - "signer": the key that signs the entries
    - "head": the newest entry, as "SEQ:HASH"

    If no log was begun, return {"entries": [], "count": 0}. path: a coordinator's home, or a site
    file. Errors: NotGenuine if entries were changed, or if the log was begun and is missing now."""
    from fedtune.core.config import load_site
    from fedtune.core.ledger import audit_log

    folder = path if path.is_dir() else load_site(path).home
    if not audit_log.was_begun(folder):
        return {"entries": [], "count": 0}
    checked = audit_log.verify(folder, audit_log.signer_at(folder))
    entries = checked.entries[: -LATEST - 1 : -1]
    refused = [entry for entry in checked.entries[::-1] if entry["event"] == "refuse"][:LATEST]
    return {
        "entries": entries,
        "refusals": refused,
        "count": len(checked.entries),
        "signer": checked.signer,
        "head": checked.head,
    }


def verified(path: Path, trust: str) -> dict[str, Any]:
    """Return the result of `fedtune verify` for a run or a dossier; {"unsigned": True} if it has no
    signature. trust: the consortium's fingerprint, "" if it is not known."""
    from fedtune.core.run_folder import SIGNATURE
    from fedtune.evidence.verify import verify

    if not any((path / name).exists() for name in (SIGNATURE, "release.json")):
        return {"unsigned": True}
    return asdict(verify(path, trust))


def versions(path: Path, _: str) -> dict[str, Any]:
    """Return the list of a run's versions that `fedtune versions` shows (versions/index.json); {}
    if the run has none."""
    from fedtune.server.versions import Versions

    index = Versions(path).index()
    return asdict(index) if index else {}


KINDS: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    function.__name__: function for function in (budget, plans, acts, verified, versions)
}


def main(words: list[str]) -> None:
    from fedtune.report import jsonable

    what, path, trust = words
    try:
        result = KINDS[what](Path(path), trust)
    except FedtuneError as error:
        result = {"error": str(error)}
    print(json.dumps(jsonable(result), allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
