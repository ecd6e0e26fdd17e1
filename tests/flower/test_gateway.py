"""The gateway under attack: each is refused with its own reason, and nothing reaches the SuperLink.

The SuperLink's place is taken by a counter, so that "nothing" can be seen; test_tls.py has a real
one. Certificates carry explicit dates, no clock is turned."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.superlink.routers.fleet.router import router

from fedtune.core.processes import Child
from fedtune.flower import certs, enrol
from fedtune.flower import gateway as module
from fedtune.flower.gateway import Gateway
from fedtune.flower.peers import Limits
from fedtune.flower.ports import free_port
from tests.flower import kit
from tests.flower.gateway_kit import (
    BROKEN,
    MIB,
    PART,
    World,
    ask,
    connected,
    context,
    node_key,
    until,
)

Door = tuple[Gateway, int]


def test_the_names_are_those_of_flower() -> None:
    assert module.NODE_KEY.decode() == FLEET_HTTP_PUBLIC_KEY_HEADER
    served = {route.path for route in router.routes}
    assert served - module.FLEET == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert served > module.FLEET


def test_an_admitted_site_gets_through_and_its_request_is_passed_on_whole(world: World) -> None:
    with world.gateway() as (door, port), connected(port, world.a) as line:
        mine = {"flwr-timestamp": "now", "cookie": "x", "x-forwarded-for": "me"}
        for _ in range(3):
            assert ask(line, node_key(world.a), body=b"x" * MIB, headers=mine) == (200, "fine")
        assert not door.refused
    assert [(path, size) for path, size, _ in world.upstream.got] == 3 * [(PART, MIB)]
    headers = world.upstream.got[0][2]
    assert headers["flwr-timestamp"] == "now"
    assert not {"cookie", "x-forwarded-for"} & set(headers)


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ({"path": "/v1/control/start-run"}, 403, "not a path of the Fleet API"),
        ({"path": "/v1/fleet/register-node"}, 403, "not a path of the Fleet API"),
        ({"path": "/v1/fleet/../control/start-run"}, 403, "not a path of the Fleet API"),
        ({"path": PART + "?x=1"}, 403, "not a path of the Fleet API"),
        ({"path": "/v1/runtime/acquire-task"}, 403, "not a path of the Fleet API"),
        ({"method": "GET"}, 403, "not a path of the Fleet API"),
        ({"body": iter([b"unsaid"])}, 411, "a request must state its length"),
        (
            {
                "body": b"6\r\nunsaid\r\n0\r\n\r\n",
                "headers": {"content-length": "1", "transfer-encoding": "chunked"},
            },
            411,
            "a request must state its length",
        ),
        ({"headers": {"content-length": str(2**62)}}, 413, "a request has at most 16777216 bytes"),
        ({"headers": {"content-length": "16777217"}}, 413, "a request has at most 16777216 bytes"),
    ],
)
def test_a_bad_request_is_refused(
    world: World, how: dict[str, Any], status: int, reason: str
) -> None:
    with world.gateway() as (door, port), connected(port, world.a) as line:
        assert ask(line, node_key(world.a), **how) == (status, reason)
        assert dict(door.refused) == {reason: 1}
    assert not world.upstream.got


def test_another_nodes_key_under_a_valid_certificate_is_refused(world: World) -> None:
    reason = "the node key is not the one admitted with this certificate"
    with world.gateway() as (door, port):
        for key in (node_key(world.sites["b"]), "", "%%%", node_key(world.a) + "AAAA"):
            with connected(port, world.a) as line:
                assert ask(line, key) == (403, reason)
        with connected(port, world.a) as line:  # two of them: which one counts?
            line.putrequest("POST", PART)
            for site in "ab":
                line.putheader("flwr-public-key", node_key(world.sites[site]))
            line.putheader("content-length", "0")
            line.endheaders()
            assert line.getresponse().status == 403
        assert dict(door.refused) == {reason: 5}
    assert not world.upstream.got


def test_a_revoked_site_is_refused_from_the_next_request_on(world: World) -> None:
    with world.gateway() as (door, port), connected(port, world.a) as line:
        assert ask(line, node_key(world.a))[0] == 200
        enrol.revoke(world.home, "a")
        with connected(port, world.a) as fresh:
            assert ask(fresh, node_key(world.a)) == (403, "revoked")
        until(lambda: not door._peers)  # the open connection was closed, nobody asked on it
        with pytest.raises(BROKEN):
            line.sock.settimeout(5)
            line.sock.sendall(b"POST / HTTP/1.1\r\n\r\n")
            assert line.sock.recv(1) == b""
            raise ConnectionError
        with connected(port, world.sites["b"]) as other:
            assert ask(other, node_key(world.sites["b"]))[0] == 200
    assert len(world.upstream.got) == 2


def test_a_body_that_is_on_its_way_is_cut_off_by_revocation(world: World) -> None:
    with world.gateway() as (door, port), connected(port, world.a) as line:
        line.putrequest("POST", PART)
        line.putheader("flwr-public-key", node_key(world.a))
        line.putheader("content-length", str(2 * MIB))
        line.endheaders()
        line.send(b"x" * MIB)
        until(lambda: bool(door._quota.tokens))  # the request was let in
        enrol.revoke(world.home, "a")
        until(lambda: door.refused["revoked"] >= 1)
        with pytest.raises(BROKEN):
            line.send(b"x" * MIB)
            line.getresponse()
    assert not world.upstream.got


def test_new_keys_under_the_name_end_the_old_ones(world: World) -> None:
    enrol.revoke(world.home, "a")
    site = kit.site_file(world.home.parent / "a2", "a", 1)
    fresh = kit.join_up(world.home, site, 1)
    with world.gateway() as (_, port):
        with connected(port, world.a) as line:
            assert ask(line, node_key(fresh)) == (403, "revoked")
        with connected(port, fresh) as line:
            assert ask(line, node_key(fresh))[0] == 200


def test_a_certificate_that_runs_out_ends_its_connection_too(world: World) -> None:
    now = certs.read_clock()
    kit.reissue(world.home, world.a, now - timedelta(days=1), now + timedelta(seconds=4))
    with world.gateway() as (_, port), connected(port, world.a) as line:
        line.request("POST", PART, b"", {"flwr-public-key": node_key(world.a)})
        response = line.getresponse()
        assert response.headers["connection"] == "close"  # the next one shows a newer leaf
    with world.gateway() as (_, port), connected(port, world.a) as line:
        line.connect()
        until(lambda: certs.read_clock() > now + timedelta(seconds=4))
        assert ask(line, node_key(world.a)) == (403, "the certificate has expired")
    assert len(world.upstream.got) == 1


def test_too_many_requests_are_refused_for_that_site_alone(world: World) -> None:
    with world.gateway(Limits(rate=0.01, burst=5)) as (door, port):
        with connected(port, world.a) as line:
            statuses = [ask(line, node_key(world.a))[0] for _ in range(7)]
        with connected(port, world.sites["b"]) as line:
            assert ask(line, node_key(world.sites["b"]))[0] == 200
        assert statuses == 5 * [200] + 2 * [429]
        assert door.refused["too many requests from this site"] == 2
    assert len(world.upstream.got) == 6


def test_too_many_connections_are_refused_for_that_site_alone(world: World) -> None:
    with world.gateway(Limits(per_site=2)) as (door, port):
        with (
            connected(port, world.a) as one,
            connected(port, world.a) as two,
            connected(port, world.a) as three,
            connected(port, world.sites["b"]) as other,
        ):
            assert [ask(line, node_key(world.a))[0] for line in (one, two)] == [200, 200]
            assert ask(three, node_key(world.a)) == (503, "too many connections from this site")
            assert ask(other, node_key(world.sites["b"]))[0] == 200
        assert door.refused["too many connections from this site"] == 1


def test_a_stalled_body_is_let_go(world: World) -> None:
    with world.gateway(Limits(stall=0.5)) as (door, port), connected(port, world.a) as line:
        line.putrequest("POST", PART)
        line.putheader("flwr-public-key", node_key(world.a))
        line.putheader("content-length", "100")
        line.endheaders()
        line.send(b"x")
        with pytest.raises(BROKEN):
            line.getresponse()
        until(lambda: not door._peers)
    assert not world.upstream.got


def test_an_answer_that_is_too_long_is_not_passed_on(world: World) -> None:
    world.upstream.says = b"x" * 5000
    with world.gateway(Limits(response_bytes=4999)) as (_, port), connected(port, world.a) as line:
        assert ask(line, node_key(world.a)) == (502, "the SuperLink's answer is too long")


def test_without_a_superlink_the_site_is_told_to_try_again(world: World) -> None:
    nobody = f"https://127.0.0.1:{free_port()}"
    with (
        kit.gateway(world.home, nobody, world.upstream.trust) as (_, port),
        connected(port, world.a) as line,
    ):
        assert ask(line, node_key(world.a)) == (502, "the SuperLink does not answer")


def test_garbage_after_the_handshake_reaches_nobody(world: World) -> None:
    with world.gateway() as (_, port):
        for junk in (
            b"\0" * 1000,
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST " + b"a" * 20_000,
            b"\r\n" * 9,
        ):
            raw = socket.create_connection(("127.0.0.1", port))
            with context(world.a).wrap_socket(raw, server_hostname="127.0.0.1") as line:
                line.sendall(junk)
                line.settimeout(0.5)
                with suppress(*BROKEN):
                    assert b" 200 " not in line.recv(1000)
        with connected(port, world.a) as line:
            assert ask(line, node_key(world.a))[0] == 200
    assert len(world.upstream.got) == 1


def test_memory_is_flat(world: World, tmp_path: Path) -> None:
    """Forty requests of 15 MiB, four at a time: below what two of them would take."""
    port = free_port()
    options = [str(world.home), "127.0.0.1", str(port), world.upstream.url]
    state = tmp_path / "state"
    with Child(
        "gateway", [*options, str(world.upstream.trust)], home=state, log=state / "log"
    ) as child:
        child.wait_for_port("127.0.0.1", port)

        def peak() -> int:
            status = Path(f"/proc/{child.pid}/status").read_text()
            return int(status.partition("VmHWM:")[2].split()[0]) // 1024

        def many(count: int, size: int) -> None:
            for _ in range(count):
                with connected(port, world.a) as line:
                    assert ask(line, node_key(world.a), body=bytes(size))[0] == 200

        many(3, 1000)
        before = peak()
        threads = [threading.Thread(target=many, args=(10, 15 * MIB)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(world.upstream.got) == 43
        assert peak() - before < 24


@pytest.mark.parametrize("path", sorted(module.FLEET - {PART}))
def test_a_request_that_carries_no_part_is_short(world: World, path: str) -> None:
    """The tree of an answer's parts, too: the SuperLink reads a request as a whole."""
    with world.gateway() as (_, port), connected(port, world.a) as line:
        assert ask(line, node_key(world.a), path, bytes(256 << 10)) == (200, "fine")
        assert ask(line, node_key(world.a), path, bytes((256 << 10) + 1))[0] == 413
