"""A second ledger for the same records is refused on this machine, before the site joins."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.core.config import load_site
from fedtune.core.config.hospital import RegisteredData
from fedtune.core.data.records import unit_member
from fedtune.core.errors import ConfigError, FedtuneError, InfrastructureError, InputError
from fedtune.core.ledger.entries import EVERY
from fedtune.core.ledger.files import LedgerError
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.seal import receipt
from fedtune.core.wire.spool import Spool
from fedtune.courier.process import list_readable
from fedtune.derive import label
from fedtune.homes import known_homes
from fedtune.homes.opening import check_ledger_stands, open_ledger
from fedtune.launch import site as launch
from fedtune.launch import spooled
from fedtune.launch.tune import tune
from fedtune.officer import adopt as adoption
from fedtune.officer import before_joining
from fedtune.officer.adopt import adopt
from fedtune.officer.before_joining import check_before_joining
from fedtune.officer.memberships import still
from fedtune.server import rounds
from tests.cli_kit import run
from tests.client.adoption_kit import make_site, spend, write_notes
from tests.expected import raises_nothing
from tests.simulated import simulate


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    write_notes(tmp_path / "notes.jsonl", ["a", "b", "c"])
    for name in ("cardio", "onco"):
        spend(make_site(tmp_path, name), 1)
    return tmp_path


def join(world: Path, name: str) -> None:
    check_before_joining(load_site(world / f"{name}.toml"))


def test_a_second_home_of_the_same_records_is_refused_and_told_the_way_out(world: Path) -> None:
    join(world, "cardio")
    join(world, "cardio")  # started again
    with pytest.raises(ConfigError) as refused:
        join(world, "onco")
    said = str(refused.value)
    assert str(world / "cardio-state") in said and "--adopt" in said
    assert f"--forget {world / 'notes.jsonl'}" in said
    notes = known_homes.path_of_notes()
    assert notes == world / "xdg" / "fedtune" / "homes.json"
    assert notes.stat().st_mode & 0o777 == 0o600 and notes.parent.stat().st_mode & 0o77 == 0


def test_the_courier_reads_no_note_of_a_home(world: Path) -> None:
    join(world, "cardio")
    site = load_site(world / "cardio.toml", alone=True)
    notes = known_homes.path_of_notes()
    assert not any(notes.is_relative_to(path.absolute()) for path in list_readable(site))


def test_without_the_check_the_second_joins(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin."""
    monkeypatch.setattr(before_joining, "check_home", lambda site: None)
    for name in ("cardio", "onco"):
        join(world, name)


@pytest.mark.parametrize("how", ["link", "hard link", "renamed", "folder's other name", "database"])
def test_the_same_place_is_known_by_whatever_path(world: Path, how: str) -> None:
    notes = world / "notes.jsonl"
    path = "other.jsonl"
    if how == "database":
        for name in ("cardio", "onco"):
            file = make_site(world, name)
            text = file.read_text().replace(
                'path = "notes.jsonl"',
                'url = "postgresql://USER@host/db"\noptions = { table = "notes" }',
            )
            file.write_text(text.replace("USER", name))
        known_homes.check_home(load_site(world / "cardio.toml"))
        with pytest.raises(ConfigError, match="postgresql://host/db"):
            known_homes.check_home(load_site(world / "onco.toml"))
        return
    join(world, "cardio")
    if how == "link":
        (world / path).symlink_to(notes)
    elif how == "hard link":
        (world / path).hardlink_to(notes)
    elif how == "renamed":
        notes.rename(world / path)
    else:
        (world / "also").symlink_to(world, target_is_directory=True)
        path = "also/notes.jsonl"
    make_site(world, "onco", path=path)
    with pytest.raises(ConfigError, match="another ledger"):
        join(world, "onco")


