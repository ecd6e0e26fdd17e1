"""Evidence that a site keeps after an incident: what is in it, and what a check of it proves."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from fedtune.core.config import Site, load_site
from fedtune.core.config.checked import keep_checked
from fedtune.core.data.identity import identities
from fedtune.core.errors import ConfigError, NotGenuine
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.wire.keys import SigningKey, canonical
from fedtune.evidence import incident
from tests.cli_kit import run
from tests.client.adoption_kit import kill_at, make_site, spend, write_notes
from tests.expected import raises_nothing

QUOTED = b"panicked at a record: Zaphod Beeblebrox"  # as a library does in the vault's own log


@pytest.fixture
def site(tmp_path: Path) -> Site:
    write_notes(tmp_path / "notes.jsonl", [f"p{n}" for n in range(7)])
    file = make_site(tmp_path, "north")
    spend(file, 2, withdrawn=["p3"])
    site = load_site(file)
    (site.site.state / "vault.log").write_bytes(QUOTED)
    return site


def secrets_of(site: Site) -> list[bytes]:
    book = Ledger(site.home)
    members = [bytes.fromhex(book.hashed(member)) for member in set().union(*identities(site.data))]
    return [
        QUOTED,
        (site.home / "salt").read_bytes(),
        (site.home / "site.key").read_bytes(),
        *members,
    ]


def test_what_is_kept_never_held_a_salt_a_members_hash_or_a_librarys_words(
    site: Site, tmp_path: Path
) -> None:
    """Nor does what is left where it was killed. Twin: the ledger itself has all of them."""
    secrets, step, ended = secrets_of(site), 0, False
    while not ended:
        out = tmp_path / "out" / str(step)
        ended = kill_at(step, partial(incident.keep_of_site, site, out / "kept"))
        for path in (path for path in out.rglob("*") if path.is_file()):
            content = path.read_bytes()
            assert not any(secret in content for secret in secrets), f"{path} of step {step}"
        step += 3
    whole = b"".join(path.read_bytes() for path in site.home.iterdir() if path.is_file())
    assert all(secret in whole for secret in secrets)


@pytest.mark.parametrize("password", ["s3cret-w0rd", "a:b'c@d", "%40%2F", "ä"])
def test_a_proxys_password_is_not_kept(site: Site, tmp_path: Path, password: str) -> None:
    """All else in site.toml is as it stood. Twin: a url without one is not changed."""
    assert site.file
    before = site.file.read_text()
    for proxy in (f"http://fed:{password}@proxy:3128", "http://proxy:3128"):
        said = f'\n[coordinator]\nproxy = "{proxy}"  # ask it@example.org\n'
        site.file.write_text(before + said)
        now = load_site(site.file)
        assert now.coordinator and now.coordinator.proxy == proxy
        kept = incident.keep_of_site(now, tmp_path / f"kept-{len(proxy)}")
        expected = (before + said).replace(f":{password}@", ":...@")
        assert (kept.folder / "site.toml").read_text() == expected


def test_the_tables_with_which_the_site_was_started_are_kept(site: Site, tmp_path: Path) -> None:
    """The site file may have been changed since. The proxy's password is not kept."""
    assert site.file
    before = site.file.read_text()
    site.file.write_text(before + '\n[coordinator]\nproxy = "http://fed:s3cret@proxy:3128"\n')
    running = keep_checked(load_site(site.file))
    site.file.write_text(before)
    kept = incident.keep_of_site(load_site(site.file), tmp_path / "kept")
    expected = running.read_text().replace(":s3cret@", ":...@")
    assert (kept.folder / "state" / running.name).read_text() == expected
    assert "proxy" in expected and "s3cret" not in expected


def test_the_kept_ledger_has_every_entry_and_no_member(site: Site, tmp_path: Path) -> None:
    kept = incident.keep_of_site(site, tmp_path / "kept")
    book = Ledger(site.home)
    with closing(sqlite3.connect(kept.folder / "ledger" / "ledger.db")) as copy:
        rows = list(copy.execute("SELECT seq, hash FROM entries ORDER BY seq"))
        assert rows[-1] == (book.head.seq, book.head.hash) and len(rows) == book.head.seq + 1
        assert list(copy.execute("SELECT * FROM members")) == []


def _damage_log(home: Path) -> None:
    whole = (home / "audit.jsonl").read_bytes()
    (home / "audit.jsonl").write_bytes(whole[:-40] + b"x" * 39 + b"\n")


def _edit_entry(home: Path) -> None:
    with closing(sqlite3.connect(home / "ledger.db")) as book:
        book.execute("UPDATE entries SET body = '{}' WHERE seq = 2")
        book.commit()


