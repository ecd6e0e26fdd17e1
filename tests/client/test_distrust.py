"""What a site does about consortia once the audit log, which alone remembers whom a person
distrusts, is gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.core.config import load_site
from fedtune.core.errors import FedtuneError, NotGenuine, Refused
from fedtune.core.ledger import audit_log
from fedtune.core.ledger.audit_log import AuditLog
from fedtune.core.ledger.ledger import Ledger
from fedtune.dashboard import work
from fedtune.officer import leave as leaving
from fedtune.officer.adopt import adopt
from fedtune.officer.leave import DISTRUST, check_trusted
from tests.cli_kit import run
from tests.client.adoption_kit import make_site, spend, write_notes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A site that left the consortium ab:cd and declared it distrusted."""
    write_notes(tmp_path / "notes.jsonl", ["a", "b", "c"])
    file = make_site(tmp_path, "north")
    book = spend(file, 1)
    AuditLog(book.folder, book.key).add(
        "leave", DISTRUST, consortium="ab:cd", membership="", files=1
    )
    return file


def move_away(file: Path, *names: str) -> Path:
    home = load_site(file).home
    for name in names:
        (home / name).rename(file.with_name(name))
    return home


@pytest.mark.parametrize("begun", [False, True])
def test_once_the_log_is_gone_no_consortium_is_trusted_until_a_person_says_so(
    file: Path, begun: bool
) -> None:
    """By the commands that the refusal names. Put back, the log remembers."""
    home = move_away(file, "audit.jsonl")
    if begun:
        key = Ledger(home).key
        for event in ("purge", "join"):
            AuditLog(home, key).add(event, files=1)
    for consortium in ("ab:cd", "12:34"):
        with pytest.raises(Refused if begun else NotGenuine) as refused:
            check_trusted(home, consortium)
    named = [part for part in str(refused.value).split("`") if part.startswith("fedtune ledger")]
    for words in named:
        assert run(*words.replace("SITE", str(file)).split()[1:]).exit_code == 0
    check_trusted(home, "12:34")
    assert len(named) == 2
    file.with_name("audit.jsonl").rename(home / "audit.jsonl")
    check_trusted(home, "12:34")
    with pytest.raises(Refused, match="trusted no more"):
        check_trusted(home, "ab:cd")


def test_the_loss_is_entered_before_what_a_receipt_shows(file: Path) -> None:
    """An order brings its receipt before anything else is entered, and the receipt names an entry
    that the log lacks. That entry makes the log as long as audit.lock remembers."""
    head = AuditLog(load_site(file).home, Ledger(load_site(file).home).key).head
    home = move_away(file, "audit.jsonl")
    log = AuditLog(home, Ledger(home).key)
    log.check(head)
    log.check(head)  # a repeated order enters nothing more
    entries = audit_log.verify(home, log._key.public).entries
    assert [entry["rule"] for entry in entries] == ["missing", "receipt"]
    with pytest.raises(Refused, match="taken away"):
        check_trusted(home, "ab:cd")


