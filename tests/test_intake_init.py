"""`fedtune init` for records that lie elsewhere than in one file: the files it writes are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.core.config import load_site
from fedtune.core.data.records import read_file
from tests import databases
from tests.data.test_arrow_source import note, saved
from tests.data.test_fhir_source import document, exported
from tests.test_cli import run

CLASSES = ("--task", "classify", "--label", "heart", "--label", "lung")
NOTES = [("7", "cough", "lung"), ("8", "fever", "heart"), ("8", "pain", "heart")]


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(site: str) -> list[tuple[str, str]]:
    found = read_file(load_site(site).data, unit="patient")
    return sorted((record.unit, record.prompt) for record in found.records)


def in_database() -> databases.Made:
    made = databases.made("sqlite", Path("clinic"))
    made.table("note", ("who", "q", "desk"), NOTES)
    return made


def test_a_site_of_a_database(world: Path) -> None:
    in_database()
    columns = ("--text", "q", "--target", "desk", "--patient", "who")
    made = run(
        "init", "north", *CLASSES, "--role", "site", *columns, "--data",
        "sqlite:///clinic/clinic.db#note",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert read("north/site.toml") == [("7", "cough"), ("8", "fever"), ("8", "pain")]
    site = load_site("north/site.toml")
    assert site.site.state == world / "clinic" / ".fedtune" / "clinic-db"
    shown = run("data", "report", "north/site.toml")
    assert shown.exit_code == 0 and "note" in shown.output, shown.output
    # and without a recipe
    assert run("init", "south", "--role", "site", "--data", "sqlite:///clinic/clinic.db#note",
               "--patient", "who").exit_code == 0  # fmt: skip
    assert load_site("south/site.toml").data.url == site.data.url


def test_sites_are_named_after_what_tells_them_apart() -> None:
    urls, lines = {}, ["who,q,desk", *(f"p{n},what?,A" for n in range(3))]
    for folder in ("north", "south"):
        made = databases.made("sqlite", Path(folder))
        for table in ("heart", "lung"):
            made.table(table, ("who", "q", "desk"), NOTES)
        Path(folder, "clinic.db").rename(f"{folder}.db")
        urls[folder] = f"sqlite:///{folder}.db"
        Path(folder, "notes.csv").write_text("\n".join(lines))
    columns = ("--text", "q", "--target", "desk", "--patient", "who")
    for study, places, expected in (
        ("files", [f"{url}#lung" for url in urls.values()], ["north", "south"]),
        ("tables", [f"{urls['north']}#heart", f"{urls['north']}#lung"], ["heart", "lung"]),
        ("folders", ["north/notes.csv", "south/notes.csv"], ["north", "south"]),
        ("nothing", [f"{urls['north']}#lung"] * 2, ["site-1", "site-2"]),
    ):
        data = [word for place in places for word in ("--data", place)]
        assert run("init", study, *CLASSES, *columns, *data).exit_code == 0
        assert sorted(path.name for path in Path(study, "sites").iterdir()) == expected


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("sqlite:///clinic/clinic.db", "names no table"),
        ("sqlite:///clinic/clinic.db#absent", "has no table"),
        ("sqlite:///clinic/none.db#note", "no such file"),
        ("postgresql://u:Zaphod-1979@h/db#note", "must hold no password"),
        ("mysql://h/db#note", "must begin with one of"),
    ],
)
def test_a_database_that_cannot_be_read_is_said(data: str, said: str) -> None:
    in_database()
    made = run("init", "north", *CLASSES, "--role", "site", "--data", data, "--text", "q",
               "--target", "desk", "--patient", "who")  # fmt: skip
    assert made.exit_code == 2 and said in made.output.replace("\n", " "), made.output
    assert "Zaphod" not in made.output and not Path("north").exists()


def test_a_database_that_tells_patients_apart_asks_for_their_column() -> None:
    made = databases.made("sqlite", Path("clinic"))
    made.table("note", ("person_id", "q", "desk"), NOTES)
    asked = ("init", "north", *CLASSES, "--role", "site", "--text", "q", "--target", "desk",
             "--data", "sqlite:///clinic/clinic.db#note")  # fmt: skip
    refused = run(*asked)
    assert refused.exit_code == 2 and "person_id" in refused.output
    made = run(*asked, "--patient", "person_id")
    assert made.exit_code == 0, made.output


def test_a_bulk_export_and_a_data_set_on_disk() -> None:
    exported(Path("bulk"), DocumentReference=[document("d1", "1"), document("d2", "2", "fever")])
    made = run(
        "init", "north", *CLASSES, "--role", "site", "--text", "text", "--target", "type",
        "--patient", "patient", "--data", "bulk",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert read("north/site.toml") == [("1", "cough"), ("2", "fever")]
    saved(Path("set"), [note(1, 0), note(2, 1, "fever")])
    made = run(
        "init", "south", *CLASSES, "--role", "site", "--text", "note", "--target", "desk",
        "--patient", "who", "--data", "set",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert read("south/site.toml") == [("1", "cough"), ("2", "fever")]
    assert json.loads(Path("set/state.json").read_text())
