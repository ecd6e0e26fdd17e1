"""Answers that wait at a site until a person there lets them go."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import load_site, load_study
from fedtune.core.errors import InputError
from fedtune.core.ledger.chain import Transaction
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry import process_cache
from fedtune.core.vault import airlock
from fedtune.core.vault.policy import refusals
from fedtune.core.vault.prepared import Held
from fedtune.core.vault.waiting_plans import keep_plan
from fedtune.core.vault.worker import SiteWorker, worker
from fedtune.officer.let_go import ANSWER, decide, list_waiting
from fedtune.officer.review import review
from fedtune.public.start import Start, start
from tests.cli_kit import run as command
from tests.client.airlock_kit import Asked, a_site, contents
from tests.client.site_kit import begun, make_site, notes
from tests.depth import long_but
from tests.forks import Fork
from tests.private_evaluation_kit import WILLING, world

pytestmark = pytest.mark.usefixtures("without_self_test")

WAITS = 'policy.answers = "held"'


def name_of(asked: Asked) -> str:
    (one,) = list_waiting(asked.site)
    return one.name


def test_an_answer_waits_until_a_person_lets_it_go(tmp_path: Path, tiny_base: Path) -> None:
    """Twin: under "immediate" the same order is answered at once."""
    asked = a_site(tmp_path, tiny_base)
    for _ in range(2):
        reply = asked.train()
        assert reply.status == "waiting" and WAITS in str(reply.fields["reason"])
        assert contents(reply) == b"" and reply.fields["header"] == reply.fields["signature"] == ""
        assert reply.fields["events"] == "[]"
    assert asked.paid() == len(asked.worker.log.steps()) == 1
    assert [one.round for one in decide(asked.site, [name_of(asked)], refuse=False)] == [1]
    sent = asked.train()
    assert sent.status == "trained" and contents(sent)
    assert asked.paid() == 1 and list_waiting(asked.site) == []
    other = a_site(tmp_path / "twin", tiny_base, "immediate")
    assert other.train().status == "trained" and list_waiting(other.site) == []


def test_what_waits_is_kept_over_a_restart_and_sent_as_it_was(
    tmp_path: Path, tiny_base: Path
) -> None:
    asked = a_site(tmp_path, tiny_base)
    asked.train()
    (kept,) = (asked.site.site.state / "outbox").iterdir()
    before = kept.read_bytes()
    assert kept.stat().st_mode & 0o777 == 0o600
    asked.restart()
    assert asked.train().status == "unprepared"  # as after any restart
    asked.prepare()
    assert asked.train().status == "waiting" and kept.read_bytes() == before
    decide(asked.site, [], refuse=False, every=True)
    first = contents(asked.train())
    asked.restart()
    asked.prepare()
    assert contents(asked.train()) == first and asked.paid() == 1


def test_a_refused_answer_stays_paid_and_is_never_made_again(
    tmp_path: Path, tiny_base: Path
) -> None:
    asked = a_site(tmp_path, tiny_base)
    asked.train()
    name = name_of(asked)
    decide(asked.site, [name], refuse=True)
    for answers in ("held", "immediate"):
        asked.set_policy(answers)
        asked.restart()
        asked.prepare()
        reply = asked.train()
        assert reply.status == "void" and "refused to let this answer go" in reply.fields["reason"]
        assert contents(reply) == b""
    assert asked.paid() == len(asked.worker.log.steps()) == 1
    assert list((asked.site.site.state / "outbox").iterdir()) == []
    with pytest.raises(InputError, match="nothing waits here under"):
        decide(asked.site, [name], refuse=False)
    ledger, slot = asked.worker.ledger, asked.worker.ledger.spending("records")[0]
    with pytest.raises(InputError, match="was refused"):
        ledger.let_go((slot.charge.study, 1, slot.adapter), "somebody")
    asked.set_policy("held")
    assert asked.train(2).status == "waiting"  # the next round is another answer


def test_what_was_let_go_is_not_refused_afterwards(tmp_path: Path, tiny_base: Path) -> None:
    asked = a_site(tmp_path, tiny_base)
    asked.train()
    decide(asked.site, [], refuse=False, every=True)
    spent = asked.worker.ledger.spending("records")[0]
    with pytest.raises(InputError, match="may have been sent"):
        asked.worker.ledger.refuse((spent.charge.study, 1, spent.adapter), "somebody")


def test_other_bytes_of_the_same_round_wait_anew(tmp_path: Path, tiny_base: Path) -> None:
    """What was let go is gone, and the round is trained and paid for again: nobody saw that one."""
    asked = a_site(tmp_path, tiny_base)
    asked.train()
    decide(asked.site, [], refuse=False, every=True)
    for path in (asked.site.site.state / "outbox").iterdir():
        path.unlink()
    assert asked.train().status == "waiting" and asked.paid() == 2
    decide(asked.site, [], refuse=False, every=True)
    assert asked.train().status == "trained"


def test_a_policy_that_changes_lets_nothing_go(tmp_path: Path, tiny_base: Path) -> None:
    asked = a_site(tmp_path, tiny_base)
    asked.train()
    asked.set_policy("immediate")
    assert asked.train().status == "waiting"
    assert asked.train(2).status == "trained"
    asked.set_policy("held")
    assert asked.train(2).status == "trained"  # it had left already
    assert asked.train(3).status == "waiting"


def test_who_simulates_a_study_runs_its_sites_and_nothing_waits(
    tmp_path: Path, tiny_base: Path
) -> None:
    notes(tmp_path)
    site = SiteWorker(make_site(tmp_path, {"answers": "held"}, patient="who"))
    made, site.simulated = begun(tiny_base), True
    assert site.prepare(made.study, made.frozen).admitted
    assert site.train(made.study.digest, 1, made.adapter).delta


def test_an_update_without_noise_is_never_kept_and_so_refused(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Before anything is read. Twin: where nothing waits it is admitted."""
    notes(tmp_path)
    study = begun(tiny_base, privacy="off", clipping=None).study

    def said(answers: str) -> list[str]:
        rules = {"allow_privacy_off": True, "answers": answers}
        site = make_site(tmp_path, rules, patient="who")
        return [str(refused) for refused in refusals(study, site, None)]

    assert [why for why in said("held") if why not in said("immediate")] == [
        'policy.answers = "held", and an update without noise is never kept, so it cannot wait'
    ]


