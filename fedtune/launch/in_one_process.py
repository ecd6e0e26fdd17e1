"""Define the ClientApp of a site in a simulation, where vault and courier are one process."""

from __future__ import annotations

from flwr.app import Context

from fedtune.core.vault.answers import Place, answer, site_errors
from fedtune.core.wire.requests import Answer, Request
from fedtune.courier.app import client_app
from fedtune.flower.grid import PEERS, SIMULATED
from fedtune.officer.site_file import site_file

__all__ = ["app", "place_of", "site_errors"]


def place_of(context: Context) -> Place:
    """Return the site file of a simulated node, and how the site takes part. Both are read from the
    node's config, which Flower's `context` holds. Errors: ConfigError if the config names no
    site."""
    node = context.node_config
    watch = node.get("watch")
    return Place(
        site=site_file(context),
        coordinator=str(node.get("coordinator", "")),
        watch=None if watch is None else bool(watch),
        reviewed=str(node.get("reviewed", "")),
        simulated=SIMULATED in node,
        peers=tuple(str(node.get(PEERS, "")).split()),
    )


def _answered_here(context: Context, request: Request, _: float) -> Answer:
    return answer(place_of(context), request)


app = client_app(_answered_here)
