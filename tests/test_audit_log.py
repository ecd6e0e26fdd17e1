"""The audit log: every act at both roles, and every way to change it afterwards."""

from __future__ import annotations

import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.errors import FedtuneError, InfrastructureError, InputError, NotGenuine
from fedtune.core.ledger import audit_log
from fedtune.core.ledger.audit_log import FILE, AuditLog, NotAuditable, verify
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry.reasons import OTHER, PHRASES
from fedtune.core.wire.keys import SigningKey, canonical
from fedtune.evidence.coordinator_home import coordinator_log
from fedtune.launch.coordinator import audit_events
from fedtune.officer.freeze import read_decisions
from fedtune.officer.site_files import sites_in
from fedtune.officer.withdraw import RECEIPTS
from tests.cli_kit import run
from tests.expected import raises_only
from tests.guarantee.world import lay_out, patients
from tests.simulated import simulate

KEY = SigningKey()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    acts = AuditLog(tmp_path / "log", KEY)
    for number in range(6):
        acts.add("purge", "--yes", files=number)
    return acts.folder


def lines(folder: Path) -> list[bytes]:
    return (folder / FILE).read_bytes().splitlines(keepends=True)


# ------------------------------------------------------------------------- the chain


def test_a_log_verifies_and_says_who_when_and_under_which_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "somebody-else")
    monkeypatch.setenv("USER", "somebody-else")
    monkeypatch.setenv(audit_log.PERSON, "Dr. Ann Lee")
    AuditLog(tmp_path, KEY).add("sign", "--sign", plan="sha256:" + "0" * 64)
    (entry,) = verify(tmp_path, KEY.public).entries
    assert entry["person"] == "Dr. Ann Lee" and entry["rule"] == "--sign"
    assert entry["login"] == audit_log.login() != "somebody-else"
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_a_changed_byte_is_refused(folder: Path, tmp_path: Path) -> None:
    whole, rng = (folder / FILE).read_bytes(), random.Random(0)
    for _ in range(300):
        at, how = rng.randrange(len(whole)), rng.randrange(3)
        other = bytes([rng.choice([n for n in range(256) if n != whole[at]])])
        changed = [
            whole[:at] + other + whole[at + 1 :],
            whole[:at] + rng.choice([b" ", b"\n", b"="]) + whole[at:],
            whole[:at] + whole[at + 1 :],
        ][how]
        (folder / FILE).write_bytes(changed)
        with pytest.raises(FedtuneError, match=FILE):
            verify(folder, KEY.public)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:2] + rows[3:],
        lambda rows: rows[1:],
        lambda rows: [rows[1], rows[0], *rows[2:]],
        lambda rows: [*rows, rows[-1]],
        lambda rows: [*rows[:3], rows[2], *rows[3:]],
    ],
    ids=["taken out", "first gone", "swapped", "last twice", "one twice"],
)
def test_entries_that_were_moved_are_refused(folder: Path, change: Any) -> None:
    (folder / FILE).write_bytes(b"".join(change(lines(folder))))
    with pytest.raises(NotGenuine, match="does not follow"):
        verify(folder, KEY.public)


def test_another_key_is_refused_also_with_a_whole_chain_of_its_own(folder: Path) -> None:
    other = SigningKey()
    shutil.rmtree(folder)
    AuditLog(folder, other).add("purge", files=0)
    assert verify(folder, other.public)
    with pytest.raises(NotGenuine, match="not signed by"):
        verify(folder, KEY.public)


def test_entries_that_were_cut_off_are_found_by_a_head_that_was_noted(folder: Path) -> None:
    head = verify(folder, KEY.public).head
    AuditLog(folder, KEY).add("purge", files=6)
    assert verify(folder, KEY.public, head).head != head  # it goes on from there
    (folder / FILE).write_bytes(b"".join(lines(folder)[:-2]))
    assert verify(folder, KEY.public)  # the log alone cannot tell: docs/retention.md says so
    with pytest.raises(NotGenuine, match="entry 5 is not the one that was noted"):
        verify(folder, KEY.public, head)
    for bad in ("5", "x:" + "0" * 64, "5:abc", "9999999999:" + "0" * 64):
        with pytest.raises(InputError):
            verify(folder, KEY.public, bad)


