"""Who does not get as far as HTTP at the gateway, and keeps nobody out."""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path

import pytest

from fedtune.flower import certs
from fedtune.flower import gateway as module
from fedtune.flower.peers import Limits
from tests.flower import kit
from tests.flower.gateway_kit import BROKEN, World, ask, connected, context, node_key, until


def no_certificate(world: World) -> ssl.SSLContext:
    return context(world.a, certificate=False)


def another_ca(world: World) -> ssl.SSLContext:
    site = kit.site_file(world.home.parent / "other-a", "a", 1)
    other = kit.join_up(world.home.parent / "other-home", site, 1)
    made = context(world.a, certificate=False)
    made.load_cert_chain(other.certificate, other.keys / "tls.key")
    return made


def past(world: World) -> ssl.SSLContext:
    now = certs.read_clock()
    kit.reissue(world.home, world.a, now - timedelta(days=2), now - timedelta(seconds=2))
    return context(world.a)


def future(world: World) -> ssl.SSLContext:
    now = certs.read_clock()
    kit.reissue(world.home, world.a, now + timedelta(hours=1), now + timedelta(days=2))
    return context(world.a)


def the_servers_own(world: World) -> ssl.SSLContext:
    made = context(world.a, certificate=False)
    made.load_cert_chain(certs.server_leaf(world.home))
    return made


def tls_1_2(world: World) -> ssl.SSLContext:
    made = context(world.a)
    made.maximum_version = ssl.TLSVersion.TLSv1_2
    return made


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (no_certificate, "no certificate"),
        (another_ca, "certificate: "),
        (past, "certificate: certificate has expired"),
        (future, "certificate: certificate is not yet valid"),
        (the_servers_own, "certificate: unsuitable certificate purpose"),
        (tls_1_2, "older than TLS 1.3"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_handshake_is_refused(
    world: World, attack: Callable[[World], ssl.SSLContext], reason: str
) -> None:
    made = attack(world)
    with world.gateway() as (door, port):
        with connected(port, world.a, made) as line, pytest.raises(BROKEN):
            ask(line, node_key(world.a))
        until(lambda: bool(door.refused))
        assert all(said.startswith(reason) for said in door.refused), door.refused
    assert not world.upstream.got


def test_plain_http_is_refused(world: World) -> None:
    with world.gateway() as (door, port):
        plain = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with closing(plain) as line, pytest.raises(BROKEN):
            ask(line, node_key(world.a))
        until(lambda: door.refused["plain HTTP"] == 1)
    assert not world.upstream.got


def test_who_says_nothing_is_let_go_and_keeps_nobody_out(world: World) -> None:
    with world.gateway(Limits(handshake=0.5, handshakes=2)) as (door, port):
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(4)]
        with connected(port, world.a) as line:
            assert ask(line, node_key(world.a))[0] == 200
        until(lambda: door.refused["handshake not finished"] == 4)
        for each in silent:
            each.close()


def from_address(source: str, port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), source_address=(source, 0))


@pytest.mark.parametrize("says", [b"", b"\x16\x03\x01"], ids=["nothing", "a-little"])
def test_two_hundred_silent_sockets_keep_no_site_waiting(world: World, says: bytes) -> None:
    with world.gateway() as (door, port):
        silent = [from_address("127.0.0.2", port) for _ in range(200)]
        for each in silent:
            each.send(says)
        began = time.monotonic()
        with connected(port, world.a) as line:
            assert ask(line, node_key(world.a))[0] == 200
        assert time.monotonic() - began < Limits().silent  # it waited for none of them
        until(lambda: door.refused["handshake not finished"] >= 200 - Limits().per_network)
        assert len(door._shaking) <= Limits().per_network
        for each in silent:
            each.close()


def test_the_oldest_unfinished_handshake_gives_way_among_its_own_first(world: World) -> None:
    limits = Limits(handshakes=4, per_network=2, silent=60.0, handshake=60.0)
    with world.gateway(limits) as (door, port):
        third = from_address("127.0.0.3", port)
        first, second = (from_address("127.0.0.2", port) for _ in range(2))
        until(lambda: len(door._shaking) == 3)
        with closing(from_address("127.0.0.2", port)), closing(from_address("127.0.0.4", port)):
            until(lambda: door.refused["handshake not finished"] == 1)
            assert first.recv(1) == b""
            until(lambda: len(door._shaking) == 4)
            with closing(from_address("127.0.0.5", port)):  # full: the oldest of all
                until(lambda: door.refused["handshake not finished"] == 2)
                assert third.recv(1) == b""
                until(lambda: len(door._shaking) == 4)
        for each in (first, second, third):
            each.close()


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_a_host_is_known_by_what_it_cannot_choose(address: str, network: str) -> None:
    assert module.network_of(address) == network


