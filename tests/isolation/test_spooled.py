"""A vault and a courier that share a folder: whole studies, kills at any moment, a scheduler."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, cast

import pytest

from fedtune.core.config import VaultTable, save
from fedtune.core.config.checked import load_checked
from fedtune.core.config.state_files import COUNTS
from fedtune.core.dp.accountant import epsilon
from fedtune.core.errors import ConfigError, InfrastructureError
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.vault import kept_plans
from fedtune.core.vault import worker as site
from fedtune.core.vault.answers import answer
from fedtune.core.vault.budget import MOST_ATTEMPTS
from fedtune.core.vault.policy import refusals
from fedtune.core.vault.process import HOME
from fedtune.core.wire.requests import Answer, Request
from fedtune.core.wire.spool import Spool, _encode, decode_request
from fedtune.courier.process import by_file
from fedtune.dashboard import work
from fedtune.flower.ports import free_port
from fedtune.launch import spooled
from fedtune.launch.event_reader import EventReader
from fedtune.launch.site import check
from fedtune.observe.status import LOCK
from tests import databases
from tests.client.airlock_kit import Asked, a_site, contents
from tests.client.site_kit import begun as a_start
from tests.client.site_kit import make_site, notes
from tests.flower import kit
from tests.forks import ForkedChild
from tests.isolation.test_halves import CONFINES, confined
from tests.isolation.test_halves import a_site as a_place
from tests.network.kit import (
    FEDTUNE,
    PRIVATE,
    SITES,
    Consortium,
    children,
    consortium,
    end,
    until,
    without_network,
)
from tests.slurm import slurm
from tests.test_cli import run as command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a vault is confined by Linux")


def begun(
    made: Consortium, base: Path, rounds: int, seconds: float = 60
) -> subprocess.Popen[bytes]:
    """Start a study with every site enrolled, and the clients of all but north."""
    made.lay_out(base, PRIVATE, rounds, round_timeout=seconds)
    server = made.server()
    until(made.listens, 120, made.told)
    for name in SITES:
        made.join(name)
    for name in ("east", "south"):
        made.client(name, "--once")
    return server


def check_all_trained(made: Consortium, rounds: int) -> None:
    """North took part in each round, and paid for each; nothing is left in its spool."""
    trained = [entry["participants"] for entry in made.report()["rounds"]]
    assert len(trained) == rounds and all("north" in each for each in trained), made.told()
    spent = made.spending("north")
    charged = Counter(each.charge.round for each in spent)
    assert {each.charge.round for each in spent if each.released} == set(range(1, rounds + 1))
    noised = made.noised("north")
    assert all(noised[number] <= charged[number] for number in noised)


def left(made: Consortium) -> list[Path]:
    return [*(made.root / "north" / "spool").glob("*/*")]


@pytest.mark.long  # by default: one of the sites of tests/network/test_from_nothing.py
def test_a_site_takes_part_by_files_alone(tmp_path: Path, tiny_base: Path) -> None:
    """Its vault is where no network is at all; each round is charged once."""
    rounds = 3
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        server = begun(made, tiny_base, rounds)
        courier = made.spooled("north", "courier", "--once")
        made.where["north"] = without_network()
        vault = made.spooled("north", "vault")
        assert server.wait(400) == 0, made.told()
        assert courier.wait(60) == 0, made.told()
        until(lambda: not left(made), 20, made.told)
        assert end(vault) == 0
        check_all_trained(made, rounds)
        charged = Counter(each.charge.round for each in made.spending("north"))
        assert {*charged.values()} == {1}
        assert made.log("north").read_text().count("OPEN") == 0


@pytest.mark.long
def test_every_process_of_a_spooled_site_may_be_killed(tmp_path: Path, tiny_base: Path) -> None:
    """Each half, and what each half started, after a round of its own: the study goes to its end,
    and north is in each round."""
    rounds = 5
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        server = begun(made, tiny_base, rounds)
        halves = {"vault": made.spooled("north", "vault")}
        halves["courier"] = made.spooled("north", "courier", "--once")
        until(lambda: made.rounds() >= 1, 300, made.told)
        for name in ("vault", "courier"):
            at = made.rounds()
            os.kill(children(halves[name].pid)[name], signal.SIGKILL)  # started again by itself
            until(partial(goes_on, made, server, at), 300, made.told)
            at = made.rounds()
            halves[name].kill()
            halves[name].wait()
            halves[name] = made.spooled("north", name, *(["--once"] * (name == "courier")))
            until(partial(goes_on, made, server, at), 300, made.told)
        assert server.wait(600) == 0, made.told()
        assert halves["courier"].wait(60) == 0, made.told()
        until(lambda: not left(made), 20, made.told)
        assert end(halves["vault"]) == 0
        check_all_trained(made, rounds)


def goes_on(made: Consortium, server: subprocess.Popen[bytes], at: int) -> bool:
    """Whether a further round was kept, or the study is over."""
    return made.rounds() > at or server.poll() is not None


# ------------------------------------------------------------------- a vault for each request


def set_run(made: Consortium, *command: str) -> None:
    """Have north's vault started by a command for each request."""
    with (made.root / "north" / "site.toml").open("a") as file:
        file.write(f"\n[vault]\nrun = {json.dumps(shlex.join([*command, *FEDTUNE]))}\n")