def test_an_entry_of_another_spelling_is_refused(folder: Path) -> None:
    """Signed all the same: one content would have two forms, and two hashes."""
    rows = lines(folder)
    rows[-1] = json.dumps(json.loads(rows[-1]), indent=None).encode() + b"\n"
    (folder / FILE).write_bytes(b"".join(rows))
    with pytest.raises(NotGenuine, match="line 6"):
        verify(folder, KEY.public)


@pytest.mark.parametrize("signature", [5, None, ["a"], {"a": 1}, True])
def test_a_signature_of_another_type_is_none(folder: Path, signature: Any) -> None:
    """Whoever restores a ledger freezes it then, and meets no error of another kind."""
    *before, last = lines(folder)
    other = canonical(json.loads(last) | {"signature": signature}) + b"\n"
    (folder / FILE).write_bytes(b"".join([*before, other]))
    with raises_only(NotGenuine, "line 6: is not an entry"):
        verify(folder, KEY.public)
    frozen = read_decisions(folder, KEY.public).frozen
    assert frozen and "damaged" in frozen.why


def test_what_a_crash_cut_short_is_taken_away_by_the_next_entry(folder: Path) -> None:
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole + b'{"event":"wit')
    with pytest.raises(NotGenuine, match="cut short"):
        verify(folder, KEY.public)
    AuditLog(folder, KEY).add("purge", files=9)
    assert [e["facts"]["files"] for e in verify(folder, KEY.public).entries] == [*range(6), 9]


def test_an_older_file_is_kept_and_verified_with_the_rest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "LIMIT", 1000)
    for number in range(6, 20):
        AuditLog(folder, KEY).add("purge", "--yes", files=number)
    names = audit_log.files(folder)
    assert len(names) > 3 and names[0] == "audit-000000000.jsonl" and names[-1] == FILE
    entries = verify(folder, KEY.public).entries
    assert [entry["facts"]["files"] for entry in entries] == [*range(20)]
    (folder / names[1]).unlink()
    with pytest.raises(NotGenuine, match="does not follow"):
        verify(folder, KEY.public)


@pytest.mark.parametrize("line", [b'{"seq": ', b"[1]", b"\xff", b"{}", b"9", b"[" * 100_000])
def test_a_file_is_not_set_aside_by_a_first_line_that_is_no_entry(
    folder: Path, monkeypatch: pytest.MonkeyPatch, line: bytes
) -> None:
    """Whoever withdraws, freezes or lifts hears of a damaged log, and not of a wrong type."""
    for number in range(6, 80):
        AuditLog(folder, KEY).add("purge", files=number)
    _, *lines = (folder / FILE).read_bytes().split(b"\n")
    (folder / FILE).write_bytes(b"\n".join([line, *lines]))
    monkeypatch.setattr(audit_log, "LIMIT", 1000)
    with raises_only(NotGenuine, "line 1: is not an entry"):
        AuditLog(folder, KEY).add("lift")
    assert audit_log.files(folder) == [FILE]


@pytest.mark.parametrize("which", ["the only file", "the newest file"])
def test_a_log_that_was_taken_away_is_missed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """By `verify`, and by the next entry, before which the new log says so. Twin: with audit.lock
    gone too, nothing is missed."""
    acts = AuditLog(folder, KEY)
    first = 0
    if which == "the newest file":
        monkeypatch.setattr(audit_log, "LIMIT", 1)
        first = acts.add("purge", files=1)
        monkeypatch.undo()
    (folder / FILE).rename(folder / "damaged")
    with pytest.raises(NotGenuine, match=f"entry {first} and later ones are missing"):
        verify(folder, KEY.public)
    acts.add("purge", files=2)
    acts.add("purge", files=3)
    entries = verify(folder, KEY.public).entries[first:]
    assert [e["event"] for e in entries] == ["cut", "purge", "purge"]
    assert (entries[0]["rule"], entries[0]["facts"]) == ("missing", {"entry": first})
    for name in (FILE, audit_log.LOCK):
        (folder / name).unlink()
    acts.add("purge", files=4)
    assert [e["event"] for e in verify(folder, KEY.public).entries[first:]] == ["purge"]


