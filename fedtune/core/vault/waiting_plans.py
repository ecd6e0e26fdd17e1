"""Store plans for a person at the site to read and sign with `fedtune review`:
STATE/plans/PLAN.json. A plan is public."""

from __future__ import annotations

import logging
from pathlib import Path

from fedtune.core.config import Site, Study
from fedtune.core.errors import InfrastructureError, PolicyRefused
from fedtune.core.files.writing import replace

log = logging.getLogger("fedtune.site")
MOST = 32  # plans that wait, at most
MOST_BYTES = 2**20  # largest size of a plan as JSON


def check_plan_length(plan: str) -> None:
    """Check that a plan, as a coordinator sent it, is no longer than MOST_BYTES, the limit at every
    site. Errors: PolicyRefused."""
    if len(plan) > MOST_BYTES or len(plan.encode()) > MOST_BYTES:
        raise PolicyRefused(
            "the plan is too large", f"at most {MOST_BYTES:,} bytes as JSON", "shorten its texts"
        )


def keep_plan(site: Site, study: Study) -> Path:
    """Write a plan to the file in which `fedtune review` finds it, whether or not somebody here has
    signed it; return the file's path.

    At most MOST plans are kept: the oldest are deleted first. If the disk has no space for a plan,
    the plan is not stored; the site then logs a warning, and the coordinator gets the same answer.
    Call this while the ledger's reserve of disk space (files.room) is in place, not while it is
    freed for an order: a plan that nobody asked for must not take the space of a charge or a
    withdrawal."""
    path = site.site.plan_file(study.digest)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = (study.model_dump_json(indent=2) + "\n").encode()
        others = [file for file in path.parent.glob("*.json") if file != path]
        others.sort(key=lambda file: file.stat().st_mtime, reverse=True)
        for old in others[MOST - 1 :]:
            old.unlink()
        replace(path, content)
    except (OSError, InfrastructureError) as error:
        log.warning("%s: the plan is not kept for review (%s)", path, error)
    return path
