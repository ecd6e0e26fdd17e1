"""What a restore charges for entries that were lost: the steps that were charged, and nothing for
withdrawals and arrivals, which follow from people."""

from __future__ import annotations

import json
import math
import random
import shutil
import sqlite3
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedtune.core.config import PolicyTable
from fedtune.core.dp.steplog import Step, StepLog
from fedtune.core.ledger import files
from fedtune.core.ledger import ledger as ledger_module
from fedtune.core.ledger import restore as restore_module
from fedtune.core.ledger.entries import EVERY, Charge, Earlier, Gone
from fedtune.core.ledger.files import Costliest, Head, Mark, Paid, opened_token
from fedtune.core.ledger.ledger import Ledger, LedgerError
from fedtune.core.ledger.spending import budget
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.seal import receipt
from tests.dp.ledger_kit import STUDY, charge, covers, run_round, total, yes

COUNTS = ("steps", "bare", "charged", *Costliest._fields, "paid_signature")


def as_of_an_older_release(folder: Path) -> None:
    """Take the counts out of anchor and receipts, which older releases did not write."""
    head = folder / "ledger.head"
    kept = {k: v for k, v in json.loads(head.read_text()).items() if k not in COUNTS}
    head.write_text(json.dumps(kept))
    if (receipts := folder / "ledger.receipt").exists():
        lists = json.loads(receipts.read_text())
        rows = {n: [{k: r[k] for k in r if k not in COUNTS} for r in lists[n]] for n in lists}
        receipts.write_text(json.dumps(rows))


def enter(ledger: Ledger, what: str, number: int) -> None:
    """Enter what follows from a person: a withdrawal, or the arrival of a patient."""
    key = b"person %d" % number
    if what == "withdraw":
        ledger.withdraw(key)
    else:
        ledger.declare("notes", None, f"sha256:{number}", [key], keys=[key])


def spent_after(folder: Path, what: str, lost: int, evidence: str) -> tuple[float, list[str]]:
    """Restore a ledger that lost two rounds, and `lost` entries that follow from people. Return the
    ε that counts, and the decisions that were kept."""
    ledger = Ledger(folder)
    ledger.declare("notes", [], "sha256:0", [b"ann", b"bob"], keys=[b"ann", b"bob"])
    coordinator = SigningKey()
    for round_ in (1, 2):
        run_round(ledger, round_)
    ledger.accept_receipt(receipt(coordinator, ledger.head_statement()), coordinator.public)
    copy = folder.with_name(f"{folder.name}-copy")
    ledger.backup(copy)
    early = shutil.copytree(folder, folder.with_name(f"{folder.name}-early"))
    for round_ in (3, 4):
        run_round(ledger, round_)
        for number in range(lost):
            enter(ledger, what, 10 * round_ + number)
    if "receipt" in evidence:
        late = receipt(coordinator, ledger.head_statement())
        shutil.rmtree(folder)
        shutil.copytree(early, folder)
        with pytest.raises(LedgerError, match="the coordinator holds a receipt"):
            Ledger(folder).accept_receipt(late, coordinator.public)
    elif "rows" in evidence:
        with closing(sqlite3.connect(folder / "ledger.db")) as database, database:
            database.execute("UPDATE entries SET body = '{}' WHERE seq = (SELECT MAX(seq) FROM "
                             "entries WHERE kind = 'reserve')")  # fmt: skip
    else:
        (folder / "ledger.db").unlink()
    if "old" in evidence:
        as_of_an_older_release(folder)
    if "log" in evidence:
        shutil.copy2(early / "steps.jsonl", folder)
    restored = Ledger.restore(folder, copy)
    assert covers(total(restored), {1.0: 16})
    ours = restored.spending("notes")
    return budget("notes", ours, PolicyTable(max_delta=1e-3)).epsilon, sorted(restored.withdrawn())


def spent_by_count(tmp_path: Path, what: str, evidence: str) -> set[float]:
    return {spent_after(tmp_path / f"{n}", what, n, evidence)[0] for n in (0, 1, 2)}


@pytest.mark.parametrize("what", ["withdraw", "arrive"])
@pytest.mark.parametrize(
    "evidence",
    ["anchor", "anchor, log rolled back", "receipt", "rows"],
)
def test_a_restore_charges_alike_however_many_withdrew_or_arrived(
    tmp_path: Path, what: str, evidence: str
) -> None:
    """A coordinator can read from refusals how much ε is left, and must not count people by it."""
    assert len(spent_by_count(tmp_path, what, evidence)) == 1


