"""Plans that wait for somebody at the site to sign them: STATE/plans/PLAN.json, public."""

from __future__ import annotations

import logging
from pathlib import Path

from fedtune.config import Site, Study

log = logging.getLogger("fedtune.site")
MOST = 32  # plans that wait, at most


def keep_plan(site: Site, study: Study) -> Path:
    """Keep a plan that nobody here signed, or somebody did, where `fedtune review` finds it. It is
    public.

    At most MOST are kept, and the oldest go: plans that nobody asked for do not fill the disk. A
    disk that refuses one is a warning here: the answer to the coordinator is the same."""
    path = site.site.plan_file(study.digest)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_text(study.model_dump_json(indent=2) + "\n", encoding="utf-8")
        kept = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in kept[:-MOST]:
            old.unlink()
    except OSError as error:
        log.warning("%s: the plan is not kept for review (%s)", path, error.strerror)
    return path