def check_started_for_each(made: Consortium, base: Path, *command: str) -> None:
    """A study in which each of north's requests has a vault of its own."""
    rounds = 2
    server = begun(made, base, rounds, seconds=300)
    set_run(made, *command)
    courier = made.spooled("north", "courier", "--once")
    vault = made.spooled("north", "vault")
    assert server.wait(500) == 0, made.told()
    assert courier.wait(60) == 0, made.told()
    until(lambda: not left(made), 20, made.told)
    assert "vault" not in children(vault.pid)
    assert end(vault) == 0
    check_all_trained(made, rounds)
    assert {*Counter(each.charge.round for each in made.spending("north")).values()} == {1}


@pytest.mark.long
def test_a_command_without_a_network_starts_the_vault_for_each_request(
    tmp_path: Path, tiny_base: Path
) -> None:
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        check_started_for_each(made, tiny_base, *without_network())


@pytest.mark.long
def test_slurm_starts_the_vault_for_each_request(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slurm(tmp_path / "slurm") as found:
        monkeypatch.setenv("SLURM_CONF", found["SLURM_CONF"])
        with consortium(tmp_path / "made", "127.0.0.1", free_port()) as made:
            check_started_for_each(made, tiny_base, "srun", "--ntasks=1")
        log = (tmp_path / "slurm" / "slurmctld.log").read_text()
        assert log.count("WEXITSTATUS 0") >= 3, log  # the plan, and two rounds


# ------------------------------------------------------------------------ a courier by itself


def test_a_courier_withdraws_what_was_asked_before_it_and_what_nobody_waits_for(
    spool: Spool,
) -> None:
    request = Request("train", {})
    context: Any = None
    old = spool.ask(request)
    (spool.requests / f"{old}.0.1.new").touch()  # as a killed one leaves it
    ask = by_file(spool)
    assert [*spool.requests.iterdir()] == []
    with pytest.raises(InfrastructureError, match="in time"):
        ask(context, request, 0.2)
    assert [*spool.requests.iterdir()] == []
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, context, request, 60.0)
        until(spool.waiting, 10)
        (name,) = spool.waiting()
        assert name != old
        spool.put(name, Answer("site", {"status": "trained", "reason": ""}))
        assert asked.result(10).status == "trained"
    spool.remove_answered()
    assert [*spool.path.glob("*/*")] == []


# ------------------------------------------------------------------------- a vault by itself


@contextmanager
def a_vault(asked: Asked, spool: Spool, *name: str, broken: str = "") -> Iterator[ForkedChild]:
    """Run the site's vault; name: of the only request that it answers; broken: statements that it
    runs before."""
    tells, told = socket.socketpair()
    with tells, told, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForkedChild, "before", KILLED + broken)
        state = asked.site.site.state
        options = [str(asked.path), str(spool.path), str(told.fileno()), "1", "{}"]
        options += [asked.checked, *name]
        log = state / "vault.log"
        with ForkedChild("vault", options, home=state / HOME, log=log, keep=[told.fileno()]) as one:
            yield one


