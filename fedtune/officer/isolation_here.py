"""Find out how `fedtune client` would confine a site's vault and courier on this machine, and how
they were confined when they last started, perhaps in other containers."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from fedtune.core import isolation
from fedtune.core.config import Site
from fedtune.core.errors import FedtuneError
from fedtune.core.vault.process import families
from fedtune.courier.process import ELSEWHERE, describe_open_files
from fedtune.observe.status import read_status


@dataclass(frozen=True)
class Here:
    """How far this machine would isolate a site's vault and courier.

    - text: a text for people about the means that separate the two, and the protections that are
      missing
    - lacks: the missing protections alone, one text for each"""

    text: str
    lacks: tuple[str, ...]


def isolation_here(site: Site) -> Here:
    """Try which confinement this machine supports for vault and courier, and check whether the
    courier could read the site's records.

    If the courier reported at its last start that it found no record, it runs elsewhere, and its
    confinement here is not described."""
    of_vault, of_courier = isolation.try_confinement()
    last = _last(site)
    lacks = [*of_vault.missing, *describe_open_files(site)]
    text = f"records are read without a network ({_describe_means(of_vault)})"
    if not last or ELSEWHERE not in last.get("courier", [ELSEWHERE]):
        lacks += of_courier.missing
        text += f", and what speaks to the network reads none ({_describe_means(of_courier)})"
    if socket.AF_INET in families(site, processes=1):
        lacks.append("a database over TCP keeps the vault on the network")
    text += f"; OPEN: {'; '.join(lacks)}" if lacks else ""
    if last:
        halves = "; ".join(f"{h}: {isolation.describe(walls)}" for h, walls in sorted(last.items()))
        text += f". When they last came up: {halves}"
    return Here(text, tuple(lacks))


def _describe_means(tried: isolation.Confinement) -> str:
    return isolation.describe([*tried.means, *tried.reasons])


def _last(site: Site) -> Mapping[str, list[str]]:
    """Return, for each half of the site ("vault", "courier"), the texts in which it reported at its
    last start what confines it; {} if there is no report."""
    with suppress(FedtuneError):
        told: Mapping[str, list[str]] = read_status(site.site.state).status.get("confined", {})
        return told
    return {}
