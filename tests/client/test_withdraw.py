"""A receipt for every withdrawal, which its patient may keep and anybody at the site can check."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import sqlite3
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.core.config import Site, load_site
from fedtune.core.config.patient_columns import patient_columns
from fedtune.core.data.identity import identities
from fedtune.core.data.records import unit_member
from fedtune.core.dp.accountant import epsilon
from fedtune.core.errors import ConfigError, DataError, InputError, PolicyRefused
from fedtune.core.files.room import Room
from fedtune.core.ledger import patient_column
from fedtune.core.ledger.entries import Earlier
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry.reasons import reason_of
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.vault.policy import compute_within_limits
from fedtune.core.vault.prepared import Held
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire.keys import canonical
from fedtune.derive.label import _file_and_exclusion
from fedtune.officer import withdraw as withdrawals
from fedtune.officer.before_joining import check_before_joining
from fedtune.officer.doctor import examine
from fedtune.officer.let_go import decide
from fedtune.officer.review import cost_refusals
from fedtune.officer.withdraw import UnknownPatient
from fedtune.officer.withdraw import withdraw as leave_out
from fedtune.public.start import Start
from tests.client.adoption_kit import CHARGE
from tests.client.hospital_kit import make_apart, make_hospital, study_of
from tests.client.site_kit import begun, make_site, notes, trains
from tests.disks import disk
from tests.guarantee.search import Finder, forms

SITE = """
[site]
name = "north"
declared_size = 20
state = "state"
[data]
path = "data.jsonl"
columns = { text = "q", patient = "who" }
[data.consent]
column = "agreed"
"""
KEY = "Zaphod-Beeblebrox-1979"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"who": who, "q": "cough", "agreed": "yes"} for who in (KEY, "b", "c")]
    rows.append({"who": "never", "q": "cough", "agreed": "no"})
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("site.toml").write_text(SITE)
    return tmp_path


def withdraw(*options: str, keys: str = "") -> Result:
    return CliRunner().invoke(app, ["withdraw", "site.toml", *options], input=keys)


def receipt_of(result: Result) -> Path:
    assert result.exit_code == 0, result.output
    (path,) = re.findall(r"receipt for the patient: (\S+)", result.output)
    return Path(path)


def test_a_receipt_names_entry_and_releases_and_no_patient(world: Path) -> None:
    path = receipt_of(withdraw(keys=f"{KEY}\n"))
    receipt, ledger = json.loads(path.read_text()), Ledger(world / "state")
    assert path.stat().st_mode & 0o777 == 0o600
    assert receipt["site"] == "north" and receipt["releases"] == []
    assert receipt["unit"] == ledger.hashed(unit_member(KEY))
    assert not Finder(forms(KEY)).in_folder(world / "state")
    checked = withdraw("--check", str(path))
    assert checked.exit_code == 0 and "stands" in checked.output


def test_who_withdrew_stays_out_after_a_restore(world: Path) -> None:
    """From a backup of before: receipts that the site keeps say who withdrew since, and when."""
    Ledger(world / "state").backup(world / "copy")
    path = receipt_of(withdraw(keys=f"{KEY}\n"))
    before = set(Ledger(world / "state").withdrawn())
    path.with_name("withdrawal-of-nobody.json").write_text('{"unit": "ab", "time": "2026"}')
    (world / "state" / "ledger.db").unlink()
    restored = CliRunner().invoke(
        app, ["ledger", "site.toml", "--restore", "--from", str(world / "copy")]
    )
    assert restored.exit_code == 0, restored.output
    assert set(Ledger(world / "state").withdrawn()) == before != set()
    assert "restored, with 1 withdrawals" in restored.output
    checked = withdraw("--check", str(path))
    assert checked.exit_code == 0 and "stands" in checked.output


ACCEPTANCE = """
[acceptance]
path = "judged.jsonl"
columns = { text = "q", patient = "who" }
thresholds = { loss = 1.0 }
"""


def test_who_is_only_judged_on_may_withdraw(world: Path) -> None:
    """Twins: somebody who is nowhere; a file of them that is not there stops nobody else."""
    (world / "site.toml").write_text(SITE + ACCEPTANCE)
    assert withdraw(keys="b\n").exit_code == 0
    (world / "judged.jsonl").write_text(json.dumps({"who": "judged", "q": "cough"}) + "\n")
    assert withdraw(keys="judged\n").exit_code == 0
    assert withdraw(keys="nobody\n").exit_code == 2
    ledger = Ledger(world / "state")
    assert set(ledger.withdrawn()) == {ledger.hashed(unit_member(who)) for who in ("b", "judged")}


TELLS_APART = ("time", "unit", "signature")


def receipts_with_and_without_another(world: Path) -> list[list[Any]]:
    """The receipts of `b` and `c`, without what tells two patients apart, from one site in two
    worlds: in the first nobody else withdraws, in the second somebody does between them."""
    site, seen = load_site("site.toml"), list[list[Any]]()
    Ledger(site.site.state).declare(site.data.name, [])
    shutil.copytree(site.site.state, world / "before")  # one key and one salt
    for between in ((), (KEY,)):
        shutil.rmtree(site.site.state)
        shutil.copytree(world / "before", site.site.state)
        receipts = [receipt_of(withdraw(keys="b\n"))]
        for other in between:
            withdraw(keys=f"{other}\n")
        receipts.append(receipt_of(withdraw(keys="c\n")))
        kept = list[Any]()
        for path in receipts:
            fields = json.loads(path.read_text())
            name = path.name.replace(fields["unit"][:16], "")
            kept.append((name, {k: v for k, v in fields.items() if k not in TELLS_APART}))
        seen.append(kept)
    return seen


def test_two_patients_learn_nothing_from_their_receipts_of_who_else_withdrew(world: Path) -> None:
    alone, with_another = receipts_with_and_without_another(world)
    assert alone[0] == alone[1] == with_another[0] == with_another[1]


def test_the_twin_whose_receipt_names_the_entry_is_caught(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(withdrawals, "_receipt", with_entry)
    with pytest.raises(AssertionError):
        test_two_patients_learn_nothing_from_their_receipts_of_who_else_withdrew(world)


RECEIPT = withdrawals._receipt


def with_entry(site: Any, ledger: Ledger, entry: Any, releases: Any) -> dict[str, Any]:
    """A receipt as earlier releases gave it: the ledger's entry and its hash in clear."""
    receipt = RECEIPT(site, ledger, entry, releases)
    del receipt["signature"]
    receipt |= {"entry": entry.seq, "hash": entry.hash}
    return receipt | {"signature": ledger.key.sign(b"fedtune withdrawal\0" + canonical(receipt))}


