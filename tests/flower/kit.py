"""Sites that were enrolled and admitted, as files in a folder; and a gateway in this process."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from cryptography import x509

from fedtune.core.config import load_site
from fedtune.core.wire.keys import SigningKey
from fedtune.flower import certs, enrol
from fedtune.flower.forwarder import find_newest_certificate
from fedtune.flower.gateway import Gateway
from fedtune.flower.link import Link, link
from fedtune.flower.peers import Limits

SITE = """[site]
name = "{name}"
declared_size = 10
[data]
path = "two.jsonl"
[data.columns]
text = "text"
[coordinator]
address = "127.0.0.1:{port}"
answer = "answer.json"
"""


def site_file(folder: Path, name: str, port: int, extra: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "site.toml"
    path.write_text(SITE.format(name=name, port=port) + extra)
    (folder / "two.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    return path


def ask(site: Path) -> enrol.Request:
    """The request of a site, made at the site."""
    here = load_site(site)
    state, file = here.site.state, site.parent / "request"
    signing = SigningKey.at(state / "site.key")
    said = enrol.enroll(here.site.name, state / "keys", signing, file)
    request = enrol.read_request(file)
    enrol.compare(request, said)
    return request


def join_up(home: Path, site: Path, port: int) -> Link:
    """Enrol and admit the site; how it reaches its coordinator."""
    answer = enrol.admit(home, ask(site), f"127.0.0.1:{port}")
    (site.parent / "answer.json").write_text(json.dumps(asdict(answer)))
    found = link(load_site(site), site)
    find_newest_certificate(found)
    return found


def reissue(home: Path, found: Link, start: datetime, end: datetime) -> None:
    """Give the site a certificate for exactly this time, in place of its own."""
    key = certs.read_key(found.keys / "tls.key").public_key()
    leaf = certs.issue(home, key, found.name, start=start, end=end)
    found.certificate.write_bytes(leaf.public_bytes(certs.PEM))


def leaf_of(found: Link) -> x509.Certificate:
    return x509.load_pem_x509_certificate(found.certificate.read_bytes())


@contextmanager
def gateway(
    home: Path, upstream: str, trust: Path, limits: Limits | None = None, port: int = 0
) -> Iterator[tuple[Gateway, int]]:
    """A gateway on loopback, in a thread."""
    certs.server_leaf(home)
    door = Gateway(home, upstream, trust, limits)
    listener = socket.create_server(("127.0.0.1", port))
    loop = asyncio.new_event_loop()
    task = loop.create_task(door.serve(listener))

    def work() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield door, listener.getsockname()[1]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        listener.close()