KILLED = """
import os, signal
from fedtune.core.wire import spool
def killed(*given, **named):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def answered(asked: Asked, spool: Spool, request: Request) -> Answer:
    """What a vault that is started for this request alone answers."""
    name = spool.ask(request)
    answer_pending(asked, spool, name)
    return taken(spool, name)


def answer_pending(asked: Asked, spool: Spool, name: str) -> None:
    with a_vault(asked, spool, name) as vault:
        vault.wait()


def taken(spool: Spool, name: str) -> Answer:
    found = spool.answer_to(name)
    assert found is not None
    spool.withdraw(name)
    spool.remove_answered()
    return found


@pytest.fixture
def asked(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Its self-test is of no matter here, and runs in the studies above."""
    monkeypatch.setattr(site, "self_test", lambda *_: None)
    return a_site(tmp_path, tiny_base, "immediate")


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.at(tmp_path / "spool")


POINTS = {
    "before it is read": "spool.Spool.take = killed",
    "once it is answered": "spool.Spool.put = killed",
    "before it is written": "spool.write_all = killed",
    "before it has its name": "rename = os.rename; "
    "os.rename = lambda *g, **n: killed() if n else rename(*g, **n)",
    "once it has its name": "rename = os.rename; "
    "os.rename = lambda *g, **n: (rename(*g, **n), n and killed())",
}


@pytest.mark.long  # by default: one process, at every point of its answers (client/test_airlock.py)
@pytest.mark.parametrize("point", POINTS)
def test_a_vault_that_is_killed_charges_once_and_answers_the_same(
    point: str, asked: Asked, spool: Spool
) -> None:
    assert answered(asked, spool, asked.plan()).status == "admitted"
    order = asked.request()
    name = spool.ask(order)
    with a_vault(asked, spool, name, broken=POINTS[point]) as vault:
        vault._process.wait()
        assert vault.status == -signal.SIGKILL
    assert (spool.answer_to(name) is not None) == (point == "once it has its name")
    if name in spool.waiting():
        answer_pending(asked, spool, name)
    first = taken(spool, name)
    assert first.status == "trained" and asked.paid() == 1
    again = answered(asked, spool, order)
    asked.restart()
    asked.prepare()
    for other in (again, answer(asked.place, order)):  # by another file, and by a socket's vault
        assert contents(other) == contents(first)
        assert body_of(other) == body_of(first)
    assert asked.paid() == 1
    assert [*spool.path.glob("*/*")] == []


def body_of(answer: Answer) -> str:
    """The digest of all that an answer says; its seal also names the log's newest entry."""
    return str(json.loads(str(answer.fields["header"]))["body"])


def test_a_vault_that_stays_answers_after_a_kill_and_asks_for_the_plan_again(
    asked: Asked, spool: Spool
) -> None:
    with a_vault(asked, spool):
        name = spool.ask(asked.plan())
        until(lambda: spool.answer_to(name), 60)
        assert taken(spool, name).status == "admitted"
    name = spool.ask(asked.request())
    with a_vault(asked, spool) as vault:
        until(lambda: spool.answer_to(name), 60)
        assert taken(spool, name).status == "unprepared" and asked.paid() == 0
        for request, status in ((asked.plan(), "admitted"), (asked.request(), "trained")):
            name = spool.ask(request)
            until(partial(spool.answer_to, name), 60)
            assert taken(spool, name).status == status
        assert vault.alive and asked.paid() == 1


