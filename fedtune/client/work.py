"""Read a coordinator's order, have the site's worker do it, return what is to be sealed."""

from __future__ import annotations

import json

from flwr.app import Message

from fedtune.client import secure_round
from fedtune.client.prepared import Update
from fedtune.client.site import SiteWorker
from fedtune.flower.arrays import Arrays, read_agreed


def train(site: SiteWorker, digest: str, message: Message) -> Update:
    """Train one round from the adapter that came with the order."""
    round_, receipt = _order(message)
    return site.train(digest, round_, _adapter(site, digest, message), receipt)


def evaluate(site: SiteWorker, digest: str, message: Message) -> Update:
    """Evaluate the adapter that came with the order on the held-out records, with noise."""
    round_, receipt = _order(message)
    return site.evaluate(digest, round_, _adapter(site, digest, message), receipt)


def ready(site: SiteWorker, digest: str, message: Message) -> Update:
    """Draw a noised sum from the adapter that came with the order."""
    round_, receipt = _order(message)
    asked = json.loads(str(message.content.config_records["set"]["asked"]))
    adapter = _adapter(site, digest, message)
    attempt = _attempt(message)
    return secure_round.ready(site, digest, round_, attempt, adapter, receipt, list(asked))


def masked(site: SiteWorker, digest: str, message: Message) -> Update:
    """Mask this site's draw for the set that came with the order."""
    round_, receipt = _order(message)
    statements = str(message.content.config_records["set"]["statements"])
    return secure_round.masked(site, digest, round_, _attempt(message), statements, receipt)


def _order(message: Message) -> tuple[int, str]:
    """Return the round and the receipt of an order."""
    order = message.content.config_records["order"]
    return int(str(order["round"])), str(order["receipt"])


def _attempt(message: Message) -> int:
    return int(str(message.content.config_records["order"]["attempt"]))


def _adapter(site: SiteWorker, digest: str, message: Message) -> Arrays:
    """Decode the adapter that came with an order. Errors: Unprepared, WireError."""
    return read_agreed(message.content.array_records["adapter"], site.shapes(digest))
