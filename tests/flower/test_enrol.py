"""Enrolment: altered, repeated, revoked, stolen; each refused with its own reason, nothing kept."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.core.config import load_site
from fedtune.core.errors import ConfigError, Refused
from fedtune.core.wire.keys import SigningKey, canonical
from fedtune.flower import certs, enrol
from fedtune.flower.ports import free_port
from fedtune.launch.coordinator import prepare
from tests.flower import kit


def test_private_keys_stay_where_they_were_made(tmp_path: Path) -> None:
    site, home = kit.site_file(tmp_path / "a", "a", 1), tmp_path / "home"
    found = kit.join_up(home, site, 1)
    secret = [found.keys / "node.key", found.keys / "tls.key", site.parent / "state" / "site.key"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in secret} == {0o600}
    elsewhere = [p for p in home.rglob("*") if p.is_file()]
    elsewhere += [site.parent / "request", site.parent / "answer.json"]
    assert len(elsewhere) == 6  # ca.pem, signing.key, nodes/a.json, leaves/a.pem
    for file in elsewhere:
        body = file.read_bytes()
        assert not [p for p in secret if p.read_bytes() in body]
        assert file.name == "ca.pem" or b"PRIVATE" not in body


def test_the_registry_holds_every_key(tmp_path: Path) -> None:
    site, home = kit.site_file(tmp_path / "a", "a", 1), tmp_path / "home"
    found = kit.join_up(home, site, 1)
    record = enrol.registry(home)["a"]
    assert record.signing == SigningKey.at(site.parent / "state" / "site.key").public
    node = certs.read_key(found.keys / "node.key").public_key()
    assert record.node.encode() == certs.public_pem(node)
    assert found.answer.coordinator == SigningKey.at(home / "signing.key").public


def each_field(said: dict[str, str]) -> list[dict[str, str]]:
    """The request with one character of one field changed, for every field."""
    changed = []
    for key, value in said.items():
        at = len(value) // 2
        letter = "b" if value[at] != "b" else "c"
        changed.append(said | {key: value[:at] + letter + value[at + 1 :]})
    return changed


def test_an_altered_request_is_refused(tmp_path: Path) -> None:
    site, home, file = kit.site_file(tmp_path / "ann", "ann", 1), tmp_path / "home", tmp_path / "r"
    kit.ask(site)
    said = json.loads((site.parent / "request").read_text())
    broken = each_field(said)
    broken += [said | {"more": "x"}, {k: v for k, v in said.items() if k != "csr"}]
    assert len(broken) == 8
    for body in broken:
        file.write_text(json.dumps(body))
        with pytest.raises(ConfigError, match=r"altered|not a request"):
            enrol.read_request(file)
    for junk in ("", "[]", "{}", '{"name": 1}', "[" * 50_000, '{"name": "' + "x" * 70_000 + '"}'):
        file.write_text(junk)
        with pytest.raises(ConfigError):
            enrol.read_request(file)
    assert not home.exists()


def resigned(body: dict[str, str], node: ec.EllipticCurvePrivateKey, key: SigningKey) -> str:
    signed = enrol.PURPOSE + canonical(body)
    by_node = node.sign(signed, ec.ECDSA(hashes.SHA384())).hex()
    return json.dumps(body | {"node_signature": by_node, "signature": key.sign(signed)})


def test_a_request_with_a_key_that_its_maker_does_not_hold_is_refused(tmp_path: Path) -> None:
    """Somebody who signs with keys of their own cannot enrol another's node or TLS key; and a
    request that they sign as a whole has another fingerprint."""
    site = kit.site_file(tmp_path / "a", "a", 1)
    asked, file = kit.ask(site), tmp_path / "r"
    said = json.loads((site.parent / "request").read_text())
    body = {key: said[key] for key in enrol.FIELDS}
    mine, tls, key = certs.node_key(tmp_path / "n"), certs.tls_key(tmp_path / "t"), SigningKey()
    theirs = body | {"signing": key.public}
    for stolen in (
        theirs | {"csr": certs.request(tls, "a").decode()},  # their node key
        theirs | {"node": certs.public_pem(mine.public_key()).decode(), "name": "b"},  # their CSR
        theirs | {"node": certs.public_pem(tls.public_key()).decode()},  # one key for two uses
    ):
        file.write_text(resigned(stolen, mine, key))
        with pytest.raises(ConfigError, match="altered"):
            enrol.read_request(file)
    own = {"node": certs.public_pem(mine.public_key()).decode()}
    whole = theirs | own | {"csr": certs.request(tls, "a").decode()}
    file.write_text(resigned(whole, mine, key))
    with pytest.raises(Refused, match="fingerprint"):
        enrol.compare(enrol.read_request(file), asked.fingerprint)
    enrol.compare(asked, asked.fingerprint.replace(" ", "-").upper())


@pytest.mark.parametrize("name", ["../a", "", ".", "a/b", "a" * 65, "é", "-a", "a b"])
def test_a_name_that_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    if 0 < len(name) <= 64:
        enrol.enroll(name, tmp_path / "keys", SigningKey(), tmp_path / "r")
        with pytest.raises(ConfigError, match="name"):
            enrol.read_request(tmp_path / "r")
    assert enrol.lookup(tmp_path, name) is None


def test_the_same_name_twice_is_refused_until_the_first_is_revoked(tmp_path: Path) -> None:
    home, site = tmp_path / "home", kit.site_file(tmp_path / "a", "a", 1)
    first = kit.join_up(home, site, 1)
    before = enrol.registry(home)
    other = kit.ask(kit.site_file(tmp_path / "a2", "a", 1))
    with pytest.raises(Refused, match="admitted already, with other keys"):
        enrol.admit(home, other, "x:1")
    assert enrol.registry(home) == before
    again = kit.join_up(home, site, 1)  # the same keys: a new certificate, the same record
    assert enrol.registry(home) == before
    assert kit.leaf_of(again).serial_number != 0 and again.answer.fingerprint
    assert first.answer.certificate != again.answer.certificate
    ended = enrol.revoke(home, "a")
    assert ended.revoked and not enrol.registry(home)
    assert enrol.was_revoked(home, ended.tls)
    enrol.admit(home, other, "x:1")
    assert enrol.registry(home)["a"].tls == enrol.tls_digest(other.tls)
    with pytest.raises(ConfigError, match="no site named b"):
        enrol.revoke(home, "b")


def own_name(asked: enrol.Request) -> enrol.Request:
    return asked


def another_name(asked: enrol.Request) -> enrol.Request:
    return replace(asked, name="b")


@pytest.mark.parametrize("under", [own_name, another_name])
def test_a_revoked_key_does_not_come_back(
    tmp_path: Path, under: Callable[[enrol.Request], enrol.Request]
) -> None:
    home, site = tmp_path / "home", kit.site_file(tmp_path / "a", "a", 1)
    kit.join_up(home, site, 1)
    asked = kit.ask(site)
    enrol.revoke(home, "a")
    with pytest.raises(Refused, match="was revoked"):
        enrol.admit(home, under(asked), "x:1")
    assert not enrol.registry(home)


def test_a_key_serves_one_name(tmp_path: Path) -> None:
    home, site = tmp_path / "home", kit.site_file(tmp_path / "a", "a", 1)
    kit.join_up(home, site, 1)
    asked = kit.ask(site)
    fresh = kit.ask(kit.site_file(tmp_path / "c", "c", 1))
    for taken in ({"node": asked.node}, {"tls": asked.tls}, {"signing": asked.signing}):
        with pytest.raises(Refused, match="is that of the site a"):
            enrol.admit(home, replace(fresh, **taken), "x:1")
    enrol.admit(home, fresh, "x:1")


def test_rotation_keeps_the_ledgers_signing_key(tmp_path: Path) -> None:
    home, site = tmp_path / "home", kit.site_file(tmp_path / "a", "a", 1)
    kit.join_up(home, site, 1)
    before = enrol.registry(home)["a"]
    enrol.revoke(home, "a")
    (load_site(site).site.state / "keys").rename(tmp_path / "old")
    kit.join_up(home, site, 1)
    after = enrol.registry(home)["a"]
    assert after.signing == before.signing
    assert after.node != before.node and after.tls != before.tls


def test_two_processes_make_one_ca(tmp_path: Path) -> None:
    found: list[bytes] = []
    threads = [
        Thread(target=lambda: found.append(certs.ca(tmp_path)[1].public_bytes(certs.PEM)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["ca.pem"]


def test_a_lost_ca_is_not_replaced_by_a_new_one(tmp_path: Path) -> None:
    """Its answers would be of no use to the site, nor the sites' certificates to the gateway."""
    site, home = kit.site_file(tmp_path / "a", "a", 1), tmp_path / "home"
    kit.join_up(home, site, 1)
    other = kit.ask(kit.site_file(tmp_path / "b", "b", 1))
    kept = (home / "ca.pem").rename(tmp_path / "backup")
    with pytest.raises(ConfigError, match=r"ca\.pem: missing.*restore it from a backup"):
        enrol.admit(home, other, "x:1")
    with pytest.raises(ConfigError, match=r"ca\.pem: missing"):
        prepare(home, "127.0.0.1", free_port())
    assert not (home / "ca.pem").exists() and list(enrol.registry(home)) == ["a"]
    kept.rename(home / "ca.pem")
    first = json.loads((site.parent / "answer.json").read_text())
    assert enrol.admit(home, other, "x:1").ca == first["ca"]


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    certs.tls_key(tmp_path / "tls.key")
    (tmp_path / "tls.key").chmod(0o640)
    with pytest.raises(ConfigError, match="other users"):
        certs.read_key(tmp_path / "tls.key")
    (tmp_path / "tls.key").chmod(0o600)
    assert certs.tls_key(tmp_path / "tls.key")
    (tmp_path / "tls.key").write_text("x")
    with pytest.raises(ConfigError, match="no readable key"):
        certs.tls_key(tmp_path / "tls.key")


