"""Filter the events of a site's courier (its process that uses the network) before they are shown.
The courier may be hostile, so only events and fields of known names pass, with values of known
types, bounded lengths and printable text."""

from __future__ import annotations

import logging
from typing import Any

from fedtune.core.errors import escape_controls

LONGEST = 2_000  # largest number of characters of a text from the courier


CERTIFICATE = 16_384  # largest number of characters of a renewed certificate


FROM_COURIER = frozenset(
    {"isolation", "joined", "answered", "refused", "failed", "waiting", "connected"}
    | {"reconnecting", "stopped", "log", "ended", "error", "renewed"}
)


FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("kind", "error", "address", "text", "reason", "level"), str),
    **dict.fromkeys(("happened", "expected", "todo"), str),
    **dict.fromkeys(("bytes_up", "bytes_down"), int),
    **dict.fromkeys(("means", "missing", "reasons"), list),
    "certificate": str,
    "seconds": (int, float),
    "gone": bool,
}


def from_courier(event: str, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Return the facts of a courier's event that may be shown; None if the courier may not send an
    event of this name."""
    if event not in FROM_COURIER:
        return None
    shown: dict[str, Any] = {}
    for name, value in facts.items():
        wanted = FIELDS.get(name)
        if wanted is None or not isinstance(value, wanted):
            continue
        if isinstance(value, str):
            # A certificate has lines of ASCII; whoever reads it verifies it.
            is_lines = name == "certificate" and value.isascii()
            shown[name] = value[:CERTIFICATE] if is_lines else escape_controls(value)[:LONGEST]
        elif isinstance(value, list):
            shown[name] = [escape_controls(str(each))[:LONGEST] for each in value[:20]]
        elif isinstance(value, int | float) and 0 <= value < 2**53:  # neither NaN nor infinite
            shown[name] = value
    return shown


def log_again(facts: dict[str, Any]) -> None:
    """Log in this process a line that another process logged, at that line's level. facts: the
    other process's "log" event, which holds the line and its level."""
    names = {"WARNING": logging.WARNING, "ERROR": logging.ERROR, "CRITICAL": logging.CRITICAL}
    level = names.get(str(facts.get("level")), logging.WARNING)
    logging.getLogger("fedtune.client").log(level, "%s", facts.get("text"))