@pytest.mark.parametrize("how", ["the oldest file is deleted", "a byte is flipped", "a line cut"])
def test_a_log_that_lacks_a_part_is_no_log(
    file: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Twin: a crash cut the last line short, under which nothing was done."""
    home = load_site(file).home
    if how == "the oldest file is deleted":
        monkeypatch.setattr(audit_log, "LIMIT", 0)
    for _ in range(3):
        AuditLog(home, Ledger(home).key).add("purge", files=1)
    oldest = home / audit_log.files(home)[0]
    content = oldest.read_bytes()
    with open(home / "audit.jsonl", "ab") as newest:
        newest.write(b'{"event": "pur')
    check_trusted(home, "12:34")
    if how == "the oldest file is deleted":
        assert oldest.name != "audit.jsonl"
        oldest.unlink()
    elif how == "a byte is flipped":
        oldest.write_bytes(content.replace(b"distrust", b"distrusu"))
    else:
        oldest.write_bytes(b"".join(content.splitlines(keepends=True)[1:]))
    with pytest.raises(NotGenuine, match=DISTRUST):
        check_trusted(home, "12:34")


@pytest.mark.parametrize("how", ["cut short", "noted"])
def test_a_new_file_whose_first_line_was_not_finished_is_missed_too(
    file: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A crash while the log went on in a new file; what is entered then begins it. Or a crash
    between this line and the note of it, which the next entry makes good."""
    home = load_site(file).home
    log = AuditLog(home, Ledger(home).key)
    with monkeypatch.context() as patch:
        patch.setattr(audit_log, "LIMIT", 0)
        if how == "noted":
            patch.setattr(audit_log, "_note_begun", lambda *_: None)
        log.add("purge", files=1)
    if how == "cut short":
        (home / "audit.jsonl").write_bytes(b'{"event": "pur')
    log.add("leave", DISTRUST, consortium="12:34", membership="", files=1)
    (home / "audit.jsonl").unlink()
    with pytest.raises(NotGenuine, match="missing"):
        check_trusted(home, "12:34")


def test_an_older_copy_of_the_log_is_settled_by_a_person_too(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before the log went on in a new file. The loss is entered once, not with each act."""
    home = load_site(file).home
    log, copy = AuditLog(home, Ledger(home).key), (home / "audit.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(audit_log, "LIMIT", 0)
        for _ in range(2):
            log.add("purge", files=1)
    for name in audit_log.files(home):
        (home / name).unlink()
    (home / "audit.jsonl").write_bytes(copy)
    for _ in range(2):
        log.add("purge", files=1)
    events = [entry["event"] for entry in audit_log.verify(home, log._key.public).entries]
    assert events[-3:] == ["cut", "purge", "purge"]
    with pytest.raises(Refused, match="taken away"):
        check_trusted(home, "12:34")
    for option in ("--freeze", "--lift"):
        assert run("ledger", file, option).exit_code == 0
    check_trusted(home, "12:34")


def test_where_audit_lock_is_gone_too_nothing_tells_of_a_log(file: Path) -> None:
    """The twin, as docs/guarantee.md says."""
    check_trusted(move_away(file, "audit.jsonl", "audit.lock"), "ab:cd")


def test_a_lift_of_before_or_an_added_line_settles_nothing(file: Path) -> None:
    """Twins: a signed lift of the log that was taken away, and a line that nobody signed."""
    home = load_site(file).home
    for option in ("--freeze", "--lift"):
        assert run("ledger", file, option).exit_code == 0
    move_away(file, "audit.jsonl")
    lifted = file.with_name("audit.jsonl").read_bytes().splitlines(keepends=True)[-1]
    assert json.loads(lifted)["event"] == "lift"
    AuditLog(home, Ledger(home).key).add("purge", files=1)
    new = (home / "audit.jsonl").read_bytes()
    for line in (lifted, b'{"event": "lift", "rule": "--lift", "seq": 2}\n'):
        (home / "audit.jsonl").write_bytes(new + line)
        with pytest.raises(NotGenuine):
            check_trusted(home, "ab:cd")


def test_a_consortium_that_is_left_again_stays_distrusted(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site is in it again, and leaves it although its log is gone; then the loss is settled."""
    home = move_away(file, "audit.jsonl")
    node = home / "keys" / "node.key"
    node.parent.mkdir(parents=True, exist_ok=True)
    node.write_bytes(b"a key")
    monkeypatch.setattr(leaving, "consortium_of", lambda _: "ab:cd")
    leaving.leave(load_site(file), distrust=True)
    for option in ("--freeze", "--lift"):
        assert run("ledger", file, option).exit_code == 0
    with pytest.raises(Refused, match="trusted no more"):
        check_trusted(home, "ab:cd")
    check_trusted(home, "12:34")


@pytest.mark.parametrize("begun", [False, True])
def test_a_site_whose_log_is_gone_is_not_adopted(file: Path, begun: bool) -> None:
    """The home would not know that there ever was one. It is adopted once the log is put back."""
    home, hospital = move_away(file, "audit.jsonl"), file.with_name("home")
    if begun:
        AuditLog(home, Ledger(home).key).add("purge", files=1)
    with pytest.raises(FedtuneError, match=DISTRUST):
        adopt(hospital, file, "north")
    assert not hospital.exists()
    file.with_name("audit.jsonl").rename(home / "audit.jsonl")
    adopt(hospital, file, "north")
    with pytest.raises(Refused, match="trusted no more"):
        check_trusted(hospital, "ab:cd")


def test_a_page_says_that_the_log_is_gone(file: Path) -> None:
    """Twin: of a site without a log it says that there are no entries."""
    home = load_site(file).home
    assert work.acts(file, "")["count"] == 2
    move_away(file, "audit.jsonl")
    with pytest.raises(NotGenuine, match="missing"):
        work.acts(file, "")
    (home / audit_log.LOCK).unlink()
    assert work.acts(file, "") == {"entries": [], "count": 0}
