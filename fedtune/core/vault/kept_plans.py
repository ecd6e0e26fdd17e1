"""Store the requests that brought the plans which this site admitted, in the file (0600)
STATE/kept-plans/PLAN-TABLES.request.

A vault that is started for one request knows no study. So if the request orders a round, the vault
first takes the stored request that brought the order's plan, and answers this request as a
restarted vault does: every rule is checked again. It drops that answer, and then carries out the
order. A plan is stored while its study is running. Which plans are stored depends only on messages,
never on a record. TABLES is a digest of the settings with which the site answered the plan. If a
person has started the site with others since, the plan is unknown, so that the coordinator sends it
again and is told what these settings say of the site: its declared size, or that a query selects
its records."""

from __future__ import annotations

import hashlib
import json
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


def keep_plan_request(site: Site, request: Request, content: bytes, answer: Answer) -> None:
    """Store the request if it brought a plan that was admitted; delete the stored requests of
    studies that have ended.

    - site: the site, in whose state folder the requests are stored
    - request: the request that was answered
    - content: the bytes of the request's file in the spool, which are what is stored
    - answer: this site's answer to the request

    Call this while the ledger's reserve of disk space (files.room) is in place, not while it is
    freed for an order, so that no file takes space from the reserve. If the disk has no other
    space, the plan is not stored and the site logs a warning; the plan's orders are then answered
    as for an unknown plan."""
    folder = site.site.state / FOLDER
    try:
        if request.kind == "prepare" and answer.status == "admitted":
            path = _path(site, str(request.tables["plan"]["digest"]))
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace(path, content, private=True)
        known = {_path(site, digest) for digest in under_way(site.site.state)}
        for path in set(folder.glob("*.request")) - known:
            path.unlink(missing_ok=True)
    except (OSError, FedtuneError) as error:
        log.warning("%s: a plan is not kept (%s)", folder, describe(error))


def find_plan_request(site: Site, request: Request) -> Request | None:
    """Return the stored request that brought the plan which an order names. Return None if there is
    none that was answered with the site's present settings, or if it cannot be decoded, for example
    since an earlier release wrote it; the site then asks the coordinator for the plan again.

    request: an order; for any other request None is returned"""
    named = PLAN.match(str(request.tables.get("order", {}).get("plan", "")))
    path = named and _path(site, named[0])
    if not (path and path.is_file()):
        return None
    with suppress(InputError):
        return decode_request(reading.content(path, "a plan that is kept", most=MOST_FILE))
    return None


def _path(site: Site, digest: str) -> Path:
    """Return the path of a plan's stored request. Of the site's settings only the policy is not in
    its name: each order reads that anew. digest: the plan's."""
    settings = json.dumps(site.model_dump(mode="json", exclude={"policy"}), sort_keys=True)
    of_settings = hashlib.sha256(settings.encode()).hexdigest()[:16]
    return site.site.state / FOLDER / f"{outbox_name(digest)}-{of_settings}.request"
