"""A site's way out: through proxies, over restarts, with certificates that it renews by itself."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedtune.core.config import load_site
from fedtune.core.errors import ConfigError, Refused
from fedtune.core.processes import Child, is_reachable
from fedtune.courier.executor import Executor, _refusal
from fedtune.flower import certs, enrol, gateway
from fedtune.flower.forwarder import Forwarder
from fedtune.flower.link import Link, link
from fedtune.flower.ports import free_port
from fedtune.launch import coordinator
from fedtune.observe.log import ADDRESS
from tests.flower import kit


def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class World:
    """A coordinator's home with one admitted site; nobody is behind the gateway."""

    def __init__(self, root: Path) -> None:
        self.root, self.home, self.port = root, root / "home", free_port()
        self.site = kit.site_file(root / "a", "a", self.port)
        self.link = kit.join_up(self.home, self.site, self.port)
        self.trust, _ = certs.loopback(root / "nobody")

    def gateway(self):
        return kit.gateway(self.home, "https://127.0.0.1:1", self.trust, port=self.port)

    def forwarder(self, found: Link | None = None, **how: Any) -> Forwarder:
        return Forwarder(found or self.link, self.root / "state", watch=0.1, **how)


@pytest.fixture()
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def status(way: Forwarder) -> httpx.Response:
    trust = ssl.create_default_context(cafile=str(way.certificate))
    with httpx.Client(verify=trust, trust_env=False) as client:
        return client.get(f"https://127.0.0.1:{way.port}/fedtune/status")


def test_it_outlives_restarts_of_the_gateway(world: World) -> None:
    with world.forwarder() as way:
        until(lambda: way.away > 0)  # nobody there yet
        assert status(way).status_code == 503
        for _ in range(2):
            with world.gateway():
                until(lambda: way.away == 0)
                assert status(way).json()["name"] == "a"
            until(lambda: way.away > 0)


def test_a_gateway_that_is_killed_is_started_again(world: World) -> None:
    children = []

    class Watched(Child):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            children.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinator, "Child", Watched)
        with coordinator.superlink(world.home) as behind, world.forwarder() as way:
            with coordinator.supervised_gateway(behind, world.home, "127.0.0.1", world.port):
                until(lambda: way.away == 0 and status(way).status_code == 200)
                children[-1]._process.kill()
                until(lambda: children[-1].pid != children[1].pid)
                until(lambda: is_reachable("127.0.0.1", world.port))
                until(lambda: status(way).status_code == 200)
            assert [child.alive for child in children] == [True, False, False]


def test_a_leaf_is_renewed_before_it_ends_and_used_at_once(world: World) -> None:
    now = certs.read_clock()
    kit.reissue(world.home, world.link, now - timedelta(seconds=90), now + timedelta(seconds=6))
    answer = replace(world.link.answer, certificate=world.link.certificate.read_text())
    told: list[bytes] = []  # what is kept on a site's disk, where a courier writes nothing
    found = replace(world.link, answer=answer)
    with world.gateway(), world.forwarder(found, on_renewed=told.append) as way:
        until(lambda: not certs.is_spent(kit.leaf_of(world.link), 0.1))
        until(lambda: certs.read_clock() > now + timedelta(seconds=6.2))  # the old one has ended
        assert status(way).status_code == 200
        until(lambda: way.away == 0)
    assert kit.leaf_of(world.link).not_valid_after_utc > now + timedelta(days=29)
    assert told[-1:] == [world.link.certificate.read_bytes()]
    again = world.forwarder(link(load_site(world.site), world.site))  # a restart keeps it
    assert kit.leaf_of(again.link).not_valid_after_utc > now + timedelta(days=29)


def test_who_only_reads_the_keys_keeps_a_renewal_elsewhere(world: World, tmp_path: Path) -> None:
    """As a courier does, which writes beside no ledger; it begins with what was kept for it."""
    now, own = certs.read_clock(), tmp_path / "own"
    own.mkdir()
    kit.reissue(world.home, world.link, now - timedelta(seconds=90), now + timedelta(seconds=6))
    kept = world.link.certificate.read_bytes()
    answer = replace(world.link.answer, certificate=kept.decode())
    reads = replace(world.link, answer=answer, own=own)
    with world.gateway(), world.forwarder(reads) as way:
        until(lambda: not certs.is_spent(kit.leaf_of(reads), 0.1))
        until(lambda: way.away == 0 and status(way).status_code == 200)
    assert world.link.certificate.read_bytes() == kept
    renewed = kit.leaf_of(reads)
    reads.certificate.rename(world.link.certificate)  # as who started it keeps it
    world.forwarder(reads)
    assert kit.leaf_of(reads) == renewed


def test_a_leaf_in_its_first_part_is_left_alone(world: World) -> None:
    before = world.link.certificate.read_bytes()
    with world.gateway(), world.forwarder() as way:
        until(lambda: way._since is None)
        time.sleep(0.5)
    assert world.link.certificate.read_bytes() == before