@pytest.mark.parametrize("evidence", ["anchor", "receipt"])
def test_a_restore_that_counts_entries_is_caught(
    tmp_path: Path, evidence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: each lost entry is priced as a round of four steps. Nothing is charged too little,
    and ε tells the number of withdrawals."""

    def price_entries(marks: list[Mark], covered: dict[Head, Paid], _: object) -> list[Charge]:
        most = max((mark.head.seq for mark in marks), default=0)
        return [restore_module._bound(Costliest(1.0, 0.1, 1), 4 * most)]

    monkeypatch.setattr(restore_module, "_price", price_entries)
    assert len(spent_by_count(tmp_path, "withdraw", evidence)) == 3


@pytest.mark.parametrize("evidence", ["old anchor", "old receipt"])
def test_what_does_not_say_what_was_charged_exhausts_the_ledger(
    tmp_path: Path, evidence: str
) -> None:
    """Anchor or receipt of an older release."""
    assert spent_by_count(tmp_path, "withdraw", evidence) == {math.inf}


def test_a_token_of_an_older_release_is_still_a_receipt(
    used: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no counts; the audit log's head is where it was."""
    coordinator, audit = SigningKey(), "41:" + "a" * 64

    def sealed(key: SigningKey, statement: dict[str, object], audit: str, membership: str) -> str:
        text = f"{statement['seq']:012d}{statement['hash']}{statement['signature']}{audit:>80}"
        nonce = bytes(12)
        return (
            nonce + AESGCM(key.derive("ledger token")).encrypt(nonce, text.encode(), None)
        ).hex()

    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "sealed_token", sealed)
        old = used.head_statement(audit)
    assert "steps" not in opened_token(used.key, old["token"])
    assert used.accept_receipt(receipt(coordinator, old), coordinator.public) == audit
    assert opened_token(used.key, used.head_statement()["token"])["steps"] == 20
    Ledger(used.folder).verify()


def test_an_anchor_of_an_older_release_gets_the_counts_when_it_is_opened(used: Ledger) -> None:
    as_of_an_older_release(used.folder)
    run = Ledger(used.folder)
    assert json.loads((used.folder / "ledger.head").read_text())["steps"] == 20
    run_round(run, 6)
    assert json.loads((used.folder / "ledger.head").read_text())["steps"] == 24


def test_counts_that_the_site_did_not_sign_are_none(used: Ledger, tmp_path: Path) -> None:
    """Else a flipped bit of the anchor hides rounds that were lost."""
    used.backup(tmp_path / "copy")
    early = (used.folder / "steps.jsonl").read_bytes()
    run_round(used, 6)
    head = used.folder / "ledger.head"
    head.write_text(head.read_text().replace('"steps":24', '"steps":20'))
    (used.folder / "ledger.db").unlink()
    (used.folder / "steps.jsonl").write_bytes(early)
    assert covers(total(Ledger.restore(used.folder, tmp_path / "copy")), {1.0: 24})


def test_what_an_earlier_restore_charged_is_charged_again_if_it_is_lost(
    used: Ledger, tmp_path: Path
) -> None:
    """The step log knows nothing of it: it was put back with the ledger."""
    used.backup(tmp_path / "copy")
    early = (used.folder / "steps.jsonl").read_bytes()
    for round_ in range(6, 9):
        run_round(used, round_)
    for _ in range(2):
        (used.folder / "ledger.db").unlink()
        (used.folder / "steps.jsonl").write_bytes(early)
        restored = Ledger.restore(used.folder, tmp_path / "copy")
        assert total(restored) == {1.0: 32}


