"""A ledger that a person froze: nothing is charged, answered or deleted until a person lifts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.core.config import load_site
from fedtune.core.errors import (
    ConfigError,
    InfrastructureError,
    InputError,
    NotGenuine,
    PolicyRefused,
    Refused,
)
from fedtune.core.ledger.audit_log import AuditLog
from fedtune.core.ledger.files import NoRoom, waiting_draw_path
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.vault import worker as worker_module
from fedtune.core.vault.answers import answer
from fedtune.core.vault.studies import under_way
from fedtune.core.wire.seal import sign_end
from fedtune.officer import freeze as officer
from fedtune.officer import leave as leaving
from fedtune.officer import purge
from fedtune.officer.let_go import decide
from tests.cli_kit import run
from tests.client.adoption_kit import CHARGE
from tests.client.airlock_kit import Asked, a_site, contents
from tests.client.hospital_kit import make_hospital
from tests.disks import disk

pytestmark = pytest.mark.usefixtures("without_self_test")
FROZEN = "has frozen its ledger"


@pytest.fixture
def asked(tmp_path: Path, tiny_base: Path) -> Asked:
    return a_site(tmp_path, tiny_base, "immediate")


def nothing(ledger: Ledger) -> None:
    """In a twin, in place of the check that it lacks."""


def test_a_frozen_site_pays_for_nothing_and_answers_nothing(asked: Asked) -> None:
    """The plan is refused too, a vault that runs need not be told, and a lift ends it."""
    assert asked.train(1).status == "trained"
    officer.freeze(asked.site, "suspected leak")
    for round_ in (1, 2):  # what was released is not sent again, and nothing is trained
        reply = asked.train(round_)
        assert reply.status == "refused" and FROZEN in str(reply.fields["reason"])
        assert contents(reply) == b"" and reply.fields["header"] == ""
    assert asked.prepare().status == "refused" and asked.paid() == 1
    asked.restart()
    assert asked.prepare().status == "refused"
    officer.lift(asked.site, "it was none")
    assert asked.prepare().status == "admitted"
    assert contents(asked.train(1)) and asked.paid() == 1
    assert asked.train(2).status == "trained" and asked.paid() == 2
    acts = [event for event, _ in asked.events() if event in ("freeze", "lift")]
    assert acts == ["freeze", "lift"]


def test_a_round_under_way_is_paid_and_not_answered(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = worker_module.local_round

    def frozen_meanwhile(*given: object) -> object:
        officer.freeze(asked.site, "")
        return plain(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(worker_module, "local_round", frozen_meanwhile)
    reply = asked.train()
    assert reply.status == "refused" and contents(reply) == b"" and asked.paid() == 1


def test_twin_a_site_that_looks_only_before_a_round_answers_it(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = worker_module.local_round

    def frozen_meanwhile(*given: object) -> object:
        officer.freeze(asked.site, "")
        monkeypatch.setattr(Ledger, "check_not_frozen", nothing)
        return plain(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(worker_module, "local_round", frozen_meanwhile)
    assert contents(asked.train())


def test_a_freeze_between_the_check_and_the_charge_charges_nothing(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: with the check outside the ledger's transaction alone, the round is charged."""
    monkeypatch.setattr(Ledger, "check_not_frozen", nothing)
    officer.freeze(asked.site, "")
    assert asked.train().status == "refused" and asked.paid() == 0
    monkeypatch.setattr(Ledger, "_check_not_frozen", nothing)
    assert asked.train().status == "trained" and asked.paid() == 1


def test_a_frozen_ledger_reserves_for_nobody(tmp_path: Path) -> None:
    book, other = Ledger(tmp_path), Ledger(tmp_path)
    book.declare("records", [])
    other.freeze("an officer", "")
    with pytest.raises(PolicyRefused, match=FROZEN):
        book.reserve("records", CHARGE, "a", lambda charges: None)
    with pytest.raises(PolicyRefused, match=FROZEN):
        book.reserve_for("records", CHARGE, "a", lambda charges: None)
    assert book.spending() == []
    other.freeze("somebody else", "again")
    frozen = book.frozen
    assert frozen and (frozen.who, frozen.why) == ("an officer", "")  # the first one stands
    book.verify()


