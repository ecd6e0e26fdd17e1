"""Data declared public or generated: paid from a ledger of the run, marked, and never what was
private."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import Site, load_site, load_study
from fedtune.core.config.patient_columns import patient_columns
from fedtune.core.data.identity import identities
from fedtune.core.data.records import record_member
from fedtune.core.errors import ConfigError, FedtuneError, PolicyRefused
from fedtune.core.ledger import declared as declared_entries
from fedtune.core.ledger.entries import EVERY
from fedtune.core.ledger.ledger import Charge, Ledger, LedgerError
from fedtune.core.vault import declared, studies
from fedtune.core.vault.declared import declare
from fedtune.core.vault.worker import SiteWorker
from fedtune.evidence.verify import verify
from fedtune.launch.simulate import simulate
from fedtune.launch.site import join
from fedtune.officer.before_joining import check_before_joining
from fedtune.officer.claims import compare
from tests.cli_kit import run
from tests.client.site_kit import begun, make_site, notes, trains

NOTES = "the patient was seen with fever and a cough, for day"


def with_long_notes(folder: Path) -> Site:
    """A site of private records: short answers, notes of over 40 letters."""
    notes(folder)
    rows = [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]
    write(folder / "notes.jsonl", [r | {"note": f"{NOTES} {n}"} for n, r in enumerate(rows)])
    return make_site(folder, patient="who")


def paid(folder: Path, base: Path) -> Site:
    """A site whose private records trained one round."""
    site = with_long_notes(folder)
    worker, made = SiteWorker(site), begun(base)
    assert worker.prepare(made.study, made.frozen).admitted
    trains(worker, made, 1)
    return site


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def relabelled(site: Site, rows: list[dict[str, str]], **changes: object) -> Site:
    path = write(site.data.path.with_name("other.jsonl"), rows)
    data = {"path": path, "declared": "public", "name": "other"} | changes
    return site.model_copy(update={"data": site.data.model_copy(update=data)})


def public(count: int) -> list[dict[str, str]]:
    return [
        {"who": f"g{n}", "note": f"a note that nobody wrote of anybody, number {n}", "answer": "no"}
        for n in range(count)
    ]


@pytest.fixture
def site(tmp_path: Path, tiny_base: Path) -> Site:
    return paid(tmp_path, tiny_base)


def private_rows(site: Site) -> list[dict[str, str]]:
    return [json.loads(line) for line in site.data.path.read_text().splitlines()]


def test_the_same_name_is_refused_whatever_is_in_the_file(site: Site) -> None:
    with pytest.raises(PolicyRefused, match="dataset 'records' was charged as private"):
        declare(relabelled(site, public(12), name="records"))


def test_a_coordinator_learns_of_such_a_refusal_without_the_name(site: Site) -> None:
    """Twin: the same check, for the person at the site."""
    book = Ledger(site.site.state)
    with pytest.raises(PolicyRefused, match="charged as private here") as sent:
        declared_entries.check_declared(book, "records", "public")
    assert "'records'" not in str(sent.value)
    with pytest.raises(PolicyRefused, match="dataset 'records' was charged as private"):
        declared_entries.check_name({"records"}, "records", "public", at_site=True)


@pytest.mark.parametrize("which", ["all", "some", "one among public ones"])
def test_records_once_charged_are_refused_under_another_name(site: Site, which: str) -> None:
    rows = private_rows(site)
    chosen = {"all": rows, "some": rows[3:7], "one among public ones": [*public(20), rows[5]]}
    with pytest.raises(PolicyRefused, match="charged as private here"):
        declare(relabelled(site, chosen[which]))
    assert Ledger(site.site.state)._account.not_private == {}


def test_a_record_is_known_again_under_another_patient_in_other_columns_and_by_its_patient_alone(
    site: Site,
) -> None:
    row = private_rows(site)[5]
    columns = site.data.columns
    stranger = {**row, "who": "g99"}
    text = columns.model_copy(update={"prompt": None, "completion": None, "text": "note"})
    same_patient = {**public(1)[0], "who": row["who"]}
    for changed in (
        relabelled(site, [*public(9), stranger]),
        relabelled(site, [*public(9), stranger], columns=text),
        relabelled(site, [*public(9), same_patient]),
    ):
        with pytest.raises(PolicyRefused, match="1 of 10 records"):
            declare(changed)


def test_other_records_are_declared_once_by_a_signed_entry(site: Site) -> None:
    """The twin of the refusals: what shares nothing with private records passes."""
    other = relabelled(site, public(12))
    before = Ledger(site.site.state).head.seq
    declare(other)
    declare(other)
    ledger = Ledger(site.site.state)
    ledger.verify()
    assert ledger.head.seq == before + 1
    assert ledger._account.not_private == {"other": "public"}


def test_without_the_hashes_a_relabelled_record_would_pass(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: a check that does not know the records again lets them through."""
    monkeypatch.setattr(declared, "identities", lambda data: [{b"unknown"}])
    declare(relabelled(site, private_rows(site)))