@pytest.mark.parametrize(("first", "second"), [("notes.jsonl", "."), (".", "notes.jsonl")])
def test_a_folder_and_a_file_in_it_are_one_place(world: Path, first: str, second: str) -> None:
    """Also by a link to the folder; beside it lies another place."""
    (world / "data").mkdir()
    (world / "data" / "notes.jsonl").write_text((world / "notes.jsonl").read_text())
    (world / "data-2").mkdir()
    (world / "data-2" / "notes.jsonl").write_text((world / "notes.jsonl").read_text())
    (world / "also").symlink_to(world / "data", target_is_directory=True)
    known_homes.check_home(load_site(make_site(world, "cardio", path=f"data/{first}")))
    for folder in ("data", "also"):
        with pytest.raises(ConfigError, match="another ledger") as refused:
            known_homes.check_home(load_site(make_site(world, "onco", path=f"{folder}/{second}")))
    known_homes.check_home(load_site(make_site(world, "onco", path=f"data-2/{second}")))
    place = str(refused.value).rpartition("--forget ")[2].strip("`")
    assert known_homes.forget(place, world / "onco-state") == [str(world / "cardio-state")]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("//host/db", "//other@HOST:5432/db?application_name=x", True),
        ("//host/db", "///db?host=host", True),
        ("//host/db", "//host/?dbname=db", True),
        ("//ada@host", "//host/ada", True),
        ("//one,host:5432/db", "//host/db", True),
        ("///db", "//localhost/db", True),
        ("//[::1]:5433/db", "///db?port=5433&hostaddr=127.0.0.1", True),
        ("///db?host=/run/a", "//%2Frun%2Fa/db", True),
        ("///db?host=/run/a", "///db?host=/run/b", False),
        ("//host/db", "//host:5433/db", False),
        ("//host/db", "//host/db2", False),
        ("//host/db", "//host2/db", False),
    ],
)
def test_a_database_is_known_however_its_url_is_spelled(
    world: Path, first: str, second: str, same: bool
) -> None:
    for name, url in (("cardio", first), ("onco", second)):
        file = make_site(world, name)
        place = f'url = "postgresql:{url}"\noptions = {{ table = "notes" }}'
        file.write_text(file.read_text().replace('path = "notes.jsonl"', place))
    sites = [load_site(world / f"{name}.toml") for name in ("cardio", "onco")]
    known_homes.check_home(sites[0])
    if same:
        with pytest.raises(ConfigError, match="another ledger"):
            known_homes.check_home(sites[1])
    else:
        known_homes.check_home(sites[1])
    registered = RegisteredData(url=f"postgresql:{first}")
    assert registered.is_place_of(sites[1].data) == (same and "," not in first)


def test_other_records_do_not_matter(world: Path) -> None:
    join(world, "cardio")
    write_notes(world / "scans.jsonl", ["x", "y"])
    spend(make_site(world, "scan", path="scans.jsonl"), 1)
    join(world, "scan")


def unmount(home: Path) -> None:
    """Leave what is seen of a home whose volume is not mounted: the empty folder below it."""
    home.rename(home.with_name("volume"))
    home.mkdir()


def test_a_home_that_is_not_mounted_is_not_begun_anew(world: Path) -> None:
    """Nor by another site, nor after a command that began a ledger in the empty folder. Once it is
    mounted again, the site joins."""
    join(world, "cardio")
    home = world / "cardio-state"
    unmount(home)
    for name, said in (("cardio", "is not there"), ("onco", "is its volume mounted")):
        with pytest.raises(ConfigError, match=said):
            join(world, name)
    Ledger(home)  # as `fedtune ledger` does
    with pytest.raises(ConfigError, match="is not there"):
        join(world, "cardio")
    shutil.rmtree(home)
    (world / "volume").rename(home)
    join(world, "cardio")


