"""Write an OMOP database of three hospitals with invented notes, and a site file for each."""

from __future__ import annotations

import argparse
import sqlite3
from contextlib import closing
from pathlib import Path

HOSPITALS = {"north": 11, "south": 12, "west": 13}  # name -> care_site_id
DESKS = {
    "cardiology": ("palpitations", "chest pain on exertion", "swollen ankles"),
    "pulmonology": ("a dry cough", "wheezing at night", "short breath"),
    "orthopaedics": ("a painful knee", "a stiff shoulder", "pain in the lower back"),
}
PATIENTS, NOTES = 40, 3  # patients at each hospital, and notes of each patient
SITE = """\
[site]
name = "{name}"
declared_size = {size}
state = "state-{name}"
[data]
url = "sqlite:///omop.db"
filter = {{ care_site_id = {care_site} }}
[data.options]
table = "note"
join = "person"
on = "person_id"
[data.columns]
text = "note_text"
label = "note_title"
patient = "person_id"
[policy]
max_epsilon = 8.0
max_delta = 1e-3
"""


def write(folder: Path) -> None:
    """Write omop.db and the site files into a new folder."""
    folder.mkdir(parents=True)
    with closing(sqlite3.connect(folder / "omop.db")) as database:
        database.execute(
            "CREATE TABLE person (person_id INTEGER PRIMARY KEY, care_site_id INTEGER)"
        )
        database.execute(
            "CREATE TABLE note (note_id INTEGER PRIMARY KEY, person_id INTEGER, note_date TEXT, "
            "note_title TEXT, note_text TEXT)"
        )
        for care_site in HOSPITALS.values():
            _fill(database, care_site)
        database.commit()
    for name, care_site in HOSPITALS.items():
        text = SITE.format(name=name, size=PATIENTS, care_site=care_site)
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")


def _fill(database: sqlite3.Connection, care_site: int) -> None:
    """Add a hospital's patients to the database; all notes of a patient belong to one desk."""
    desks = list(DESKS)
    for number in range(PATIENTS):
        person, desk = 1000 * care_site + number, desks[number % len(desks)]
        database.execute("INSERT INTO person VALUES (?, ?)", (person, care_site))
        for visit in range(NOTES):
            complaint = DESKS[desk][visit]
            text = f"Seen in the clinic for {complaint}, for {2 + (number + visit) % 9} days."
            day = f"2024-{1 + visit:02}-{1 + number % 28:02}"
            database.execute(
                "INSERT INTO note (person_id, note_date, note_title, note_text) "
                "VALUES (?, ?, ?, ?)",
                (person, day, desk, text),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