def test_hashes_of_a_withdrawn_patient_and_after_purge_still_refuse(site: Site) -> None:
    from fedtune.core.data.records import unit_member
    from fedtune.officer.purge import listing, purge

    row = private_rows(site)[5]
    Ledger(site.site.state).withdraw(unit_member(row["who"]))
    purge(listing(site))
    with pytest.raises(PolicyRefused, match="1 of 10 records"):
        declare(relabelled(site, [*public(9), {**row, "who": "g99"}]))


def test_after_a_restore_that_lost_charges_nothing_is_declared(site: Site, tmp_path: Path) -> None:
    (site.site.state / "ledger.db").unlink()
    Ledger.restore(site.site.state)
    with pytest.raises(PolicyRefused, match="this ledger was restored"):
        declare(relabelled(site, public(12)))


@pytest.fixture
def tried(tmp_path: Path) -> Site:
    """A site whose private records were declared public before anybody paid for them."""
    site = with_long_notes(tmp_path)
    public_site = site.model_copy(
        update={"data": site.data.model_copy(update={"declared": "public", "name": "tried"})}
    )
    declare(public_site)
    return site


def test_what_was_tried_for_free_is_not_private_until_a_person_accepts_it(
    tried: Site, tmp_path: Path, tiny_base: Path
) -> None:
    with pytest.raises(PolicyRefused, match=r"24 of 24 records .* in no budget"):
        declare(tried)
    ledger = Ledger(tried.site.state)
    ledger.verify()
    assert declared_entries.list_not_accepted(ledger, tried.data.name)
    ledger.accept(tried.data.name, "an officer", "tried once, on this machine", declared=["tried"])
    assert not declared_entries.list_not_accepted(Ledger(tried.site.state), tried.data.name)
    declare(tried)
    worker, made = SiteWorker(tried), begun(tiny_base)
    assert worker.prepare(made.study, made.frozen).admitted
    trains(worker, made, 1)
    data = tried.data.model_copy(update={"declared": "public"})
    with pytest.raises(PolicyRefused, match="was charged as private here"):
        declare(tried.model_copy(update={"data": data}))


def test_an_acceptance_of_something_else_is_none_of_declared_records(tried: Site) -> None:
    """As of a column that was only renamed. Twins: one that names what was declared, one of an
    earlier release, which was for everything, and what is declared again afterwards."""
    ledger, name = Ledger(tried.site.state), tried.data.name
    ledger.accept(name, "an officer", "the column was renamed")
    with pytest.raises(PolicyRefused, match=r"24 of 24 records .* in 'tried', "):
        declare(tried)
    assert declared.list_shared(tried, ledger, name) == ["tried"]
    ledger.accept(name, "an officer", "tried once", declared=["tried"])
    declare(tried)
    assert declared.list_shared(tried, ledger, name) == []
    declared_entries.declare(ledger, "later", "generated", identities(tried.data))
    with pytest.raises(PolicyRefused, match="in 'later', "):
        declare(tried)
    with ledger._store.writing() as writer:
        earlier = {"dataset": name, "upto": ledger._store.head.seq, "by": "somebody", "why": ""}
        writer.append("accept", earlier)
    declare(tried)