@pytest.mark.parametrize("where", ["nodes/a.json", "nodes/revoked/a-{tls}.json"])
def test_a_record_of_a_newer_release_is_refused_and_left_alone(tmp_path: Path, where: str) -> None:
    """Also where it says nothing that this release does not know."""
    site, home = kit.site_file(tmp_path / "a", "a", 1), tmp_path / "home"
    kit.join_up(home, site, 1)
    file = home / where.format(tls=enrol.registry(home)["a"].tls[:16])
    if "revoked" in where:
        enrol.revoke(home, "a")
    said = json.loads(file.read_text())
    assert said["format"] == enrol.FORMAT
    file.write_text(json.dumps(said | {"format": enrol.FORMAT + 1}))
    before = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="written by a newer fedtune"):
        kit.join_up(home, site, 1)
    assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file()} == before


def test_a_record_from_before_there_were_formats_is_read(tmp_path: Path) -> None:
    site, home = kit.site_file(tmp_path / "a", "a", 1), tmp_path / "home"
    kit.join_up(home, site, 1)
    said, record = json.loads((home / "nodes/a.json").read_text()), enrol.registry(home)["a"]
    del said["format"]
    (home / "nodes/a.json").write_text(json.dumps(said))
    assert enrol.registry(home) == {"a": record}


def test_the_newest_certificate_of_each_key_is_kept_to_be_looked_at(tmp_path: Path) -> None:
    site, home = kit.site_file(tmp_path / "a", "a", 1), tmp_path / "home"
    found = kit.join_up(home, site, 1)
    record = enrol.registry(home)["a"]
    assert enrol.leaf_of(home, record) == kit.leaf_of(found)
    csr = certs.request(certs.read_key(found.keys / "tls.key"), "a")
    renewed = enrol.renew(home, record, csr)
    kept = enrol.leaf_of(home, record)
    assert kept is not None and kept.public_bytes(certs.PEM) == renewed
    assert enrol.leaf_of(home, replace(record, tls="0" * 64)) is None
