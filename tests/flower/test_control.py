"""Another account of the coordinator's machine reaches the SuperLink's port, and gains nothing."""

from __future__ import annotations

import hashlib
import socket
import ssl
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedtune.core.errors import InfrastructureError
from fedtune.flower import api
from fedtune.flower.ports import free_port
from fedtune.launch import coordinator
from fedtune.launch.coordinator import Link
from tests.depth import long_but


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    with coordinator.superlink(tmp_path_factory.mktemp("control") / "home") as link:
        yield link


def key() -> bytes:
    made = ec.generate_private_key(ec.SECP384R1()).public_key()
    return made.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def plain(link: Link) -> ControlHttpClient:
    """Flower's own client, as anybody on this machine can run it (the certificate is no secret)."""
    version = RuntimeVersionHttpInterceptor("flwr")
    return ControlHttpClient.from_server_address(link.address, False, link.ca, [version])


@pytest.mark.parametrize(
    ("free", "listens"), long_but([(False, True)], product((True, False), (True, False)))
)
def test_a_port_that_somebody_takes_first_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: bool, listens: bool
) -> None:
    """Between the choice of a port and its use, whether or not that program listens there; and it
    ends with an error if no port is ever free."""
    with socket.socket() as taken, socket.socket() as other:
        for one in (taken, other):
            one.bind(("127.0.0.1", 0))
            one.settimeout(0)
            if listens:
                one.listen()
        number = taken.getsockname()[1]
        ports = [number, free_port()] if free else [number, other.getsockname()[1]]
        monkeypatch.setattr(coordinator, "PORTS", len(ports))
        monkeypatch.setattr(coordinator, "free_port", iter(ports).__next__)
        if free:
            with coordinator.superlink(tmp_path / "home") as link:
                assert link.address == f"127.0.0.1:{ports[1]}" and link.child.alive
        else:
            with pytest.raises(InfrastructureError, match="ended by itself"):
                coordinator.superlink(tmp_path / "home").__enter__()


def test_the_coordinator_registers_sites_and_starts_runs(link: Link) -> None:
    content = coordinator.bundle()
    api.register(link.address, link.ca, link.secret, {"north": key()})
    digest = hashlib.sha256(content).hexdigest()
    api.start_run(link.address, link.ca, link.secret, content, digest)


@pytest.mark.parametrize("secret", [b"", b"guessed", bytes(32)])
def test_who_lacks_the_secret_registers_starts_and_lists_nothing(link: Link, secret: bytes) -> None:
    content, digest = coordinator.bundle(), "0" * 64
    asked: list[Any] = [
        lambda: api.register(link.address, link.ca, secret, {"rogue": key()}),
        lambda: api.start_run(link.address, link.ca, secret, content, digest),
    ]
    for ask in asked:
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            ask()
    with plain(link) as control:
        for call, request in (
            (control.ListNodes, ListNodesRequest()),
            (control.ListRuns, ListRunsRequest()),
        ):
            with pytest.raises(httpx.HTTPStatusError, match="401"):
                call(request)


def test_nothing_else_is_open_either(link: Link) -> None:
    trust = ssl.create_default_context(cadata=link.ca.decode())
    with httpx.Client(verify=trust, base_url=f"https://{link.address}", trust_env=False) as client:
        for path in ("/", "/docs", "/openapi.json", "/health", "/v1/control/", "//v1/fleet/../x"):
            assert client.get(path).status_code == 401, path
        # the twin: what a site asks for reaches Flower, which knows no unsigned request
        assert client.post("/v1/fleet/pull-messages").status_code != 404
        assert client.get("/v1/fleet/nothing").status_code == 404
