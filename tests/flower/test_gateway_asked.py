"""What a site was asked for, renewals, and limits that are lifted."""

from __future__ import annotations

import http.client
import os
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.errors import Refused
from fedtune.flower import allowance, certs, enrol
from fedtune.flower import gateway as module
from fedtune.flower.peers import Limits
from tests.flower.gateway_kit import (
    BROKEN,
    MIB,
    PART,
    World,
    ask,
    connected,
    node_key,
)


def test_a_site_pushes_no_more_than_it_was_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allowance, "SLACK", 5 * MIB)  # in all 3 x 5 + 5
    refused = (413, "the site sends more than the coordinator asked for")
    tree = "/v1/fleet/push-messages"

    def push(line: http.client.HTTPSConnection, name: str = "a", path: str = PART) -> Any:
        key = node_key(world.sites[name])
        return ask(line, key, path, bytes(10 * MIB if path == PART else 1000))

    with world.gateway() as (_, port):
        for asked, ends in (({}, [refused]), ({"b": (1, MIB)}, [refused])):
            allowance.write(world.home, asked)
            for path in (PART, tree):
                with connected(port, world.a) as line:
                    assert [push(line, path=path)] == ends
        for times in (1, 2):  # asked again, it counts from zero
            allowance.write(world.home, {"a": (times, 5 * MIB), "b": (1, 5 * MIB)})
            with connected(port, world.a) as line:
                assert [push(line)[0], push(line)[0], push(line)] == [200, 200, refused]
        with connected(port, world.sites["b"]) as line:
            assert push(line, "b")[0] == 200
        (world.home / "flower" / "allowance.json").write_text("{")
        with connected(port, world.a) as line:
            assert push(line) == refused


def test_a_certificate_is_renewed_for_the_same_key_alone(world: World) -> None:
    key, other = (certs.read_key(world.sites[n].keys / "tls.key") for n in "ab")
    record = enrol.registry(world.home)["a"]
    assert b"BEGIN CERTIFICATE" in enrol.renew(world.home, record, certs.request(key, "a"))
    for asked in (certs.request(other, "a"), certs.request(key, "b"), b"junk"):
        with pytest.raises(Refused):
            enrol.renew(world.home, record, asked)
        with world.gateway() as (_, port), connected(port, world.a) as line:
            assert ask(line, "", path=module.RENEW, body=asked)[0] == 403


def test_a_site_renews_once_a_minute(world: World) -> None:
    """Each is a signature and a file on the disk. What is refused is none of them: any account of
    the site's machine can send it."""
    signed = {n: certs.request(certs.read_key(world.sites[n].keys / "tls.key"), n) for n in "ab"}
    with world.gateway(Limits(renewal=0.5)) as (_, port):
        with connected(port, world.a) as line:
            assert ask(line, "", path=module.RENEW, body=b"junk")[0] == 403
        with connected(port, world.a) as line:
            assert ask(line, "", path=module.RENEW, body=signed["a"])[0] == 200
            assert ask(line, "", path=module.RENEW, body=signed["a"])[0] == 429
        with connected(port, world.sites["b"]) as line:
            assert ask(line, "", path=module.RENEW, body=signed["b"])[0] == 200
        time.sleep(0.6)
        with connected(port, world.a) as line:
            assert ask(line, "", path=module.RENEW, body=signed["a"])[0] == 200


def test_a_renewal_that_takes_long_is_waited_for_by_its_site_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, go = threading.Event(), threading.Event()

    def slow(*_: Any) -> bytes:
        going.set()
        assert go.wait(12)
        return b"leaf"

    monkeypatch.setattr(enrol, "renew", slow)
    with world.gateway() as (_, port), connected(port, world.a) as line:
        line.request("POST", module.RENEW, b"csr")
        assert going.wait(10)
        found: Any = "it waits too"
        with connected(port, world.sites["b"]) as other, suppress(*BROKEN):
            found = ask(other, node_key(world.sites["b"]))
        go.set()
        assert found == (200, "fine")
        assert line.getresponse().read() == b"leaf"


def test_a_request_to_renew_is_short(world: World) -> None:
    with world.gateway() as (_, port), connected(port, world.a) as line:
        assert ask(line, "", path=module.RENEW, body=b"x" * 20_000)[0] == 413


def test_the_servers_leaf_is_renewed_and_keeps_its_names(tmp_path: Path) -> None:
    file = certs.server_leaf(tmp_path, ["fed.example.org", "10.0.0.7"])
    first = file.read_bytes()
    assert certs.server_leaf(tmp_path).read_bytes() == first
    assert certs.server_leaf(tmp_path, ["new.example.org"]).read_bytes() != first
    key, now = certs.read_key(file), certs.read_clock()
    hosts = ["localhost", "127.0.0.1", "fed.example.org"]
    start, end = now - timedelta(days=20), now + timedelta(days=10)
    old = certs.issue(tmp_path, key.public_key(), "fedtune coordinator", hosts, start, end)
    file.write_bytes(old.public_bytes(certs.PEM) + certs._pem(key))
    certs.server_leaf(tmp_path)
    leaf = certs.x509.load_pem_x509_certificate(file.read_bytes())
    assert not certs.is_spent(leaf, 0.1) and certs._names(leaf) == hosts
    assert os.stat(file).st_mode & 0o077 == 0
    leaf.verify_directly_issued_by(certs.ca(tmp_path)[1])


def test_nothing_is_resumed(world: World) -> None:
    """A resumed session shows no certificate, so its owner could go on after the certificate."""
    for tickets, resumable in ((None, False), (2, True)):  # the second is the twin
        with world.gateway() as (door, port), connected(port, world.a) as line:
            if tickets:
                door._tls.num_tickets = tickets
            assert ask(line, node_key(world.a))[0] == 200
            assert line.sock.session.has_ticket == resumable


def test_a_limit_that_is_lifted_lets_the_attack_through(world: World) -> None:
    """The twin: the tests above see the limit, not an accident."""
    wide = replace(Limits(), request_bytes=64 * MIB, burst=10_000, per_site=100)
    with world.gateway(wide) as (door, port), connected(port, world.a) as line:
        assert ask(line, node_key(world.a), body=bytes(17 * MIB))[0] == 200
        assert not door.refused


def test_a_registry_that_is_read_once_lets_the_revoked_in(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = enrol.registry(world.home)
    enrol.revoke(world.home, "a")
    monkeypatch.setattr(enrol, "lookup", lambda _home, name: then.get(name))
    with world.gateway() as (_, port), connected(port, world.a) as line:
        assert ask(line, node_key(world.a))[0] == 200


def test_a_binding_that_is_not_kept_lets_another_nodes_key_in(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = enrol.registry(world.home)
    loose = {name: replace(record, node=known["b"].node) for name, record in known.items()}
    monkeypatch.setattr(enrol, "lookup", lambda _home, name: loose.get(name))
    with world.gateway() as (_, port), connected(port, world.a) as line:
        assert ask(line, node_key(world.sites["b"]))[0] == 200
