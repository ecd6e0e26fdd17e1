"""What a client checks when it starts: before a study it refuses, in the midst of one no record
decides whether the site comes back."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.core.config import load_site
from fedtune.core.data.identity import identities
from fedtune.core.data.sources._interface import NotWellFormed
from fedtune.core.errors import ConfigError, DataError, FedtuneError, PolicyRefused
from fedtune.core.ledger import declared
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry import process_cache
from fedtune.core.vault import studies
from fedtune.core.wire.arrays import bodies
from fedtune.core.wire.codec import encode
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.requests import FAILED
from fedtune.core.wire.seal import digest_beside, order, sign_end, sign_plan
from fedtune.flower.grid import InProcessGrid
from fedtune.flower.records import to_record
from fedtune.launch.in_one_process import app
from fedtune.launch.site import join
from fedtune.officer.before_joining import check_before_joining
from fedtune.officer.purge import listing, purge
from fedtune.officer.sheet import describe_data
from fedtune.public.start import Start
from fedtune.server.admission import plan_message
from tests.client.site_kit import begun

SITE = """
[site]
name = "a"
declared_size = 12
state = "state"
base = "{base}"
[data]
columns = {{ prompt = "note", completion = "answer", patient = "who" }}
{source}
[policy]
bases = "any"
max_delta = 1e-4
{policy}
"""
COORDINATOR = SigningKey()
BROKEN = "{"  # JSON that is none
JOINS = ""  # what keeps the site from joining
Rows = list[tuple[str, str]]  # patient, note
OTHERS: Rows = [(f"p{n}", f"fever on day {n}") for n in range(4)]


def jsonl(path: Path, rows: Rows) -> None:
    named = [{"who": who, "note": note, "answer": "yes"} for who, note in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in named))


def csv(path: Path, rows: Rows) -> None:
    lines = [f"{who},{note},yes\n" for who, note in rows]
    path.write_text("who,note,answer\n" + "".join(lines))


def sqlite(path: Path, rows: Rows) -> None:
    """A table whose notes are taken out of JSON: one row that is none makes it unreadable."""
    path.unlink(missing_ok=True)
    said = [
        (who, "yes", note if note == BROKEN else json.dumps({"note": note})) for who, note in rows
    ]
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE notes (who TEXT, answer TEXT, raw TEXT)")
        database.executemany("INSERT INTO notes VALUES (?, ?, ?)", said)
        taken_out = "note TEXT AS (json_extract(raw, '$.note'))"
        database.execute(f"ALTER TABLE notes ADD COLUMN {taken_out}")


def nothing(_: Path) -> None: ...


def attest(path: Path) -> None:
    (path.parent / "sheet.toml").write_text('licence = "x"\n')
    describe_data(load_site(path))


def declare_as_public(path: Path) -> None:
    """Once somebody declared a file public in which there was a text of the patient's."""
    other = path.parent / "other.jsonl"
    jsonl(other, [("somebody", "a text that somebody once declared as public")])
    table = {"name": "other", "path": other, "declared": "public"}
    data = load_site(path).data.model_copy(update=table)
    declared.declare(Ledger(path.parent / "state"), "other", "public", identities(data), True)


@dataclass(frozen=True)
class Case:
    """A check at the start that a record decides. before: the records of the study's first round;
    then: those at the restart, of others; mine: those of one patient more, at the restart;
    set_up: what people did before; refuses: how the start ends where it refuses, and in which of
    the two worlds."""

    refuses: type[FedtuneError]
    in_world: str
    mine: Rows
    before: tuple[Rows, Rows] = (OTHERS, [])
    then: tuple[str, ...] = ()
    write: Callable[[Path, Rows], None] = jsonl
    policy: str = ""
    set_up: Callable[[Path], None] = nothing