@pytest.mark.parametrize(
    "lost", [["ledger.db"], ["ledger.db", "ledger.head"], ["ledger.db", "early"]]
)
@pytest.mark.parametrize("how", ["put back", "restored"])
def test_the_step_log_explains_only_what_it_shows(
    used: Ledger, tmp_path: Path, how: str, lost: list[str]
) -> None:
    """Rounds 6 and 7 are lost with the ledger and the step log, which then shows 8 and 9: rounds 8
    and 9 do not pay for what a receipt counts."""
    folder, coordinator = used.folder, SigningKey()
    used.accept_receipt(receipt(coordinator, used.head_statement()), coordinator.public)
    used.backup(tmp_path / "copy")
    early = shutil.copytree(folder, tmp_path / "early")
    for round_ in (6, 7):
        run_round(used, round_)
    late = receipt(coordinator, used.head_statement())
    if how == "put back":
        shutil.rmtree(folder)
        shutil.copytree(early, folder)
        back = Ledger(folder)
    else:
        used.accept_receipt(late, coordinator.public)
        (folder / "ledger.db").unlink()
        shutil.copy2(early / "steps.jsonl", folder)
        back = Ledger.restore(folder, tmp_path / "copy")
    for round_ in (8, 9):
        run_round(back, round_)
    if how == "put back":
        with pytest.raises(LedgerError, match="the coordinator holds a receipt"):
            back.accept_receipt(late, coordinator.public)
    for name in lost:
        if name == "early":  # the anchor is an earlier copy of itself
            shutil.copy2(early / "ledger.head", folder)
        else:
            (folder / name).unlink()
    restored = total(Ledger.restore(folder, tmp_path / "copy"))
    assert covers(restored, {1.0: 36})
    if lost == ["ledger.db"]:
        # The receipt's rounds are charged once more if the entry of an earlier restore, which knew
        # that it had charged for them, is lost as well.
        assert restored == {1.0: 36 if how == "put back" else 44}


@pytest.mark.parametrize("kind", ["a round", "an exhausted restore", "an adopted charge"])
def test_a_lost_charge_without_noise_is_no_round_with_noise(
    used: Ledger, tmp_path: Path, kind: str
) -> None:
    """σ = 0 has no ε, and so has what replaces it."""
    used.backup(tmp_path / "copy")
    early = (used.folder / "steps.jsonl").read_bytes()
    bare = replace(charge(6), noise_multiplier=0.0)
    if kind == "a round":
        used.reserve("notes", bare, "adapter 6", yes)
    elif kind == "an adopted charge":
        adopted = replace(restore_module.EXHAUSTED, membership="m", adopted=True)
        used.enter_earlier("m", [Earlier(EVERY, adopted, "")], {}, [], "an officer")
    else:
        for name in ("ledger.db", "steps.jsonl"):
            (used.folder / name).unlink()
        run = Ledger.restore(used.folder, tmp_path / "copy")
        assert 0.0 not in total(run)  # nothing was lost: the anchor says so
        for name in ("ledger.db", "ledger.head"):
            (used.folder / name).unlink()
        assert 0.0 in total(Ledger.restore(used.folder, tmp_path / "copy"))
    (used.folder / "ledger.db").unlink()
    (used.folder / "steps.jsonl").write_bytes(early)
    assert 0.0 in total(Ledger.restore(used.folder, tmp_path / "copy"))


def put_back(folder: Path, tmp_path: Path, more: int) -> dict[float, float]:
    """Put a folder back to an earlier copy of itself, from which it goes on for `more` rounds.
    Between the two it paid for three rounds, a person withdrew, and it was backed up. Return what
    was paid in all."""
    ledger = Ledger(folder)
    ledger.declare("notes", [], "sha256:0", [b"ann"])
    run_round(ledger, 1)
    early = shutil.copytree(folder, tmp_path / "early")
    for round_ in (2, 3, 4):
        run_round(ledger, round_, done=charge(round_, sigma=0.5))
    enter(ledger, "withdraw", 1)
    ledger.backup(tmp_path / "copy")
    shutil.rmtree(folder)
    shutil.copytree(early, folder)
    for round_ in range(more):
        run_round(Ledger(folder), round_, done=charge(round_, study="sha256:" + "77" * 32))
    return {1.0: 4 * (1 + more), 0.5: 12}


@pytest.mark.parametrize("more", [2, 6])
def test_what_only_the_copy_has_is_charged_and_decided(
    folder: Path, tmp_path: Path, more: int
) -> None:
    """The folder went on from an earlier copy of itself, and has fewer entries than the backup, or
    more. A second restore charges nothing again."""
    paid = put_back(folder, tmp_path, more)
    restored = Ledger.restore(folder, tmp_path / "copy")
    assert covers(total(restored), paid)
    if more == 6:  # the longer chain: what each of the two has is known
        assert total(restored) == paid
    assert restored.withdrawn()
    before = total(restored)
    assert total(Ledger.restore(folder, tmp_path / "copy")) == before