@pytest.mark.parametrize(("begins", "ends", "says"), [(-9, -1, "expired"), (1, 9, "not valid yet")])
def test_a_leaf_out_of_its_time_is_named(world: World, begins: int, ends: int, says: str) -> None:
    days = [certs.read_clock() + timedelta(days=each) for each in (begins, ends)]
    kit.reissue(world.home, world.link, *days)
    answer = replace(world.link.answer, certificate=world.link.certificate.read_text())
    with world.gateway(), world.forwarder(replace(world.link, answer=answer)) as way:
        until(lambda: says in (way.refusal or ""))
    assert world.link.certificate.read_text() == answer.certificate


def test_revocation_is_told(world: World) -> None:
    with world.gateway(), world.forwarder() as way:
        until(lambda: way.away == 0 and way.refusal is None)
        enrol.revoke(world.home, "a")
        until(lambda: way.refusal == "revoked")


def test_a_gateway_of_another_consortium_is_not_trusted(world: World) -> None:
    stranger = World(world.root / "stranger")
    stranger.port = world.port
    with stranger.gateway() as (door, _), world.forwarder() as way:
        until(lambda: way.distrust)
        assert status(way).status_code == 503
        assert not door._peers


def test_a_gateway_under_another_name_is_not_trusted(world: World) -> None:
    leaf_key = certs.read_key(certs.server_leaf(world.home))
    leaf = certs.issue(world.home, leaf_key.public_key(), "x", ["elsewhere.example.org"])
    (world.home / "server.pem").write_bytes(certs._pem(leaf_key) + leaf.public_bytes(certs.PEM))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certs, "server_leaf", lambda home, names=(): home / "server.pem")
        with world.gateway(), world.forwarder() as way:
            until(lambda: way.distrust)


@pytest.mark.parametrize(("begins", "ends", "says"), [(-9, -1, "expired"), (1, 9, "not valid yet")])
def test_a_gateway_out_of_its_time_is_a_matter_of_clocks(
    world: World, begins: int, ends: int, says: str
) -> None:
    """A clock that is wrong here makes a good certificate look like this; a stranger's never."""
    days = [certs.read_clock() + timedelta(days=each) for each in (begins, ends)]
    key = certs.read_key(certs.server_leaf(world.home))
    leaf = certs.issue(world.home, key.public_key(), "x", ["localhost", "127.0.0.1"], *days)
    good = (world.home / "server.pem").read_bytes()
    late = certs._pem(key) + leaf.public_bytes(certs.PEM)
    executor = Executor(lambda *_: None, lambda *_: None)  # type: ignore[arg-type,return-value]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certs, "server_leaf", lambda home, names=(): home / "server.pem")
        (world.home / "server.pem").write_bytes(late)
        with world.forwarder() as way:
            with world.gateway():
                until(lambda: says in (way.refusal or ""))
                assert way.clock and not way.distrust
                told = str(executor.run_supernode(world.root / "state", way))
                assert "clocks that agree" in told and "NTP" in told
                assert "--name" not in told and "enroll" not in told
            (world.home / "server.pem").write_bytes(good)
            with world.gateway():  # the clock is put right: the site goes on by itself
                until(lambda: way.refusal is None and way.away == 0 and not way.clock)


def test_an_address_of_ipv6_is_written_as_in_files_and_logs(world: World) -> None:
    """The log takes no other, and drops what it does not take."""
    found = replace(world.link, host="::1").address
    assert found == f"[::1]:{world.port}" and ADDRESS.fullmatch(found)


class Shifted:
    """The module `certs` where the clock is an hour away."""

    def __init__(self, hours: int) -> None:
        self._hours = hours

    def __getattr__(self, name: str) -> Any:
        return getattr(certs, name)

    def read_clock(self) -> datetime:
        return certs.read_clock() + timedelta(hours=self._hours)


