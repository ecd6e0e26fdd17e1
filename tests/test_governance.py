"""From a hospital's export to a folder that verifies: FHIR, scan, sheet, training, dossier."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedtune.core.data import scan_engine
from tests.cli_kit import run
from tests.data.test_fhir_source import DATA, at, document, exported, visit
from tests.depth import long_but

BULK = DATA / "fhir_bulk"
NAMES = ("Adeyemi", "Brennan", "Castellanos", "Dubois")
REAL = (  # three hospitals of the export, each with three patients
    "8a990ec7-9b5c-389f-9806-59d1113dfaae",
    "4de05f8e-95ca-3a2f-818a-39a974dcf8bf",
    "61e67719-63e4-318e-91ab-c834166b4680",
)
SHEET = ["provenance", "licence", "legal_basis", "de_identification", "attested_by"]
STUDY = """
[study]
name = "notes"
data_sheet = ["licence"]
[base]
model = "{base}"
dtype = "float32"
[lora]
rank = 2
last_layers = 2
[objective]
name = "causal_lm"
max_length = 48
overflow = "truncate"
[training]
rounds = 2
sampling_rate = 1.0
learning_rate = 0.1
[clipping]
[privacy]
epsilon = 6
delta = 1e-3
unit = "patient"
max_records_per_unit = 4
"""


def invented(folder: Path) -> tuple[Path, tuple[str, ...]]:
    """An export of three hospitals with four patients each, whose notes name them."""
    documents, visits = list[Any](), list[Any]()
    for hospital in ("org-alder", "org-birch", "org-cedar"):
        for number, name in enumerate(NAMES):
            patient = f"{hospital}-{number}"
            visits.append(visit(f"e-{patient}", patient, hospital))
            for day in range(2):
                text = f"Dr {name} saw the patient on 2021-03-0{day + 1}: cough, no fever."
                documents.append(document(f"{patient}-{day}", patient, text, **at(f"e-{patient}")))
    return exported(folder, DocumentReference=documents, Encounter=visits), (
        "org-alder",
        "org-birch",
        "org-cedar",
    )


def site(folder: Path, name: str, export: Path, hospital: str) -> Path:
    tables = {
        "site": {"name": name, "declared_size": 10, "state": "state"},
        "data": {
            "path": str(export),
            "source": "fhir",
            "filter": {"status": ["current", "superseded"], "site": hospital},
            "columns": {"text": "text", "patient": "patient"},
            "scan": {"action": "redact"},
        },
        "policy": {"bases": "any", "data_sheet": SHEET},
    }
    path = folder / name / "site.toml"
    path.parent.mkdir()
    path.write_text(tomli_w.dumps(tables))
    return path


def done(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.long
@pytest.mark.skipif(bool(scan_engine.name_missing_package()), reason="needs fedtune[scan]")
@pytest.mark.parametrize("which", long_but(["invented"], ["invented", "fhir_bulk"]))
def test_from_an_export_to_a_dossier(
    which: str, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if which == "fhir_bulk" and not BULK.is_dir():
        pytest.skip(f"{BULK} is not here; FEDTUNE_DATA names the folder of data sets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    export, hospitals = invented(tmp_path / "bulk") if which == "invented" else (BULK, REAL)
    if which == "fhir_bulk":
        export = shutil.copytree(BULK, tmp_path / "bulk")
    sites = [site(tmp_path, f"site{n}", export, h) for n, h in enumerate(hospitals, 1)]
    (tmp_path / "study.toml").write_text(STUDY.format(base=tiny_base))

    scanned = json.loads(done("data", "scan", sites[0], "--json"))
    assert scanned["records"] > 5 and scanned["findings"]["date"] > 5
    early = run("simulate", "study.toml", "--sites", tmp_path, "--out", "runs/notes")
    assert early.exit_code == 3 and "sheet" in early.stderr  # nobody has said what the data is
    for path in sites:
        run("data", "describe", path)
        sheet = path.with_name("sheet.toml")
        fields = tomllib.loads(sheet.read_text())
        assert fields.keys() >= {*SHEET}
        sheet.write_text(tomli_w.dumps(fields | dict.fromkeys(SHEET, "as the board knows it")))
        done("data", "describe", path)
    done("simulate", "study.toml", "--sites", tmp_path, "--out", "runs/notes")
    report = json.loads((tmp_path / "runs/notes/report.json").read_text())
    assert {*report["sites"]} == {"site1", "site2", "site3"}
    done("release", "runs/notes", "--out", "dossier")
    shown = run("verify", "dossier", "--json")
    assert shown.exit_code == 3  # consistent, and nobody was named who should have signed it
    signer = json.loads(shown.stdout)["signer"]
    proven = json.loads(done("verify", "dossier", "--trust", signer, "--simulation", "--json"))
    assert proven["epsilon"] == report["privacy"]["epsilon"] <= 6
    acts = [e["event"] for e in json.loads(done("log", sites[0], "--json"))["entries"]]
    assert acts[-3:] == ["admit", "release", "release"]
    left = b"".join(p.read_bytes() for p in Path("dossier").rglob("*") if p.is_file())
    for secret in (*NAMES, *hospitals, "2021-03-01", "bulk"):
        assert secret.encode() not in left, secret
