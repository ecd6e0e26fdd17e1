"""The same records give the same adapter, wherever a site's records are read from."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedtune.core.config import load_site, load_study
from fedtune.core.dp import noise
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry import process_cache
from fedtune.core.training import selftest
from fedtune.core.vault.worker import SiteWorker
from fedtune.officer.review import review
from fedtune.officer.sheet import records_hash
from fedtune.public.start import start
from tests import databases
from tests.data.test_fhir_source import document, exported, replacing
from tests.databases import Made
from tests.guarantee.test_wire_inventory import shape, usual_of
from tests.guarantee.world import Recorder, lay_out, patients, run
from tests.simulated import simulate
from tests.test_cli import run as command

DATA = Path(os.environ.get("FEDTUNE_DATA") or Path(__file__).parents[2] / "shared" / "data")
HOSPITALS = ("north", "south", "west")
STUDY = """
[study]
name = "intake"
[base]
model = "{base}"
dtype = "float32"
[lora]
rank = 2
alpha = 4
modules = ["q_proj"]
last_layers = 1
[objective]
name = "classify"
labels = {labels}
max_length = 64
overflow = "truncate"
[training]
rounds = 2
sampling_rate = 1.0
learning_rate = 0.5
[clipping]
max_grad_norm = 0.5
[privacy]
noise_multiplier = 2.0
delta = 1e-3
unit = "patient"
max_records_per_unit = 2
[strategy]
min_sites = 3
round_timeout = 120
"""
SITE = """
[site]
name = "{name}"
declared_size = 20
state = "{name}"
[data]
{data}
[policy]
bases = "any"
"""
FILES = 'path = "{name}.jsonl"\ncolumns = {{ text = "text", label = "label", patient = "patient" }}'
OMOP = """url = "{url}"
options = {{ table = "note", join = "person", on = "person_id" }}
filter = {{ care_site_id = "{name}" }}
[data.columns]
text = "note_text"
label = "note_title"
patient = "person_id"
"""
Row = tuple[str, str, str]  # patient, text, label
Rows = dict[str, list[Row]]  # by hospital


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    yield from databases.serving()


def invented() -> Rows:
    return {
        name: [
            (
                f"{name}-{n % 4}",
                f"fever on day {7 * n + len(name)}, seen in the {name}",
                "yn"[n % 2],
            )
            for n in range(7)
        ]
        for name in HOSPITALS
    }


def trained(
    folder: Path, base: Path, rows: Rows, data: str, **fields: Any
) -> dict[str, np.ndarray]:
    """What three hospitals train, each from what its [data] says; without the noise (σ = 0)."""
    folder.mkdir()
    labels = sorted({label for each in rows.values() for _, _, label in each})
    (folder / "study.toml").write_text(STUDY.format(base=base, labels=json.dumps(labels)))
    for name in rows:
        text = SITE.format(name=name, data=data.format(name=name, **fields))
        (folder / f"{name}.toml").write_text(text)
    process_cache.clear("workers")
    sites = [folder / f"{name}.toml" for name in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selftest, "require", lambda *_: None)  # it measures the noise
        patch.setattr(
            noise, "gaussian_on_grid", lambda d, std, grid: torch.zeros(d, dtype=torch.int64)
        )
        simulate(folder / "study.toml", sites, folder / "run")
    return dict(load_file(folder / "run" / "adapter" / "adapter_model.safetensors"))


def from_files(folder: Path, base: Path, rows: Rows) -> dict[str, np.ndarray]:
    folder.mkdir()
    for name, each in rows.items():
        lines = (json.dumps(dict(zip(("patient", "text", "label"), r, strict=True))) for r in each)
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return trained(folder / "study", base, rows, FILES.replace("{name}.", f"{folder}/{{name}}."))


def as_omop(made: Made, rows: Rows) -> None:
    """One OMOP database of several hospitals: each note's is its person's."""
    notes = [
        (str(number), patient, text, label)
        for number, (patient, text, label) in enumerate(r for each in rows.values() for r in each)
    ]
    people = {patient: name for name, each in rows.items() for patient, _, _ in each}
    columns = ("note_id", "person_id", "note_text", "note_title")
    made.table("note", columns, sorted(notes, key=lambda note: note[2]))
    made.table("person", ("person_id", "care_site_id"), sorted(people.items()))


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return set(one) == set(other) and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("kind", ["sqlite", "duckdb", "postgresql"])
def test_an_omop_database_trains_to_the_adapter_that_its_rows_in_files_train_to(
    kind: str, tmp_path: Path, tiny_base: Path, request: pytest.FixtureRequest
) -> None:
    if why := databases.missing(kind):
        pytest.skip(why)
    server = request.getfixturevalue("server") if kind == "postgresql" else None
    rows, made = invented(), databases.made(kind, tmp_path, server)
    as_omop(made, rows)
    files = from_files(tmp_path / "files", tiny_base, rows)
    assert same(files, trained(tmp_path / "sql", tiny_base, rows, OMOP, url=made.url))
    if kind == "sqlite":  # the twin: another text of one patient is another adapter
        made.execute("UPDATE note SET note_text = 'cough' WHERE person_id = 'west-3'")
        assert not same(files, trained(tmp_path / "other", tiny_base, rows, OMOP, url=made.url))


def test_mts_dialog_as_omop_notes_of_three_hospitals_trains_to_the_same_adapter(
    tmp_path: Path, tiny_base: Path, server: str
) -> None:
    source = DATA / "mts_dialog" / "train.jsonl"
    if not source.is_file():
        pytest.skip(f"{source} is not there (FEDTUNE_DATA names its folder)")
    records = [json.loads(line) for line in source.read_text().splitlines()[:90]]
    rows = {
        name: [(r["id"], r["dialogue"], r["section"]) for r in records[n :: len(HOSPITALS)]]
        for n, name in enumerate(HOSPITALS)
    }
    made = databases.made("postgresql", tmp_path, server)
    as_omop(made, rows)
    files = from_files(tmp_path / "files", tiny_base, rows)
    assert same(files, trained(tmp_path / "sql", tiny_base, rows, OMOP, url=made.url))


# ------------------------------------------------------------------------------------- the wire

Sets = Sequence[dict[str, Any]]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Recorder:
    return usual_of("causal_lm", tmp_path_factory, tiny_base)


def in_database(folder: Path, base: Path, rows: Sets, made: Made, query: str = "") -> Path:
    """The wire inventory's study, whose northern site reads a database."""
    study = lay_out(folder, base, patients(12))
    made.table("note", ("who", "q", "a"), [(r.get("who"), r.get("q"), r.get("a")) for r in rows])
    options = f'query = "{query}"' if query else 'table = "note"'
    north = folder / "site-north.toml"
    data = f'url = "{made.url}"\noptions = {{ {options} }}'
    north.write_text(north.read_text().replace('path = "north.jsonl"', data))
    return study