def run_branch(folder: Path, rounds: int, sigma: float) -> tuple[dict[str, Any], SigningKey]:
    """Run a coordinator's study of `rounds` rounds. Return the coordinator's receipt for the newest
    answer, which the site has not seen yet, and the coordinator."""
    coordinator, ledger = SigningKey(), Ledger(folder)
    for number in range(rounds):
        study = "sha256:" + coordinator.public
        run_round(ledger, number, done=charge(number, sigma=sigma, study=study))
    newest = receipt(coordinator, ledger.head_statement(coordinator=coordinator.public))
    return newest, coordinator


@pytest.mark.parametrize("lost", ["database", "database and step log", "newest entries", "nothing"])
def test_a_receipt_of_a_lost_branch_is_not_taken_for_a_charge_of_its_number(
    folder: Path, tmp_path: Path, lost: str
) -> None:
    """A study ran, the folder was put back to before it, and another study went on from there. Then
    the ledger was restored for another reason, or for the other coordinator's receipt. That charges
    for lost entries with the numbers of the first study's, which it knows nothing of."""
    ledger = Ledger(folder)
    ledger.declare("notes", [], "sha256:0", [b"ann"])
    run_round(ledger, 1)
    early = shutil.copytree(folder, tmp_path / "early")
    first, its_coordinator = run_branch(folder, rounds=3, sigma=0.5)
    shutil.rmtree(folder)
    shutil.copytree(early, folder)
    second, other_coordinator = run_branch(folder, rounds=5, sigma=1.0)
    if "database" in lost:
        (folder / "ledger.db").unlink()
        if "log" in lost:
            shutil.copy2(early / "steps.jsonl", folder)
    elif lost == "newest entries":
        shutil.copy2(early / "ledger.db", folder)
    else:
        shutil.rmtree(folder)
        shutil.copytree(early, folder)
        with pytest.raises(LedgerError, match="the coordinator holds a receipt"):
            Ledger(folder).accept_receipt(second, other_coordinator.public)
    restored = Ledger.restore(folder, early)
    assert covers(total(restored), {1.0: 24})
    restored.accept_receipt(second, other_coordinator.public)  # though the site never stored it
    with pytest.raises(LedgerError, match="the coordinator holds a receipt"):
        restored.accept_receipt(first, its_coordinator.public)
    again = Ledger.restore(folder, early)
    assert covers(total(again), {1.0: 24, 0.5: 12})
    again.accept_receipt(first, its_coordinator.public)
    run_round(again, 9)


def test_what_one_membership_was_sent_says_nothing_of_anothers_branch(
    folder: Path, tmp_path: Path
) -> None:
    """One coordinator admitted two memberships. The receipt of the second, of the branch that is
    there, does not show where the branch of the first one's receipt split off."""
    ledger, coordinator = Ledger(folder), SigningKey()
    ledger.declare("notes", [], "sha256:0", [b"ann"])
    run_round(ledger, 1)
    early = shutil.copytree(folder, tmp_path / "early")

    def run_for(name: str, rounds: int) -> dict[str, Any]:
        for number in range(rounds):
            done = charge(number, study="sha256:" + name)
            run_round(Ledger(folder), number, done=done)
        return receipt(coordinator, Ledger(folder).head_statement("", name, coordinator.public))

    first = run_for("north", 5)
    shutil.rmtree(folder)
    shutil.copytree(early, folder)
    second = run_for("south", 4)
    names = ("north", "south")
    Ledger(folder).accept_receipt(second, coordinator.public, names)
    run_for("south", 3)
    with pytest.raises(LedgerError, match="the coordinator holds a receipt"):
        Ledger(folder).accept_receipt(first, coordinator.public, names)
    assert covers(total(Ledger.restore(folder)), {1.0: 4 * (1 + 5 + 4 + 3)})