CASES = {
    "attested records": Case(
        PolicyRefused, "with", [("A", "cough")], policy='data_sheet = ["licence"]', set_up=attest
    ),
    "a CSV cell that is not well-formed": Case(
        NotWellFormed, "with", [("A", '"an open quote')], write=csv
    ),
    "a database that a row makes unreadable": Case(
        DataError, "with", [("A", BROKEN)], write=sqlite
    ),
    "fewer than two units": Case(
        DataError, "without", [("A", "cough")], before=(OTHERS, [("A", "cough")]), then=("p0",)
    ),
    "a text that was declared public": Case(
        PolicyRefused,
        "with",
        [("A", "a text that somebody once declared as public")],
        set_up=declare_as_public,
    ),
}


class World:
    """A site with one patient's records or without, up to a restart in mid-study."""

    def __init__(self, folder: Path, case: Case, made: Start, mine: bool) -> None:
        folder.mkdir()
        self.case, self.made, self.mine, self.path = case, made, mine, folder / "site.toml"
        self.data = folder / f"notes.{case.write.__name__}"
        source = f'path = "{self.data.name}"'
        if case.write is sqlite:
            source = (
                f'source = "sql"\nurl = "sqlite:///{self.data}"\noptions = {{ table = "notes" }}'
            )
        filled = {"source": source, "policy": case.policy}
        self.path.write_text(SITE.format(base=made.study.base.model, **filled))
        others, own = case.before
        case.write(self.data, others + (own if mine else []))
        case.set_up(self.path)

    def restart(self) -> str:
        """Check what `fedtune client` does at its start, after the records changed; returns what
        keeps the site from joining."""
        others = [row for row in OTHERS if not self.case.then or row[0] in self.case.then]
        self.case.write(self.data, others + (self.case.mine if self.mine else []))
        process_cache.clear("workers")
        try:
            check_before_joining(load_site(self.path))
        except FedtuneError as error:
            return type(error).__name__
        return JOINS

    def ask(self, kind: str, content: RecordDict) -> Message:
        grid = InProcessGrid([self.path], app)
        (node,) = grid.get_node_ids()
        (reply,) = grid.send_and_receive([grid.create_message(content, kind, node, "1")])
        return reply

    def prepare(self, **more: Any) -> str:
        content = plan_message(self.made.study, self.made.frozen, COORDINATOR)
        plan = ConfigRecord(dict(content.config_records["plan"]) | more)
        sent = RecordDict({"plan": plan, "frozen": content.array_records["frozen"]})
        said = self.ask("query.prepare", sent).content["admission"]
        return f"{said['status']} {said['reason']}".strip()

    def train(self, round_: int) -> dict[str, Any]:
        adapter = to_record(encode(self.made.adapter, self.made.study.wire.adapter))
        about, beside = self.made.study.digest, digest_beside(bodies(adapter))
        signed = ConfigRecord(order(COORDINATOR, about, round_, "0" * 32, "", beside=beside))
        reply = self.ask("train", RecordDict({"order": signed, "adapter": adapter}))
        said = reply.content["site"]
        return {"status": said["status"], "events": said["events"], "reason": said["reason"]}


@pytest.fixture(scope="module")
def made(tiny_base: Path) -> Start:
    return begun(tiny_base)


def worlds(folder: Path, case: Case, made: Start) -> dict[str, World]:
    return {name: World(folder / name, case, made, name == "with") for name in ("with", "without")}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_before_a_study_a_person_has_to_see_to_the_records(
    tmp_path: Path, made: Start, case: Case
) -> None:
    for name, world in worlds(tmp_path, case, made).items():
        expected = case.refuses.__name__ if name == case.in_world else JOINS
        assert world.restart() == expected, name


def test_a_client_ends_with_what_its_check_found(tmp_path: Path, made: Start) -> None:
    """The check runs in a process of its own; its error arrives whole, as the nearest of errors.py.
    With records that are right the client goes on, and looks for its way to a coordinator."""
    worlds_here = worlds(tmp_path, CASES["a CSV cell that is not well-formed"], made)
    for world in worlds_here.values():
        world.restart()
    with pytest.raises(DataError, match=r"notes\.csv") as found:
        join(worlds_here["with"].path)
    assert found.value.exit_code == DataError.exit_code and "open quote" not in str(found.value)
    with pytest.raises(ConfigError, match=r"node\.key: no such file"):
        join(worlds_here["without"].path)


