"""Carry out the coordinator's orders at a site: train, evaluate, or take part in a round of shared
noise. Each function decodes what came with the order, calls the SiteWorker, and returns the update
that is then sealed and sent."""

from __future__ import annotations

import json

from fedtune.core.vault import secure_round
from fedtune.core.vault.prepared import Update
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire.arrays import Arrays, read_agreed
from fedtune.core.wire.requests import Request


def train(site: SiteWorker, digest: str, request: Request) -> Update:
    """Carry out an order to train: train one round from the adapter that came with the order, and
    return the update. digest: the plan's digest; request: the order."""
    round_, receipt = _order(request)
    return site.train(digest, round_, _adapter(site, digest, request), receipt)


def evaluate(site: SiteWorker, digest: str, request: Request) -> Update:
    """Carry out an order to evaluate: evaluate the adapter that came with the order on the held-out
    records, with noise, and return the answer. digest: the plan's digest; request: the order."""
    round_, receipt = _order(request)
    return site.evaluate(digest, round_, _adapter(site, digest, request), receipt)


def draw_sum(site: SiteWorker, digest: str, request: Request) -> Update:
    """Carry out the first order of a round of shared noise: train on the adapter that came with the
    order, keep the noised sum as this site's draw, and return the signed statement that the site is
    ready. digest: the plan's digest; request: the order."""
    round_, receipt = _order(request)
    asked = json.loads(str(request.tables["set"]["asked"]))
    adapter = _adapter(site, digest, request)
    attempt = _attempt(request)
    return secure_round.draw_sum(site, digest, round_, attempt, adapter, receipt, list(asked))


def mask_sum(site: SiteWorker, digest: str, request: Request) -> Update:
    """Carry out the second order of a round of shared noise: mask this site's draw for the set of
    sites that came with the order, and return the masked words. digest: the plan's digest; request:
    the order."""
    round_, receipt = _order(request)
    statements = str(request.tables["set"]["statements"])
    return secure_round.mask_sum(site, digest, round_, _attempt(request), statements, receipt)


def _order(request: Request) -> tuple[int, str]:
    """Return the number of the round, and the coordinator's receipt as JSON ("" if there is none),
    from an order."""
    order = request.tables["order"]
    return int(str(order["round"])), str(order["receipt"])


def _attempt(request: Request) -> int:
    return int(str(request.tables["order"]["attempt"]))


def _adapter(site: SiteWorker, digest: str, request: Request) -> Arrays:
    """Decode the adapter that came with an order, in fp32 by name. digest: the plan's digest;
    request: the order. Errors: Unprepared if the site does not know the plan; WireError if the
    arrays do not have the shapes of the plan's adapter."""
    return read_agreed(request.arrays, site.shapes(digest))