@pytest.mark.parametrize(
    ("hours", "says"),
    [(1, "behind the coordinator's"), (-1, "ahead of the coordinator's"), (0, "")],
)
def test_a_refusal_names_clocks_that_disagree(
    world: World, hours: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Certificates last through an hour; what a node signs does not. Twin: with clocks that agree
    a refusal asks for another enrolment."""
    monkeypatch.setattr(gateway, "certs", Shifted(hours))
    with world.gateway(), world.forwarder() as way:
        until(lambda: abs(way.ahead + 3600 * hours) < 60 and way.away == 0)
        told = str(_refusal(way))
    assert ("NTP" in told and says in told) == bool(hours), told
    assert ("enroll" in told) != bool(hours)


# -------------------------------------------------------------------------------- proxies


class Proxy:
    """A CONNECT proxy that notes what it was asked; `pipe` moves bytes, nothing else."""

    def __init__(self, says: bytes = b"HTTP/1.1 200 Connection established\r\n\r\n") -> None:
        self.says, self.asked = says, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.context: ssl.SSLContext | None = None

    def serve(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.connect, args=(near,), daemon=True).start()

    def connect(self, near: socket.socket) -> None:
        with suppress(OSError):
            if self.context:
                near = self.context.wrap_socket(near, server_side=True)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += near.recv(1)
            self.asked.append(head.decode())
            near.sendall(self.says)
            if b" 200 " in self.says:
                host, _, port = head.split()[1].decode().rpartition(":")
                far = socket.create_connection((host, int(port)))
                threading.Thread(target=pipe, args=(far, near), daemon=True).start()
                pipe(near, far)
        near.close()


def pipe(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while body := one.recv(65_536):
            other.sendall(body)
    for each in (one, other):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


@contextmanager
def proxy(**options: bytes) -> Iterator[Proxy]:
    made = Proxy(**options)
    thread = threading.Thread(target=made.serve)
    thread.start()
    try:
        yield made
    finally:
        made.listener.shutdown(socket.SHUT_RDWR)
        made.listener.close()
        thread.join()


def test_a_proxy_is_asked_to_connect_and_sees_nothing(world: World) -> None:
    with proxy() as middle, world.gateway() as (door, _):
        through = replace(world.link, proxy=f"http://user:p%40ss@127.0.0.1:{middle.port}")
        with world.forwarder(through) as way:
            until(lambda: way.away == 0 and status(way).status_code == 200)
        assert not door.refused
    lines = middle.asked[0].split("\r\n")
    assert lines[0] == f"CONNECT 127.0.0.1:{world.port} HTTP/1.1"
    assert f"Proxy-Authorization: Basic {b64encode(b'user:p@ss').decode()}" in lines


def test_a_proxy_with_tls_of_its_own_needs_its_ca(world: World) -> None:
    with proxy() as middle, world.gateway():
        trust, key = certs.loopback(world.root / "proxy")
        middle.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        middle.context.load_cert_chain(trust, key)
        through = replace(world.link, proxy=f"https://127.0.0.1:{middle.port}")
        with world.forwarder(through) as way:
            until(lambda: way.distrust)
            assert not middle.asked
        with world.forwarder(replace(through, proxy_ca=trust)) as way:
            until(lambda: way.away == 0 and status(way).status_code == 200)


def test_a_proxy_that_refuses_is_not_gone_around(world: World) -> None:
    with proxy(says=b"HTTP/1.1 407 no\r\n\r\n") as middle, world.gateway() as (door, _):
        through = replace(world.link, proxy=f"127.0.0.1:{middle.port}")
        with world.forwarder(through) as way:
            until(lambda: way.away > 0 and len(middle.asked) >= 2)
            assert status(way).status_code == 503
        assert not door._quota.tokens


def test_a_proxy_that_opens_tls_is_refused(world: World) -> None:
    """It answers CONNECT and then speaks TLS itself, under a certificate of its own."""
    stranger = World(world.root / "stranger")
    with proxy() as middle, stranger.gateway() as (door, port):
        through = replace(world.link, port=port, proxy=f"http://127.0.0.1:{middle.port}")
        with world.forwarder(through) as way:
            until(lambda: way.distrust)
        assert not door._quota.tokens


def test_the_environments_proxy_counts_unless_it_is_told_off(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with proxy() as middle, world.gateway():
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{middle.port}")
        with world.forwarder() as way:
            until(lambda: way.away == 0 and status(way).status_code == 200)
        assert middle.asked
        middle.asked.clear()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with world.forwarder() as way:
            until(lambda: way.away == 0 and status(way).status_code == 200)
        assert not middle.asked
    with pytest.raises(ConfigError, match="proxy"):
        world.forwarder(replace(world.link, proxy="socks5://127.0.0.1:1"))


# ----------------------------------------------------------------------------- the answer


def test_what_is_wrong_with_an_answer_is_named(world: World) -> None:
    site, file = world.site, world.site.parent / "answer.json"
    good = file.read_text()
    for old, new, says in (
        ('"name": "a"', '"name": "b"', "another request"),
        ("BEGIN CERTIFICATE", "BEGIN", "not signed by its CA"),
        ('"address"', '"adress"', "not an answer"),
        ("{", "[", "not valid JSON"),
    ):
        file.write_text(good.replace(old, new))
        with pytest.raises(ConfigError, match=says):
            link(load_site(site), site)
    file.write_text(good)
    text = site.read_text()
    site.write_text(text + 'fingerprint = "0000 0000 0000 0000 0000"\n')
    with pytest.raises(Refused, match="replaced"):
        link(load_site(site), site)
    site.write_text(text + f'fingerprint = "{world.link.answer.fingerprint.upper()}"\n')
    assert link(load_site(site), site).port == world.port
    (world.link.keys / "tls.key").unlink()
    with pytest.raises(ConfigError, match="enroll"):
        link(load_site(site), site)
