"""Certificates that live for a minute or two, in a consortium that waits for longer than that: they
are renewed by themselves at either end, and who was off meanwhile is told what to do."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from cryptography import x509

from fedtune.flower.ports import free_port
from tests.network import remains
from tests.network.kit import PRIVATE, SITES, Consortium, consortium, done, end, said, until
from tests.network.test_upgrade import copied

LIFE = 240  # seconds of a certificate; a site renews it at two thirds, a server at half
SHORT = {
    "fedtune/flower/certs.py": {
        "CA_DAYS, LEAF_DAYS = 3650, 30\n": f"CA_DAYS, LEAF_DAYS = 3650, {LIFE} / 86_400\n",
        "SKEW = timedelta(minutes=5)": "SKEW = timedelta(0)",
    },
    "fedtune/flower/peers.py": {"renewal: float = 60.0": "renewal: float = 1.0"},
    "fedtune/flower/gateway.py": {"RENEWAL_SECONDS = 3600.0": "RENEWAL_SECONDS = 2.0"},
    "fedtune/flower/forwarder.py": {"WATCH_SECONDS = 15.0": "WATCH_SECONDS = 2.0"},
}


def again(made: Consortium, name: str) -> None:
    """Enrol once more with the same keys, as who was off for too long is asked to."""
    folder, packages = made.root / name, made.packages["hub"]
    heard = said(done(folder, "enroll", "site.toml", packages=packages), "fingerprint   ")
    shutil.copy(folder / f"{name}.request", made.hub)
    words = ("admit", f"{name}.request", "--fingerprint", heard)
    done(made.hub, *words, packages=packages)
    shutil.copy(made.hub / f"{name}.answer", folder)


@pytest.mark.long
def test_certificates_that_run_out_in_a_running_consortium(tmp_path: Path, tiny_base: Path) -> None:
    packages = copied(tmp_path / "short", SHORT)
    with consortium(tmp_path / "run", "127.0.0.1", free_port()) as made:
        made.lay_out(tiny_base, PRIVATE, 2, round_timeout=60)
        made.packages = dict.fromkeys(("hub", *SITES), packages)
        server = made.server()
        until(made.listens, 600, made.told)
        for name in SITES:
            made.join(name)
            again(made, name)  # by the release whose certificates are short
        early, late = SITES[:2], SITES[2]
        for name in early:
            made.client(name)
        first = {name: serial(certificate(made, name)) for name in early}
        first["hub"] = serial(made.hub / "coordinator" / "server.pem")
        time.sleep(2 * LIFE)
        assert server.poll() is None and made.rounds() == 0, made.told()
        client = made.client(late)
        assert client.wait(900) == 4, made.told()
        told = made.log(late).read_text().replace("\n", " ")
        assert "certificate has expired, or the clock here is wrong" in told, told
        again(made, late)
        made.client(late)
        assert server.wait(1800) == 0, made.told()
        for name in early:
            assert serial(certificate(made, name)) != first[name], name
        assert serial(made.hub / "coordinator" / "server.pem") != first["hub"]
        for process in made.running:
            end(process)
        remains.check(made, private=True)


def certificate(made: Consortium, name: str) -> Path:
    """Where a site's client keeps what its courier tells it: the newest certificate."""
    return made.root / name / "state" / "keys" / "renewed" / "tls.crt"


def serial(path: Path) -> int:
    until(path.exists, 300)
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number