def lay_out_restore(tried: Site, tmp_path: Path, how: str) -> Ledger:
    """Restore the ledger from a copy of before anything was declared, or from what is left."""
    state, early = tried.site.state, tmp_path / "early"
    if how == "nothing is lost":
        return Ledger.restore(state)
    shutil.copytree(state, early)
    with closing(sqlite3.connect(early / "ledger.db")) as database, database:
        database.execute("DELETE FROM entries WHERE seq > 0")
        database.execute("DELETE FROM members")
    if how == "its row is read":  # but for the first entry, the database is whole
        with closing(sqlite3.connect(state / "ledger.db")) as database, database:
            database.execute("UPDATE entries SET hash = '' WHERE seq = 0")
    else:
        (state / "ledger.db").unlink()
    return Ledger.restore(state, early if how != "no copy" else None)


@pytest.mark.parametrize("how", ["a copy", "no copy", "its row is read", "nothing is lost"])
def test_a_restore_forgets_no_declaration_without_a_word(
    tried: Site, tmp_path: Path, how: str
) -> None:
    """Private records are accepted as perhaps declared, whether or not any was; what can be read of
    a declaration is kept. Twin: nothing was lost."""
    from fedtune.core.config import save

    file, name = str(save(tried, tmp_path / "site.toml")), tried.data.name
    ledger = lay_out_restore(tried, tmp_path, how)
    if ledger.frozen:
        ledger.lift("an officer", "nobody withdrew")
    lost, read = how != "nothing is lost", how in ("its row is read", "nothing is lost")
    shared = [*(["*"] if lost else []), *(["tried"] if read else [])]
    assert declared.list_shared(tried, ledger, name) == shared
    options = [word for each in shared for word in ("--accept-declared", each)]
    told = " ".join(run("ledger", file).output.split())
    assert ("a restore of the ledger may have lost which ones were" in told) == lost
    assert ("--accept-declared '*'" in told) == lost and "NOT ACCEPTED" in told
    words = (
        ["24 of 24 records"] if read else ["a restore of the ledger may have lost which ones were"]
    )
    with pytest.raises(PolicyRefused, match=words[0]):
        declare(tried)
    accepted = run("ledger", file, "--accept", name, *options)
    assert accepted.exit_code == 0, accepted.output
    declare(tried)
    assert bool(ledger.members_lost) == lost


@pytest.mark.parametrize("copy", [False, True])
def test_a_restore_asks_alike_whatever_was_lost(tmp_path: Path, copy: bool) -> None:
    """Nothing was ever declared, nor entered since the copy."""
    site = with_long_notes(tmp_path)
    ledger = Ledger(site.site.state)
    ledger.declare(site.data.name, [])
    ledger.backup(tmp_path / "copy")
    (site.site.state / "ledger.db").unlink()
    Ledger.restore(site.site.state, tmp_path / "copy" if copy else None)
    with pytest.raises(
        PolicyRefused, match="a restore of the ledger may have lost which ones were"
    ):
        declare(site)