def test_an_answer_about_held_out_records_waits_too(tmp_path: Path, tiny_base: Path) -> None:
    policy = WILLING + 'answers = "held"\n'
    study = load_study(world(tmp_path, tiny_base, 3.0, policy=policy))
    path = tmp_path / "site-north.toml"
    process_cache.clear("workers")
    site, made = worker(str(path)), start(study)
    assert site.prepare(made.study, made.frozen).admitted
    for _ in range(2):
        with pytest.raises(Held):
            site.evaluate(made.study.digest, 2, made.adapter)
    (shown,) = decide(load_site(path), [], refuse=False, every=True)
    assert shown.study.endswith("(evaluation)")
    assert site.evaluate(made.study.digest, 2, made.adapter).delta
    assert len(site.ledger.spending()) == 1


# ------------------------------------------------------------------------------- what is entered


def test_both_acts_are_entered_in_the_audit_log_and_in_the_ledger(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = a_site(tmp_path, tiny_base)
    for _ in range(2):
        asked.train()
    (first,) = list_waiting(asked.site)
    decide(asked.site, [first.name], refuse=False)
    asked.train()
    asked.train(2)
    (second,) = list_waiting(asked.site)
    decide(asked.site, [second.name], refuse=True)
    assert asked.events()[1:] == [
        ("wait", "policy.answers"),
        ("let-go", "by name"),
        ("release", "standing"),
        ("wait", "policy.answers"),  # of the second round
        ("refuse", "--refuse"),
    ]
    ledger = Ledger(asked.site.site.state)
    ledger.verify()
    spent = {s.charge.round: (s.charge.study, s.charge.round, s.adapter) for s in ledger.spending()}
    assert ledger.is_let_go(spent[1]) and not ledger.is_refused(spent[1])
    assert ledger.is_refused(spent[2]) and not ledger.is_let_go(spent[2])

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    asked.train(3)
    monkeypatch.setattr("fedtune.core.ledger.audit_log._append", full)
    with pytest.raises(Exception, match="cannot be written"):  # and so it is not done
        decide(asked.site, [], refuse=False, every=True)
    monkeypatch.undo()
    assert [one.round for one in list_waiting(asked.site)] == [3]


def test_a_person_is_shown_the_plan_a_length_and_a_cost_and_no_content(
    tmp_path: Path, tiny_base: Path
) -> None:
    """The list is the same whatever the records say. Twin: another plan's is not."""
    asked = a_site(tmp_path, tiny_base)
    asked.train()
    (shown,) = list_waiting(asked.site)
    assert (shown.kind, shown.round) == (ANSWER, 1)
    assert shown.plan == asked.made.study.digest and shown.study == asked.made.study.study.name
    (kept,) = (asked.site.site.state / "outbox").iterdir()
    assert shown.size == kept.stat().st_size and 0 < float(shown.epsilon) < 8
    other = tmp_path / "other"
    others = a_site(other, tiny_base)
    (other / "notes.jsonl").write_text(
        json.dumps({"who": "p", "note": "x" * 300, "answer": "y"}) + "\n"
    )
    others.train()
    (theirs,) = list_waiting(others.site)
    facts = ("name", "kind", "study", "plan", "round", "size", "epsilon", "fallback")
    assert [getattr(shown, fact) for fact in facts] == [getattr(theirs, fact) for fact in facts]
    changed = a_site(tmp_path / "third", tiny_base, privacy={
        "epsilon": 3.0, "delta": 1e-4, "unit": "patient",
    })  # fmt: skip
    changed.train()
    assert list_waiting(changed.site)[0].epsilon != shown.epsilon


# -------------------------------------------------------------------------------- the commands


def test_the_command_lists_lets_go_and_refuses(tmp_path: Path, tiny_base: Path) -> None:
    asked = a_site(tmp_path, tiny_base)
    none = command("let-go", asked.path)
    assert none.exit_code == 0 and "nothing waits" in none.output
    asked.train(1)
    listed = json.loads(command("let-go", asked.path, "--json").stdout)["waiting"]
    assert [one["round"] for one in listed] == [1]
    table = command("let-go", asked.path).output
    assert listed[0]["name"] in table and "paid" in table
    for wrong in (["--refuse"], ["--all", listed[0]["name"]], ["0" * 12]):
        done = command("let-go", asked.path, *wrong)
        assert done.exit_code == 2 and len(list_waiting(asked.site)) == 1, done.output
    done = command("let-go", asked.path, listed[0]["name"])
    assert done.exit_code == 0 and "round 1: goes when" in done.output
    assert asked.train(1).status == "trained"
    asked.train(2)
    done = command("let-go", asked.path, "--all", "--refuse", "--json")
    assert [one["round"] for one in json.loads(done.stdout)["refused"]] == [2]
    assert asked.train(2).status == "void"


def test_an_answer_waits_until_a_later_round_is_ordered(tmp_path: Path, tiny_base: Path) -> None:
    """A coordinator that goes on takes no answer of an earlier round any more."""
    asked = a_site(tmp_path, tiny_base)
    for round_ in (1, 2):
        asked.train(round_)
        assert [one.round for one in list_waiting(asked.site)] == [round_]


def test_review_and_doctor_say_that_answers_wait(tmp_path: Path, tiny_base: Path) -> None:
    """Twin: under "immediate" neither does."""
    asked = a_site(tmp_path, tiny_base)
    asked.train()
    site, ledger = asked.site, Ledger(asked.site.site.state)
    leaves = dict(review(asked.made.study, site, ledger).sections)["What would leave this site"]
    assert any("before a person here has let it go" in line for line in leaves)
    examined = command("doctor", asked.path).output
    assert "held answers" in examined and "1 wait" in " ".join(examined.split())
    asked.set_policy("immediate")
    leaves = dict(review(asked.made.study, asked.site, ledger).sections)[
        "What would leave this site"
    ]
    assert not any("let it go" in line for line in leaves)
    assert "held answers" not in command("doctor", asked.path).output
    assert keep_plan(asked.site, asked.made.study).exists()


# ------------------------------------------------------------------------- a process that is killed


def ends_at(where: str, path: Path, made: Start) -> None:
    """Train a round in a process that ends by itself at one of POINTS."""
    asked = Asked(path, made)
    assert asked.prepare().status == "admitted"

    def die(*_: object, **__: object) -> None:
        os._exit(9)

    enter = Transaction.append

    def append(self: Transaction, kind: str, body: Any, seq: int | None = None) -> Any:
        return die() if kind == "hold" else enter(self, kind, body, seq)

    with pytest.MonkeyPatch.context() as patch:
        if where == "computed":  # after the charge
            patch.setattr(SiteWorker, "events", die)
        elif where == "held":  # in the transaction that enters the release
            patch.setattr(Transaction, "append", append)
        elif where == "told":  # it is held, and the courier was told nothing
            patch.setattr(airlock, "check_let_go", die)
        elif where == "sealed":  # it was let go, and the courier has nothing
            patch.setattr(SiteWorker, "sealed", die)
        asked.train()
    raise SystemExit("it went on")


POINTS = [("computed", 2), ("held", 2), ("told", 1), ("sealed", 1)]


@pytest.mark.parametrize(("where", "paid"), long_but([("held", 2), ("sealed", 1)], POINTS))
def test_a_process_that_is_killed_at_any_point_sends_nothing_early_and_nothing_twice(
    tmp_path: Path, tiny_base: Path, where: str, paid: int
) -> None:
    """Where the answer was not kept yet, its round is paid for again and waits; where it was, the
    same bytes go, once they are let go."""
    asked = a_site(tmp_path, tiny_base)
    outbox, kept = asked.site.site.state / "outbox", b""
    if where == "sealed":
        asked.train()
        decide(asked.site, [], refuse=False, every=True)
        (file,) = outbox.iterdir()
        kept = file.read_bytes()
    assert Fork(lambda: ends_at(where, asked.path, asked.made)).wait() == 9
    asked.restart()
    asked.prepare()
    assert asked.paid() == 1
    if where == "sealed":
        assert file.read_bytes() == kept
    else:
        assert asked.train().status == "waiting" and len(list_waiting(asked.site)) == 1
        decide(asked.site, [], refuse=False, every=True)
    sent = contents(asked.train())
    assert sent == contents(asked.train()) and asked.paid() == paid