def test_lost_rounds_cost_what_anchor_or_receipt_says_they_cost_at_most(
    folder: Path, tmp_path: Path
) -> None:
    """Ledger and step log were put back together: nothing else says that the rounds had less noise
    than any that is left, a larger sampling rate, and more records of a patient."""
    ledger = Ledger(folder)
    ledger.declare("notes", [], "sha256:0", [b"ann"])
    run_round(ledger, 1)
    early = shutil.copytree(folder, tmp_path / "early")
    costly = replace(charge(2, sigma=0.5), sampling_rate=0.4, records=3)
    run_round(ledger, 2, done=costly)
    run_round(ledger, 3)
    for name in ("ledger.db", "steps.jsonl"):
        shutil.copy2(early / name, folder)
    *_, lost = Ledger.restore(folder).charges("notes")
    assert (lost.steps, lost.noise_multiplier) == (8, 0.5)
    assert (lost.sampling_rate, lost.records) == (0.4, 3)


def test_the_anchor_holds_the_last_two_heads_that_each_coordinator_was_sent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest may never have come there: the coordinator then sends the receipt before it. A
    membership's last two do not displace those of another one, and stay however many entries
    follow."""
    monkeypatch.setattr(files, "CHARGED", 1)
    monkeypatch.setattr(files, "FURTHER", 0)
    ledger, sent = Ledger(folder), list[dict[str, Any]]()
    ledger.declare("notes", [], "sha256:0", [b"ann"])
    coordinators = [SigningKey(), SigningKey()]
    for round_ in range(3):
        run_round(ledger, round_)
        for key in coordinators:
            for name in ("north", "south"):
                statement = ledger.head_statement(membership=name, coordinator=key.public)
                sent += [receipt(key, statement)] * (round_ > 0)
        enter(ledger, "withdraw", round_)
    (folder / "ledger.db").unlink()
    restored, taken = Ledger.restore(folder), 0
    for one in sent:
        with suppress(LedgerError):
            restored.accept_receipt(one, one["coordinator"], ("north", "south"))
            taken += 1
    assert taken == 8  # of each of two coordinators and two memberships the last two


class Site:
    """A ledger to which anything happens in turn, with a backup and a copy of its step log. If
    `damaged`, its database is never lost, but one of its first rows is. If not, the anchor may be
    of an older release, which does not say what the costliest round cost; then the first one is."""

    def __init__(self, folder: Path, chance: random.Random, damaged: bool) -> None:
        self.folder, self.chance, self.count = folder, chance, 0
        self.damaged, self.is_older = damaged, chance.random() < 0.4
        self.ledger = Ledger(folder)
        self.ledger.declare("notes", [], "sha256:0", [b"ann"], keys=[b"ann"])
        run_round(self.ledger, 1)
        self.back_up()

    def back_up(self) -> None:
        self.copy = self.folder.with_name(f"{self.folder.name}-copy-{self.count}")
        self.ledger.backup(self.copy)
        self.log = (self.folder / "steps.jsonl").read_bytes()

    def act(self) -> None:
        self.count += 1
        sigmas = [1.0, 2.0] if self.is_older and not self.damaged else [0.5, 1.0, 2.0]
        sigma, steps = self.chance.choice(sigmas), self.chance.choice([1, 3, 4])
        one = charge(self.count + 1, sigma=sigma, steps=steps)
        match self.chance.choice(
            ["round", "round", "crash", "leave", "arrive", "adopt", "back up"]
        ):
            case "round":
                run_round(self.ledger, self.count + 1, done=one)
            case "crash":
                self.ledger.reserve("notes", one, f"adapter {self.count}", yes)
            case "leave":
                enter(self.ledger, "withdraw", self.count)
            case "arrive":
                enter(self.ledger, "arrive", self.count)
            case "adopt":
                name = f"m{self.count}"
                many = replace(one, study="restore", name="lost", steps=9)
                theirs = [replace(c, membership=name, adopted=True) for c in (one, many)]
                earlier = [Earlier("notes", theirs[0], f"a@{name}"), Earlier(EVERY, theirs[1], "")]
                self.ledger.enter_earlier(name, earlier, {b"left": Gone(1)}, [], "an officer")
            case "back up":
                self.back_up()

    def loses(self) -> bool:
        """Lose the database, perhaps the newest lines of the step log, and perhaps the anchor's
        counts. Return whether the restored ledger charges all that was charged before."""
        before = total(self.ledger)
        if self.damaged:
            with closing(sqlite3.connect(self.folder / "ledger.db")) as database, database:
                database.execute("UPDATE entries SET hash = '' WHERE seq = 1")
        else:
            (self.folder / "ledger.db").unlink()
        if self.chance.random() < 0.6:
            (self.folder / "steps.jsonl").write_bytes(self.log)
        if self.is_older and self.chance.random() < 0.5:
            as_of_an_older_release(self.folder)
        self.ledger = Ledger.restore(self.folder, self.copy)
        return covers(total(self.ledger), before)


def are_covered(tmp_path: Path, sites: int, damaged: bool = False) -> list[bool]:
    covered = []
    for seed in range(sites):
        chance = random.Random(seed)
        site = Site(tmp_path / f"site-{seed}", chance, damaged)
        for _ in range(3):
            for _ in range(chance.randrange(6)):
                site.act()
            covered.append(site.loses())
        site.ledger.verify()
    return covered


@pytest.mark.parametrize("database", ["lost", "damaged"])
def test_whatever_happens_a_restore_charges_no_less_than_was_charged(
    tmp_path: Path, database: str
) -> None:
    assert all(are_covered(tmp_path, sites=16, damaged=database == "damaged"))


def test_a_restore_that_goes_by_the_step_log_alone_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: where the step log was rolled back as well, rounds are missing."""
    monkeypatch.setattr(restore_module, "_price", lambda *_: [])
    assert not all(are_covered(tmp_path, sites=4))