def test_a_receipt_of_an_earlier_release_is_still_checked(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(withdrawals, "_receipt", with_entry)
    path = receipt_of(withdraw(keys=f"{KEY}\n"))
    monkeypatch.undo()
    monkeypatch.chdir(world)
    assert {"entry", "hash"} <= json.loads(path.read_text()).keys()
    checked = withdraw("--check", str(path))
    assert checked.exit_code == 0 and "stands" in checked.output
    path.write_text(path.read_text().replace('"entry": ', '"entry": 1'))
    assert withdraw("--check", str(path)).exit_code == 2


def test_who_withdraws_twice_gets_the_same_receipt(world: Path) -> None:
    first = receipt_of(withdraw(keys=f"{KEY}\n"))
    before = first.read_bytes()
    assert receipt_of(withdraw(keys=f" {KEY} \n")) == first and first.read_bytes() == before
    assert receipt_of(withdraw(keys="b\n")) != first


@pytest.mark.parametrize("made_up_for", [True, False])
@pytest.mark.parametrize("during", [True, False])
def test_a_withdrawal_takes_no_space_beside_the_ledgers_room(
    world: Path, monkeypatch: pytest.MonkeyPatch, during: bool, made_up_for: bool
) -> None:
    """Between two orders or while one is answered: how much is free afterwards follows from no
    withdrawal, nor does which later order finds the disk full. Twin: a room that makes up for the
    ledger's length alone."""
    if not made_up_for:
        monkeypatch.setattr(Room, "_blocks", lambda *_: 0)
    with disk(world / "disk", megabytes=24) as small:
        state = small.path / "state"
        Path("site.toml").write_text(SITE.replace('"state"', f'"{state}"'))
        room = Room(state, 20)
        free = []
        for key in ("", KEY, "b"):
            with room.give_up():
                ledger = Ledger(state, room)
                ledger.declare("records", [], cohort="first")
                if key and during:
                    receipt_of(withdraw(keys=f"{key}\n"))
            if key and not during:
                receipt_of(withdraw(keys=f"{key}\n"))
                with room.give_up():
                    pass
            free.append(small.free)
    assert (len(set(free)) == 1) is made_up_for


@pytest.mark.parametrize("lends", [True, False])
def test_a_patient_may_withdraw_where_the_disk_is_full_but_for_the_room(
    world: Path, monkeypatch: pytest.MonkeyPatch, lends: bool
) -> None:
    """Whoever sends plans could keep a patient in training. Twin: a room that lends nothing."""
    if not lends:
        monkeypatch.setattr(Room, "give_up", lambda _: nullcontext())
    with disk(world / "disk", megabytes=24) as small:
        state = small.path / "state"
        Path("site.toml").write_text(SITE.replace('"state"', f'"{state}"'))
        with Room(state, 20).give_up():
            ledger = Ledger(state, Room(state, 20))
            assert not ledger.withdrawn()
        with small.with_room_for(0):
            said = withdraw(keys=f"{KEY}\n")
            assert (said.exit_code == 0 and bool(ledger.withdrawn())) is lends
        receipt_of(withdraw(keys=f"{KEY}\n"))


def test_who_never_agreed_is_known_and_may_withdraw_too(world: Path) -> None:
    """Consent leaves the rows out of training; the patient is no stranger for that."""
    assert receipt_of(withdraw(keys="never\n")).exists()
    nobody = withdraw(keys="nobody\n")
    assert nobody.exit_code == 2 and "NOT KNOWN HERE" in nobody.output
    assert len(list((world / "state" / "withdrawals").iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"time": "1999-01-01T00:00:00Z"}, "not signed by this site"),
        ({"signature": "00" * 64}, "not signed by this site"),
        ({"unit": "00"}, "not signed by this site"),
    ],
)
def test_a_changed_receipt_is_none(world: Path, changes: dict[str, str], said: str) -> None:
    path = receipt_of(withdraw(keys=f"{KEY}\n"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    checked = withdraw("--check", str(path))
    assert checked.exit_code == 2 and said in checked.output


def test_a_receipt_whose_entry_was_lost_is_not_taken_for_a_withdrawal(world: Path) -> None:
    site = load_site("site.toml")
    ledger = Ledger(site.site.state)
    ledger.backup(world / "copy", key=True)
    path = receipt_of(withdraw(keys=f"{KEY}\n"))
    kept = path.rename(world / "receipt.json")
    for file in site.site.state.glob("ledger.*"):
        file.unlink()
    Ledger.restore(site.site.state, world / "copy")
    checked = withdraw("--check", str(kept))
    assert checked.exit_code == 2 and "does not have this withdrawal" in checked.output


WRONG: tuple[Any, ...] = (None, [], {}, 5, -1.5, 10**400, "", "x" * 100_000, "\0", [[[[]]]])
WRONG += (math.nan, math.inf, {"a": [math.nan]})  # as Python writes them; no JSON, and unsigned


def test_no_changed_receipt_is_taken_for_one(world: Path) -> None:
    """Every field with every wrong value, every field left out, and 200 damaged files."""
    path = receipt_of(withdraw(keys=f"{KEY}\n"))
    whole, ledger = path.read_bytes(), Ledger(world / "state")
    fields, draw = json.loads(whole), random.Random(1)
    texts = [json.dumps({k: v for k, v in fields.items() if k != left}) for left in fields]
    for name in (*fields, "new"):
        texts += [json.dumps(fields | {name: w}) for w in WRONG if fields.get(name) != w]
    for text in (*map(str.encode, texts), *(damaged(whole, draw) for _ in range(200))):
        path.write_bytes(text)
        with pytest.raises(InputError):
            withdrawals.check_receipt(path, ledger)
    path.write_bytes(whole)
    assert withdrawals.check_receipt(path, ledger) == fields["time"]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content with one byte changed, or a part gone, from where is no space between words."""
    start = draw.choice([at for at, byte in enumerate(content) if byte not in b" \n"])
    before, byte = content[:start], content[start]
    if draw.random() < 0.5:
        return before + bytes([byte ^ draw.randrange(1, 128)]) + content[start + 1 :]
    return before + content[start + draw.randrange(1, 30) :]


def paid_by_both(home: Path) -> Site:
    """Lay out a home of which cardio paid two rounds of "records" and onco five of "clinic", with
    "p-both" in both; return cardio's site."""
    made = make_apart(home)
    text = (home / "hospital.toml").read_text()  # as a person declares it who knows of p-both
    (home / "hospital.toml").write_text(text.replace('disjoint_from = ["clinic"]\n', ""))
    book = Ledger(home)
    for name, rounds in (("cardio", 2), ("onco", 5)):
        data = load_site(made[name]).data
        book.declare(data.name, data.disjoint_from, "content", set().union(*identities(data)))
        for round_ in range(rounds):
            charge = replace(CHARGE, study=name, name=name, round=round_, membership=name)
            number = book.reserve(data.name, charge, f"a@{name}", lambda charges: None)
            book.release(number, b"an update")
    return load_site(made["cardio"])


def test_a_receipt_names_what_every_membership_released(tmp_path: Path) -> None:
    """Of a patient in both datasets, and of one whom this membership's dataset lacks."""
    site = paid_by_both(tmp_path)
    done = leave_out(site, "p-both", Ledger(tmp_path))
    assert [(r.name, r.rounds) for r in done.releases] == [("cardio", 2), ("onco", 5)]
    assert [each["name"] for each in done.receipt["releases"]] == ["cardio", "onco"]
    assert done.in_file == 2
    done = leave_out(site, "clinic-p1", Ledger(tmp_path))
    assert done.trained_on and [r.name for r in done.releases] == ["onco"]
    with pytest.raises(UnknownPatient):
        leave_out(site, "clinic-p99", Ledger(tmp_path))


def test_a_receipt_states_what_shared_noise_costs_whatever_happens(tmp_path: Path) -> None:
    """A patient who withdraws is told no ε that other sites could make wrong.

    Twin: of studies without shared noise, one ε is stated."""
    site, book = paid_by_both(tmp_path), Ledger(tmp_path)
    shared = replace(CHARGE, study="joint", name="joint", sites=4, colluding=1, membership="cardio")
    book.release(book.reserve("records", shared, "a@cardio", lambda charges: None), b"update")
    done = leave_out(site, "p-both", book)
    planned, alone = (
        epsilon([each], site.policy.delta) for each in (shared.event, shared.fallback)
    )
    assert done.releases[-1].epsilon == pytest.approx(planned)
    assert done.releases[-1].fallback == pytest.approx(alone) and planned < alone
    assert [each["epsilon"] for each in done.receipt["releases"]] == [
        rounded_up(done.releases[0].epsilon),
        rounded_up(done.releases[1].epsilon),
        f"{rounded_up(planned)} if no more sites collude than the study's plan allows, "
        f"{rounded_up(alone)} whatever happens",
    ]


def test_a_receipt_lists_nothing_that_was_charged_after_the_withdrawal(tmp_path: Path) -> None:
    """Nor where the patient is withdrawn again, by a list of all keys, or its file was lost."""
    site, book = paid_by_both(tmp_path), Ledger(tmp_path)
    first = leave_out(site, "p-both", book)
    given = first.receipt_file.read_bytes()
    for study in ("cardio", "later"):
        charge = replace(CHARGE, study=study, name=study, round=7, membership="cardio")
        book.release(book.reserve("records", charge, "a@cardio", lambda charges: None), b"update")
    renamed = site.site.model_copy(update={"name": "south"})
    again = leave_out(site.model_copy(update={"site": renamed}), "p-both", book)
    assert again.receipt_file.read_bytes() == given and again.receipt == first.receipt
    assert [(r.name, r.rounds) for r in again.releases] == [("cardio", 2), ("onco", 5)]
    first.receipt_file.write_text("{}")
    assert leave_out(site, "p-both", book).receipt == first.receipt == json.loads(given)


def test_a_round_under_way_at_the_withdrawal_is_in_the_next_receipt(tmp_path: Path) -> None:
    """It was charged before the withdrawal, read the patient's records, and was sent after it."""
    site, book = paid_by_both(tmp_path), Ledger(tmp_path)
    charge = replace(CHARGE, study="running", name="running", round=7, membership="cardio")
    running = book.reserve("records", charge, "a@cardio", lambda charges: None)
    leave_out(site, "p-both", book)
    book.release(running, b"update")
    releases = leave_out(site, "p-both", book).receipt["releases"]
    assert [(each["name"], each["rounds"]) for each in releases] == [
        ("cardio", 2), ("onco", 5), ("running", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("refused", [False, True])
def test_a_receipt_lists_no_update_that_a_person_refused(
    tmp_path: Path, tiny_base: Path, refused: bool
) -> None:
    """Twin: one that still waits for a person, and may leave."""
    notes(tmp_path)
    site, made = make_site(tmp_path, {"answers": "held"}, patient="who"), begun(tiny_base)
    worker = SiteWorker(site)
    worker.prepare(made.study, made.frozen)
    with pytest.raises(Held):
        trains(worker, made, 1)
    if refused:
        decide(site, [], refuse=True, every=True)
    releases = leave_out(site, "p1", worker.home).releases
    assert [release.rounds for release in releases] == ([] if refused else [1])


def test_a_patient_of_another_memberships_file_alone_is_known(tmp_path: Path) -> None:
    """Twin: if that file cannot be read, nobody knows whether the key is right; a patient who was
    found elsewhere withdraws all the same, and is told that a file was not read."""
    site = load_site(make_apart(tmp_path)["cardio"])
    assert leave_out(site, "clinic-p1", Ledger(tmp_path)).in_file == 2
    (tmp_path / "clinic.jsonl").unlink()
    with pytest.raises(DataError):
        leave_out(site, "clinic-p2", Ledger(tmp_path))
    assert leave_out(site, "p1", Ledger(tmp_path)).in_file is None
    (tmp_path / "onco" / "site.toml").write_text("[site]")
    with pytest.raises(ConfigError):
        leave_out(site, "clinic-p2", Ledger(tmp_path))


# -------------------------------------------------------------- the column of patients is taken out


def with_notes(world: Path, patient: str = "who", name: str = "records", also: str = "") -> Site:
    """Lay out a site whose file names this column of patients; "" for none."""
    notes(world)
    named = f', patient = "{patient}"' if patient else ""
    text = f"""
[site]
name = "north"
declared_size = 12
state = "state"
[data]
path = "notes.jsonl"
name = "{name}"
columns = {{ prompt = "note", completion = "answer"{named} }}
{also}
[policy]
bases = "any"
max_delta = 1e-4
"""
    (world / "site.toml").write_text(text)
    return load_site("site.toml")


def begin(site: Site, base: Path, unit: str) -> tuple[SiteWorker, Start, str]:
    """Start the site, and prepare a study for this unit; return both, and why it was refused."""
    worker = SiteWorker(site, Path("site.toml"))
    made = begun(base, privacy={"epsilon": 2.0, "delta": 1e-4, "unit": unit})
    told = worker.prepare(made.study, made.frozen)
    return worker, made, told.reason


def trained(worker: SiteWorker, made: Start, round_: int, name: str = "records") -> int:
    """Return how many records the site has trained on in a round."""
    trains(worker, made, round_)
    return len(worker._cached[name][1].dataset.examples)


@pytest.mark.parametrize("withdrawn", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_no_study_reads_who_withdrew_as_somebody_unknown(
    world: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, withdrawn: bool, broken: bool
) -> None:
    """The refusal is the same whether or not anybody withdrew, and no acceptance takes it away.
    Twin: without it all 24 records train, also those of the patient who withdrew."""
    worker, made, _ = begin(with_notes(world), tiny_base, "patient")
    assert trained(worker, made, 1) == 24
    if withdrawn:
        leave_out(worker.site, "p2", worker.home)
        assert trained(worker, made, 2) == 21
    site = with_notes(world, patient="")
    if broken:
        monkeypatch.setattr("fedtune.core.vault.worker.check_column_stays", lambda *given: None)
    worker, made, refused = begin(site, tiny_base, "record")
    if broken:
        assert "the cost of earlier rounds" in refused
        worker.ledger.accept("records", "officer", "", patient_columns(site))
        worker, made, refused = begin(site, tiny_base, "record")
        assert refused == "" and trained(worker, made, 1) == 24
        return
    assert "no patient column is named" in refused and "names the column again" in refused
    assert "who'" not in refused and "records'" not in refused
    assert reason_of(refused) == "patient column"
    worker.ledger.accept("records", "officer", "", patient_columns(site))
    assert "no patient column is named" in begin(site, tiny_base, "record")[2]
    (first, *_) = cost_refusals(made.study, site, None, worker.ledger)
    assert "'who' of dataset 'records'" in str(first)
    (found,) = [each for each in examine(Path("site.toml")) if each.name == "ledger"]
    assert not found.good and "'who' of dataset 'records'" in found.says
    with pytest.raises(ConfigError, match="name the column again"):
        leave_out(site, "p3", worker.home)
    again, made, refused = begin(with_notes(world), tiny_base, "patient")  # the column is back
    assert refused == "" and trained(again, made, 3) == (21 if withdrawn else 24)


def test_nor_under_another_name_unless_a_person_signs_that_it_has_other_patients(
    world: Path, tiny_base: Path
) -> None:
    """The records moved to a dataset of another name, and no table names the earlier one."""
    worker, made, _ = begin(with_notes(world), tiny_base, "patient")
    trained(worker, made, 1)
    assert "no patient column" in begin(with_notes(world, "", "newer"), tiny_base, "record")[2]
    apart = 'disjoint_from = ["records"]'
    assert begin(with_notes(world, "", "other", apart), tiny_base, "record")[2] == ""


def test_who_withdrew_by_another_column_is_told_at_the_site(
    world: Path, tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The column is corrected before any charge, by which a study would be refused. A column that
    has another name and the same keys ends it once they are withdrawn again; the receipt stays."""
    with_notes(world)
    rows = [json.loads(line) for line in (world / "notes.jsonl").read_text().splitlines()]

    def named(column: str, keys: str = "n") -> Site:
        site = with_notes(world, column)
        more = [{**row, "nhs": row["who"].replace("p", keys)} for row in rows]
        (world / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
        return site

    def told() -> list[bool]:
        caplog.clear()
        check_before_joining(load_site("site.toml"))
        (doctor,) = [each.says for each in examine(Path("site.toml")) if each.name == "ledger"]
        shown = CliRunner().invoke(app, ["ledger", "site.toml"])
        checked = withdraw("--check", str(path))
        assert shown.exit_code == checked.exit_code == 0 and "stands" in checked.output
        said = [caplog.text, doctor, " ".join(shown.output.split()), checked.output]
        return ["did so before the column 'nhs' told patients apart" in each for each in said]

    named("who")
    path = receipt_of(withdraw(keys="p2\n"))
    given = path.read_bytes()
    assert told() == [False] * 4
    site = named("nhs")
    assert told() == [True] * 4
    worker, made, refused = begin(site, tiny_base, "patient")
    assert refused == "" and trained(worker, made, 1) == 24  # nothing is refused by it
    assert withdraw("--unseen", keys="p2\n").exit_code == 0
    assert told() == [True] * 4  # no record has this key, so that nothing says it is of this column
    named("nhs", keys="p")
    assert withdraw(keys="p2\n").exit_code == 0
    assert told() == [False] * 4 and path.read_bytes() == given
    book = Ledger(world / "state")
    assert len(book.withdrawn()) == 1 and book.withdrawn_by == {
        unit: frozenset({"who", "nhs"}) for unit in book.withdrawn()
    }


def test_a_key_of_an_earlier_column_withdraws_nobody_unasked(world: Path, tiny_base: Path) -> None:
    """The ledger knows it from a round, but the patient's records have another key by now, and
    would be read on."""
    worker, made, _ = begin(with_notes(world), tiny_base, "patient")
    assert trained(worker, made, 1) == 24
    site = with_notes(world, "nhs")
    rows = [json.loads(line) for line in (world / "notes.jsonl").read_text().splitlines()]
    more = [{**row, "nhs": row["who"].replace("p", "n")} for row in rows]
    (world / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    found = withdraw(keys="p5\n")
    assert found.exit_code == 2 and "'who' told patients apart" in found.output
    assert "in the column 'nhs' now" in found.output
    book = Ledger(world / "state")
    assert not book.withdrawn() and not [*(world / "state").glob("withdrawals/*")]
    assert withdraw(keys="n5\n").exit_code == 0 and len(book.withdrawn()) == 1
    worker.ledger.accept("records", "officer", "", patient_columns(site))
    again, made, refused = begin(site, tiny_base, "patient")
    assert refused == "" and trained(again, made, 2) == 21
    assert withdraw("--unseen", keys="p5\n").exit_code == 0  # who has no record left
    assert withdraw(keys="p5\n").exit_code == 0 and len(book.withdrawn()) == 2


def test_a_column_that_changes_while_the_site_runs_stops_its_answers(
    world: Path, tiny_base: Path
) -> None:
    """A patient withdraws by the key of the new column, and the records were read by the old."""
    worker, made, _ = begin(with_notes(world), tiny_base, "patient")
    assert trained(worker, made, 1) == 24
    with_notes(world, "nhs")
    refused = worker.prepare(made.study, made.frozen).reason
    assert refused.startswith("columns.patient was changed while this site takes part")
    with pytest.raises(PolicyRefused, match="was changed while this site"):
        trained(worker, made, 2)
    with_notes(world)
    assert trained(worker, made, 2) == 24


def test_a_key_with_a_character_at_which_python_ends_a_line(world: Path) -> None:
    keys = ["a\u2028b", "c\x0bd", "e\x85f"]
    rows = [{"who": who, "q": "cough", "agreed": "yes"} for who in keys]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("keys").write_bytes("\r\n".join(keys).encode() + b"\n\n")
    assert withdraw("--file", "keys").exit_code == 0
    ledger = Ledger(world / "state")
    assert set(ledger.withdrawn()) == {ledger.hashed(unit_member(key)) for key in keys}


@pytest.mark.parametrize("broken", [False, True])
def test_a_plan_that_waits_for_a_person_is_judged_by_what_the_files_state(
    world: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """A person follows the refusal: a dataset of its own, disjoint from the one that had a column,
    and that one's rounds do not count against it. The ledger has this declared before a charge, so
    who signs or simulates before that must not wait for it. Twin: the ledger's own declarations."""
    worker, _, _ = begin(with_notes(world), tiny_base, "patient")
    worker.ledger.reserve("records", replace(CHARGE, noise_multiplier=0.0), "a", lambda _: None)
    if broken:
        monkeypatch.setattr(patient_column, "disjoint_datasets", lambda site: {})
        monkeypatch.setattr(Ledger, "as_stated", lambda ledger, *given: ledger)
    site = with_notes(world, "", "labs", 'disjoint_from = ["records"]')
    made = begun(tiny_base, privacy={"epsilon": 2.0, "delta": 1e-4, "unit": "record"})
    plan = compute_within_limits(made.study, site)
    refused = cost_refusals(made.study, site, plan, Ledger(site.home))
    assert len(refused) == 2 * broken
    (found,) = [each for each in examine(Path("site.toml")) if each.name == "ledger"]
    assert found.good is not broken
    assert "labs" not in Ledger(site.home).datasets  # nothing was declared meanwhile
    if not broken:
        assert SiteWorker(site, Path("site.toml")).prepare(made.study, made.frozen).admitted
        itself = with_notes(world, "", "records", 'disjoint_from = ["records"]')
        assert "no patient column" in str(cost_refusals(made.study, itself, None, worker.ledger)[0])


def test_a_declaration_that_a_restore_lost_keeps_no_dataset_from_being_disjoint(
    world: Path, tiny_base: Path
) -> None:
    """The ledger remembers a column of a dataset that it has declared no more."""
    site = with_notes(world, "")
    SiteWorker(site, Path("site.toml")).ledger.backup(world / "backup")
    begin(with_notes(world), tiny_base, "patient")
    state = site.home
    with closing(sqlite3.connect(state / "ledger.db")) as connection, connection:
        connection.execute("UPDATE entries SET prev = 'x' WHERE seq = 0")
    restored = Ledger.restore(state, world / "backup")
    assert restored.datasets == [] and restored.patient_columns == {"records": ["who"]}
    assert "no patient column" in begin(with_notes(world, "", "labs"), tiny_base, "record")[2]
    apart = 'disjoint_from = ["records"]'
    assert begin(with_notes(world, "", "labs", apart), tiny_base, "record")[2] == ""


def test_declared_data_are_judged_by_the_ledger_that_pays_for_them(
    world: Path, tiny_base: Path
) -> None:
    """The lifetime ledger remembers a column and a round without noise of a private dataset. Twin:
    private data under the same name."""
    worker, made, _ = begin(with_notes(world), tiny_base, "patient")
    worker.ledger.reserve("records", replace(CHARGE, noise_multiplier=0.0), "a", lambda _: None)
    made = begun(tiny_base, privacy={"epsilon": 2.0, "delta": 1e-4, "unit": "record"})
    for also, refusals in (('declared = "public"', 0), ("", 2)):
        site = with_notes(world, "", "open", also)
        plan = compute_within_limits(made.study, site)
        assert len(cost_refusals(made.study, site, plan, worker.ledger)) == refusals
        reads = nullcontext() if also else pytest.raises(PolicyRefused, match="no patient column")
        with reads:
            _file_and_exclusion(site)


@pytest.mark.parametrize("broken", [False, True])
def test_a_restore_keeps_the_column_with_whoever_withdrew_by_it(
    world: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """From rows of the damaged ledger, as it does a withdrawal. Twin: without them a study on
    records reads everybody."""
    site = with_notes(world, "")
    worker = SiteWorker(site, Path("site.toml"))
    worker.ledger.backup(world / "backup")
    worker, _, refused = begin(with_notes(world), tiny_base, "patient")
    assert refused == ""
    leave_out(worker.site, "p2", worker.home)
    state = worker.home.folder
    with closing(sqlite3.connect(state / "ledger.db")) as connection, connection:
        connection.execute("UPDATE entries SET prev = 'x' WHERE seq = 0")
    if broken:
        monkeypatch.setattr("fedtune.core.ledger.restore._readable_columns", lambda *given: {})
    restored = Ledger.restore(state, world / "backup")
    assert restored.unknown("records", "record") == []
    assert restored.patient_columns == ({} if broken else {"records": ["who"]})
    refused = begin(with_notes(world, ""), tiny_base, "record")[2]
    assert ("no patient column is named" in refused) is not broken


def test_charges_from_which_nothing_can_be_disjoint_lock_no_dataset_out(
    world: Path, tiny_base: Path
) -> None:
    """Those of an adopted ledger, and those that a restore entered, count until a person accepts
    them. Twin: a charge per patient of a dataset that has a name here."""
    worker, _, refused = begin(with_notes(world, "", "images"), tiny_base, "record")
    assert refused == ""
    paid = replace(CHARGE, unit="patient", membership="onco", adopted=True, patient="who")
    worker.ledger.enter_earlier(
        "onco", [Earlier("onco/records", paid, "a@onco")], {}, [], "officer"
    )
    refused = begin(with_notes(world, "", "images"), tiny_base, "record")[2]
    assert "the cost of earlier rounds" in refused
    worker.ledger.accept("images", "officer", "", {})
    assert begin(with_notes(world, "", "images"), tiny_base, "record")[2] == ""
    worker.ledger.reserve("images", replace(CHARGE, unit="patient"), "adapter", lambda _: None)
    assert "no patient column" in begin(with_notes(world, "", "images"), tiny_base, "record")[2]


def test_a_dataset_that_never_had_a_column_is_read_by_record(world: Path, tiny_base: Path) -> None:
    """The twin of the refusals, and charges of earlier releases, which name no column."""
    worker, made, refused = begin(with_notes(world, ""), tiny_base, "record")
    assert refused == "" and trained(worker, made, 1) == 24
    assert worker.ledger.patient_columns == {}
    paid = replace(CHARGE, unit="patient")
    worker.ledger.reserve("records", paid, "adapter", lambda _: None)
    assert worker.ledger.patient_columns == {"records": []}
    assert "no patient column" in begin(with_notes(world, ""), tiny_base, "record")[2]


def test_in_a_home_too(tmp_path: Path, tiny_base: Path) -> None:
    files = make_hospital(tmp_path)
    worker = SiteWorker(load_site(files["cardio"]), files["cardio"])
    made = study_of("heart", tiny_base)
    assert worker.prepare(made.study, made.frozen).admitted
    for file in (tmp_path / "hospital.toml", *files.values()):
        lines = file.read_text().replace(', patient = "who"', "").splitlines()
        file.write_text("\n".join(line for line in lines if line != 'patient = "who"'))
    other = SiteWorker(load_site(files["onco"]), files["onco"])
    assert other.site.data.columns.patient is None
    made = begun(tiny_base, privacy={"epsilon": 2.0, "delta": 1e-4, "unit": "record"})
    told = other.prepare(made.study, made.frozen)
    assert not told.admitted and "no patient column is named" in told.reason


def test_in_a_home_by_its_settings_and_not_by_what_another_coordinator_sent(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registered column counts from the start. Twin: by the ledger alone a study on records goes
    on until another consortium's plan comes."""
    files = make_hospital(tmp_path)
    (tmp_path / "more.jsonl").write_text((tmp_path / "notes.jsonl").read_text())
    hospital = tmp_path / "hospital.toml"
    hospital.write_text(hospital.read_text() + '[datasets.more]\npath = "more.jsonl"\n')
    text = files["cardio"].read_text().replace(', patient = "who"', "")
    own = 'name = "more"\npath = "../more.jsonl"'
    files["cardio"].write_text(text.replace('path = "../notes.jsonl"', own))
    made = begun(tiny_base, privacy={"epsilon": 2.0, "delta": 1e-4, "unit": "record"})

    def prepare() -> str:
        worker = SiteWorker(load_site(files["cardio"]), files["cardio"])
        return worker.prepare(made.study, made.frozen).reason

    assert "no patient column is named" in prepare()
    with monkeypatch.context() as twin:
        twin.setattr(patient_column, "patient_columns", lambda site: {})
        assert prepare() == ""
        other = SiteWorker(load_site(files["onco"]), files["onco"])
        heart = study_of("heart", tiny_base)
        assert other.prepare(heart.study, heart.frozen).admitted
        assert "no patient column is named" in prepare()


def test_held_out_records_too(world: Path) -> None:
    table = """
[evaluation]
path = "held.jsonl"
name = "held"
columns = {{ prompt = "note", completion = "answer"{} }}
"""
    with_column = with_notes(world, also=table.format(', patient = "who"'))
    worker = SiteWorker(with_column, Path("site.toml"))
    worker.declare(with_column.evaluation, SimpleNamespace(unit="patient"), with_column)  # type: ignore[arg-type]
    site = with_notes(world, "", also=table.format(""))
    again = SiteWorker(site, Path("site.toml"))
    with pytest.raises(PolicyRefused, match="no patient column is named"):
        again.declare(site.evaluation, SimpleNamespace(unit="record"), site)  # type: ignore[arg-type]
