"""What test_doctor.py and test_doctor_command.py share."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.core.ledger.ledger import Ledger
from fedtune.doctor import machine
from fedtune.flower import certs
from fedtune.flower.ports import free_port
from fedtune.launch.coordinator import prepare
from fedtune.server.doctor import Place, examine
from tests.flower import kit
from tests.network.kit import PRIVATE, STUDY

HUB = "hub.example.org"
DAY = timedelta(days=1)


def by_name(found: Iterator[machine.Finding]) -> dict[str, machine.Finding]:
    return {finding.name: finding for finding in found}


class Hub:
    """A coordinator's folder with one admitted site, as its commands leave it."""

    def __init__(self, root: Path, base: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.patch = root, patch
        self.study, self.home, self.port = root / "study.toml", root / "coordinator", free_port()
        self.names: list[str] = []
        text = STUDY.format(privacy=PRIVATE, base=base, rounds=3, min_sites=1, round_timeout=60)
        self.study.write_text(text)
        prepare(self.home, "127.0.0.1", self.port, [HUB])
        self.site = kit.site_file(root / "a", "a", self.port)
        Ledger(root / "a" / "state")
        kit.join_up(self.home, self.site, self.port)

    def look(self) -> dict[str, machine.Finding]:
        place = Place(self.home, "127.0.0.1", self.port, self.names)
        return by_name(examine(self.study, place))

    def edit(self, old: str, new: str) -> None:
        text = self.study.read_text()
        assert text.count(old) == 1, old
        self.study.write_text(text.replace(old, new))

    def leaf(self, start: timedelta, end: timedelta, home: Path | None = None) -> None:
        """Put a certificate for HUB and loopback in the place of the gateway's."""
        key, now = ec.generate_private_key(ec.SECP384R1()), certs.read_clock()
        hosts = [HUB, "localhost", "127.0.0.1"]
        leaf = certs.issue(
            home or self.home, key.public_key(), "hub", hosts, now + start, now + end
        )
        (self.home / "server.pem").write_bytes(certs._pem(key) + leaf.public_bytes(certs.PEM))

    def site_leaf(self, end: timedelta) -> None:
        """A certificate of the site's that ends then, as issued."""
        key = certs.read_key(self.site.parent / "state" / "keys" / "tls.key").public_key()
        now = certs.read_clock()
        leaf = certs.issue(self.home, key, "a", start=now - 30 * DAY, end=now + end)
        (self.home / "leaves" / "a.pem").write_bytes(leaf.public_bytes(certs.PEM))
