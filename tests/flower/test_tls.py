"""A federation of real processes on loopback: TLS, node keys, and no code but the installed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedtune.config import load_study
from fedtune.errors import ConfigError, InfrastructureError
from fedtune.flower import api, coordinator, processes, site_executor
from fedtune.flower.certs import (
    Consortium,
    make_ca,
    make_consortium,
    make_node_key,
    make_server_certificate,
)
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.processes import free_port, reachable
from tests.flower import tls_roles

STUDY = """privacy = "off"
[study]
name = "tls"
[base]
model = "none"
[objective]
name = "causal_lm"
[training]
rounds = 2
sampling_rate = 1.0
learning_rate = 0.1
"""
SITE = """[site]
name = "{name}"
declared_size = 10
[data]
path = "none.jsonl"
[data.columns]
text = "text"
[coordinator]
address = "127.0.0.1:{port}"
ca = "{ca}"
node_key = "{key}"
"""
ROOT = Path(__file__).resolve().parents[2]
SITES = ("a", "b", "c")


def write_site(
    folder: Path, name: str, port: int, ca: str = "ca.crt", key: str = "node_key"
) -> Path:
    path = folder / "site.toml"
    path.write_text(SITE.format(name=name, port=port, ca=ca, key=key))
    return path


@contextmanager
def role(log: Path, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process of tls_roles.py, ended by its handle whatever happens in the block."""
    nowhere = {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    environment = {**os.environ, **nowhere, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(tls_roles.__file__)), *map(str, arguments)]
    with open(log, "wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def hostile_bundle(path: Path, marker: Path) -> Path:
    """An app bundle that brings settings, and modules that leave a mark when they are imported."""
    code = f"open({str(marker)!r}, 'w').close()\napp = None\n"
    with zipfile.ZipFile(io.BytesIO(coordinator.bundle())) as archive:
        assert archive.namelist() == ["pyproject.toml"]
        project = archive.read("pyproject.toml").decode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pyproject.toml", project + 'site = "/etc/passwd"\n')
        for name in ("client/__init__.py", "client/app.py", "server/__init__.py", "server/app.py"):
            archive.writestr(name, code)
    path.write_bytes(buffer.getvalue())
    return path


class World:
    """What is left of a federation that ran: one study, then a coordinator that came back."""

    def __init__(self, root: Path) -> None:
        self.root, self.port, self.marker = root, free_port(), root / "marker"
        self.consortium: Consortium = make_consortium(root, SITES, ["coordinator.test"])
        (root / "study.toml").write_text(STUDY)
        self.bundle = hostile_bundle(root / "hostile.fab", self.marker)
        self.files = {n: write_site(f, n, self.port) for n, f in self.consortium.sites.items()}
        self.body: dict[str, Any] = {}
        self.statuses: dict[str, int] = {}

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text()

    def site(self, name: str, *once: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
        return role(self.root / f"{name}.log", "site", self.files[name], *once)

    def coordinator(self, nodes: int) -> AbstractContextManager[subprocess.Popen[bytes]]:
        out, log = self.root / "body.json", self.root / "coordinator.log"
        return role(log, "coordinator", self.root, self.port, nodes, out, self.bundle)

    def run(self) -> None:
        unknown = self.root / "sites" / "unknown"
        make_node_key(unknown / "node_key")
        self.files["unknown"] = write_site(unknown, "unknown", self.port, ca="../a/ca.crt")
        with ExitStack() as stack:
            names = {"a": (), "b": (), "c": ("once",), "unknown": ()}
            with self.coordinator(nodes=3) as process:
                until(lambda: reachable("127.0.0.1", self.port))
                sites = {n: stack.enter_context(self.site(n, *once)) for n, once in names.items()}
                assert process.wait(60) == 0, self.log("coordinator")
            self.body = json.loads((self.root / "body.json").read_text())
            self.come_back()
            for name in ("a", "b"):
                sites[name].terminate()
            self.statuses = {name: process.wait(30) for name, process in sites.items()}

    def come_back(self) -> None:
        home, address = self.consortium.home, f"127.0.0.1:{self.port}"
        with coordinator.superlink(home, "127.0.0.1", self.port):
            ca, digest = (home / "ca.crt").read_bytes(), hashlib.sha256(b"").hexdigest()
            api.start_run(address, ca, coordinator.read_nodes(home), coordinator.bundle(), digest)
            until(lambda: all(self.log(name).count("joined") == 2 for name in ("a", "b")))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(tmp_path_factory.mktemp("tls"))
    made.run()
    return made


def test_processes_equal_one_process(world: World) -> None:
    grid = InProcessGrid([world.files[n] for n in SITES], tls_roles.app)
    here = tls_roles.average(grid, load_study(world.root / "study.toml"), world.root)
    assert world.body["sites"] == here["sites"] == list(SITES)
    np.testing.assert_allclose(world.body["adapter"], here["adapter"], rtol=0, atol=1e-6)
    assert np.abs(here["adapter"]).max() > 0.1


def test_a_bundle_is_never_run_nor_unpacked(world: World) -> None:
    assert world.body["settings"] == ["{}"]
    assert not world.marker.exists()
    assert not [p for p in world.root.rglob("*") if p.name == "apps" or p.suffix == ".py"]


def test_an_unregistered_key_is_refused_and_told_what_to_do(world: World) -> None:
    assert world.statuses["unknown"] == InfrastructureError.exit_code
    assert "refuses this site" in world.log("unknown")
    assert "node_key.pub" in world.log("unknown")
    assert "answered" not in world.log("unknown")


def test_a_site_outlives_the_coordinator_and_rejoins(world: World) -> None:
    assert world.log("a").count("joined") == 2
    assert world.statuses == {"a": 0, "b": 0, "c": 0, "unknown": 4}


def test_another_kind_of_message_is_refused(world: World) -> None:
    assert world.body["evaluate"] == 3 * [[True, site_executor.REFUSAL]]


def test_an_exception_tells_its_class_and_no_more(world: World) -> None:
    assert world.body["train"] == 3 * [[True, "ValueError"]]
    assert not [p for p in world.root.rglob("*.log") if "holds a secret" in p.read_text()]


def test_a_task_is_for_the_holder_of_the_secret(world: World) -> None:
    assert world.body["stranger"] == 401


def test_nothing_is_left_running(world: World) -> None:
    assert not reachable("127.0.0.1", world.port)
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(world.root) not in lines


def test_secrets_are_for_their_owner_alone(world: World) -> None:
    secret = [p for p in world.root.rglob("*") if p.suffix in {".key", ".secret"}]
    secret += [folder / "node_key" for folder in world.consortium.sites.values()]
    assert len(secret) >= 8
    assert {stat.S_IMODE(p.stat().st_mode) for p in secret} == {0o600}


# ------------------------------------------------------------------------------- one part at a time


def test_a_task_that_is_not_a_clientapp_is_refused() -> None:
    called = []
    executor = site_executor._Executor(
        Path("site.toml"), lambda m, c: called.append(m) or m, lambda *_: None, once=False
    )
    api._identify(1, 1, 1)
    message = Message(RecordDict({"round": ConfigRecord({})}), 2, "train")
    reply = executor.reply(api.AGENT_APP, message, Context(1, 2, {}, RecordDict(), {}))
    assert reply.has_error() and reply.error.reason == site_executor.REFUSAL
    assert not called


@pytest.fixture()
def alone(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_superlink_that_dies_ends_the_study_with_a_reason(
    alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = []

    class Watched(processes.Child):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            children.append(self)

    monkeypatch.setattr(coordinator, "Child", Watched)

    def rounds(grid: Any, *_: Any, **__: Any) -> dict[str, Any]:
        os.kill(children[0].pid, signal.SIGKILL)
        until(lambda: not children[0].alive)
        return {"nodes": grid.get_node_ids()}

    home = alone.consortium.home
    with pytest.raises(InfrastructureError, match="flower-superlink ended by itself"):
        coordinator.serve(
            alone.root / "study.toml", alone.root, port=alone.port, home=home, run=rounds
        )
    assert not reachable("127.0.0.1", alone.port)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_coordinator_that_is_stopped_takes_its_superlink_along(
    alone: World, signum: signal.Signals
) -> None:
    with alone.coordinator(nodes=9) as process:
        until(lambda: reachable("127.0.0.1", alone.port))
        process.send_signal(signum)
        status = process.wait(20)
        until(lambda: not reachable("127.0.0.1", alone.port), 20)
    if signum != signal.SIGKILL:
        assert status == InfrastructureError.exit_code
        assert f"stopped by {signum.name}" in alone.log("coordinator")
        assert "--resume" in alone.log("coordinator")


def test_a_coordinator_with_another_ca_is_not_trusted(alone: World, tmp_path: Path) -> None:
    other = make_ca(tmp_path / "other")
    write_site(alone.consortium.sites["a"], "a", alone.port, ca=str(other))
    with (
        coordinator.superlink(alone.consortium.home, "127.0.0.1", alone.port),
        pytest.raises(InfrastructureError, match="does not verify"),
    ):
        site_executor.join(alone.files["a"], client_app=tls_roles.app)


def test_a_taken_port_is_named_before_anything_starts(alone: World) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InfrastructureError, match=f"port {port} .* is taken"):
            home = alone.consortium.home
            coordinator.serve(alone.root / "study.toml", alone.root, port=port, home=home)


def test_what_is_missing_is_named(alone: World) -> None:
    home = alone.consortium.home
    (home / "server.key").unlink()
    with pytest.raises(ConfigError, match=r"server\.key"):
        coordinator.serve(alone.root / "study.toml", alone.root, home=home, port=alone.port)
    for public in (home / "nodes").iterdir():
        public.unlink()
    with pytest.raises(ConfigError, match="holds no site's key"):
        coordinator.read_nodes(home)
    (home / "nodes" / "a.pub").write_text("ssh-ed25519 AAAA")
    with pytest.raises(ConfigError, match="not a node key"):
        coordinator.read_nodes(home)


def test_the_server_certificate_names_its_hosts(tmp_path: Path) -> None:
    make_ca(tmp_path)
    path = make_server_certificate(tmp_path, ["fed.example.org", "10.0.0.7", "127.0.0.1"])
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "fed.example.org"]
    assert list(map(str, names.get_values_for_type(x509.IPAddress))) == ["127.0.0.1", "10.0.0.7"]
    certificate.verify_directly_issued_by(
        x509.load_pem_x509_certificate((tmp_path / "ca.crt").read_bytes())
    )


def test_a_key_is_never_replaced(tmp_path: Path) -> None:
    make_node_key(tmp_path / "node_key")
    before = (tmp_path / "node_key").read_bytes()
    with pytest.raises(ConfigError, match="not replaced"):
        make_node_key(tmp_path / "node_key")
    assert (tmp_path / "node_key").read_bytes() == before
