"""Another account of the coordinator's machine reaches the SuperLink's port, and gains nothing."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedtune.flower import api
from fedtune.launch import coordinator
from fedtune.launch.coordinator import Link


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
