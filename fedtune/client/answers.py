"""A coordinator's order in, a site's sealed answer out, whatever the work."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedtune.client.prepared import Unprepared, Update
from fedtune.client.site import SiteWorker
from fedtune.errors import FedtuneError, Refused
from fedtune.flower.arrays import Arrays, bodies, read_agreed, to_record
from fedtune.wire.seal import SealError, body_digest, check_order

log = logging.getLogger("fedtune.client")
trouble: dict[str, FedtuneError] = {}  # by site file, for this process alone; `simulate` shows it
INTERNAL = "internal error"  # in words: what kind of error is for the site's own log
Work = Callable[[SiteWorker, str, int, Arrays, str], Update]


def sealed(
    message: Message,
    context: Context,
    site_of: Callable[[Context], SiteWorker],
    work: Work,
    *,
    record: str,
    done: str,
    order_for: str = "",
) -> Message:
    """Do the ordered work and seal what it made: its arrays as `record`, its status `done`.

    order_for: what follows the plan's digest in an order for this kind of work, so that an order
    for one kind is never taken for another."""
    said = {"name": "", "status": done, "reason": "", "events": "[]"}
    said |= {"header": "", "signature": ""}
    arrays = ArrayRecord()

    def attempt() -> None:
        nonlocal arrays
        site = site_of(context)
        said["name"] = site.site.site.name
        order = message.content.config_records["order"]
        digest, number = _plan_of(order["plan"], order_for), int(str(order["round"]))
        check_order(order, site.coordinator_of(digest))
        adapter = read_agreed(message.content.array_records["adapter"], site.shapes(digest))
        made = work(site, digest, number, adapter, str(order["receipt"]))
        made_arrays = to_record(made.delta)
        filled = said | {"events": json.dumps(made.events)}
        body = body_digest(bodies(made_arrays), filled)
        said.update(filled, **site.sealed(digest, number, str(order["nonce"]), body))
        arrays = made_arrays

    if failure := guarded(attempt, context):
        said["status"], said["reason"] = failure
    return Message(RecordDict({record: arrays, "site": ConfigRecord(dict(said))}), reply_to=message)


def _plan_of(named: Any, order_for: str) -> str:
    digest = str(named)
    if not digest.endswith(order_for):
        raise SealError("the order is for another kind of work")
    return digest.removesuffix(order_for)


def guarded(attempt: Callable[[], None], context: Context) -> tuple[str, str] | None:
    """Status and reason of what went wrong, if anything. Guarantee: only a refusal's words leave
    the site (rules and public values); of our own errors the class, and of any other exception
    that there was one: what a library raises may follow from a record."""
    try:
        attempt()
    except Unprepared as error:
        return "unprepared", str(error)
    except Refused as error:
        return "refused", str(error)
    except Exception as error:
        if isinstance(error, FedtuneError):
            trouble[str(context.node_config.get("site"))] = error
        own = isinstance(error, FedtuneError)
        log.warning("%s: %s", type(error).__name__, error if own else "")  # for the site's own eyes
        return "failed", type(error).__name__ if own else INTERNAL
    return None