def test_after_a_restore_a_site_waits_for_a_person_in_mid_study_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike the records themselves, the restore may decide whether the site comes back."""
    site = with_long_notes(tmp_path)
    ledger, name = Ledger(site.site.state), site.data.name
    ledger.declare(name, [])
    monkeypatch.setattr(studies, "under_way", lambda state: {"sha256:0": "a study"})
    check_before_joining(site)
    (site.site.state / "ledger.db").unlink()
    ledger = Ledger.restore(site.site.state, None)
    with pytest.raises(PolicyRefused, match="may have lost which ones were"):
        check_before_joining(site)
    ledger.accept(name, "an officer", "none was ever declared", {}, [EVERY], ledger.head.seq)
    check_before_joining(site)


def pay_by_earlier_rules(tried: Site, round_: int = 1) -> None:
    """Charge a round whose cost is not known, as that of an earlier release."""
    ledger, digest = Ledger(tried.site.state), "sha256:" + "5" * 64
    one = Charge(digest, "old", round_, 2.0, 0.1, 1, 1, 1.0, "patient", "first", rules=1)
    ledger.declare(tried.data.name, [])
    ledger.reserve(tried.data.name, one, "adapter", lambda charges: None)


def test_declared_records_are_accepted_by_name_alone(tried: Site) -> None:
    """Whoever accepts rounds is told what is left, and accepts no record with them. Twin: the name
    of the declared dataset is given."""
    from fedtune.core.config import save

    file, name = str(save(tried, tried.data.path.with_name("site.toml"))), tried.data.name
    left = f"NOT ACCEPTED: {name} has private records that were declared public or generated here"
    named = "--accept-declared", "tried"
    assert left in run("ledger", file).output  # before anything is accepted, too
    told = run("ledger", file, "--accept", name)
    assert told.exit_code == 2 and "--accept-declared tried" in " ".join(told.output.split())
    pay_by_earlier_rules(tried)
    shown = run("ledger", file, "--accept", name, "--reason", "renamed")
    assert shown.exit_code == 0 and left in shown.output and "accepted: " not in shown.output
    assert not Ledger(tried.site.state).unknown(name, "patient", patient_columns(tried))
    with pytest.raises(PolicyRefused, match=r"in 'tried', .*--accept-declared tried --reason"):
        declare(tried)
    assert run("ledger", file, "--accept", name, "--accept-declared", "other").exit_code == 2
    assert run("ledger", file, *named).exit_code == 2
    shown = run("ledger", file, "--accept", name, *named, "--reason", "tried once")
    assert shown.exit_code == 0 and "accepted: " in shown.output and left not in shown.output
    declare(tried)
    assert run("ledger", file, "--accept", name).exit_code == 2  # nothing is left


def test_nobody_accepts_what_comes_while_the_records_are_read(
    tried: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: a round that was there before."""
    from fedtune.core.config import save

    file, name = str(save(tried, tried.data.path.with_name("site.toml"))), tried.data.name
    pay_by_earlier_rules(tried)
    read = declared.list_shared

    def is_charged_meanwhile(*given: Any) -> list[str]:
        pay_by_earlier_rules(tried, 2)
        return read(*given)

    monkeypatch.setattr(declared, "list_shared", is_charged_meanwhile)
    assert run("ledger", file, "--accept", name).exit_code == 0
    left = Ledger(tried.site.state).unknown(name, "patient", patient_columns(tried))
    assert [spent.charge.round for spent in left] == [2]


def test_one_record_that_was_tried_for_free_is_enough(tried: Site) -> None:
    """And a twin: other records, of patients with the same numbers, are private as ever."""
    rows = private_rows(tried)
    other = [{**row, "note": f"other words of another day {n}"} for n, row in enumerate(rows)]
    path = write(tried.data.path.with_name("later.jsonl"), other)
    data = tried.data.model_copy(update={"path": path})
    declare(tried.model_copy(update={"data": data}))
    write(path, [*other, {**rows[3], "who": "p99"}])
    with pytest.raises(PolicyRefused, match="1 of 25 records"):
        declare(tried.model_copy(update={"data": data}))


def test_the_hashes_of_what_was_declared_are_signed_for(tried: Site) -> None:
    with sqlite3.connect(tried.site.state / "ledger.db") as database:
        assert database.execute("DELETE FROM members").rowcount
    with pytest.raises(LedgerError, match="were edited"):
        Ledger(tried.site.state)


def test_the_hash_is_of_the_whole_record(site: Site) -> None:
    from fedtune.core.data.records import read_records

    records, _ = read_records(site.data, unit="patient")
    ledger = Ledger(site.site.state)
    assert all(ledger.holds("records", record_member(record)) for record in records)


def test_doctor_and_review_say_so_and_sign_nothing(site: Site) -> None:
    from fedtune.core.config import save
    from fedtune.officer.doctor import examine

    before = Ledger(site.site.state).head
    good = save(relabelled(site, public(12)), site.data.path.with_name("good.toml"))
    (finding,) = [found for found in examine(good) if found.name == "declared data"]
    assert finding.good and "allow_declared_data" in finding.says
    bad = relabelled(site, private_rows(site)[:6])
    path = save(bad, site.data.path.with_name("bad.toml"))
    (finding,) = [found for found in examine(path) if found.name == "declared data"]
    assert not finding.good and "charged as private" in finding.says
    assert Ledger(site.site.state).head == before


# ------------------------------------------------------------------------------ a whole run


def declare_in(path: Path, what: str = "generated") -> None:
    path.write_text(path.read_text().replace("[data]", f'[data]\ndeclared = "{what}"'))