def in_mid_study(folder: Path, case: Case, made: Start) -> None:
    """A restart in mid-study looks the same with a patient's records and without."""
    seen = []
    for world in worlds(folder, case, made).values():
        assert world.prepare() == "admitted"
        answers = [world.train(1), world.restart(), world.prepare(), world.train(2)]
        seen.append(answers)
    assert seen[0] == seen[1]
    assert [seen[0][1], seen[0][2], seen[0][3]["status"]] == [JOINS, "admitted", "trained"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_in_mid_study_no_record_decides_whether_a_site_comes_back(
    tmp_path: Path, made: Start, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fedtune.site"):
        in_mid_study(tmp_path, case, made)
    told = [line for line in caplog.messages if "This site joins all the same" in line]
    assert len(told) == 1 and case.refuses.__name__ in told[0] and made.study.study.name in told[0]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_twin_that_checks_as_before_any_study_is_caught(
    tmp_path: Path, made: Start, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "under_way", lambda _: {})
    with pytest.raises(AssertionError):
        in_mid_study(tmp_path, case, made)


def test_a_study_is_under_way_until_its_coordinator_says_that_it_ended(
    tmp_path: Path, made: Start
) -> None:
    world = World(tmp_path / "site", CASES["attested records"], made, True)
    state = tmp_path / "site" / "state"
    assert world.prepare() == "admitted"
    assert studies.under_way(state) == {made.study.digest: made.study.study.name}
    assert world.restart() == JOINS
    assert world.prepare(**sign_end(COORDINATOR, made.study.digest)) == "finished"
    assert studies.under_way(state) == {}
    assert world.restart() == "PolicyRefused"


OTHER = "sha256:" + "0" * 64  # another study's plan
ENDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "nobody's": lambda digest: {"finished": True},
    "another key's": lambda digest: sign_end(SigningKey(), digest),
    "another study's": lambda digest: sign_end(COORDINATOR, OTHER),
    "the plan's own signature": lambda digest: {
        "finished": True,
        "finished_signature": sign_plan(COORDINATOR, digest)["signature"],
    },
    "no text": lambda digest: {"finished": True, "finished_signature": b"\xff"},
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_nobody_but_its_coordinator_ends_a_study(
    tmp_path: Path, made: Start, end: Callable[[str], dict[str, Any]]
) -> None:
    """Such as the half on the network, which has the plan with its signature, and the end of an
    earlier study. Twin: the coordinator's own word, in the test above."""
    world = World(tmp_path / "site", CASES["attested records"], made, True)
    world.prepare()
    assert world.prepare(**end(made.study.digest)) == f"failed {FAILED}"
    assert studies.under_way(tmp_path / "site" / "state") != {}


def test_purge_says_that_a_study_is_over(tmp_path: Path, made: Start) -> None:
    """For one whose coordinator never said so."""
    world = World(tmp_path / "site", CASES["attested records"], made, True)
    world.prepare()
    assert world.restart() == JOINS
    purge(listing(load_site(world.path), made.study.study.name))
    assert world.restart() == "PolicyRefused"


def test_a_torn_note_counts_as_a_study_under_way(tmp_path: Path, made: Start) -> None:
    world = World(tmp_path / "site", CASES["attested records"], made, True)
    world.prepare()
    (note,) = (tmp_path / "site" / "state" / studies.FOLDER).iterdir()
    note.write_text("{")
    assert studies.under_way(note.parents[1]) == {note.stem: note.stem}
    assert world.restart() == JOINS


def test_what_people_typed_is_checked_in_mid_study_too(tmp_path: Path, made: Start) -> None:
    """Rules and the sheet's own words follow from no record."""
    world = World(tmp_path / "site", CASES["attested records"], made, True)
    world.prepare()
    (tmp_path / "site" / "sheet.toml").write_text('licence = "another"\n')
    assert world.restart() == "PolicyRefused"
