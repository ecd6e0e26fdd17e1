"""Keep one file for each study that a site admitted and that has not ended:
STATE/studies/PLAN.json, where PLAN stands for the digits of the plan's digest.

The file holds {"plan", "study", "since"} and can be read by this user only (0600). It is written
before the coordinator learns that its plan was admitted. It is removed when the coordinator says
that the study has ended, or by `fedtune purge`. If a study ends while the ledger is frozen, its
file is renamed to PLAN.ended instead. Which files exist depends on messages and on what people do,
never on a record."""

from __future__ import annotations

import json
import time
from pathlib import Path

from fedtune.core.config import Study
from fedtune.core.errors import InputError, PolicyRefused
from fedtune.core.files import reading
from fedtune.core.files.writing import replace
from fedtune.core.ledger.files import newer_name, outbox_name, outbox_prefix

FOLDER = "studies"  # in the state folder
ENDED = ".ended"  # suffix of the file of a study that ended while the ledger was frozen
MOST = 64  # studies under way at once: their files take disk space that the ledger needs


def check_number(state: Path, study: Study) -> None:
    """Check that the number of other studies that run at this site is below the limit MOST. study:
    the study that is not counted. state: the site's state folder. Errors: PolicyRefused if there
    are too many."""
    others = [
        path for path in (state / FOLDER).glob("*.json") if path != _path(state, study.digest)
    ]
    if len(others) >= MOST:
        raise PolicyRefused(
            "too many studies are running at this site",
            f"at most {MOST}",
            "end a study that will not go on: `fedtune purge SITE --study NAME`, at the site",
        )


def begin(state: Path, study: Study) -> None:
    """Note that a study is running at the site, by writing its file. state: the site's state
    folder. Errors: InfrastructureError."""
    path = _path(state, study.digest)
    if not path.exists():
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        facts = {"plan": study.digest, "study": study.study.name, "since": since}
        replace(path, json.dumps(facts, indent=1).encode(), private=True)


def end(state: Path, plan_digest: str, *, is_kept: bool = False) -> None:
    """Note that a study has ended, by deleting its file.

    - state: the site's state folder
    - plan_digest: the digest of the study's plan
    - is_kept: whether the file may be evidence; it is then renamed to PLAN.ended instead"""
    path = _path(state, plan_digest)
    if is_kept and path.exists():
        path.rename(path.with_suffix(ENDED))
    else:
        path.unlink(missing_ok=True)


def under_way(state: Path) -> dict[str, str]:
    """Return the studies that run at the site, plan's digest -> study's name. A file that cannot be
    read counts as a study, too; the file's name without ".json" then serves as both. state: the
    site's state folder."""
    names = {}
    for path in sorted((state / FOLDER).glob("*.json")):
        try:
            facts = reading.json_in(path, "a study under way")
            names[str(facts["plan"])] = str(facts["study"])
        except (InputError, KeyError):
            names[path.stem] = path.stem
    return names


def _path(state: Path, plan_digest: str) -> Path:
    folder = state / FOLDER
    old = folder / f"{outbox_prefix(plan_digest)}.json"
    return newer_name(folder / f"{outbox_name(plan_digest)}.json", old)