def test_a_run_pays_from_its_own_ledger_and_is_marked_by_site(study: Path) -> None:
    north, south = Path("north/site.toml"), Path("south/site.toml")
    declare_in(north)
    sites = [load_site(north), load_site(south)]
    run = simulate(load_study(study), sites, "runs/a")
    assert run.report["declared"] == {"north": "generated"}
    assert Ledger(Path("north/state")).spending() == []
    assert len(Ledger(Path("south/state")).spending()) == 2, "the twin: private is paid for life"
    assert len(Ledger(Path("runs/a/ledgers/north")).spending("records")) == 2
    text = Path("runs/a/report.md").read_text()
    assert "north trained on data that its site declared generated" in text
    assert "south trained" not in text


def test_a_declared_run_can_be_rehearsed_as_often_as_one_likes(study: Path) -> None:
    for name in ("north", "south"):
        declare_in(Path(f"{name}/site.toml"), "public")
    sites = [load_site(f"{name}/site.toml") for name in ("north", "south")]
    for number in range(3):  # the ceiling is one such study
        run = simulate(load_study(study), sites, f"runs/{number}")
    assert "no claim about patients" in Path("runs/2/report.md").read_text()
    assert run.report["declared"] == {"north": "public", "south": "public"}


def test_private_studies_are_refused_where_declared_ones_are_not(study: Path) -> None:
    """The twin: the same three times on private data."""
    from fedtune.core.errors import Refused

    sites = [load_site(f"{name}/site.toml") for name in ("north", "south")]
    simulate(load_study(study), sites, "runs/0")
    with pytest.raises(Refused, match="max_epsilon"):
        simulate(load_study(study, settings=["study.seed=5"]), sites, "runs/1")


def test_a_run_that_is_refused_leaves_no_ledger(study: Path) -> None:
    declare_in(Path("north/site.toml"))
    south = Path("south/site.toml")
    south.write_text(south.read_text().replace("max_epsilon = 8", "max_epsilon = 0.5"))
    sites = [load_site(f"{name}/site.toml") for name in ("north", "south")]
    with pytest.raises(Exception, match="max_epsilon"):
        simulate(load_study(study, settings=["strategy.min_sites=2"]), sites, "runs/a")
    assert not Path("runs/a").exists()


def test_a_resumed_run_goes_on_in_its_own_ledger(study: Path) -> None:
    declare_in(Path("north/site.toml"))
    sites = [load_site("north/site.toml")]
    one = load_study(study, settings=["strategy.min_sites=1"])

    def stop(event: str, data: object) -> None:
        if event == "round":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(one, sites, "runs/a", on_event=stop)
    run = simulate(one, sites, "runs/a", resume=True)
    assert len(Ledger(Path("runs/a/ledgers/north")).spending("records")) == 2
    assert run.report["declared"] == {"north": "generated"}


def test_a_site_cannot_turn_public_in_the_middle_of_a_study(study: Path) -> None:
    one = load_study(study, settings=["strategy.min_sites=1"])
    path = Path("north/site.toml")

    def stop(event: str, data: object) -> None:
        if event == "round":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(one, [load_site(path)], "runs/a", on_event=stop)
    rows = [{"prompt": f"Invented {n}?", "completion": " no"} for n in range(12)]
    write(path.with_name("new.jsonl"), rows)
    path.write_text(
        path.read_text().replace('path = "data.jsonl"', 'name = "new"\npath = "new.jsonl"')
    )
    declare_in(path)
    with pytest.raises(FedtuneError) as refused:
        simulate(one, [load_site(path)], "runs/a", resume=True)
    assert "what it declares of its data changed" in str(refused.value)


# --------------------------------------------------------------------------- a consortium


def test_a_client_refuses_declared_data_unless_its_policy_allows_it(tmp_path: Path) -> None:
    notes(tmp_path)
    from fedtune.core.config import save

    site = make_site(tmp_path, patient="who")
    site = site.changed(data={"declared": "public"})
    with pytest.raises(FedtuneError) as refused:
        join(save(site, tmp_path / "site.toml"))
    assert "allow_declared_data" in str(refused.value)
    allowed = site.changed(policy={"allow_declared_data": True})
    with pytest.raises(FedtuneError, match="fedtune enroll"):  # it goes on, and is not enrolled
        join(save(allowed, tmp_path / "site.toml"))


