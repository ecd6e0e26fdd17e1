"""`fedtune doctor`, on either side: each finding as it should be, and as it should not."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

import fedtune.flower.gateway as gateway_module
from fedtune.core.config import load_site
from fedtune.core.errors import FedtuneError
from fedtune.core.wire.protocol import PROTOCOL
from fedtune.doctor import machine
from fedtune.doctor import tls as look
from fedtune.flower import api, certs, enrol
from fedtune.officer.doctor import examine as examine_site
from fedtune.server.doctor import Place, examine
from tests.doctor_kit import DAY, HUB, Hub, by_name
from tests.flower import kit


def bad(found: dict[str, machine.Finding]) -> dict[str, str]:
    return {name: finding.says for name, finding in found.items() if not finding.good}


def test_a_coordinator_that_is_well_before_its_first_start_while_it_runs_and_after(
    hub: Hub, tmp_path: Path
) -> None:
    place = Place(tmp_path / "none", "127.0.0.1", hub.port, [])
    before = by_name(examine(hub.study, place))
    assert not bad(before) and "makes it" in before["home"].says and not place.home.exists()
    after = hub.look()
    assert not bad(after)
    assert "free" in after["port"].says and "1 admitted (a), 0 revoked" in after["sites"].says
    assert HUB in after["names"].says and "flwr 1.42" in after["versions"].says
    assert "ε = " in after["plan"].says
    trust, _ = certs.loopback(tmp_path / "own")
    with kit.gateway(hub.home, "https://127.0.0.1:1", trust, port=hub.port):
        running = hub.look()
    assert not bad(running) and "the gateway answers" in running["port"].says


def test_nothing_is_made_or_changed(hub: Hub) -> None:
    before = {p: p.read_bytes() for p in hub.root.rglob("*") if p.is_file()}
    hub.look()
    assert {p: p.read_bytes() for p in hub.root.rglob("*") if p.is_file()} == before


def another_ca(hub: Hub) -> None:
    (hub.root / "other").mkdir()
    hub.leaf(-DAY, 20 * DAY, hub.root / "other")


def from_the_future(hub: Hub) -> None:
    file = hub.home / "nodes" / "a.json"
    later = (certs.read_clock() + DAY).isoformat()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"admitted": later}))


def other_version(hub: Hub) -> None:
    """As a package installer would leave it, in a folder that comes first."""
    folder = hub.root / "site-packages" / "flwr-1.43.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: flwr\nVersion: 1.43.0\n")
    hub.patch.syspath_prepend(str(folder.parent))


def newer_record(hub: Hub) -> None:
    file = hub.home / "nodes" / "a.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))


BASE_TABLE = 'dtype = "float32"'
WRONG: dict[str, tuple[Callable[[Hub], Any], str, str]] = {
    "expired": (lambda h: h.leaf(-30 * DAY, -DAY), "certificate", "expired.*fedtune server"),
    "near its end": (lambda h: h.leaf(-30 * DAY, DAY), "certificate", "about to expire"),
    "not yet valid": (lambda h: h.leaf(DAY, 30 * DAY), "certificate", "not valid yet.*NTP"),
    "set back": (lambda h: h.leaf(DAY, 30 * DAY), "clock", "server.pem was written at"),
    "set back since": (from_the_future, "clock", "a was written at.*never goes back"),
    "another CA": (another_ca, "certificate", "not signed by this consortium's CA"),
    "no CA": (lambda h: (h.home / "ca.pem").write_bytes(b""), "certificates", "from a backup"),
    "lost CA": (lambda h: (h.home / "ca.pem").unlink(), "certificates", "ca.pem.*from a backup"),
    "wrong SAN": (
        lambda h: h.names.append("other.example.org"),
        "names",
        "is for localhost.*hub.example.org; expected other.example.org.*--name other.example.org",
    ),
    "wrong digest": (
        lambda h: h.edit(BASE_TABLE, f'{BASE_TABLE}\ndigest = "sha256:{"0" * 64}"'),
        "base",
        "digest of the base here is sha256:.*expected sha256:000",
    ),
    "no base": (lambda h: h.edit('model = "', 'model = "/none'), "base", "no such folder|models"),
    "full disk": (lambda h: h.patch.setattr(machine, "FREE", 1e18), "disk", "free disk space"),
    "little memory": (lambda h: h.patch.setattr(machine, "ROOM", 1e18), "memory", "available"),
    "readable CA": (lambda h: (h.home / "ca.pem").chmod(0o644), "secrets", "ca.pem.*chmod 600"),
    "readable key": (lambda h: (h.home / "signing.key").chmod(0o640), "secrets", "signing.key"),
    "a site ran out": (
        lambda h: h.site_leaf(-DAY),
        "sites",
        "a: its certificate expired on.*again",
    ),
    "a site is off": (lambda h: h.site_leaf(DAY), "sites", "a: its certificate ends.*start"),
    "newer registry": (newer_record, "sites", "newer fedtune"),
    "other flwr": (other_version, "versions", "flwr 1.43.0; expected flwr<1.43"),
    "no ε left": (
        lambda h: (
            h.edit("noise_multiplier = 4.0", "noise_multiplier = 0.5, epsilon = 0.01"),
            h.edit("rounds = 3\n", ""),
        ),
        "plan",
        "does not pay for one round",
    ),
    "no such file": (
        lambda h: h.study.write_text(
            h.study.read_text()
            + '[evaluation]\npath = "x.jsonl"\ncolumns = { prompt = "p", completion = "c" }\n'
        ),
        "public files",
        "x.jsonl: no such file",
    ),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_wrong_at_a_coordinator_is_named_with_what_to_do(hub: Hub, how: str) -> None:
    change, name, words = WRONG[how]
    change(hub)
    assert re.search(words, bad(hub.look())[name]), bad(hub.look())


@contextmanager
def answering(answer: Callable[[socket.socket], Any], port: int = 0) -> Iterator[int]:
    """Somebody who listens on loopback and answers everybody in the same way."""
    with socket.create_server(("127.0.0.1", port)) as door:
        door.settimeout(0.05)
        done = threading.Event()

        def serve() -> None:
            while not done.is_set():
                with suppress(OSError):
                    caller, _ = door.accept()
                    with caller:
                        answer(caller)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield door.getsockname()[1]
        finally:
            done.set()
            thread.join()


def with_certificate(pem: Path) -> Callable[[socket.socket], None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)

    def answer(caller: socket.socket) -> None:
        caller.settimeout(5)
        with context.wrap_socket(caller, server_side=True) as secure:
            secure.recv(1)

    return answer


def test_a_port_that_another_has_is_named(hub: Hub, tmp_path: Path) -> None:
    with answering(lambda caller: caller.sendall(b"220 mail\r\n"), hub.port):
        assert "not as a gateway does" in bad(hub.look())["port"]
    other = tmp_path / "other"
    other.mkdir()
    with answering(with_certificate(certs.server_leaf(other)), hub.port):
        assert "another certificate" in bad(hub.look())["port"]
    with socket.socket() as held:
        held.bind(("127.0.0.1", hub.port))  # and does not listen
        assert "cannot be listened on" in bad(hub.look())["port"]
    assert not bad(hub.look())


def test_of_a_long_answer_the_rest_is_dropped() -> None:
    """Whatever the pieces in which it comes."""

    async def ask(length: int) -> tuple[int, bytes]:
        reader = asyncio.StreamReader()
        reader.feed_data(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + length * b"x")
        writer: Any = SimpleNamespace(write=lambda data: None)
        return await look._http(reader, writer, "/", HUB)

    for length in (0, look.LONGEST - 1, look.LONGEST, 3 * look.LONGEST):
        assert asyncio.run(ask(length)) == (200, min(length, look.LONGEST) * b"x")


class Shifted:
    """The gateway's clock, `seconds` before ours."""

    def __init__(self, seconds: float) -> None:
        self._by = timedelta(seconds=seconds)

    def read_clock(self) -> Any:
        return certs.read_clock() + self._by

    def __getattr__(self, name: str) -> Any:
        return getattr(certs, name)


