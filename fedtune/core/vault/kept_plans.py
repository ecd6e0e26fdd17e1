"""Store plans that this site was admitted to, as requests: STATE/kept-plans/PLAN.request; 0600.

A vault that is started for one request has no prepared study. It first answers again the request
that held the plan, like a vault that was restarted: every rule is checked again, and this answer is
dropped. Then it does its order. A plan is stored as long as its study is running; which plans are
stored depends on messages alone, never on a record."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from pathlib import Path

from fedtune.core.config import Site
from fedtune.core.errors import FedtuneError, InputError, describe
from fedtune.core.files import reading
from fedtune.core.files.writing import replace
from fedtune.core.ledger.files import outbox_name
from fedtune.core.vault.studies import under_way
from fedtune.core.wire.requests import Answer, Request
from fedtune.core.wire.spool import MOST_FILE, decode_request

log = logging.getLogger("fedtune.site")
FOLDER = "kept-plans"  # in the state folder
PLAN = re.compile(r"sha256:[0-9a-f]{64}")


def keep_asked(site: Site, request: Request, content: bytes, answer: Answer) -> None:
    """Store a plan that was admitted, and forget those whose studies have ended. Called while
    the ledger's space is reserved (files.room), so that it cannot be written into. A plan for
    which the disk has no space is not stored, and the site prints a warning: its orders are
    answered as for an unknown plan."""
    folder = site.site.state / FOLDER
    try:
        if request.kind == "prepare" and answer.status == "admitted":
            path = _path(folder, str(request.tables["plan"]["digest"]))
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace(path, content, private=True)
        known = {_path(folder, digest) for digest in under_way(site.site.state)}
        for path in set(folder.glob("*.request")) - known:
            path.unlink(missing_ok=True)
    except (OSError, FedtuneError) as error:
        log.warning("%s: a plan is not kept (%s)", folder, describe(error))


def find_asked(site: Site, request: Request) -> Request | None:
    """Return the stored request that brought the plan which an order names. None if none is stored,
    or if an earlier release wrote the file: the coordinator is then asked for the plan again."""
    named = PLAN.match(str(request.tables.get("order", {}).get("plan", "")))
    path = named and _path(site.site.state / FOLDER, named[0])
    if not (path and path.is_file()):
        return None
    with suppress(InputError):
        return decode_request(reading.content(path, "a plan that is kept", most=MOST_FILE))
    return None


def _path(folder: Path, digest: str) -> Path:
    return folder / f"{outbox_name(digest)}.request"