def test_a_row_that_can_be_read_says_nothing_of_the_one_before_it(
    folder: Path, tmp_path: Path
) -> None:
    """A round's row and its line in the step log are lost, and the anchor is an earlier one. The
    rows after it are charged; a receipt for the last of them shows that one is missing."""
    ledger, coordinator = Ledger(folder), SigningKey()
    ledger.declare("notes", [], "sha256:0", [b"ann"])
    run_round(ledger, 1)
    ledger.backup(tmp_path / "copy")
    early = {name: (folder / name).read_bytes() for name in ("ledger.head", "steps.jsonl")}
    for round_ in (2, 3, 4):
        run_round(ledger, round_)
    late = receipt(coordinator, ledger.head_statement())
    with closing(sqlite3.connect(folder / "ledger.db")) as database, database:
        of_round_3 = "json_extract(body, '$.charge.round') = 3"
        database.execute(f"DELETE FROM entries WHERE kind = 'reserve' AND {of_round_3}")
    for name, content in early.items():
        (folder / name).write_bytes(content)
    restored = Ledger.restore(folder, tmp_path / "copy")
    assert total(restored) == {1.0: 12}
    with pytest.raises(LedgerError, match="the coordinator holds a receipt"):
        restored.accept_receipt(late, coordinator.public)
    again = Ledger.restore(folder, tmp_path / "copy")
    assert covers(total(again), {1.0: 16})
    again.accept_receipt(late, coordinator.public)


@pytest.mark.parametrize("lost", [False, True])
def test_a_line_of_an_older_release_is_charged_if_its_round_is_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """It does not name the ledger's entry. A second restore charges nothing again."""
    monkeypatch.setattr(Ledger, "hash_of", lambda ledger, number: "")
    ledger = Ledger(folder)
    ledger.declare("notes", [], "sha256:0", [b"ann"])
    run_round(ledger, 1)
    early = {name: (folder / name).read_bytes() for name in ("ledger.db", "ledger.head")}
    run_round(ledger, 2)
    if lost:
        for name, content in early.items():
            (folder / name).write_bytes(content)
    for _ in range(2):
        assert total(Ledger.restore(folder)) == {1.0: 8}


def test_lines_that_name_one_charge_count_at_their_costliest(folder: Path) -> None:
    """However their steps differ."""
    ledger = Ledger(folder)
    ledger.declare("notes", [], "sha256:0", [b"ann"])
    log = StepLog(folder / "steps.jsonl")
    log.begin_round("ab" * 32)
    for sigma in (0.5, 1.0):
        log.append(Step(STUDY, 1, sigma, 0.1, 1.0, "record", 1))
    assert total(Ledger.restore(folder)) == {0.5: 2}


