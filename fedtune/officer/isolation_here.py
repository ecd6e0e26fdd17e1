"""How `fedtune client` would keep a site's two halves apart on this machine, tried and said."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from fedtune.core import isolation
from fedtune.core.config import Site
from fedtune.core.vault.process import families
from fedtune.courier.process import describe_open_files


@dataclass(frozen=True)
class Here:
    """text: what keeps them apart, and what is open; lacks: the latter alone, item by item."""

    text: str
    lacks: tuple[str, ...]


def isolation_here(site: Site) -> Here:
    """Try what this machine gives a vault and a courier, and look where the site's records are."""
    of_vault, of_courier = isolation.available()
    lacks = [*of_vault.missing, *of_courier.missing]
    lacks += describe_open_files(site)
    if socket.AF_INET in families(site, processes=1):
        lacks.append("a database over TCP keeps the vault on the network")
    text = f"records are read without a network ({', '.join(of_vault.means)}), and what speaks to "
    text += f"the network reads none ({', '.join(of_courier.means)})"
    return Here(text + (f"; OPEN: {'; '.join(lacks)}" if lacks else ""), tuple(lacks))