NETWORK = {"certificate", "names", "its certificate", "coordinator", "clock", "protocol"}


def site_look(hub: Hub) -> dict[str, machine.Finding]:
    return by_name(examine_site(hub.site))


@contextmanager
def open_door(hub: Hub) -> Iterator[None]:
    trust, _ = certs.loopback(hub.root / "own")
    with kit.gateway(hub.home, "https://127.0.0.1:1", trust, port=hub.port):
        yield


def test_a_site_that_is_well_sees_names_certificates_clock_and_protocol(hub: Hub) -> None:
    with open_door(hub):
        found = site_look(hub)
    assert set(found) >= NETWORK | {"versions", "disk", "secrets", "enrolment"}
    assert set(bad(found)) == {"records"}  # it has none
    assert "lets this site in" in found["coordinator"].says
    assert "127.0.0.1 is among" in found["names"].says
    assert "records and FEDTUNE_CACHE on the same disk" in found["disk"].says
    assert f"{PROTOCOL} at both ends" in found["protocol"].says


def test_a_cache_on_a_disk_of_its_own_is_not_warned_of(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = hub.root.stat().st_dev
    folders = [Path("/dev/shm"), Path(__file__).parent]
    elsewhere = [each for each in folders if each.is_dir() and each.stat().st_dev != own]
    if not elsewhere:
        pytest.skip("needs a second file system, such as /dev/shm")
    monkeypatch.setenv("FEDTUNE_CACHE", str(elsewhere[0]))
    with open_door(hub):
        assert "; records on the same disk" in site_look(hub)["disk"].says


def test_a_site_that_is_turned_away_or_answered_by_nobody(hub: Hub) -> None:
    assert "does not answer" in bad(site_look(hub))["coordinator"]
    with open_door(hub):
        enrol.revoke(hub.home, "a")
        assert "refuses this site: revoked" in bad(site_look(hub))["coordinator"]
    (hub.site.parent / "answer.json").unlink()
    assert "answer.json" in bad(site_look(hub))["enrolment"]


@pytest.mark.parametrize(("shift", "good"), [(0, True), (-4, True), (-6, False), (300, True)])
def test_a_clock_that_flower_would_refuse_is_named(hub: Hub, shift: float, good: bool) -> None:
    hub.patch.setattr(gateway_module, "certs", Shifted(shift))
    with open_door(hub):
        found = site_look(hub)["clock"]
    assert found.good is good, found.says
    if not good:
        assert "ahead of the coordinator's" in found.says and "NTP" in found.says


def test_the_window_is_flowers_own() -> None:
    assert api.CLOCK_WINDOW == (-5, 305)
    for ahead in (-304.9, 0, 4.9):
        look.clock(ahead)
    for ahead in (-305.1, 5.1, 86_400):
        with pytest.raises(FedtuneError, match="NTP"):
            look.clock(ahead)


def test_a_coordinator_of_another_protocol_is_named(hub: Hub) -> None:
    said = {"protocol": PROTOCOL + 1, "release": "9.9"}
    hub.patch.setattr(gateway_module, "version_fields", lambda: said)
    with open_door(hub):
        assert f"protocol {PROTOCOL + 1} (fedtune 9.9)" in bad(site_look(hub))["protocol"]


def test_a_gateways_certificate_that_the_site_must_not_trust(hub: Hub) -> None:
    hub.leaf(-30 * DAY, -DAY)
    with answering(with_certificate(hub.home / "server.pem"), hub.port):
        found = bad(site_look(hub))
    assert "expired" in found["its certificate"] and "does not verify" in found["coordinator"]
    another_ca(hub)
    with answering(with_certificate(hub.home / "server.pem"), hub.port):
        assert "not signed by this consortium's CA" in bad(site_look(hub))["its certificate"]


def test_a_gateway_that_the_site_calls_by_another_name(hub: Hub) -> None:
    """An address of this machine's loopback that the certificate does not name."""
    key = ec.generate_private_key(ec.SECP384R1())
    leaf = certs.issue(hub.home, key.public_key(), "hub", [HUB])
    (hub.home / "server.pem").write_bytes(certs._pem(key) + leaf.public_bytes(certs.PEM))
    with answering(with_certificate(hub.home / "server.pem"), hub.port):
        found = bad(site_look(hub))
    assert f"is for {HUB}; expected 127.0.0.1 among them" in found["names"]
    assert "its certificate" not in found


def test_a_sites_own_certificate_and_keys(hub: Hub) -> None:
    found = kit.link(load_site(hub.site), hub.site)
    key = certs.read_key(found.keys / "tls.key").public_key()
    file = hub.site.parent / "answer.json"
    for end, words in ((-DAY, "expired"), (DAY, "about to expire")):
        start = certs.read_clock() - 30 * DAY
        leaf = certs.issue(hub.home, key, "a", start=start, end=certs.read_clock() + end)
        said = json.loads(file.read_text()) | {"certificate": leaf.public_bytes(certs.PEM).decode()}
        file.write_text(json.dumps(said))
        found.certificate.unlink()
        with open_door(hub):
            now = bad(site_look(hub))
        assert words in now["certificate"] and "fedtune enroll" in now["certificate"]
        assert ("coordinator" in now) == (end < timedelta(0))
    (found.keys / "node.key").chmod(0o644)
    assert "node.key: other users can read it" in bad(site_look(hub))["secrets"]
