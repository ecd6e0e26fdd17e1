"""Parse a machine's address: a host name or IP address, and a port."""

from __future__ import annotations

import re
from ipaddress import IPv6Address

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9_.])?")  # DNS's, and Docker's _


def is_host(name: str) -> bool:
    """Return whether `name` is a valid host name or IP address."""
    return (bool(_HOST.fullmatch(name)) and max(map(len, name.split("."))) <= 63) or _is_v6(name)


def host_and_port(text: str) -> tuple[str, int]:
    """Split "host:port" or "[IPv6]:port" into the host, without brackets, and the port. Errors:
    ValueError if the text is no such address."""
    host, _, port = text.rpartition(":")
    if host[:1] == "[" and host[-1:] == "]":
        host = host[1:-1]
        good = _is_v6(host)
    else:
        good = is_host(host) and ":" not in host
    if not good or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError("must be host:port, as in hub.example.org:8443")
    return host, int(port)


def _is_v6(name: str) -> bool:
    try:
        IPv6Address(name)
    except ValueError:
        return False
    return True