def test_a_plan_is_kept_as_long_as_its_study_is_under_way(asked: Asked) -> None:
    """And a plan of which another release kept the request is not known."""
    admitted, folder = asked.prepare(), asked.site.site.state / kept_plans.FOLDER
    content = _encode(asked.plan(), {"number": ""})
    kept_plans.keep_plan_request(asked.site, asked.plan(), content, admitted)
    (kept,) = folder.iterdir()
    found = kept_plans.find_plan_request(asked.site, asked.request())
    assert found is not None and found.tables == decode_request(content).tables
    assert kept_plans.find_plan_request(asked.site, asked.plan()) is None  # no order
    kept.write_bytes(content[:-1])
    assert kept_plans.find_plan_request(asked.site, asked.request()) is None
    asked.worker.finish(asked.made.study.digest)
    kept_plans.keep_plan_request(asked.site, asked.request(), b"", admitted)
    assert [*folder.iterdir()] == []


def test_what_is_no_request_is_answered_as_a_failure(asked: Asked, spool: Spool) -> None:
    """As over a socket; and an order whose plan the site does not know as such."""
    content = b"not a request"
    name = hashlib.sha256(content).hexdigest()
    forged = asked.request()
    forged.tables["order"]["plan"] = "../../../etc/passwd"  # type: ignore[index]
    with a_vault(asked, spool):
        (spool.requests / name).write_bytes(content)
        until(lambda: spool.answer_to(name), 60)
        assert taken(spool, name).status == "failed"
        for request in (asked.request(), forged):
            name = spool.ask(request)
            until(partial(spool.answer_to, name), 60)
            assert taken(spool, name).status in ("unprepared", "refused")
    assert asked.paid() == 0


# ----------------------------------------------------- a site file that changes in mid-study


def sample(answer: Answer) -> tuple[float, float]:
    """Rate and noise of the round's steps, of which there is one kind."""
    ((rate, sigma),) = {(e["q"], e["sigma"]) for e in json.loads(str(answer.fields["events"]))}
    return rate, sigma


def rounds_paid(asked: Asked) -> set[int]:
    return {each.charge.round for each in asked.worker.ledger.spending()}


def query(folder: Path) -> dict[str, dict[str, Any]]:
    """The tables of a site whose records a query selects."""
    made = databases.Made("sqlite", f"sqlite:///{folder}/notes.sqlite")
    rows = [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]
    made.table("note", [*rows[0]], [[*row.values()] for row in rows])
    data = {"path": str(folder), "url": made.url, "options": {"query": "SELECT * FROM note"}}
    return {"data": data, "policy": {"allow_free_query": True}}


def test_a_query_that_comes_between_two_orders_waits_until_a_person_starts_the_site(
    asked: Asked, spool: Spool, tmp_path: Path
) -> None:
    """Where each order has a vault of its own. Else the coordinator would never hear of it."""
    assert answered(asked, spool, asked.plan()).status == "admitted"
    assert answered(asked, spool, asked.request(round_=1)).status == "trained"
    asked.edit(**query(tmp_path))
    assert answered(asked, spool, asked.request(round_=2)).status == "unprepared"
    refused = answered(asked, spool, asked.plan())  # which the coordinator then sends once more
    assert refused.status == "refused" and len(rounds_paid(asked)) == 1
    assert "it did not when the site joined" in str(refused.fields["reason"])
    asked.start()
    assert answered(asked, spool, asked.request(round_=2)).status == "unprepared"
    told = answered(asked, spool, asked.plan())
    assert told.status == "admitted" and told.fields["free_query"] is True
    assert answered(asked, spool, asked.request(round_=2)).status == "trained"