SETS: dict[str, Sets] = {
    "twelve": patients(12),
    "nobody": [],
    "bad cells": [*patients(6), {"who": "p"}, {"who": None, "q": "x", "a": "y"}, {"q": " "}],
}


@pytest.mark.parametrize("which", SETS)
def test_the_wire_looks_the_same_whatever_is_in_a_database(
    usual: Recorder, tmp_path: Path, tiny_base: Path, which: str
) -> None:
    made = databases.made("sqlite", tmp_path / "database")
    study = in_database(tmp_path, tiny_base, SETS[which], made)
    assert shape(run(study)) == shape(usual)


@pytest.mark.parametrize("then", ["gone", "no table", "broken"])
def test_the_wire_looks_the_same_whatever_becomes_of_a_database_in_mid_study(
    usual: Recorder, tmp_path: Path, tiny_base: Path, then: str
) -> None:
    made = databases.made("sqlite", tmp_path / "database")
    study = in_database(tmp_path, tiny_base, patients(12), made)
    north, rounds = tmp_path / "site-north.toml", list[str]()
    north.write_text(
        north.read_text().replace(
            "[policy]", '[data.consent]\ncolumn = \'a\'\nvalues = ["y", "n"]\n[policy]'
        )
    )

    def between(kind: str) -> None:
        rounds.append(kind)
        if rounds.count("round") == 1 and kind == "round":
            path = tmp_path / "database" / "clinic.db"
            if then == "gone":
                path.unlink()
            elif then == "broken":
                path.write_bytes(b"x" * 4096)
            else:
                made.execute("DROP TABLE note")

    assert shape(run(study, between)) == shape(usual)
    counts = json.loads((tmp_path / "state-north" / "counts.json").read_text())["records"]
    assert counts["units"] == 0


BULKS: dict[str, dict[str, list[Any]]] = {
    "twelve": {"DocumentReference": [document(f"d{n}", str(n), f"day {n}") for n in range(12)]},
    "nobody": {"DocumentReference": []},
    "bad": {"DocumentReference": [document("d", "1"), "{", document("e", None), "[]"]},
    "who replaces everybody": {
        "DocumentReference": [
            *(document(f"d{n}", str(n), f"day {n}") for n in range(6)),
            *(document(f"x{n}", "x", f"day {n}", **replacing(f"d{n}")) for n in range(6)),
        ]
    },
    "no folder": {},
}


@pytest.mark.parametrize("which", BULKS)
def test_the_wire_looks_the_same_whatever_is_in_a_bulk_export(
    usual: Recorder, tmp_path: Path, tiny_base: Path, which: str
) -> None:
    study = lay_out(tmp_path, tiny_base, patients(12))
    exported(tmp_path / "bulk", **BULKS[which])
    north = tmp_path / "site-north.toml"
    text = north.read_text().replace('path = "north.jsonl"', 'path = "bulk"\nsource = "fhir"')
    columns = 'columns = { prompt = "q", completion = "a", patient = "who" }'
    assert columns in text
    north.write_text(text.replace(columns, 'columns = { text = "text", patient = "patient" }'))
    assert shape(run(study)) == shape(usual)