def branch_out(folder: Path, chance: random.Random) -> bool:
    """Put a folder back to earlier copies of itself again and again, each time going on from there
    for several coordinators. Then each of them sends what receipts it has, in any order, and the
    ledger is restored whenever it lacks an entry. Return whether all that was spent is charged, and
    what two lost branches have in common at most twice."""
    Ledger(folder).declare("notes", [], "sha256:0", [b"ann"])
    copies = [shutil.copytree(folder, folder.with_name(f"{folder.name}-0"))]
    spent, sent = dict[float, float](), list[dict[str, Any]]()
    coordinators = [SigningKey() for _ in range(3)]
    for number in range(1, 16):
        match chance.choice(["round", "round", "round", "leave", "copy", "put back"]):
            case "round":
                sigma, steps = chance.choice([0.5, 1.0, 2.0]), chance.choice([1, 3, 4])
                run_round(Ledger(folder), number, done=charge(number, sigma=sigma, steps=steps))
                spent[sigma] = spent.get(sigma, 0) + steps
                key = chance.choice(coordinators)
                sent.append(receipt(key, Ledger(folder).head_statement(coordinator=key.public)))
            case "leave":
                enter(Ledger(folder), "withdraw", number)
            case "copy":
                copies.append(shutil.copytree(folder, folder.with_name(f"{folder.name}-{number}")))
            case "put back":
                shutil.rmtree(folder)
                shutil.copytree(chance.choice(copies), folder)
    chance.shuffle(sent)
    for one in sent:
        try:
            Ledger(folder).accept_receipt(one, one["coordinator"])
        except LedgerError:
            Ledger.restore(folder).accept_receipt(one, one["coordinator"])
    found = total(Ledger(folder))

    return covers(found, spent)


def test_of_any_branches_each_charge_counts(tmp_path: Path) -> None:
    """However often a folder was put back, and in whatever order receipts come."""
    folders = (tmp_path / f"site-{seed}" / "state" for seed in range(20))
    assert all(branch_out(folder, random.Random(folder.parent.name)) for folder in folders)


def test_a_restore_that_tells_branches_apart_by_numbers_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: an entry counts as covered if an entry of its number is."""
    price = restore_module._price

    def price_by_number(
        marks: list[Mark], covered: dict[Head, Paid], entered: dict[str, Paid]
    ) -> list[Charge]:
        paid = {head.seq: paid for head, paid in covered.items()}
        named = {head for mark in marks for head in mark.charged if head.seq in paid}
        return price(marks, {head: paid[head.seq] for head in named} | covered, entered)

    monkeypatch.setattr(restore_module, "_price", price_by_number)
    folders = (tmp_path / f"site-{seed}" / "state" for seed in range(20))
    assert not all(branch_out(folder, random.Random(folder.parent.name)) for folder in folders)


def test_like_charges_of_two_branches_have_two_hashes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder was put back within the second in which a round was charged, and runs it again."""
    monkeypatch.setattr("fedtune.core.ledger.chain.time.time", lambda: 1e9)
    Ledger(folder).declare("notes", [], "sha256:0", [b"ann"])
    heads = set()
    for place in (folder, shutil.copytree(folder, folder.with_name("copy"))):
        Ledger(place).reserve("notes", charge(), "adapter", yes)
        heads.add(Ledger(place).head)
    assert len({head.seq for head in heads}) == 1 < len(heads)


@pytest.mark.parametrize("first", ["newest", "oldest"])
def test_older_receipts_of_a_lost_branch_are_charged_once(folder: Path, first: str) -> None:
    """A coordinator that kept every receipt of a branch, and sends one after the other, cannot make
    the site pay for the branch again."""
    Ledger(folder).declare("notes", [], "sha256:0", [b"ann"])
    run_round(Ledger(folder), 1)
    early = shutil.copytree(folder, folder.with_name("early"))
    coordinator, kept, restores = SigningKey(), list[dict[str, Any]](), 0
    for round_ in range(2, 9):
        run_round(Ledger(folder), round_)
        kept.append(receipt(coordinator, Ledger(folder).head_statement()))
        if round_ == 5:
            enter(Ledger(folder), "withdraw", 1)
    shutil.rmtree(folder)
    shutil.copytree(early, folder)
    for one in kept if first == "oldest" else reversed(kept):
        try:
            Ledger(folder).accept_receipt(one, coordinator.public)
        except LedgerError:
            Ledger.restore(folder).accept_receipt(one, coordinator.public)
            restores += 1
    assert total(Ledger(folder)) == {1.0: 32}
    assert restores == (1 if first == "newest" else 7)