@pytest.mark.parametrize("frozen", [True, False])
def test_a_round_under_way_deletes_no_earlier_update_of_a_frozen_ledger(
    tmp_path: Path, frozen: bool
) -> None:
    """Nor does a person who refuses an answer. Twin: without a freeze both are deleted."""
    book = Ledger(tmp_path)
    book.declare("records", [])
    first, second = (
        book.reserve("records", CHARGE, adapter, lambda charges: None) for adapter in ("a", "b")
    )
    book.release(first, b"left the site")
    if frozen:
        book.freeze("an officer", "")
    book.release(second, b"is not sent")
    slot = CHARGE.study, CHARGE.round, "b"
    book.refuse(slot, "an officer")
    kept = {path.read_bytes() for path in (tmp_path / "outbox").iterdir()}
    assert kept == ({b"left the site", b"is not sent"} if frozen else set())
    assert book.is_refused(slot)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_site_keeps_the_answers_of_declared_data_that_a_person_refuses(
    tmp_path: Path, tiny_base: Path, frozen: bool
) -> None:
    """A run's own ledger pays for them, which nobody froze. Twin: without a freeze they go."""
    held = a_site(tmp_path, tiny_base, declared="generated")
    assert held.train().status == "waiting"
    (folder,) = (held.site.site.state / "runs").iterdir()
    assert len([*(folder / "outbox").iterdir()]) == 1
    if frozen:
        officer.freeze(held.site, "a leak")
    assert run("let-go", held.path, "--refuse", "--all").exit_code == 0
    assert len([*(folder / "outbox").iterdir()]) == (1 if frozen else 0)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_round_of_declared_data_deletes_no_earlier_update_of_a_frozen_site(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, frozen: bool
) -> None:
    asked = a_site(tmp_path, tiny_base, "immediate", declared="generated")
    assert asked.train(1).status == "trained"
    (folder,) = (asked.site.site.state / "runs").iterdir()
    plain = worker_module.local_round

    def frozen_meanwhile(*given: object) -> object:
        if frozen:
            officer.freeze(asked.site, "")
        return plain(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(worker_module, "local_round", frozen_meanwhile)
    asked.train(2)
    assert len([*(folder / "outbox").iterdir()]) == (2 if frozen else 1)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_site_keeps_the_request_of_a_draw_that_a_person_decides(
    tmp_path: Path, tiny_base: Path, frozen: bool
) -> None:
    held = a_site(tmp_path, tiny_base)
    held.train()
    spent = held.worker.ledger.spending("records")[0]
    request = waiting_draw_path(held.site.home, (spent.charge.study, 1, spent.adapter))
    request.parent.mkdir(exist_ok=True)
    request.write_text("{}")
    if frozen:
        officer.freeze(held.site, "")
    decide(held.site, [], refuse=True, every=True)
    assert request.exists() is frozen


def test_the_end_of_a_study_deletes_nothing_of_a_frozen_site(asked: Asked) -> None:
    asked.train()
    officer.freeze(asked.site, "")
    end = asked.plan()
    end.tables["plan"] |= sign_end(asked.key, asked.made.study.digest)
    studies = asked.site.site.state / "studies"
    (file,) = studies.iterdir()
    content = file.read_bytes()
    assert answer(asked.place, end).status == "finished"
    assert [path.read_bytes() for path in studies.iterdir()] == [content]
    assert not under_way(asked.site.site.state)
    officer.lift(asked.site, "")
    asked.prepare()
    assert answer(asked.place, end).status == "finished" and not [*studies.glob("*.json")]


def test_the_freeze_of_a_damaged_ledger_holds_once_it_is_restored(
    asked: Asked, tmp_path: Path
) -> None:
    copy, state = tmp_path / "copy", asked.site.site.state
    asked.worker.ledger.backup(copy)
    asked.restart()
    (state / "ledger.db").write_bytes(b"x" * 9000)
    assert run("ledger", asked.path, "--freeze").exit_code == 4
    assert run("ledger", asked.path, "--restore", "--from", copy).exit_code == 0
    assert Ledger(state).frozen


@pytest.mark.parametrize("full", [True, False])
def test_a_lift_says_if_the_disk_has_no_room_and_the_next_order_charges_nothing_then(
    tmp_path: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture, full: bool
) -> None:
    """As where the disk filled up during the freeze. Twin: with space the round is trained."""
    with disk(tmp_path / "disk", megabytes=96) as small:
        asked = a_site(small.path, tiny_base, "immediate")
        officer.freeze(asked.site, "")
        (asked.site.home / "room").unlink()
        with small.with_room_for(2**18 if full else 2**26):
            caplog.clear()
            officer.lift(asked.site, "")
            assert ("no room for the ledger" in caplog.text) == full
            status = asked.train().status
            assert (status, asked.paid()) == (("failed", 0) if full else ("trained", 1))
        assert full is False or asked.train().status == "trained"


def test_a_lift_is_entered_where_the_disk_is_full_but_for_the_room(
    tmp_path: Path, tiny_base: Path
) -> None:
    with disk(tmp_path / "disk", megabytes=96) as small:
        asked = a_site(small.path, tiny_base, "immediate")
        officer.freeze(asked.site, "")
        with small.with_room_for(0):
            officer.lift(asked.site, "x" * 9000)
        assert Ledger(asked.site.home).frozen is None


def test_only_a_frozen_ledger_is_lifted(asked: Asked) -> None:
    with pytest.raises(InputError, match="not frozen"):
        officer.lift(asked.site, "")
    assert "lift" not in [event for event, _ in asked.events()]


def test_nothing_is_purged_while_it_is_frozen(asked: Asked) -> None:
    asked.train()
    officer.freeze(asked.site, "")
    listing = purge.listing(asked.site)
    assert listing.files
    with pytest.raises(Refused, match="nothing is deleted"):
        purge.purge(listing)
    assert all(path.exists() for path in listing.files)
    officer.lift(asked.site, "")
    purge.purge(listing)
    assert not any(path.exists() for path in listing.files)


def test_a_restore_that_lost_a_freeze_freezes_again(asked: Asked, tmp_path: Path) -> None:
    """By the audit log beside it. Twins: a lifted freeze is not frozen again, and neither is a
    ledger that never was."""
    copy = tmp_path / "copy"
    asked.worker.ledger.backup(copy)
    asked.restart()
    state = asked.site.site.state

    def restored() -> bool:
        (state / "ledger.db").unlink()
        done = run("ledger", asked.path, "--restore", "--from", copy)
        assert done.exit_code == 0, done.output
        return Ledger(state).frozen is not None

    assert not restored()
    assert run("ledger", asked.path, "--freeze", "--reason", "a leak").exit_code == 0
    assert restored()
    assert run("ledger", asked.path, "--lift").exit_code == 0
    assert not restored()


def test_the_command_says_who_froze_it_and_why(asked: Asked) -> None:
    done = run("ledger", asked.path, "--freeze", "--reason", "suspected leak", "--json")
    assert done.exit_code == 0 and "FROZEN" in done.stderr and "suspected leak" in done.stderr
    assert '"why": "suspected leak"' in done.stdout
    assert run("ledger", asked.path, "--freeze", "--lift").exit_code == 2
    done = run("ledger", asked.path, "--lift", "--json")
    assert '"frozen": null' in done.stdout and "FROZEN" not in done.stderr


def test_a_home_is_frozen_for_every_membership(tmp_path: Path) -> None:
    """And no membership is ended, nor another ledger adopted, meanwhile."""
    from tests.client.hospital_kit import load

    sites = load(tmp_path)
    Ledger(tmp_path).declare("records", [])
    officer.freeze(sites["cardio"], "")
    assert Ledger(sites["onco"].home).frozen
    done = run("memberships", tmp_path, "--end", "cardio", "--yes")
    assert done.exit_code == 3 and "nothing is deleted" in done.stderr, done.output


def read_otherwise(file: Path) -> None:
    """Let a membership read patients' keys in another encoding than the others do."""
    read = '"../notes.jsonl"\nsource = "csv"\noptions = { encoding = "cp1252" }'
    file.write_text(file.read_text().replace('"../notes.jsonl"', read))


def test_a_home_with_a_wrong_file_is_frozen_all_the_same(tmp_path: Path) -> None:
    """An emergency waits for no correction; the error is still told."""
    files = make_hospital(tmp_path)
    book = Ledger(tmp_path)
    (tmp_path / "hospital.toml").write_text("no = toml = at all")
    done = run("ledger", str(files["cardio"]), "--freeze", "--reason", "doubt")
    assert done.exit_code == 2 and "hospital.toml" in done.output
    assert "the ledger is frozen, in spite of this" in done.output
    assert book.frozen and book.frozen.why == "doubt"


def test_what_an_officer_decides_waits_for_no_other_memberships_file(tmp_path: Path) -> None:
    """A study does: another key is another patient."""
    files = make_hospital(tmp_path)
    book = Ledger(tmp_path)
    book.declare("records", [])
    read_otherwise(files["onco"])
    with pytest.raises(ConfigError, match="read 'records' differently"):
        load_site(files["cardio"])
    keys = tmp_path / "keys.txt"
    keys.write_text("p1\np2\n")
    cardio, kept = files["cardio"], tmp_path / "kept"
    for words in (
        ("ledger", cardio, "--freeze"),
        ("evidence", cardio, "--to", kept),
        ("ledger", cardio, "--lift"),
        ("withdraw", cardio, "--file", keys),
        ("let-go", cardio),
        ("leave", cardio, "--distrust"),
    ):
        done = run(*words)
        assert "otherwise" not in done.output, done.output
    assert len(book.withdrawn()) == 2 and kept.is_dir()
    assert run("evidence", kept, "--signer", cardio).exit_code == 0
    assert run("evidence", kept, "--signer", files["onco"]).exit_code == 2


def test_a_damaged_log_keeps_nobody_from_leaving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it must remember that a consortium is distrusted: nothing else does."""
    site = load_site(make_hospital(tmp_path)["cardio"])
    book = Ledger(tmp_path)
    AuditLog(tmp_path, book.key).add("purge", files=1)
    node = site.site.state / "keys" / "node.key"
    node.parent.mkdir(parents=True, exist_ok=True)
    node.write_bytes(b"a key")
    log = tmp_path / "audit.jsonl"
    log.write_bytes(log.read_bytes()[:-20] + bytes(19) + b"\n")
    monkeypatch.setattr(leaving, "consortium_of", lambda _: "ab:cd")
    with pytest.raises(NotGenuine):
        leaving.leave(site, distrust=True)
    assert node.exists()
    with pytest.raises(NotGenuine):
        leaving.leave(site)
    assert not node.exists()


@pytest.mark.parametrize("how", ["changed", "lock is a folder"])
def test_a_log_that_cannot_be_read_freezes_and_keeps_nobody_from_lifting(
    asked: Asked, tmp_path: Path, how: str
) -> None:
    copy, state = tmp_path / "copy", asked.site.site.state
    asked.worker.ledger.backup(copy)
    asked.restart()
    assert run("ledger", asked.path, "--freeze").exit_code == 0
    (state / "ledger.db").unlink()
    if how == "changed":
        log = state / "audit.jsonl"
        log.write_bytes(log.read_bytes()[:-20] + bytes(19) + b"\n")
    else:
        (state / "audit.lock").unlink()
        (state / "audit.lock").mkdir()
    assert run("ledger", asked.path, "--restore", "--from", copy).exit_code != 0
    assert Ledger(state).frozen
    if how == "changed":
        assert run("ledger", asked.path, "--lift").exit_code == 2
        assert Ledger(state).frozen is None


def make_unwritable(state: Path) -> None:
    """Let no entry be added to the audit log, as on a disk that nobody can write to."""
    (state / "audit.lock").unlink(missing_ok=True)
    (state / "audit.lock").mkdir()


def test_a_freeze_and_a_lift_that_the_audit_log_lacks_hold_and_the_command_says_so(
    asked: Asked,
) -> None:
    make_unwritable(asked.site.home)
    done = run("ledger", asked.path, "--freeze")
    assert done.exit_code == 4 and "the ledger is frozen all the same" in done.output
    assert asked.train().status == "refused" and asked.paid() == 0
    done = run("ledger", asked.path, "--lift")
    assert done.exit_code == 4 and "the freeze is lifted all the same" in done.output
    assert Ledger(asked.site.home).frozen is None


def test_a_freeze_that_no_disk_has_room_for_is_not_said_to_hold(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise NoRoom("no space")

    monkeypatch.setattr(Ledger, "freeze", no_room)
    done = run("ledger", asked.path, "--freeze")
    assert done.exit_code == 4 and "all the same" not in done.output


def test_a_log_that_cannot_be_written_keeps_nobody_from_withdrawing_or_leaving(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_unwritable(asked.site.home)
    keys = asked.site.home / "keys.txt"
    keys.write_text("one\ntwo\nthree\n")
    done = run("withdraw", asked.path, "--file", keys, "--unseen")
    assert done.exit_code == 4 and done.output.count("not in the audit log") == 3
    assert done.output.count("receipt for the patient") == 3
    assert len(Ledger(asked.site.home).withdrawn()) == 3
    node = asked.site.site.state / "keys" / "node.key"
    node.parent.mkdir(exist_ok=True)
    node.write_bytes(b"a key")
    monkeypatch.setattr(leaving, "consortium_of", lambda _: "ab:cd")
    with pytest.raises(InfrastructureError):
        leaving.leave(asked.site, distrust=True)
    assert node.exists()
    with pytest.raises(InfrastructureError):
        leaving.leave(asked.site)
    assert not node.exists()


def test_a_damaged_log_keeps_nobody_of_a_list_from_withdrawing(asked: Asked) -> None:
    state = asked.site.site.state
    assert run("ledger", asked.path, "--freeze").exit_code == 0  # begins the log
    assert run("ledger", asked.path, "--lift").exit_code == 0
    log = state / "audit.jsonl"
    log.write_bytes(log.read_bytes()[:-20] + bytes(19) + b"\n")
    keys = state / "keys.txt"
    keys.write_text("one\ntwo\nthree\n")
    done = run("withdraw", asked.path, "--file", keys, "--unseen")
    assert done.exit_code == 2 and done.output.count("not in the audit log") == 3
    assert done.output.count("receipt for the patient") == 3
    assert len(Ledger(state).withdrawn()) == len([*(state / "withdrawals").iterdir()]) == 3