def test_who_says_nothing_has_seconds(world: World) -> None:
    with (
        world.gateway(Limits(silent=0.2, handshake=60.0)) as (door, port),
        closing(socket.create_connection(("127.0.0.1", port))) as line,
    ):
        until(lambda: door.refused["handshake not finished"] == 1, 5.0)
        assert line.recv(1) == b""


@pytest.mark.parametrize(
    "name", [None, "localhost", "fed.example.org", "b", "x" * 60 + ".example", "xn--80ak6aa92e.com"]
)
def test_the_name_that_a_client_asks_for_changes_nothing(world: World, name: str | None) -> None:
    """SNI: there is one certificate and one rule, whatever host somebody says that it wants."""
    for certificate in (True, False):
        made = context(world.a, certificate=certificate)
        made.check_hostname = False
        with world.gateway() as (door, port):
            raw = socket.create_connection(("127.0.0.1", port), timeout=10)
            with closing(made.wrap_socket(raw, server_hostname=name)) as line:
                line.sendall(b"GET /fedtune/status HTTP/1.1\r\nhost: x\r\n\r\n")
                try:
                    said = line.recv(65_536)
                except OSError:
                    said = b""
            assert said.startswith(b"HTTP/1.1 200") == certificate
            if not certificate:
                until(lambda: door.refused["no certificate"] == 1)


EARLY = b"POST /v1/fleet/push-object HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nearly"


def hello(extra: bytes) -> bytes:
    """A ClientHello as Python's, with one more extension."""
    made, out = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.MemoryBIO()
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    client = made.wrap_bio(ssl.MemoryBIO(), out)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    body = bytearray(out.read())[9:]  # behind the record's and the handshake's headers
    at = 34 + 1 + body[34]  # version and random; session
    at += 2 + int.from_bytes(body[at : at + 2])  # ciphers
    at += 1 + body[at]  # compression
    size = int.from_bytes(body[at : at + 2]) + len(extra)
    body[at : at + 2] = size.to_bytes(2)
    body += extra
    message = b"\x01" + len(body).to_bytes(3) + body
    return b"\x16\x03\x01" + len(message).to_bytes(2) + message


@pytest.mark.parametrize("wrapped", [True, False], ids=["as-early-data", "bare"])
def test_nothing_is_read_before_the_handshake(world: World, wrapped: bool) -> None:
    """0-RTT: who offers data with its first message shows no certificate with it."""
    record = b"\x17\x03\x03" + len(EARLY).to_bytes(2) + EARLY
    with world.gateway() as (door, port):
        with closing(socket.create_connection(("127.0.0.1", port), timeout=10)) as line:
            line.sendall(hello(b"\x00\x2a\x00\x00") + (record if wrapped else EARLY))
            with suppress(OSError):
                while said := line.recv(65_536):
                    assert b"HTTP/" not in said
        until(lambda: bool(door.refused))
    assert not world.upstream.got


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_a_ticket_of_an_earlier_session_carries_no_early_data(world: World, tmp_path: Path) -> None:
    """Even where the gateway gave a ticket away (the twin of test_nothing_is_resumed), OpenSSL's
    own client finds no early data to be allowed in it."""
    found, early = world.a, tmp_path / "early"
    early.write_bytes(EARLY)
    with world.gateway() as (door, port):
        door._tls.num_tickets = 2
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3"]
        command += ["-cert", str(found.certificate), "-key", str(found.keys / "tls.key")]
        ticket = tmp_path / "ticket"
        asked = b"GET /fedtune/status HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        save = [*command, "-sess_out", str(ticket), "-ign_eof"]
        first = subprocess.run(save, input=asked, capture_output=True, timeout=20)
        assert b"HTTP/1.1 200" in first.stdout and ticket.exists()
        again = [*command, "-sess_in", str(ticket), "-early_data", str(early), "-ign_eof"]
        second = subprocess.run(again, input=asked, capture_output=True, timeout=20)
        assert b"Early data was accepted" not in second.stdout
        assert b"Early data was not sent" in second.stdout or b"rejected" in second.stdout
    assert not world.upstream.got