def test_a_log_of_an_earlier_release_is_noted_by_the_next_entry(folder: Path) -> None:
    (folder / audit_log.LOCK).write_bytes(b"")
    AuditLog(folder, KEY).add("purge", files=1)
    (folder / FILE).unlink()
    with pytest.raises(NotGenuine, match="missing"):
        verify(folder, KEY.public)


def test_an_entry_stands_although_its_lock_cannot_be_lengthened(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the act is not done under an entry which says that it was. The next entry notes it."""

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    shutil.rmtree(folder)
    acts = AuditLog(folder, KEY)
    with monkeypatch.context() as patch:
        patch.setattr("fedtune.core.ledger.audit_log.os.ftruncate", fail)
        assert acts.add("purge", files=1) == 0
    assert "may not be noticed" in caplog.text
    assert len(verify(folder, KEY.public).entries) == 1
    acts.add("purge", files=2)
    (folder / FILE).unlink()
    with pytest.raises(NotGenuine, match="missing"):
        verify(folder, KEY.public)


def test_threads_share_one_log(folder: Path) -> None:
    def write() -> None:
        for number in range(10):
            AuditLog(folder, KEY).add("purge", files=number)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(verify(folder, KEY.public).entries) == 46


def test_a_question_that_is_repeated_is_entered_once(folder: Path) -> None:
    acts = AuditLog(folder, KEY)
    first = [acts.add("refuse", "policy.max_rank", once=1, kind="plan") for _ in range(3)]
    assert first == [6, 6, 6]
    assert acts.add("refuse", "policy.max_epsilon", once=1, kind="plan") == 7
    assert acts.add("refuse", "policy.max_rank", once=1, kind="plan") == 8
    for _ in range(20):  # two questions in turn
        assert acts.add("refuse", "policy.max_epsilon", once=16, kind="plan") == 7
        assert acts.add("refuse", "policy.max_rank", once=16, kind="plan") == 8


def test_links_and_long_rubbish_are_not_followed(folder: Path, tmp_path: Path) -> None:
    acts, other = AuditLog(folder, KEY), tmp_path / "other"
    other.write_bytes(b"somebody else's\nhalf")
    (folder / FILE).rename(folder / "kept")
    (folder / FILE).symlink_to(other)
    with pytest.raises(InfrastructureError):
        acts.add("purge", files=1)
    assert other.read_bytes() == b"somebody else's\nhalf"
    (folder / FILE).unlink()
    (folder / FILE).write_bytes(b"\0" * 9000)
    with pytest.raises(NotGenuine, match="does not end with an entry"):
        acts.add("purge", files=1)
    (folder / FILE).unlink()
    (folder / "kept").rename(folder / FILE)
    (folder / audit_log.LOCK).unlink()
    (folder / audit_log.LOCK).symlink_to(tmp_path / "made")
    with pytest.raises(InfrastructureError):
        acts.add("purge", files=1)
    assert not (tmp_path / "made").exists()


# ------------------------------------------------------------------------- what it may hold


@pytest.mark.parametrize("value", ["a\nb", "x" * 201, ["ann"], {"a": 1}, None, b"ann", "\x1b[31m"])
def test_no_text_of_a_record_can_be_passed(folder: Path, value: Any) -> None:
    with pytest.raises(NotAuditable, match=r"^dataset$"):
        AuditLog(folder, KEY).add("accept", dataset=value)
    with pytest.raises(NotAuditable, match=r"^event$"):
        AuditLog(folder, KEY).add("gossip")
    assert len(verify(folder, KEY.public).entries) == 6


def test_every_rule_that_can_refuse_can_be_entered() -> None:
    for phrase in (*PHRASES, OTHER):
        assert audit_log.TEXT.fullmatch(phrase), phrase


def test_a_name_that_is_no_name_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(audit_log.PERSON, "Ann\x1b[2J")
    with pytest.raises(InputError, match=audit_log.PERSON):
        AuditLog(folder, KEY).add("purge", files=1)


# ------------------------------------------------------------------------- at a site


@pytest.fixture
def world(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    lay_out(tmp_path, tiny_base, patients(12))
    return tmp_path


def events(path: Path) -> list[tuple[str, str]]:
    done = run("log", path, "--json")
    assert done.exit_code == 0, done.output
    return [(entry["event"], entry["rule"]) for entry in json.loads(done.stdout)["entries"]]


def test_every_act_at_a_site_is_entered(world: Path) -> None:
    site, state = world / "site-north.toml", world / "state-north"
    rules = site.read_text()
    site.write_text(rules + 'admission = "signed"\n')
    simulate_refused(world)
    assert run("review", "study.toml", "--site", site).exit_code == 0
    assert run("review", "study.toml", "--site", site, "--sign").exit_code == 0
    simulate(world / "study.toml", sites_in(world), world / "run")
    key = next(iter(patients(12)))["who"]
    withdrawn = run("withdraw", site, "--file", keys_file(world, key))
    assert withdrawn.exit_code == 0, withdrawn.output
    assert run("withdraw", site, "--file", keys_file(world, "nobody-knows-me")).exit_code == 2
    assert run("ledger", site, "--backup", "copy").exit_code == 0
    assert run("purge", site, "--yes").exit_code == 0
    (state / "ledger.db").unlink()
    assert run("ledger", site, "--restore", "--from", "copy").exit_code == 0
    assert events(site) == [
        ("wait", "policy.admission"),
        ("review", ""),
        ("sign", "--sign"),
        ("admit", "signed"),
        *[("release", "signed")] * 3,  # one a round
        ("withdraw", ""),
        ("backup", "--backup"),
        ("purge", ""),
        ("restore", "--from"),
    ]
    entries = json.loads(run("log", site, "--json").stdout)["entries"]
    (entered,) = [entry for entry in entries if entry["event"] == "withdraw"]
    assert [*entered["facts"]] == ["receipt"]
    assert (state / RECEIPTS / entered["facts"]["receipt"]).is_file()
    text = b"".join((state / name).read_bytes() for name in audit_log.files(state))
    for row in patients(12):
        for value in (row["who"], row["q"]):
            assert value.encode() not in text


def simulate_refused(world: Path) -> None:
    with pytest.raises(FedtuneError, match="signed"):
        simulate(world / "study.toml", sites_in(world), world / "refused")


def keys_file(world: Path, key: str) -> Path:
    path = world / "keys.txt"
    path.write_text(key + "\n")
    return path


def test_nothing_is_signed_or_released_that_cannot_be_entered(world: Path) -> None:
    site, state = world / "site-north.toml", world / "state-north"
    simulate(world / "study.toml", sites_in(world), world / "run")
    before = len(Ledger(state).charges("north"))
    (state / FILE).unlink()
    (state / FILE).mkdir()  # root may write to anything else
    site.write_text(site.read_text() + 'admission = "signed"\nmax_epsilon = 40.0\n')
    study = world / "study.toml"
    study.write_text(study.read_text().replace("learning_rate = 0.5", "learning_rate = 0.4"))
    refused = run("review", "study.toml", "--site", site, "--sign")
    assert refused.exit_code == 4 and "audit.jsonl" in refused.stderr
    digest = json.loads(run("review", "study.toml", "--site", site, "--json").stdout or "{}")
    assert not digest  # not even looked at
    with pytest.raises(FedtuneError):
        simulate(study, sites_in(world), world / "second")
    assert len(Ledger(state).charges("north")) == before


def test_the_command_shows_verifies_and_compares(world: Path) -> None:
    simulate(world / "study.toml", sites_in(world), world / "run")
    site, state = world / "site-north.toml", world / "state-north"
    shown = run("log", site)
    assert shown.exit_code == 0 and "release" in shown.output and "admit" in shown.output
    one = run("log", site, "--event", "admit", "--json")
    assert {e["event"] for e in json.loads(one.stdout)["entries"]} == {"admit"}
    verdict = run("log", state, "--verify", "--json")
    found = json.loads(verdict.stdout)
    assert found["count"] == 4 and found["signer"] == Ledger(state).key.public
    assert run("log", state, "--verify", "--head", found["head"]).exit_code == 0
    copy = shutil.copytree(state, world / "copy", ignore=lambda _, names: {*names} - {FILE})
    unknown = run("log", copy, "--verify")
    assert unknown.exit_code == 2 and "--signer" in unknown.stderr
    assert run("log", copy, "--verify", "--signer", found["signer"]).exit_code == 0
    (state / FILE).write_bytes(b"".join(lines(state)[1:]))
    changed = run("log", site, "--verify")
    assert changed.exit_code == 2 and "does not follow" in changed.stderr


# ------------------------------------------------------------------------- at the coordinator


def test_what_a_study_decides_is_entered(tmp_path: Path) -> None:
    key, heard = SigningKey.at(tmp_path / "signing.key"), list[str]()
    hear = audit_events(tmp_path, lambda event, _: heard.append(event))
    digest = "sha256:" + "1" * 64
    hear("start", {"plan_digest": digest, "study": "fever", "done": 0})
    too_much = "the site says: policy.max_epsilon is 3, Ann Lee"
    hear("site", {"name": "north", "status": "admitted", "reason": "", "round": 1})
    hear("site", {"name": "south", "status": "refused", "reason": too_much, "round": 1})
    hear("site", {"name": "south", "status": "refused", "reason": too_much, "round": 1})
    hear("site", {"name": "north", "status": "dropped", "reason": "not finite", "round": 2})
    hear("round", {"round": 2})
    hear("version", {"champion": 3, "promoted": True})
    hear("done", {"out": "runs/fever"})
    entries = verify(tmp_path, key.public).entries
    assert [(e["event"], e["rule"]) for e in entries] == [
        ("start", ""),
        ("refuse", "policy.max_epsilon"),
        ("drop", "not finite"),
        ("release", "[schedule]"),
        ("finish", ""),
    ]
    assert len(heard) == 8
    assert b"Ann" not in (tmp_path / FILE).read_bytes()


def test_a_coordinators_acts_on_a_run_are_entered_in_its_home(tmp_path: Path) -> None:
    run_folder = tmp_path / "runs" / "fever"
    assert coordinator_log(run_folder) is None
    key = SigningKey.at(tmp_path / "coordinator" / "signing.key")
    acts = coordinator_log(run_folder)
    assert acts is not None
    acts.add("export", "--to hf", run="fever")
    assert verify(tmp_path / "coordinator", key.public).entries[0]["event"] == "export"


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file")
    with pytest.raises(InfrastructureError, match="audit log that can be written"):
        AuditLog(tmp_path / "log", KEY).add("purge", files=1)


def test_a_signature_of_other_bytes_is_no_signature_of_an_entry(folder: Path) -> None:
    """The key signs other things too: what it signed elsewhere is no entry."""
    rows = lines(folder)
    entry = json.loads(rows[-1])
    unsigned = {name: value for name, value in entry.items() if name != "signature"}
    rows[-1] = canonical(unsigned | {"signature": KEY.sign(canonical(unsigned))}) + b"\n"
    (folder / FILE).write_bytes(b"".join(rows))
    with pytest.raises(NotGenuine, match="not signed"):
        verify(folder, KEY.public)
