"""Write five hospitals' FHIR exports, and the public files, of MTS-Dialog.

    <hospital>/export/      what $export writes: DocumentReference and Patient, a folder of .ndjson
    <hospital>/held-out/    the same of further patients, for the hospital's own acceptance
    <hospital>/acceptance.toml    the rules of that acceptance, to be added to its site.toml
    public.csv              dialogues that anybody may read; none of seven of the twenty sections
    test.csv                further dialogues, of every section: they choose and evaluate

The set names no patients: each dialogue is given one of its own. Its sections stand for codes."""

from __future__ import annotations

import argparse
import base64
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.write import jsonl, read_jsonl

HOSPITALS = ("alder", "birch", "cedar", "elm", "fir")
# Codes that no public record has: six common ones, and the rarest.
PUBLIC_LACKS = ("ROS", "PASTSURGICAL", "ALLERGY", "MEDICATIONS", "ASSESSMENT", "EXAM", "GYNHX")
PUBLIC, TEST, HELD_OUT = 100, 300, 30  # dialogues; held out: of each hospital
ACCEPTANCE = """
[acceptance]
path = "{path}"
source = "fhir"
least_group = 10
thresholds = {{ accuracy = 0.5 }}
gains = {{ accuracy = 0.0 }}
columns = {{ text = "text", label = "type", patient = "patient" }}
"""


def write(data: Path, out: Path, seed: int) -> None:
    """Write all files under `out`; the same seed writes the same bytes."""
    draw = np.random.default_rng([seed, 38])
    rows = read_jsonl(data)
    rows = [rows[i] for i in draw.permutation(len(rows))]
    known = [row for row in rows if row["section"] not in PUBLIC_LACKS][:PUBLIC]
    others = [row for row in rows if not any(row is one for one in known)]
    _csv(out / "public.csv", known)
    _csv(out / "test.csv", others[:TEST])
    for number, name in enumerate(HOSPITALS):
        mine = others[TEST + number :: len(HOSPITALS)]
        _export(out / name / "held-out", name, mine[:HELD_OUT], first=0)
        _export(out / name / "export", name, mine[HELD_OUT:], first=HELD_OUT)
        path = (out / name / "held-out").resolve()
        (out / name / "acceptance.toml").write_text(ACCEPTANCE.format(path=path), encoding="utf-8")


def _csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "type"])
        table.writerows([row["dialogue"], row["section"]] for row in rows)


def _export(folder: Path, hospital: str, rows: Sequence[dict[str, Any]], first: int) -> None:
    patients, documents = [], []
    for number, row in enumerate(rows, start=first):
        patient = f"{hospital}-{number:03}"
        patients.append({"resourceType": "Patient", "id": patient})
        text = base64.b64encode(row["dialogue"].encode()).decode()
        attachment = {"contentType": "text/plain; charset=utf-8", "data": text}
        documents.append(
            {
                "resourceType": "DocumentReference",
                "id": f"{patient}-1",
                "status": "current",
                "type": {"text": row["section"]},
                "subject": {"reference": f"Patient/{patient}"},
                "content": [{"attachment": attachment}],
            }
        )
    jsonl(folder / "Patient.000.ndjson", patients)
    jsonl(folder / "DocumentReference.000.ndjson", documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="MTS-Dialog's train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of who has which dialogue")
    chosen = parser.parse_args()
    write(chosen.data, chosen.out, chosen.seed)
    sizes = {
        name: len(read_jsonl(chosen.out / name / "export" / "Patient.000.ndjson"))
        for name in HOSPITALS
    }
    print(json.dumps({"patients": sizes, "codes without a public record": PUBLIC_LACKS}))


if __name__ == "__main__":
    main()
