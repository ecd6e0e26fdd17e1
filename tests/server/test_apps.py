"""The two thin apps, and who is admitted: malformed, hostile and honest answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

import fedtune.core.vault.answers
import fedtune.launch.in_one_process
from fedtune.core.errors import BudgetExceeded, ConfigError, ModelError, Refused
from fedtune.core.vault.prepared import Unprepared
from fedtune.core.wire import seal
from fedtune.core.wire.arrays import bodies
from fedtune.core.wire.codec import VALUES, encode
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.protocol import version_fields
from fedtune.core.wire.requests import FAILED
from fedtune.flower.enrol import Member
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.records import to_record
from fedtune.launch.in_one_process import place_of
from fedtune.server import app as server_app
from fedtune.server.admission import Roster, outcome, plan_message
from fedtune.server.exchange import Reply
from tests.server.fakes import FakeSite, make_parts, make_study, zeros

STUDY = make_study()


def query(kind: str, content: RecordDict) -> RecordDict:
    grid = InProcessGrid([Path("a")], fedtune.launch.in_one_process.app)
    (reply,) = grid.send_and_receive([grid.create_message(content, kind, 2, "1")])
    return reply.content


KEY = SigningKey()  # the coordinator's
WANTED = seal.Header(STUDY.digest, 1, "", "a", KEY.public, "n", "", {})
SAID = {"name": "a", "status": "trained", "events": "[]"}


def order(round_: int = 1, key: SigningKey = KEY) -> RecordDict:
    adapter = to_record(encode(zeros(), "float32"))
    beside = seal.digest_beside(bodies(adapter))
    record = ConfigRecord(seal.order(key, STUDY.digest, round_, "n", "", beside=beside))
    return RecordDict({"order": record, "adapter": adapter})


def known(**options: Any) -> FakeSite:
    return FakeSite("a", known=True, coordinator=KEY.public, **options)


# ------------------------------------------------------------------------------------ ClientApp


def test_prepare_gives_name_and_declared_size_and_nothing_else(trial):
    site = FakeSite("a", size=42)
    trial(site)
    reply = query("query.prepare", plan_message(STUDY, {}, SigningKey()))
    assert dict(reply["admission"]) == {
        "admitted": True, "reason": "", "status": "admitted", "name": "a", "declared_size": 42,
        "key": site.key.public, **version_fields(),
    }  # fmt: skip
    assert list(reply) == ["admission"]


def test_train_gives_update_status_and_step_log_and_nothing_else(trial):
    trial(known())
    reply = query("train", order())
    assert set(reply) == {"update", "site"}
    fields = {"name", "status", "reason", "events", "header", "signature"}
    assert set(reply["site"]) == fields
    assert json.loads(reply["site"]["events"])[0]["steps"] == 1


def test_an_order_holds_for_what_its_coordinator_sent_with_it(trial):
    """Whoever holds the half on the network has no round trained from an adapter of its own, nor
    with another table. Twin: what the coordinator sent."""
    trial(known())
    sent = order()
    other = to_record(encode({name: a + 1 for name, a in zeros().items()}, "float32"))
    for beside in ({"adapter": other}, {"set": ConfigRecord({"asked": "[]"})}):
        reply = query("train", RecordDict({**sent, **beside}))
        assert (reply["site"]["status"], reply["site"]["reason"]) == ("failed", FAILED)
    assert query("train", sent)["site"]["status"] == "trained"


@pytest.mark.parametrize(
    "error, status, reason",
    [
        (
            BudgetExceeded("ε would be 9", "at most 8"),
            "refused",
            "ε would be 9; expected at most 8",
        ),
        (Unprepared("not known"), "unprepared", "not known"),
        (ModelError("/home/ward/base is altered"), "failed", FAILED),
        (ValueError("Mrs Example, born 1.1.1950"), "failed", FAILED),
        (MemoryError(), "failed", FAILED),
    ],
)
def test_only_a_refusals_words_leave_the_site(trial, error, status, reason):
    trial(known(script={1: error}))
    reply = query("train", order())
    assert (reply["site"]["status"], reply["site"]["reason"]) == (status, reason)
    assert len(reply["update"]) == 0 and reply["site"]["events"] == "[]"


def test_a_plan_that_is_not_what_it_claims_to_be_is_not_prepared(trial):
    run = trial(FakeSite("a"))
    message = plan_message(STUDY, {}, SigningKey())
    message["plan"]["digest"] = "sha256:" + "0" * 64
    assert query("query.prepare", message)["admission"]["reason"] == FAILED
    message["plan"]["study"] = "{"
    assert query("query.prepare", message)["admission"]["admitted"] is False
    assert run.sites[0].prepared == 0


@pytest.mark.parametrize(
    "content", [RecordDict(), RecordDict({"plan": ConfigRecord({**version_fields()})})]
)
def test_malformed_messages_fail_without_a_crash(trial, content):
    trial(FakeSite("a"))
    assert query("query.prepare", content)["admission"]["status"] == "failed"
    assert query("train", content)["site"]["status"] == "failed"


def context(node: dict[str, Any], run: dict[str, Any]) -> Context:
    return Context(1, 2, node, RecordDict(), run)


def test_flowers_own_simulation_finds_the_site_by_partition(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fedtune.core.vault.answers, "worker", lambda path: SimpleNamespace(path=path)
    )
    for name in ("b", "a"):
        (tmp_path / f"{name}.toml").write_text("[site]\n")
    (tmp_path / "study.toml").write_text("[study]\n")
    run = {"sites": str(tmp_path)}
    second = place_of(context({"partition-id": 1}, run)).worker()
    assert second.path == str(tmp_path / "b.toml") and not second.simulated  # nobody here runs it
    assert place_of(context({"site": "x.toml"}, run)).worker().path == "x.toml"
    with pytest.raises(ConfigError):
        place_of(context({"partition-id": 2}, run))
    with pytest.raises(ConfigError):
        place_of(context({}, {}))


# ------------------------------------------------------------------------------------ ServerApp


def test_the_server_app_reads_its_config_and_runs(monkeypatch, tmp_path):
    seen: list[Any] = []
    monkeypatch.setattr(server_app, "load_study", lambda path: f"study of {path}")
    monkeypatch.setattr(server_app.rounds, "run", lambda *a, **k: seen.append((*a, k)))
    config = {"study": "s.toml", "out": "o", "resume": True}
    server_app.app("grid", context({}, config))  # type: ignore[arg-type]
    assert seen == [("grid", "study of s.toml", Path("o"), {"resume": True})]
    with pytest.raises(ConfigError, match="out"):
        server_app.app("grid", context({}, {"study": "s.toml"}))  # type: ignore[arg-type]


@pytest.mark.parametrize("module", [fedtune.launch.in_one_process, server_app])
def test_the_apps_stay_thin(module):
    assert len(Path(module.__file__).read_text().splitlines()) < 100


# ------------------------------------------------------------------------------------ admission


def admitted_by(answer: dict[str, Any] | None) -> Roster:
    app = ClientApp()

    @app.query("prepare")
    def reply(message: Message, _: Context) -> Message:
        content = {} if answer is None else {"admission": ConfigRecord(answer)}
        return Message(RecordDict(content), reply_to=message)

    grid = InProcessGrid([Path("x")], app)
    roster = Roster(grid, STUDY, plan_message(STUDY, {}, SigningKey()), {}, {}, lambda *_: None)
    roster.join()
    return roster


GOOD = {"admitted": True, "reason": "", "name": "a", "declared_size": 9, "key": "0" * 64}
GOOD |= version_fields()


def test_a_good_answer_is_admitted():
    assert admitted_by(GOOD).list_willing() == ["a"]


def test_only_an_enrolled_key_is_admitted_and_a_revoked_one_is_not_counted(trial):
    sites = FakeSite("a"), FakeSite("b")
    run = trial(*sites)
    known = {node: Member(site.name, site.key.public) for node, site in enumerate(sites, 2)}

    def enrolled(grid: Any) -> dict[int, Member]:
        # The registry while the plan goes out, and after b was revoked in the first round.
        return {2: known[2]} if sites[1].calls else known

    body = run.run(make_study(min_sites=1), parts=make_parts(enrolled=enrolled))
    assert [entry["participants"] for entry in body["rounds"]] == [["a"]] * 4
    assert "not enrolled" in body["rounds"][0]["missing"]["b"]
    other = trial(FakeSite("c"), folder="other")
    unknown = lambda grid: {2: Member("c", "0" * 64)}  # noqa: E731
    with pytest.raises(Refused, match="not enrolled"):
        other.run(make_study(min_sites=1), parts=make_parts(enrolled=unknown))
    assert other.sites[0].calls == []


def test_a_site_that_enrolled_with_one_coordinator_prepares_no_other_ones_plan(trial):
    site = FakeSite("a")
    trial(site)
    message = plan_message(STUDY, {}, KEY)
    for expected, status in ((SigningKey().public, "refused"), (KEY.public, "admitted")):
        grid = InProcessGrid([Path("a")], fedtune.launch.in_one_process.app)
        grid._contexts[2].node_config["coordinator"] = expected
        (reply,) = grid.send_and_receive([grid.create_message(message, "query.prepare", 2, "1")])
        assert reply.content["admission"]["status"] == status
    assert site.prepared == 1


@pytest.mark.parametrize(
    "change",
    [
        {"admitted": "yes"},
        {"admitted": 1},
        {"name": "../../etc"},
        {"name": "a\nb"},
        {"name": ""},
        {"name": 3},
        {"declared_size": 0},
        {"declared": "Mrs Example"},
        {"declared": True},
        {"free_query": "yes"},
        {"free_query": 1},
        {"declared_size": -5},
        {"declared_size": 1.5},
        {"declared_size": True},
        {"declared_size": "9"},
        {"key": ""},
        {"key": "x" * 64},
    ],
)
def test_an_odd_answer_is_not(change):
    roster = admitted_by(GOOD | change)
    assert roster.list_willing() == [] and roster.out()


def test_no_answer_is_not():
    assert admitted_by(None).out() == {"node 2": "failed: its answer to the plan is malformed"}


def test_a_refusals_words_are_tamed():
    roster = admitted_by(GOOD | {"admitted": False, "reason": "no\x1b[2J\n" + "x" * 999})
    (words,) = roster.refused.values()
    assert words.startswith("no [2J x") and len(words) == 300


@pytest.mark.parametrize("site", [None, ConfigRecord({}), ConfigRecord({"status": "splendid"})])
def test_an_odd_reply_to_train_is_a_failure(site):
    content = RecordDict({"update": ArrayRecord()} | ({"site": site} if site is not None else {}))
    assert outcome(Reply(2, content), zeros(), True, [], "", WANTED).status == "failed"


def test_a_huge_claim_in_a_small_message_is_not_allocated():
    record = to_record(encode(zeros(), "float32"))
    name = VALUES
    honest = record[name].data
    record[name].data = honest.replace(b"(10,), }         ", b"(40000000000,), }")
    assert record[name].data != honest and len(record[name].data) == len(honest)
    site, body = SigningKey(), seal.body_digest(bodies(record), SAID)
    said = ConfigRecord(
        {**SAID, **seal.seal(site, replace(WANTED, body=body, ledger={"token": "00"}))}
    )
    content = RecordDict({"update": record, "site": said})
    got = outcome(Reply(2, content), zeros(), False, [], site.public, WANTED)
    assert got.status == "dropped" and "as many bytes as its shape needs" in got.reason
    assert np.prod(record[name].shape) == 10


def sealed(key: SigningKey, record: ArrayRecord, **changes: Any) -> Reply:
    body = seal.body_digest(bodies(record), SAID)
    header = replace(WANTED, body=body, ledger={"token": "00"})
    said = {**SAID, **seal.seal(key, replace(header, **changes))}
    return Reply(2, RecordDict({"update": record, "site": ConfigRecord(said)}))


def test_a_sealed_update_is_taken_and_its_ledger_statement_kept():
    site, record = SigningKey(), to_record(encode(zeros(), "float32"))
    got = outcome(sealed(site, record), zeros(), False, [], site.public, WANTED)
    assert (got.status, got.ledger) == ("trained", {"token": "00"})


@pytest.mark.parametrize(
    "change",
    [
        {"plan": "sha256:" + "1" * 64},
        {"round": 2},
        {"base": "sha256:" + "1" * 64},
        {"site": "b"},
        {"receiver": "0" * 64},
        {"nonce": "another"},
        {"body": "0" * 64},
    ],
)
def test_an_update_sealed_for_something_else_is_dropped(change):
    site, record = SigningKey(), to_record(encode(zeros(), "float32"))
    got = outcome(sealed(site, record, **change), zeros(), False, [], site.public, WANTED)
    assert got.status == "dropped" and next(iter(change)) in got.reason


def test_an_update_signed_by_another_or_altered_is_dropped():
    site, record = SigningKey(), to_record(encode(zeros(), "float32"))
    stranger = outcome(sealed(SigningKey(), record), zeros(), False, [], site.public, WANTED)
    assert stranger.status == "dropped" and "not signed" in stranger.reason
    reply = sealed(site, record)
    record[VALUES].data = record[VALUES].data[:-1] + b"\x01"
    altered = outcome(reply, zeros(), False, [], site.public, WANTED)
    assert altered.status == "dropped" and "body" in altered.reason


def test_an_order_by_another_coordinator_or_a_plan_without_signature_is_not_followed(trial):
    site = known()
    trial(site)
    reply = query("train", order(key=SigningKey()))
    assert (reply["site"]["status"], reply["site"]["reason"]) == ("failed", FAILED)
    message = plan_message(STUDY, {}, SigningKey())
    message["plan"]["coordinator"] = SigningKey().public
    assert query("query.prepare", message)["admission"]["reason"] == FAILED
    assert site.calls == [] and site.prepared == 0
