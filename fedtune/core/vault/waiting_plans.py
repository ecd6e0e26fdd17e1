"""Store plans that wait for a person at the site to sign them: STATE/plans/PLAN.json, public."""

from __future__ import annotations

import logging
from pathlib import Path

from fedtune.core.config import Site, Study
from fedtune.core.errors import InfrastructureError, PolicyRefused
from fedtune.core.files.writing import replace

log = logging.getLogger("fedtune.site")
MOST = 32  # plans that wait, at most
MOST_BYTES = 2**20  # of a plan, as JSON


def check_plan_length(plan: str) -> None:
    """Check that a plan, as a coordinator sent it, is no longer than any site reads. Errors:
    PolicyRefused."""
    if len(plan) > MOST_BYTES or len(plan.encode()) > MOST_BYTES:
        raise PolicyRefused(
            "the plan is too large", f"at most {MOST_BYTES:,} bytes as JSON", "shorten its texts"
        )


def keep_plan(site: Site, study: Study) -> Path:
    """Store a plan where `fedtune review` finds it, whether or not somebody here has signed it. It
    is public.

    At most MOST are stored, and the oldest are dropped. A plan for which the disk has no space
    beside the ledger's reserve (files.room) is not stored, and the site prints a warning: plans
    that nobody asked for must not take the space of a charge or a withdrawal, and the coordinator's
    answer is the same. Called while the space is reserved, so that a plan cannot be written into
    it."""
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