def test_a_size_that_is_corrected_between_two_orders_waits_until_a_person_starts_the_site(
    tmp_path: Path, tiny_base: Path, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a study would have two rates and two kinds of noise, and the coordinator know one."""
    monkeypatch.setattr(site, "self_test", lambda *_: None)
    steps = {"rounds": 3, "local_steps": 1, "learning_rate": 0.1, "expected_batch": 6}
    asked = a_site(tmp_path, tiny_base, "immediate", training=steps)
    assert answered(asked, spool, asked.plan()).fields["declared_size"] == 12
    first = sample(answered(asked, spool, asked.request(round_=1)))
    asked.edit(site={"declared_size": 24})
    assert sample(answered(asked, spool, asked.request(round_=2))) == first
    assert answered(asked, spool, asked.plan()).fields["declared_size"] == 12
    asked.start()
    assert answered(asked, spool, asked.request(round_=3)).status == "unprepared"
    assert answered(asked, spool, asked.plan()).fields["declared_size"] == 24


def test_a_vault_that_is_started_again_by_itself_reads_the_records_that_a_person_had_checked(
    asked: Asked, spool: Spool, tmp_path: Path
) -> None:
    """Those of the site file by now may be another home's, which pays for them. A tighter policy
    counts all the same."""

    def ask(request: Request) -> Answer:
        name = spool.ask(request)
        until(partial(spool.answer_to, name), 60)
        return taken(spool, name)

    def rows() -> int:
        counts = json.loads((asked.site.site.state / COUNTS).read_text())
        return int(counts["records"]["rows"])

    with a_vault(asked, spool):
        assert ask(asked.plan()).status == "admitted"
        assert ask(asked.request(round_=1)).status == "trained"
    before, others = rows(), notes(tmp_path / "other", patients=40)
    asked.edit(data={"path": str(others)})
    with a_vault(asked, spool):
        assert ask(asked.plan()).status == "admitted"
        assert ask(asked.request(round_=2)).status == "trained" and rows() == before
        asked.edit(policy={"max_epsilon": 0.01})
        assert ask(asked.plan()).status == "refused"
    asked.edit(policy={"max_epsilon": 8.0})
    asked.start()
    with a_vault(asked, spool):
        assert ask(asked.plan()).status == "admitted"
        assert ask(asked.request(round_=3)).status == "trained" and rows() > before


def test_a_start_stores_the_tables_that_it_checked_and_no_others(asked: Asked) -> None:
    """Only its user can read them, and what is there already is not written once more."""
    loaded, stored = asked.site, Path(asked.checked)
    stored.unlink()
    check(loaded, asked.path)
    assert load_checked(stored, asked.path) == loaded
    assert stored.stat().st_mode & 0o777 == 0o600
    before = stored.stat()
    check(loaded, asked.path)
    assert stored.stat().st_ino == before.st_ino
    asked.edit(site={"declared_size": 24})
    with pytest.raises(ConfigError, match="was changed while it was checked"):
        check(loaded, asked.path)


def test_a_vault_without_checked_tables_answers_nothing(asked: Asked, spool: Spool) -> None:
    """And none is started by hand for one request, without them."""
    Path(asked.checked).unlink()
    name = spool.ask(asked.plan())
    with a_vault(asked, spool, name) as vault:
        assert vault._process.wait() != 0
    assert spool.answer_to(name) is None and asked.paid() == 0
    said = command("vault", asked.path, "--spool", spool.path, "--request", name)
    assert said.exit_code == 2 and "only one of --request and --checked" in said.stderr


# ---------------------------------------------------------------------- what a site may ask of it


def test_a_plan_with_shared_noise_is_refused_where_a_vault_lives_for_one_request(
    asked: Asked,
) -> None:
    """Twin: where it stays, that rule says nothing."""
    shared = asked.made.study.changed(
        secure_aggregation={"colluding": 1}, strategy={"min_sites": 3}
    )
    stays, once = asked.site, asked.site.changed(vault={"run": "srun fedtune"})

    def about_run(of: Any) -> list[str]:
        return [str(each) for each in refusals(shared, of, None) if "vault.run" in str(each)]

    assert about_run(stays) == [] and len(about_run(once)) == 1
    assert not [e for e in refusals(asked.made.study, once, None) if "vault.run" in str(e)]


@pytest.mark.parametrize("run", ["", "  ", "srun 'fedtune"])
def test_a_command_has_words(run: str) -> None:
    with pytest.raises(ValueError, match="run: "):
        VaultTable(run=run)


@CONFINES
def test_a_courier_writes_requests_and_reads_answers_and_no_more(tmp_path: Path) -> None:
    place = a_place(tmp_path)
    spool = Spool.at(tmp_path / "spool")
    (spool.answers / ("0" * 64)).touch()
    found = confined("courier", place, spool.path)
    assert found["reached"] == [
        *("node.key", "site.toml", "0" * 64, "writes flower", "writes requests")
    ]
    assert found["missing"] == []


def test_a_command_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    port = free_port()
    path = kit.site_file(tmp_path / "north", "north", port)
    kit.join_up(tmp_path / "hub", path, port)
    with path.open("a") as file:
        file.write('\n[vault]\nrun = "no-such-scheduler fedtune"\n')
    said = command("vault", path, "--spool", tmp_path / "spool")
    assert said.exit_code == 2 and "vault.run: no-such-scheduler" in said.stderr, said.output


@dataclass
class EndsAfter:
    """A vault that ends after some looks at it."""

    looks: int

    @property
    def alive(self) -> bool:
        self.looks -= 1
        return self.looks > 0

    def build_end_error(self) -> InfrastructureError:
        return InfrastructureError("the vault ended by itself")


def test_the_newest_entry_is_noted_while_a_spooled_vault_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `fedtune client`: a folder that is put back while the vault runs on is noticed."""
    noted = list[Path]()
    monkeypatch.setattr(spooled, "note_head", noted.append)
    monkeypatch.setattr(spooled, "NOTED_EACH", 0.0)
    reading, writing = Pipe(duplex=False)
    with reading, writing:
        half = spooled._Half(cast(Any, EndsAfter(3)), EventReader(reading), None, tmp_path)
        assert half.watch(lambda *_: False)
    assert noted == [tmp_path] * 3


@pytest.mark.parametrize("runs", [True, False])
def test_a_plan_is_reviewed_by_the_size_at_which_the_site_runs(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    """A size that waits for the next start is that of a site which is stopped."""
    monkeypatch.setattr(site, "self_test", lambda *_: None)
    notes(tmp_path)
    path = tmp_path / "site.toml"
    rules = {"admission": "signed", "max_epsilon": 60.0, "max_epsilon_per_study": 60.0}
    save(make_site(tmp_path, rules, patient="who"), path)
    privacy = {"noise_multiplier": 0.7, "delta": 1e-4, "unit": "patient"}
    training = {"rounds": 3, "local_steps": 1, "learning_rate": 0.1, "expected_batch": 3}
    asked = Asked(path, a_start(tiny_base, privacy=privacy, training=training))
    asked.start()
    asked.prepare()
    plan, state = asked.site.site.plan_file(asked.made.study.digest), asked.site.site.state
    asked.edit(site={"declared_size": 48})
    with (state / LOCK).open("w") as lock:
        if runs:
            fcntl.flock(lock, fcntl.LOCK_EX)
        reviewed = command("review", plan, "--site", path)
        listed = json.dumps(work.plans(path, ""))
    rate = "probability 0.25" if runs else "probability 0.0625"
    assert rate in " ".join(reviewed.output.split()) and rate in listed
    assert ("was changed since this site was started" in reviewed.output) is runs


def test_a_review_states_what_a_plan_costs_if_each_round_is_ordered_again(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "self_test", lambda *_: None)
    asked = a_site(tmp_path, tiny_base, "immediate")
    asked.edit(policy={"max_epsilon": 600.0, "max_epsilon_per_study": 600.0})
    rounds, first = asked.made.study.training.rounds or 0, asked.made.adapter
    plan = tmp_path / "plan.json"
    plan.write_text(asked.made.study.model_dump_json())
    said = " ".join(command("review", plan, "--site", asked.path).output.split())
    for round_ in range(1, rounds + 1):
        for attempt in range(MOST_ATTEMPTS):
            start = {name: array + attempt / 100 for name, array in first.items()}
            asked.made = replace(asked.made, adapter=start)
            assert asked.train(round_).status == "trained"
    charges = asked.worker.ledger.charges("records")
    assert len(charges) == rounds * MOST_ATTEMPTS
    most = epsilon([charge.event for charge in charges], 1e-4)
    assert f"this study at most up to ε = {rounded_up(most)}" in said