@pytest.mark.parametrize("how", ["the client's", "in a spool", "for each request"])
def test_a_vault_that_is_started_again_begins_no_ledger(
    world: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Each request may start a vault, on another node too, long after the site was checked."""
    join(world, "cardio")
    path, runs = world / "cardio.toml", list[str]()
    site = load_site(path)
    if how == "in a spool":
        unmount(site.home)
        vault = spooled._vault(site, path, Spool.at(world), False, 1)
        with pytest.raises(ConfigError, match="is not there"), vault:
            pytest.fail("it was started")
    elif how == "for each request":
        unmount(site.home)
        monkeypatch.setattr(spooled, "_run", lambda *_: pytest.fail("the command was run"))
        ran = site.model_copy(update={"vault": SimpleNamespace(command=["true"])})
        spool: Any = SimpleNamespace(path=world, waiting=lambda: ["0" * 64])
        with pytest.raises(ConfigError, match="is not there"):
            spooled._start_for_each(ran, path, spool, False, 1, lambda *_: None)
    else:

        class Halves:
            courier = None

            def __init__(self, **_: Any) -> None:
                assert not runs, "started where the ledger is gone"
                runs.append("halves")

            def __enter__(self) -> Halves:
                unmount(site.home)
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def watch(self, shown: Any) -> InfrastructureError:
                return InfrastructureError("the vault ended")

        monkeypatch.setattr(launch, "Halves", Halves)
        monkeypatch.setattr(launch, "check", lambda *_: None)
        monkeypatch.setattr(launch, "read_link", lambda *_: SimpleNamespace(address="here"))
        monkeypatch.setattr(launch, "place_of", lambda *_: {})
        with pytest.raises(ConfigError, match="is not there"):
            launch.join(path)
        assert runs == ["halves"]
    assert not [*site.home.glob("*.db"), *site.home.glob("*.key")]


def test_without_the_check_an_empty_folder_is_a_new_home(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin."""
    monkeypatch.setattr(known_homes, "_check_same_ledger", lambda *_: None)
    join(world, "cardio")
    unmount(world / "cardio-state")
    join(world, "cardio")
    assert Ledger(world / "cardio-state").spending() == []


COMMANDS: dict[str, list[str]] = {
    "withdraw": ["withdraw", "SITE", "--file", "WORLD/keys"],
    "check a receipt": ["withdraw", "SITE", "--check", "WORLD/keys"],
    "enroll": ["enroll", "SITE", "--out", "WORLD/request"],
    "ledger": ["ledger", "SITE"],
    "accept": ["ledger", "SITE", "--accept", "notes", "--reason", "known"],
    "backup": ["ledger", "SITE", "--backup", "WORLD/copy"],
    "freeze": ["ledger", "SITE", "--freeze", "--reason", "an incident"],
    "lift": ["ledger", "SITE", "--lift", "--reason", "it is over"],
    "let go": ["let-go", "SITE"],
    "evidence": ["evidence", "SITE", "--to", "WORLD/kept"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_begins_a_ledger_in_a_folder_that_is_not_mounted(
    world: Path, command: str
) -> None:
    """A withdrawal would be hidden beneath the volume, once it is mounted again, and a freeze would
    stop nobody. A view says that the ledger is not there, and not that nothing was spent."""
    join(world, "cardio")
    unmount(world / "cardio-state")
    (world / "keys").write_text("a\n")
    places = {"SITE": str(world / "cardio.toml"), "WORLD": str(world)}
    words = [re.sub("SITE|WORLD", lambda m: places[m[0]], word) for word in COMMANDS[command]]
    done = run(*words)
    assert done.exit_code == 2 and "is not there" in done.output, done.output
    assert not any((world / "cardio-state").iterdir())


def test_a_view_begins_no_ledger(world: Path) -> None:
    """Also of a home of which nothing is known."""
    site = make_site(world, "new")
    (world / "new-state").mkdir(exist_ok=True)
    done = run("ledger", site)
    assert done.exit_code == 2 and "no ledger yet" in done.output
    assert not any((world / "new-state").iterdir())


def test_nobody_withdrew_is_not_said_of_a_ledger_that_is_not_mounted(world: Path) -> None:
    """Of a home that is new, it is said."""
    join(world, "cardio")
    site = load_site(world / "cardio.toml")
    Ledger(site.home).withdraw(unit_member("a"))
    _, is_left_out = label._file_and_exclusion(site)
    assert is_left_out("a") and not is_left_out("b")
    unmount(site.home)
    with pytest.raises(ConfigError, match="is not there"):
        label._file_and_exclusion(site)
    _, is_left_out = label._file_and_exclusion(load_site(make_site(world, "new")))
    assert not is_left_out("a")


def test_a_person_forgets_no_home_in_the_log_of_another_ledger(world: Path) -> None:
    join(world, "cardio")
    unmount(world / "cardio-state")
    Ledger(world / "cardio-state")  # as an earlier release began one
    before = known_homes.path_of_notes().read_text()
    done = run("memberships", world / "cardio-state", "--forget", world / "elsewhere.jsonl")
    assert done.exit_code == 2 and "is not there" in done.output
    assert known_homes.path_of_notes().read_text() == before


def test_a_person_says_that_a_lost_ledger_is_of_no_use_any_more(world: Path) -> None:
    join(world, "cardio")
    home = world / "cardio-state"
    kept = run("memberships", home, "--forget", world / "cardio-state")
    assert kept.exit_code == 2 and "no note about another home" in kept.output  # it is there
    unmount(home)
    done = run("memberships", home, "--forget", home, "--json")
    assert json.loads(done.stdout)["forgot"] == [str(home)]
    join(world, "cardio")
    with pytest.raises(ConfigError, match="another ledger"):
        join(world, "onco")


def recommended(error: BaseException) -> list[str]:
    """Return the words after `fedtune` of the command by which an error says to forget a place."""
    said = next(part for part in str(error).split("`") if "--forget" in part)
    return shlex.split(said)[1:]


def forget_keys() -> None:
    """Leave the notes as an earlier release wrote them."""
    path = known_homes.path_of_notes()
    homes = json.loads(path.read_text())["homes"]
    homes = {home: [n for n in notes if "key" not in n] for home, notes in homes.items()}
    path.write_text(json.dumps({"homes": homes}))


@pytest.mark.parametrize("noted", ["with its key", "by an earlier release"])
@pytest.mark.parametrize("home", ["a newcomer's", "a ledger's", "its own"])
def test_a_home_that_is_gone_keeps_nobody_out_once_a_person_says_so(
    world: Path, noted: str, home: str
) -> None:
    """By the command that the refusal names, also for a site that has no ledger yet, as one that is
    only simulated; and by the name of the home that is gone."""
    world = world.rename(world.with_name(f"{world.name} of us"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(world / "xdg"))
        join(world, "cardio")
        if noted == "by an earlier release":
            forget_keys()
        gone = world / "cardio-state"
        shutil.rmtree(gone)
        if home == "a newcomer's":
            shutil.rmtree(world / "onco-state")
        site = load_site(world / "onco.toml")
        with pytest.raises(ConfigError, match="is its volume mounted") as refused:
            known_homes.check_simulated(site)
        own = ["memberships", str(gone), "--forget", str(gone)]
        done = run(*(own if home == "its own" else recommended(refused.value)), "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["forgot"] == [str(gone)]
        known_homes.check_simulated(site)


@pytest.mark.parametrize("noted", ["with its key", "by an earlier release"])
def test_a_newcomer_may_name_the_home_that_is_gone(world: Path, noted: str) -> None:
    join(world, "cardio")
    if noted == "by an earlier release":
        forget_keys()
    for name in ("cardio", "onco"):
        shutil.rmtree(world / f"{name}-state")
    wrong = run("memberships", world / "onco-state", "--forget", world / "elsewhere")
    assert wrong.exit_code == 2 and "hospital.toml" in wrong.output
    done = run("memberships", world / "onco-state", "--forget", world / "cardio-state")
    assert done.exit_code == 0
    known_homes.check_simulated(load_site(world / "onco.toml"))


def test_to_forget_another_home_does_not_forget_ones_own(world: Path) -> None:
    """Its volume may only not be mounted, and a site would begin a new ledger in the empty folder.
    Then the command that this refusal names is followed."""
    join(world, "onco")
    path = known_homes.path_of_notes()
    homes = json.loads(path.read_text())["homes"]
    (notes,) = homes.values()
    place = [note for note in notes if "key" not in note]
    path.write_text(json.dumps({"homes": homes | {str(world / "cardio-state"): place}}))
    home = world / "onco-state"
    unmount(home)
    done = run("memberships", home, "--forget", world / "notes.jsonl", "--json")
    assert json.loads(done.stdout)["forgot"] == [str(world / "cardio-state")]
    with pytest.raises(ConfigError, match="is not there") as refused:
        join(world, "onco")
    assert run(*recommended(refused.value)).exit_code == 0
    join(world, "onco")


@pytest.mark.parametrize("lost", ["ledger.head", "ledger.db", "ledger.*"])
def test_a_home_whose_ledger_is_damaged_pays_all_the_same(world: Path, lost: str) -> None:
    """Until a person has restored it, nobody begins another ledger for its patients."""
    join(world, "cardio")
    for path in (world / "cardio-state").glob(lost):
        path.unlink()
    with pytest.raises(ConfigError, match="another ledger"):
        join(world, "onco")


def test_what_a_home_pays_for_is_not_declared_by_a_site_beside_it(world: Path) -> None:
    """The other site's ledger does not know what was charged as private."""
    join(world, "cardio")
    file = world / "onco.toml"
    file.write_text(file.read_text().replace("[data]", '[data]\ndeclared = "public"'))
    with pytest.raises(ConfigError, match="pays for these records already"):
        known_homes.check_home(load_site(file))
    (world / "open.jsonl").write_text((world / "notes.jsonl").read_text())
    file.write_text(file.read_text().replace("notes.jsonl", "open.jsonl"))
    known_homes.check_home(load_site(file))


@pytest.mark.parametrize("declared", ["", 'declared = "generated"'])
def test_what_a_home_pays_for_is_not_simulated_by_a_site_beside_it(
    world: Path, study: Path, declared: str
) -> None:
    """Nor searched. The twin: the home's own site file is simulated, and pays from its ledger."""
    north, south = (study.parent / name / "site.toml" for name in ("north", "south"))
    ledger = Ledger(load_site(north).home)
    known_homes.check_home(load_site(north))
    text = north.read_text().replace("[data]", f"[data]\n{declared}")
    (world / "beside").mkdir()
    beside = world / "beside" / "site.toml"
    beside.write_text(text.replace('path = "data', f'path = "{north.parent}/data'))
    with pytest.raises(ConfigError, match="pays for these records already"):
        simulate(study, [beside, south], world / "run")
    assert not (world / "run").exists() and not load_site(beside).site.state.exists()
    if declared:
        with pytest.raises(ConfigError, match="pays for these records already"):
            tune(study, [load_site(beside)], world / "search", records=study)
    assert ledger.datasets == []
    simulate(study, [north, south], world / "run")
    assert len(ledger.charges("records")) == 2


def test_nothing_restores_a_ledger_that_a_simulation_charges(
    world: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor purges it or simulates it beside; afterwards the lock is gone, and was never one of
    declared data, which pays from a ledger of the run."""
    north, south = (study.parent / name / "site.toml" for name in ("north", "south"))
    south.write_text(south.read_text().replace("[data]", '[data]\ndeclared = "generated"'))
    tried, train = list[str](), rounds.run

    def meanwhile(*given: Any, **options: Any) -> None:
        for path in (north, south):
            site = load_site(path)
            try:
                with still(site.home, site):
                    tried.append(f"{site.site.name} is still")
            except InfrastructureError as error:
                tried.append(str(error))
        train(*given, **options)

    monkeypatch.setattr(rounds, "run", meanwhile)
    simulate(study, [north, south], world / "run")
    assert "another the vault of a client" in tried[0] and tried[1] == "south is still"
    assert not list(study.parent.rglob("ranks/lock"))
    assert not known_homes.path_of_notes().with_suffix(".lock").exists()


def test_a_renamed_file_is_known_though_another_has_its_name(world: Path) -> None:
    join(world, "cardio")
    (world / "notes.jsonl").rename(world / "other.jsonl")
    write_notes(world / "notes.jsonl", ["d"])
    with pytest.raises(ConfigError, match="pays for these records already"):
        known_homes.check_home(load_site(make_site(world, "onco", path="other.jsonl")))


def test_declared_data_and_a_simulation_are_not_noted(world: Path) -> None:
    more = 'declared = "generated"'
    site = make_site(world, "toy", more=more)
    site.write_text(site.read_text() + "allow_declared_data = true\n")
    known_homes.check_home(load_site(site))
    assert not known_homes.path_of_notes().exists()


def test_memberships_of_one_home_share_a_place_and_what_was_adopted_is_no_home(
    world: Path,
) -> None:
    join(world, "cardio")
    for name in ("cardio", "onco"):
        adopt(world / "home", world / f"{name}.toml", name)
        join(world, name)
    homes = json.loads(known_homes.path_of_notes().read_text())["homes"]
    assert [*homes] == [str(world / "home")]


def test_the_home_that_adopted_a_ledger_is_known_before_its_membership_runs(world: Path) -> None:
    """Else a second site over the records joined with a ledger of its own, and the membership that
    had paid was the one to be refused. Also where the adoption was killed before its last step."""
    join(world, "cardio")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(adoption, "_take_away", lambda *_: sys.exit(9))
        patched.setattr(adoption, "move_notes", lambda *_: None)
        with pytest.raises(SystemExit):
            adopt(world / "home", world / "cardio.toml", "cardio")
    adopt(world / "home", world / "cardio.toml", "cardio")
    homes = json.loads(known_homes.path_of_notes().read_text())["homes"]
    assert [*homes] == [str(world / "home")]
    with pytest.raises(ConfigError, match="pays for these records already"):
        join(world, "onco")
    join(world, "cardio")


@pytest.mark.parametrize("is_head_noted", [True, False])
def test_a_home_that_is_emptied_after_its_adoption_begins_no_other_ledger(
    world: Path, is_head_noted: bool
) -> None:
    """Before a client ran again, its hospital.toml was laid out anew, as by a machine's set-up. An
    earlier note may have the newest entry and no key. Twin: a machine with no note of either."""
    join(world, "cardio")
    home, path = world / "home", known_homes.path_of_notes()
    adopt(home, world / "cardio.toml", "cardio")
    homes = json.loads(path.read_text())["homes"]
    assert {"key": Ledger(home).key.public} in homes[str(home)]
    left_out = ["key"] if is_head_noted else ["key", "head"]
    kept = [note for note in homes[str(home)] if not any(name in note for name in left_out)]
    text = (home / "hospital.toml").read_text()
    shutil.rmtree(home)
    home.mkdir()
    (home / "hospital.toml").write_text(text)
    with pytest.raises(ConfigError, match="the ledger that pays for this site's records is not"):
        check_before_joining(load_site(world / "cardio.toml"))
    path.write_text(json.dumps({"homes": {str(home): kept}}))
    if is_head_noted:
        with pytest.raises(ConfigError, match="the ledger that pays for this site's records is"):
            check_before_joining(load_site(world / "cardio.toml"))
    else:
        with raises_nothing():
            known_homes.check_ledger_there(home)


def test_a_dead_home_is_forgotten_by_a_person_and_that_is_entered(world: Path) -> None:
    join(world, "cardio")
    adopt(world / "home", world / "onco.toml", "onco")
    with pytest.raises(ConfigError):
        join(world, "onco")
    done = run("memberships", world / "home", "--forget", world / "notes.jsonl", "--json")
    assert json.loads(done.stdout)["forgot"] == [str(world / "cardio-state")]
    acts = run("log", world / "home", "--event", "forget", "--json").stdout
    assert "forget" in acts
    join(world, "onco")
    with pytest.raises(ConfigError):
        join(world, "cardio")
    again = run("memberships", world / "home", "--forget", world / "notes.jsonl")
    assert again.exit_code == 2 and "no note about another home" in again.output


def test_notes_that_cannot_be_kept_keep_nobody_out(
    world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (world / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(world / "file"))
    join(world, "cardio")
    assert "is not remembered" in caplog.text
    monkeypatch.setenv("XDG_STATE_HOME", str(world / "xdg"))
    join(world, "cardio")
    known_homes.path_of_notes().write_text("{")
    join(world, "cardio")
    assert "begun anew" in caplog.text


def test_a_place_that_nobody_knows_is_not_forgotten(world: Path) -> None:
    with pytest.raises(InputError, match="no note about another home"):
        known_homes.forget(str(world / "notes.jsonl"), world / "home")
    assert Ledger(world / "cardio-state").head.seq > 0


def put_back(copy: Path, home: Path) -> None:
    shutil.rmtree(home)
    shutil.copytree(copy, home)


def note_a_branch(world: Path) -> Path:
    """Run 16 steps in cardio's ledger, note its newest entry, and put the folder back to before
    them. Return the copy of the folder as it was before."""
    home = world / "cardio-state"
    join(world, "cardio")
    copy = shutil.copytree(home, world / "copy")
    spend(world / "cardio.toml", 8, sigma=2.0)
    known_homes.note_head(home)
    put_back(copy, home)
    return copy


def test_a_home_that_cannot_be_reached_hides_no_other_note(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11 says so of a folder without rights, or of a share that is gone, by an error."""
    write_notes(world / "other.jsonl", ["x", "y"])
    spend(make_site(world, "cardio", path="other.jsonl"), 2)
    join(world, "cardio")
    join(world, "onco")
    found = known_homes.traces

    def unreachable(home: Path) -> list[str]:
        if home.name == "onco-state":
            raise PermissionError(home)
        return found(home)

    monkeypatch.setattr(known_homes, "traces", unreachable)
    assert known_homes.find_head(world / "cardio-state") is not None


@pytest.mark.parametrize("asks", ["client", "simulation"])
@pytest.mark.parametrize("later", [0, 9])
@pytest.mark.parametrize("stopped", [True, False])
def test_a_folder_that_was_put_back_is_noticed_first(
    world: Path, stopped: bool, later: int, asks: str
) -> None:
    """Whether or not the client ended by itself, and also if the copy went on elsewhere. What was
    lost is charged by the restore, and then the site joins."""
    home = world / "cardio-state"
    join(world, "cardio")
    copy = shutil.copytree(home, world / "copy")
    spend(world / "cardio.toml", 4, sigma=2.0)
    if stopped:
        known_homes.note_head(home)
    else:
        join(world, "cardio")  # started again after it was killed
    put_back(copy, home)
    if later:
        spend(world / "cardio.toml", later)
    else:
        known_homes.note_head(home)  # by a client that runs meanwhile
    site = load_site(world / "cardio.toml")
    asked = [partial(check_ledger_stands, home)]
    if asks == "client":
        asked = [partial(check_before_joining, site)]
    if not later:  # the anchor says it, too
        asked += [partial(open_ledger, home), partial(known_homes.check_not_put_back, home)]
    for ask in asked:
        with pytest.raises(LedgerError, match="this machine noted entry"):
            ask()
    assert run("ledger", world / "cardio.toml", "--restore").exit_code == 0
    charges = Ledger(home).charges("records")
    cheap = sum(charge.steps for charge in charges if charge.noise_multiplier == 8.0)
    costly = sum(charge.steps for charge in charges if charge.noise_multiplier == 2.0)
    assert (cheap, costly) == (2 + 2 * later, 8)
    Ledger(home).accept("records", "an officer", declared=[EVERY])
    join(world, "cardio")


@pytest.mark.parametrize("others", [0, 3, 20])
def test_a_client_that_runs_on_keeps_the_note_of_what_was_lost(world: Path, others: int) -> None:
    """However many entries the copy got from another account, whose notes are elsewhere."""
    home = world / "cardio-state"
    join(world, "cardio")
    copy = shutil.copytree(home, world / "copy")
    spend(world / "cardio.toml", 4, sigma=2.0)
    known_homes.note_head(home)
    put_back(copy, home)
    for number in range(others):
        Ledger(home).withdraw(b"%d" % number)
    known_homes.note_head(home)  # by the client that runs, each minute
    site = load_site(world / "cardio.toml")
    for ask in (partial(known_homes.check_not_put_back, home), partial(check_before_joining, site)):
        with pytest.raises(LedgerError, match="this machine noted entry"):
            ask()
    assert run("ledger", world / "cardio.toml", "--restore").exit_code == 0
    charges = Ledger(home).charges("records")
    assert sum(charge.steps for charge in charges if charge.noise_multiplier == 2.0) == 8
    known_homes.note_head(home)
    known_homes.check_not_put_back(home)  # the noted entry was charged for


def test_a_home_that_is_put_back_to_before_an_adoption_is_noticed(world: Path) -> None:
    """By the other memberships, and although no client ran since the adoption."""
    adopt(world / "home", world / "cardio.toml", "cardio")
    check_before_joining(load_site(world / "cardio.toml"))
    copy = shutil.copytree(world / "home", world / "copy")
    adopt(world / "home", world / "onco.toml", "onco")
    shutil.copy(world / "home" / "hospital.toml", copy)
    put_back(copy, world / "home")
    with pytest.raises(LedgerError, match="this machine noted entry"):
        check_before_joining(load_site(world / "cardio.toml"))


def test_what_this_machine_noted_counts_in_a_restore_with_an_earlier_anchor(world: Path) -> None:
    """Anchor and step log were put back, and the database is lost: of the newest rounds nothing
    else is left."""
    home = world / "cardio-state"
    Ledger(home).backup(world / "backup")
    early = {name: (home / name).read_bytes() for name in ("ledger.head", "steps.jsonl")}
    join(world, "cardio")
    spend(world / "cardio.toml", 4, sigma=2.0)
    known_homes.note_head(home)
    (home / "ledger.db").unlink()
    for name, content in early.items():
        (home / name).write_bytes(content)
    restore = "ledger", world / "cardio.toml", "--restore", "--from", world / "backup"
    assert run(*restore).exit_code == 0
    *_, lost = Ledger(home).charges("records")
    assert (lost.steps, lost.noise_multiplier) == (8, 2.0)


@pytest.mark.parametrize("noted_at", ["never", "before the backup", "backup's entry", "stored"])
def test_a_lost_disk_is_exhausted_whatever_this_machine_noted(world: Path, noted_at: str) -> None:
    """A note may be older than the last rounds, so it does not bound what was charged."""
    home = world / "cardio-state"
    if noted_at == "before the backup":
        join(world, "cardio")
        Ledger(home).withdraw(b"a later entry")
    Ledger(home).backup(world / "backup", key=True)
    if noted_at in ("backup's entry", "stored"):
        join(world, "cardio")
    if noted_at == "stored":
        Ledger(home).accept_noted(known_homes.find_head(home))
        known_homes.path_of_notes().unlink()
        assert (home / "ledger.receipt").exists()
    spend(world / "cardio.toml", 4, sigma=2.0)
    lost = [*home.glob("ledger*"), home / "steps.jsonl"] if noted_at == "stored" else []
    for path in lost:
        if path.name != "ledger.receipt":
            path.unlink()
    if not lost:
        shutil.rmtree(home)
    restore = "ledger", world / "cardio.toml", "--restore", "--from", world / "backup"
    assert run(*restore).exit_code == 0
    assert Ledger(home).charges("records")[-1].noise_multiplier == 0.0


def test_lost_branches_of_two_holders_are_charged_together(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder was put back twice. This account noted one branch, and a coordinator has a receipt
    of the other one: the restore charges both."""
    home, copy = world / "cardio-state", note_a_branch(world)
    coordinator = SigningKey()
    spend(world / "cardio.toml", 8, sigma=4.0)
    of_branch = receipt(coordinator, Ledger(home).head_statement(coordinator=coordinator.public))
    put_back(copy, home)
    with pytest.raises(LedgerError, match="entry"):
        Ledger(home).accept_receipt(of_branch, coordinator.public)
    assert run("ledger", world / "cardio.toml", "--restore").exit_code == 0
    assert sum(charge.steps for charge in Ledger(home).charges("records")) >= 2 + 16 + 16


def test_a_note_of_a_branch_counts_beside_what_another_account_went_on_with(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own notes do not know the branch. The first account's client sees that the folder was put
    back, and its restore charges both branches."""
    home = world / "cardio-state"
    note_a_branch(world)
    with monkeypatch.context() as account:
        account.setenv("XDG_STATE_HOME", str(world / "another"))
        join(world, "cardio")
        spend(world / "cardio.toml", 5)
    with pytest.raises(LedgerError, match="put back"):
        join(world, "cardio")
    assert run("ledger", world / "cardio.toml", "--restore").exit_code == 0
    steps = sum(charge.steps for charge in Ledger(home).charges("records"))
    assert steps == 2 + 16 + 10


def test_a_later_note_leaves_the_stored_one_known(world: Path) -> None:
    """The ledger stores what was noted when its client started, and the client noted more since. A
    restore without a backup settles both, so that the ledger opens."""
    home = world / "cardio-state"
    join(world, "cardio")
    spend(world / "cardio.toml", 4)
    known_homes.note_head(home)
    for name in ("ledger.db", "ledger.head"):
        (home / name).unlink()
    assert run("ledger", world / "cardio.toml", "--restore").exit_code == 0
    Ledger(home).verify()


def test_an_adoption_asks_what_the_machine_noted(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder was put back, and withdrawals that another account entered hide it from the
    anchor's number. An adoption forgets the note."""
    home = world / "onco-state"
    write_notes(world / "other.jsonl", ["x", "y"])
    spend(make_site(world, "cardio", path="other.jsonl"), 2)
    adopt(world / "home", world / "cardio.toml", "cardio")
    join(world, "onco")
    copy = shutil.copytree(home, world / "copy")
    spend(world / "onco.toml", 3)
    known_homes.note_head(home)
    put_back(copy, home)
    for number in range(9):
        Ledger(home).withdraw(b"%d" % number)
    with pytest.raises(FedtuneError) as refused:
        adopt(world / "home", world / "onco.toml", "onco")
    assert "this machine noted entry" in str(refused.value)


@pytest.mark.parametrize("left", [["site.key"], ["site.key", "salt"], []])
def test_a_home_of_which_the_key_alone_is_left_was_not_adopted(
    world: Path, left: list[str]
) -> None:
    """Its other files were lost: no other home pays for its records."""
    join(world, "cardio")
    kept = {name: (world / "cardio-state" / name).read_bytes() for name in left}
    shutil.rmtree(world / "cardio-state")
    (world / "cardio-state").mkdir()
    for name, content in kept.items():
        (world / "cardio-state" / name).write_bytes(content)
    with pytest.raises(ConfigError, match="another ledger"):
        join(world, "onco")
    assert known_homes.find_head(world / "cardio-state")


def test_a_note_before_the_anchor_costs_nothing_where_the_database_is_lost(world: Path) -> None:
    """The machine died within the minute after the note: the anchor names the noted entry."""
    home = world / "cardio-state"
    Ledger(home).backup(world / "backup")
    join(world, "cardio")
    spend(world / "cardio.toml", 4)
    known_homes.note_head(home)
    spend(world / "cardio.toml", 2)
    (home / "ledger.db").unlink()
    restore = "ledger", world / "cardio.toml", "--restore", "--from", world / "backup"
    assert run(*restore).exit_code == 0
    steps = sum(charge.steps for charge in Ledger(home).charges("records"))
    assert steps == 2 + 8 + 4
    Ledger(home).accept("records", "an officer", declared=[EVERY])
    join(world, "cardio")


def test_a_note_of_another_ledger_is_no_receipt(world: Path) -> None:
    home = world / "cardio-state"
    join(world, "cardio")
    path = known_homes.path_of_notes()
    noted = json.loads(path.read_text())
    foreign = json.loads((world / "onco-state" / "ledger.head").read_text())
    for note in noted["homes"][str(home)]:
        if "head" in note:
            note["head"] = {**foreign, "seq": 99}
    path.write_text(json.dumps(noted))
    join(world, "cardio")
    Ledger(home).verify()


def test_a_folder_that_was_put_back_can_be_frozen(world: Path) -> None:
    """An emergency waits for no restore: the restored ledger is frozen, by the audit log."""
    home = world / "cardio-state"
    join(world, "cardio")
    copy = shutil.copytree(home, world / "copy")
    spend(world / "cardio.toml", 2)
    known_homes.note_head(home)
    put_back(copy, home)
    assert run("ledger", world / "cardio.toml", "--freeze").exit_code == 4
    assert run("ledger", world / "cardio.toml", "--restore").exit_code == 0
    assert Ledger(home).frozen