def test_a_site_of_a_consortium_pays_each_plan_from_a_ledger_of_its_own(
    tmp_path: Path, tiny_base: Path
) -> None:
    from fedtune.core.config import save

    notes(tmp_path)
    site = make_site(tmp_path, {"allow_declared_data": True}, patient="who")
    path = save(site.changed(data={"declared": "public"}), tmp_path / "site.toml")
    made = begun(tiny_base)
    worker = SiteWorker(load_site(path), path)
    refused = worker.begin_run(made.study.digest).prepare(made.study, made.frozen)
    assert "no such declaration" in refused.reason, "checked before it joined, or not at all"
    declare(load_site(path))
    mine = worker.begin_run(made.study.digest)
    admission = mine.prepare(made.study, made.frozen)
    assert admission.admitted and admission.declared == "public"
    trains(mine, made, 1)
    home = Ledger(tmp_path / "state")
    assert home.spending() == [] and mine.key.public == home.key.public
    assert len(mine.ledger.spending("records")) == 1
    restarted = SiteWorker(load_site(path), path).begin_run(made.study.digest)
    assert len(restarted.ledger.spending("records")) == 1, "a crash forgets no round"
    private = save(site, tmp_path / "site.toml")
    assert "data.declared was changed" in mine.prepare(made.study, made.frozen).reason
    own = SiteWorker(load_site(private), private)
    assert own.begin_run(made.study.digest) is own


def test_no_plan_and_no_other_key_makes_private_data_cheap(study: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        load_study(study, settings=['data.declared="public"'])
    site = Path("north/site.toml")
    text = site.read_text()
    site.write_text(text.replace("[data]", 'ledger = "elsewhere"\n[data]'))
    with pytest.raises(ConfigError, match=r"site\.ledger: allowed only with data\.declared"):
        load_site(site)


# -------------------------------------------------------------------------------- every output


def test_every_output_of_a_run_names_its_declared_sites(study: Path) -> None:
    from fedtune.derive.model_card import gguf_metadata, privacy_line
    from fedtune.report.declared import declared_in, declared_line
    from tests.cli_kit import run

    declare_in(Path("north/site.toml"))
    shown = run("simulate", study, "--out", "runs/a").output
    words = "north trained on data that its site declared generated"
    report = json.loads(Path("runs/a/report.json").read_text())
    base = type("Base", (), {"name": "tiny"})()
    outputs = [
        " ".join(shown.split()),
        Path("runs/a/report.md").read_text(),
        privacy_line(report),
        privacy_line(report | {"private": False}),
        gguf_metadata(report, base)["description"],
        declared_line(declared_in([report, report])),
    ]
    assert all(words in text for text in outputs), outputs
    assert "data declared generated" in run("status", "runs/a", "--once").output
    # The twin: what no site declared is marked nowhere, nor what one of several runs had private.
    private = {key: value for key, value in report.items() if key != "declared"}
    assert "declared" not in privacy_line(private)
    assert declared_in([report, private]) == {"simulation": True}


def test_what_was_private_in_a_run_without_privacy_is_not_declared() -> None:
    """Its report lists the sites in its rounds alone, and that of a model which was derived from it
    nowhere. Twin: a run without privacy where the site declared its data too."""
    from fedtune.report.declared import declared_in

    north = {"declared": {"north": "public"}}
    report = {"private": True, "privacy": {"sites": {"north": {}}}} | north
    off: dict[str, Any] = {"private": False, "privacy": {"mode": "off"}}
    ran = off | {"rounds": [{"participants": ["north", "south"]}]}
    assert declared_in([report, ran]) == declared_in([report, off | {"rounds": []}]) == {}
    assert declared_in([report, ran | north]) == declared_in([report]) == north


def test_a_site_that_cannot_say_what_a_run_cost_it_states_no_epsilon(study: Path) -> None:
    """Of its rounds in the run, which were charged per record, before it named its patients. Twin:
    the site as it was."""
    north, south = (load_site(f"{name}/site.toml") for name in ("north", "south"))
    run = simulate(load_study(study), [north, south], "runs/a")
    found = verify(run.folder)
    was = compare(north, run.folder, found)
    assert was.known and was.paid is not None and was.paid > 0
    columns = north.data.columns.model_copy(update={"patient": "pid"})
    data = north.data.model_copy(update={"columns": columns})
    now = compare(north.model_copy(update={"data": data}), run.folder, found)
    assert (now.known, now.paid, now.rounds) == (False, None, was.rounds)