DAMAGES: dict[str, tuple[Callable[[Path], object], bool, bool]] = {  # and whether of the ledger
    "an audit log that was changed": (_damage_log, False, True),
    "an entry that was edited": (_edit_entry, True, True),
    "a ledger that was put back": (
        lambda home: (home / "ledger.head").write_bytes(b""),
        True,
        True,
    ),
    "no ledger": (lambda home: (home / "ledger.db").unlink(), True, False),
    "another file": (lambda home: (home / "ledger.db").write_bytes(b"x" * 9000), True, False),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_what_is_damaged_is_kept_as_it_is(site: Site, tmp_path: Path, how: str) -> None:
    """Evidence of who damaged a ledger is wanted most, and a restore comes after it. Twin: of a
    whole one the manifest names no damage."""
    assert json.loads(_manifest(incident.keep_of_site(site, tmp_path / "whole")))["damaged"] == []
    damage, of_ledger, has_rows = DAMAGES[how]
    damage(site.home)
    before = {path: path.read_bytes() for path in site.home.iterdir() if path.is_file()}
    secrets = secrets_of(load_site(site.file)) if not of_ledger and site.file else [QUOTED]
    with raises_nothing():
        kept = incident.keep_of_site(site, tmp_path / "kept")
    facts = json.loads(_manifest(kept))
    assert len(facts["damaged"]) == 1 and (facts["ledger"] == "") is of_ledger
    assert ("audit.jsonl" in facts["damaged"][0]) is not of_ledger
    assert (kept.folder / "ledger" / "ledger.db").exists() is has_rows
    content = b"".join(path.read_bytes() for path in kept.folder.rglob("*") if path.is_file())
    assert not any(secret in content for secret in [*secrets, before[site.home / "salt"]])
    after = {path: path.read_bytes() for path in site.home.iterdir() if path.is_file()}
    changed = {path.name for path in {*before, *after} if before.get(path) != after.get(path)}
    assert changed <= {"audit.jsonl"}, "nothing is mended, or made, by keeping evidence"
    assert incident.check(kept.folder) == kept


def test_of_a_ledger_with_a_damaged_page_the_entries_before_it_are_kept(
    site: Site, tmp_path: Path
) -> None:
    assert site.file
    every = spend(site.file, 60).head.seq + 1
    path = site.home / "ledger.db"
    whole = path.read_bytes()
    for page in range(1, len(whole) // 4096):  # the first one that costs some entries and not all
        path.write_bytes(whole[: page * 4096] + b"x" * 4096 + whole[(page + 1) * 4096 :])
        kept = incident.keep_of_site(site, tmp_path / f"{page}")
        copied = kept.folder / "ledger" / "ledger.db"
        if not copied.exists():
            continue
        with closing(sqlite3.connect(copied)) as copy:
            ((rows, first),) = copy.execute("SELECT count(*), min(seq) FROM entries")
        if rows < every:
            break
    assert 0 < rows < every and first == 0
    assert incident.check(kept.folder) == kept


def test_what_is_no_file_is_not_waited_for(site: Site, tmp_path: Path) -> None:
    """A pipe has the size of an empty file, and nobody writes to it."""
    (site.site.state / "log.jsonl").write_bytes(b"")
    kept = incident.keep_of_site(site, tmp_path / "kept")
    (empty, *_) = (p for p in kept.folder.rglob("*") if p.is_file() and not p.stat().st_size)
    empty.unlink()
    os.mkfifo(empty)
    with pytest.raises(NotGenuine, match="not a regular file"):
        incident.check(kept.folder)


def test_a_site_that_lost_its_key_makes_none(site: Site, tmp_path: Path) -> None:
    (site.home / "site.key").unlink()
    with pytest.raises(ConfigError, match="no signing key"):
        incident.keep_of_site(site, tmp_path / "kept")
    assert not (site.home / "site.key").exists()


def _manifest(kept: incident.Kept) -> bytes:
    return (kept.folder / incident.MANIFEST).read_bytes()


def test_a_check_says_whether_it_is_known_who_signed(site: Site, tmp_path: Path) -> None:
    """Exit code 3 without --signer, as for `fedtune verify` without --trust. Twin: a folder that
    somebody changed and signed with a new key is told from the site's own."""
    kept = incident.keep_of_site(site, tmp_path / "kept")
    forged = tmp_path / "forged"
    shutil.copytree(kept.folder, forged)
    facts, key = json.loads((forged / incident.MANIFEST).read_text()), SigningKey()
    facts |= {"noticed": "never", "signer": key.public}
    facts.pop("signature")
    signed = facts | {"signature": key.sign(incident.PURPOSE + canonical(facts))}
    (forged / incident.MANIFEST).unlink()
    (forged / incident.MANIFEST).write_bytes(canonical(signed))
    own = site.file
    for folder, signer, code in (
        (kept.folder, None, 3), (kept.folder, kept.signer, 0), (kept.folder, own, 0),
        (kept.folder, site.home, 0), (forged, None, 3), (forged, own, 2), (forged, key.public, 0),
    ):  # fmt: skip
        done = run("evidence", folder, *(("--signer", signer) if signer else ()))
        assert done.exit_code == code, done.output
        assert ("signer unknown" in done.output) == (code == 3)


def test_a_link_to_a_folder_is_found(site: Site, tmp_path: Path) -> None:
    kept = incident.keep_of_site(site, tmp_path / "kept")
    (tmp_path / "invented").mkdir()
    (tmp_path / "invented" / "log.jsonl").write_text("{}")
    (kept.folder / "coordinator").symlink_to(tmp_path / "invented")
    with pytest.raises(NotGenuine, match="was added"):
        incident.check(kept.folder)
