"""Parse and check the url of a site's database, which must hold no secret."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qs, quote, unquote, urlsplit

from pydantic import AfterValidator

FILES = ("sqlite", "duckdb")  # databases that are one file
KINDS = (*FILES, "postgresql")
SECRETS = re.compile("password|secret|token")
# A url's parameter, the environment variable, and the file that is used if neither names one.
LIBPQ = (
    ("passfile", "PGPASSFILE", "~/.pgpass"),
    ("servicefile", "PGSERVICEFILE", "~/.pg_service.conf"),
    ("sslkey", "PGSSLKEY", "~/.postgresql/postgresql.key"),
)
USER = re.compile(r"[\w.~%-]*")
SERVER = re.compile(r"(\[[^]]*\]|[^:]*)(?::(\d*))?")  # a host and its port in a url
PORT, THIS_MACHINE = "5432", ("", "127.0.0.1", "::1")


def check_url(value: str) -> str:
    """Check a database's url, and return it. Errors: ValueError; its text does not quote the url,
    which may hold a password."""
    try:
        parts = urlsplit(value)
        asked, password = parse_qs(parts.query, keep_blank_values=True), parts.password
    except ValueError:
        raise ValueError("must be a url, such as sqlite:///clinic.db") from None
    if parts.scheme not in KINDS or "\0" in value or not value.startswith(f"{parts.scheme}://"):
        raise ValueError(f"must begin with one of {', '.join(f'{kind}://' for kind in KINDS)}")
    # libpq takes what is before the last @ for a user and a password, with ? and # in them too.
    before = value.partition("//")[2].rpartition("@")[0] if parts.scheme not in FILES else ""
    if (
        password is not None
        or not USER.fullmatch(before)
        or any(SECRETS.search(key.lower()) for key in asked)
    ):
        raise ValueError(
            "must hold no password: name a file (options.password_file), an environment variable "
            "(options.password_env), or use PostgreSQL's own ~/.pgpass"
        )
    if parts.scheme in FILES and (parts.netloc or asked or not parts.path.strip("/")):
        raise ValueError(f"must be {parts.scheme}:///FILE, or {parts.scheme}:////FOLDER/FILE")
    if parts.fragment:
        raise ValueError("must not name a table behind #; name it as options.table")
    return value


Url = Annotated[str, AfterValidator(check_url)]


def kind_of(url: str) -> str:
    """Return the kind of database in a checked url: sqlite, duckdb or postgresql."""
    return urlsplit(url).scheme


def redact_url(url: str) -> str:
    """Return a checked url without its user and its query string, to be shown in messages."""
    parts = urlsplit(url)
    if parts.scheme in FILES:
        return url
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def databases_of(url: str) -> frozenset[str]:
    """Return the databases that a checked url names, each in one spelling, so that urls can be
    compared. A file is named by its path without links. A PostgreSQL database is named by host,
    port and name, once for each host, as libpq reads them from the url and its query string. Two
    names or addresses of one server count as two. Settings in a service file or in libpq's
    environment variables are not read."""
    parts = urlsplit(url)
    if parts.scheme in FILES:
        return frozenset({f"{parts.scheme}:{file_of(url).resolve()}"})
    asked = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    user, _, servers = parts.netloc.rpartition("@")
    named = [SERVER.fullmatch(server) for server in servers.split(",")]
    hosts = asked.get("host") or ",".join(each[1] for each in named if each)
    ports = asked.get("port") or ",".join(each[2] or PORT for each in named if each)
    hosts = ",".join(filter(None, (hosts, asked.get("hostaddr")))) or "localhost"
    name = asked.get("dbname") or unquote(parts.path[1:]) or asked.get("user") or unquote(user)
    pairs = product(unquote(hosts).split(","), ports.split(","))
    return frozenset(f"{_spelled(host)}:{port or PORT}/{name}" for host, port in pairs)


def _spelled(host: str) -> str:
    """Return a host's name in one spelling: in lower case, unless it is the folder of a socket."""
    if host.startswith("/"):
        return host.rstrip("/")
    host = host.lower().strip("[]").rstrip(".")
    return "localhost" if host in THIS_MACHINE else host


def is_over_tcp(url: str) -> bool:
    """Return whether a checked url's database is reached over a network: a PostgreSQL server
    that is named by a host, and not by the folder of its Unix socket."""
    parts = urlsplit(url)
    if parts.scheme in FILES:
        return False
    asked = parse_qs(parts.query)
    hosts = [unquote(parts.hostname or ""), *asked.get("host", []), *asked.get("hostaddr", [])]
    named = [host for several in hosts for host in several.split(",") if host]
    return any(not host.startswith("/") for host in named)


def secrets_of(url: str) -> Iterator[Path]:
    """Yield the existing files in which libpq looks for a password or a key for a checked url:
    those that the url or the environment names, else those in this user's home."""
    if kind_of(url) in FILES:
        return
    asked = parse_qs(urlsplit(url).query)
    for key, variable, usual in LIBPQ:
        named = [*asked.get(key, []), os.environ.get(variable, "")]
        path = Path(next(filter(None, named), usual)).expanduser()
        if path.exists():
            yield path


def file_of(url: str) -> Path:
    """Return the path of a database that is a file. It is relative if the url has three slashes."""
    return Path(unquote(urlsplit(url).path)[1:])


def anchor_url(url: str, folder: Path) -> str:
    """Return the url with the path of a file database made absolute, from `folder`. Any other url
    is returned unchanged."""
    kind = kind_of(url)
    if kind not in FILES:
        return url
    return f"{kind}:///{quote(str(folder / file_of(url)))}"