def test_a_query_needs_the_policys_leave_and_review_and_report_say_so(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = databases.made("sqlite", tmp_path / "database")
    query = "SELECT * FROM note LIMIT 20"
    study = in_database(tmp_path, tiny_base, patients(12), made, query)
    north = tmp_path / "site-north.toml"
    begun = start(load_study(study))
    refused = SiteWorker(load_site(north)).prepare(begun.study, begun.frozen)
    assert not refused.admitted and "policy.allow_free_query" in refused.reason
    north.write_text(north.read_text().replace("[policy]", "[policy]\nallow_free_query = true"))
    site = load_site(north)
    assert SiteWorker(site).prepare(begun.study, begun.frozen).admitted
    sections = dict(review(begun.study, site, Ledger(site.site.state)).sections)
    assert any("NOT COVERED" in line for line in sections["What it costs"])
    assert "that a query or a view selects" in " ".join(sections["What would leave this site"])
    shown = command("data", "report", "site-north.toml")
    assert shown.exit_code == 0 and "outside the guarantee" in shown.output, shown.output


# ----------------------------------------------------------------------------------------- FHIR


FHIR = """path = "{bulk}"
source = "fhir"
filter = {{ site = "{name}", status = ["current", "superseded"] }}
columns = {{ text = "text", label = "type", patient = "patient" }}
"""


def as_fhir(folder: Path, rows: Rows) -> Path:
    """One bulk export of several hospitals, each document's by its visit."""
    folder.mkdir(parents=True)
    documents, visits = [], []
    for number, (name, (patient, text, label)) in enumerate(
        (name, row) for name, each in rows.items() for row in each
    ):
        subject = {"reference": f"Patient/{patient}"}
        data = base64.b64encode(text.encode()).decode()
        documents.append(
            {
                "resourceType": "DocumentReference",
                "id": f"d{number}",
                "status": "superseded" if number % 2 else "current",
                "subject": subject,
                "type": {"text": label},
                "content": [{"attachment": {"contentType": "text/plain", "data": data}}],
                "context": {"encounter": [{"reference": f"Encounter/e{number}"}]},
            }
        )
        provider = {"reference": f"Organization/{name}"}
        visits.append(
            {
                "resourceType": "Encounter",
                "id": f"e{number}",
                "subject": subject,
                "serviceProvider": provider,
            }
        )
    for kind, resources in (("DocumentReference", documents), ("Encounter", visits)):
        lines = "".join(json.dumps(resource) + "\n" for resource in resources)
        (folder / f"{kind}.000.ndjson").write_text(lines)
    return folder


def test_a_bulk_export_of_three_hospitals_trains_to_the_same_adapter(
    tmp_path: Path, tiny_base: Path
) -> None:
    rows = invented()
    bulk = as_fhir(tmp_path / "bulk", rows)
    files = from_files(tmp_path / "files", tiny_base, rows)
    assert same(files, trained(tmp_path / "fhir", tiny_base, rows, FHIR, bulk=bulk))


def test_three_hospitals_train_on_a_real_bulk_export(tmp_path: Path, tiny_base: Path) -> None:
    bulk = DATA / "fhir_bulk"
    if not bulk.is_dir():
        pytest.skip(f"{bulk} is not here; FEDTUNE_DATA names the folder of data sets")
    hospitals = (
        "8a990ec7-9b5c-389f-9806-59d1113dfaae",
        "4de05f8e-95ca-3a2f-818a-39a974dcf8bf",
        "61e67719-63e4-318e-91ab-c834166b4680",
    )
    labels = ("History and physical note", "Emergency department note")
    rows: Rows = {name: [("", "", label) for label in labels] for name in hospitals}
    adapter = trained(tmp_path / "fhir", tiny_base, rows, FHIR, bulk=bulk)
    assert any(np.abs(array).max() > 0 for name, array in adapter.items() if ".lora_B." in name)
    for name in hospitals:
        counts = json.loads((tmp_path / "fhir" / name / "counts.json").read_text())["records"]
        assert counts["units"] == 3 and counts["rows"] == 1215 and not counts["rejected"]


def test_a_database_is_attested_by_its_rows(tmp_path: Path) -> None:
    """Not by what lies beside site.toml, where a database's path would be."""
    made = databases.made("sqlite", tmp_path / "database")
    made.table("note", ("who", "q"), [("a", "cough"), ("b", "fever")])
    (tmp_path / "site.toml").write_text(
        f'[site]\nname = "north"\ndeclared_size = 10\n[data]\nurl = "{made.url}"\n'
        'options = { table = "note" }\ncolumns = { text = "q", patient = "who" }\n'
    )
    site = load_site(tmp_path / "site.toml")
    before = records_hash(site)
    (tmp_path / "another.txt").write_text("lies beside it")
    made.execute("UPDATE note SET q = q")
    assert records_hash(site) == before
    made.execute("UPDATE note SET q = 'rash' WHERE who = 'b'")
    assert records_hash(site) != before
