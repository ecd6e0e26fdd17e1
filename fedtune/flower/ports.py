"""Choose the ports and names by which the programs of one machine reach each other."""

from __future__ import annotations

import os
import socket


def free_port() -> int:
    """Return the number of a loopback port on which nothing listens at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def bypass_proxy() -> None:
    """Set the environment so that this process and its children connect to 127.0.0.1 and localhost
    directly, and not through an HTTP proxy."""
    rules = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = ",".join(filter(None, [rules, "127.0.0.1", "localhost"]))


EVERYWHERE = ("0.0.0.0", "::")


def own_name(host: str) -> str:
    """Return the host name or address by which this machine connects to its own gateway: 127.0.0.1
    if the gateway listens everywhere or on localhost, else `host`. host: where the gateway
    listens."""
    return "127.0.0.1" if host in {*EVERYWHERE, "localhost"} else host


def address_of(host: str, port: int) -> str:
    """Join host and port to one text, HOST:PORT; an IPv6 address is put into brackets.

    >>> address_of("::1", 8443), address_of("hub.example.org", 8443)
    ('[::1]:8443', 'hub.example.org:8443')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
