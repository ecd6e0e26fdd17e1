"""A FHIR R4 bulk export as a site's records."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import Columns, SiteData
from fedtune.core.data.records import Read, read_file
from fedtune.core.data.sources import fhir
from fedtune.core.data.sources._interface import BadCell, Names
from fedtune.core.data.sources.fhir import Fhir
from fedtune.core.errors import ConfigError, DataError

DATA = Path(os.environ.get("FEDTUNE_DATA") or Path(__file__).parents[3] / "shared" / "data")
COLUMNS = Columns(text="text", label="type", patient="patient")
SECRET = "Zaphod-Beeblebrox-1979"


def attachment(text: str | bytes, kind: str = "text/plain; charset=utf-8") -> dict[str, Any]:
    raw = text.encode() if isinstance(text, str) else text
    data = base64.b64encode(raw).decode()
    return {"attachment": {"contentType": kind, "data": data}}


def document(number: str, patient: str | None, text: str = "cough", **more: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "resourceType": "DocumentReference",
        "id": number,
        "status": "current",
        "type": {"coding": [{"code": "34117-2", "display": "History note"}]},
        "content": [attachment(text)],
    }
    if patient is not None:
        body["subject"] = {"reference": f"Patient/{patient}"}
    return body | more


def visit(number: str, patient: str, site: str) -> dict[str, Any]:
    return {
        "resourceType": "Encounter",
        "id": number,
        "subject": {"reference": f"https://ehr.example.org/fhir/Patient/{patient}"},
        "serviceProvider": {"reference": f"Organization/{site}", "display": site.upper()},
    }


def at(number: str) -> dict[str, Any]:
    return {"context": {"encounter": [{"reference": f"Encounter/{number}"}]}}


def replacing(number: str) -> dict[str, Any]:
    target = {"reference": f"DocumentReference/{number}/_history/2"}
    return {"relatesTo": [{"code": "replaces", "target": target}]}


def exported(folder: Path, **kinds: Sequence[Any]) -> Path:
    """As a bulk export writes it: two files of each kind that has several."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, resources in kinds.items():
        for number in range(2):
            lines = [r if isinstance(r, str) else json.dumps(r) for r in resources[number::2]]
            path = folder / f"{kind}.{number:03}.ndjson"
            path.write_text("".join(line + "\n" for line in lines))
    return folder


def read(folder: Path, unit: Any = "patient", strict: bool = True, **changes: Any) -> Read:
    fields = {"path": folder, "columns": COLUMNS, "source": "fhir"} | changes
    return read_file(SiteData.model_validate(fields), unit=unit, strict=strict)


def said(found: Read) -> list[tuple[str, str]]:
    return sorted((record.unit, record.prompt) for record in found.records)


def test_documents_are_read_with_their_patient_site_and_conditions(tmp_path: Path) -> None:
    condition = {
        "resourceType": "Condition",
        "id": "c",
        "subject": {"reference": "Patient/1"},
        "encounter": {"reference": "Encounter/e1"},
        "code": {"text": "Asthma"},
    }
    folder = exported(
        tmp_path / "bulk",
        DocumentReference=[
            document("d1", "1", "cough", **at("e1")),
            document("d2", "2", "fever", **at("e2")),
            document("d3", "3", "rash", custodian={"reference": "Organization/south"}),
        ],
        Encounter=[visit("e1", "1", "north"), visit("e2", "2", "south")],
        Condition=[condition],
    )
    assert said(read(folder)) == [("1", "cough"), ("2", "fever"), ("3", "rash")]
    assert said(read(folder, filter={"site": "south"})) == [("2", "fever"), ("3", "rash")]
    assert said(read(folder, filter={"site_name": "NORTH"})) == [("1", "cough")]
    columns = COLUMNS.model_copy(update={"label": "conditions"})
    (record,) = read(folder, columns=columns).records
    assert record.label == "Asthma"


def test_which_status_counts_is_declared(tmp_path: Path) -> None:
    folder = exported(
        tmp_path / "bulk",
        DocumentReference=[
            document("d1", "1", "now"),
            document("d2", "1", "then", status="superseded"),
            document("d3", "1", "wrong", status="entered-in-error"),
            document("d4", "1", "of no status", status=None),
        ],
    )
    assert said(read(folder)) == [("1", "now")] and read(folder).filtered == 3
    both = read(folder, filter={"status": ("current", "superseded")})
    assert said(both) == [("1", "now"), ("1", "then")]
    first = read(folder, filter={"status": "current", "doc_status": "final"}, strict=False)
    assert not first.records and first.filtered == 4


def test_a_replacement_counts_within_one_patient_alone(tmp_path: Path) -> None:
    """Another patient's document cannot take a document out, whatever it says that it replaces."""
    folder = exported(
        tmp_path / "bulk",
        DocumentReference=[
            document("d1", "1", "first"),
            document("d2", "1", "second", **replacing("d1")),
            document("d3", "2", "another's"),
            document("d4", "1", "of somebody", **replacing("d3")),
            document("d5", "3", "stays"),
            document("d6", "3", "in error", status="entered-in-error", **replacing("d5")),
            document("d7", "4", "itself", **replacing("d7")),
        ],
    )
    left = [("1", "of somebody"), ("1", "second"), ("2", "another's"), ("3", "stays")]
    assert said(read(folder)) == [*left, ("4", "itself")]
    with_replaced = read(folder, filter={"replaced": ("yes", "no")})
    assert ("1", "first") in said(with_replaced)


def test_a_visit_of_another_patient_says_nothing(tmp_path: Path) -> None:
    folder = exported(
        tmp_path / "bulk",
        DocumentReference=[document("d1", "1", **at("e1")), document("d2", "2", **at("e1"))],
        Encounter=[visit("e1", "1", "north")],
    )
    assert said(read(folder, filter={"site": "north"})) == [("1", "cough")]


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not JSON"),
    "a list": ("[]", "wrong type"),
    "nobody's": (document("x", None), "missing value"),
    "another's kind": (document("x", None, subject={"reference": "Group/7"}), "missing value"),
    "contained": (document("x", None, subject={"reference": "#p"}), "missing value"),
    "no text": (document("x", "9", content=[]), "missing value"),
    "a picture": (document("x", "9", content=[attachment("x", "image/png")]), "missing value"),
    "elsewhere": (
        document(
            "x", "9", content=[{"attachment": {"contentType": "text/plain", "url": "Binary/b"}}]
        ),
        "missing value",
    ),
    "no base64": (
        document("x", "9", content=[{"attachment": {"contentType": "text/plain", "data": "%%%"}}]),
        "wrong type",
    ),
    "no UTF-8": (document("x", "9", content=[attachment(b"\xff\xfe")]), "not UTF-8"),
    "NUL": (document("x", "9", "a\0b"), "NUL byte"),
    "empty": (document("x", "9", "  "), "empty text"),
}


@pytest.mark.parametrize("how", BAD)
def test_a_bad_resource_costs_itself_alone(tmp_path: Path, how: str) -> None:
    resource, reason = BAD[how]
    others = [document("d1", "1"), document("d2", "2", "fever")]
    found = read(exported(tmp_path / "bulk", DocumentReference=[others[0], resource, others[1]]))
    assert said(found) == [("1", "cough"), ("2", "fever")]
    assert found.rejected == {reason: 1}


@pytest.mark.parametrize(
    "more",
    [
        {"context": 7, "relatesTo": 7, "contained": 7, "category": 7, "custodian": 7, "type": 7},
        {"context": {"encounter": [7, {"reference": 7}]}, "relatesTo": [7, {"target": 7}]},
        {"contained": [7, {"resourceType": "Binary", "id": []}], "category": [{"coding": [7]}]},
    ],
)
def test_whatever_else_a_resource_holds_is_nobody_elses(tmp_path: Path, more: Any) -> None:
    folder = exported(
        tmp_path / "bulk",
        DocumentReference=[document("d1", "1"), document("d2", "2", "odd", **more)],
        Encounter=["{", visit("e1", "1", "north") | {"serviceProvider": 7}, {"id": 7}, "[]"],
    )
    columns = Columns(text="text", patient="patient")
    assert [r.unit for r in read(folder, columns=columns).records] == ["1", "2"]


def test_text_that_is_contained_is_read(tmp_path: Path) -> None:
    binary = {"resourceType": "Binary", "id": "b", "data": base64.b64encode(b"inside").decode()}
    content = [
        attachment("x", "image/png"),
        {"attachment": {"contentType": "text/plain", "url": "#b"}},
    ]
    resource = document("d1", "1", contained=[binary], content=content)
    assert said(read(exported(tmp_path / "bulk", DocumentReference=[resource]))) == [
        ("1", "inside")
    ]


def test_conditions_are_records_of_their_own(tmp_path: Path) -> None:
    def condition(number: str, patient: str, **more: Any) -> dict[str, Any]:
        code = {"coding": [{"code": "195967001", "display": "Asthma"}]}
        subject = {"reference": f"urn:uuid:{patient}"}
        return {"resourceType": "Condition", "id": number, "subject": subject, "code": code} | more

    error = {"verificationStatus": {"coding": [{"code": "entered-in-error"}]}}
    folder = exported(
        tmp_path / "bulk", Condition=[condition("c1", "1"), condition("c2", "2", **error)]
    )
    columns = Columns(text="text", label="code", patient="patient")
    found = read(folder, columns=columns, options={"resource": "Condition"})
    assert [(r.unit, r.prompt, r.label) for r in found.records] == [("1", "Asthma", "195967001")]


def test_patients_are_told_apart_or_nothing_is_read(tmp_path: Path) -> None:
    folder = exported(tmp_path / "bulk", DocumentReference=[document("d1", "1")])
    for columns in (Columns(text="text"), Columns(text="text", patient="id")):
        with pytest.raises(ConfigError, match='patient = "patient"'):
            read(folder, unit="record", columns=columns)
    with pytest.raises(ConfigError, match="one of DocumentReference, Condition"):
        read(folder, options={"resource": "Patient"})


def test_a_folder_without_documents_is_an_error_and_quotes_nothing(tmp_path: Path) -> None:
    folder = exported(tmp_path / "bulk", Encounter=[visit("e1", SECRET, "north")])
    with pytest.raises(DataError, match="no file of DocumentReference") as caught:
        read(folder)
    assert SECRET not in str(caught.value)
    assert read(folder, strict=False).rejected == {"unreadable file": 1}
    with pytest.raises(DataError, match="no folder"):
        read(tmp_path / "none")


def test_a_real_bulk_export_is_read_end_to_end() -> None:
    folder = DATA / "fhir_bulk"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here; FEDTUNE_DATA names the folder of data sets")
    current = read(folder)
    assert len(current.records) == 13 and current.filtered == 1202 and not current.failed
    every = read(folder, filter={"status": ("current", "superseded")})
    assert len(every.records) == every.rows == 1215 and len({r.unit for r in every.records}) == 13
    assert all(record.prompt.strip() for record in every.records)


def test_gender_and_age_are_those_of_the_documents_own_patient(tmp_path: Path) -> None:
    def person(number: str, **more: Any) -> dict[str, Any]:
        return {"resourceType": "Patient", "id": number, **more}

    folder = exported(
        tmp_path / "bulk",
        DocumentReference=[
            document("d1", "1", "cough", date="2020-05-01T08:00:00Z"),
            document("d2", "1", "fever", date="2020-05-02T08:00:00Z"),
            document("d3", "2", "rash", date="2020"),
            document("d4", "3", "pain", date="2020-05-02"),
            document("d5", "4", "itch", date="2020-05-02"),
        ],
        Patient=[
            person("1", gender="female", birthDate="1950-05-02"),
            person("2", gender="male", birthDate="1950-05-02"),
            person("3", gender=7, birthDate="1950"),
        ],
    )
    columns = COLUMNS.model_copy(update={"label": "gender"})
    found = read(folder, columns=columns)
    assert [(r.unit, r.label) for r in found.records] == [
        ("1", "female"),
        ("2", "male"),
        ("1", "female"),
    ]
    assert found.rejected == {"missing value": 2}
    ages = read(folder, columns=COLUMNS.model_copy(update={"label": "age"}))
    assert sorted((r.unit, r.label) for r in ages.records) == [("1", "69"), ("1", "70")]


def having(number: str, said: str, patient: str = "1") -> dict[str, Any]:
    return {
        "resourceType": "Condition",
        "id": said,
        "subject": {"reference": f"Patient/{patient}"},
        "encounter": {"reference": f"Encounter/{number}"},
        "code": {"text": said},
    }


def test_the_conditions_of_a_visit_are_made_one_text_once(tmp_path: Path) -> None:
    """The work is otherwise a visit's documents times its conditions."""
    folder = exported(
        tmp_path / "bulk",
        DocumentReference=[document(f"d{n}", "1", **at("v1")) for n in range(20)],
        Condition=[having("v1", f"condition {n:02}") for n in range(20)],
    )
    rows = [row for _, row in Fhir().collect(folder, Names(folder, {})) if isinstance(row, dict)]
    assert len(rows) == 20
    assert str(rows[0]["conditions"]).startswith("condition 00; condition 01; ")
    assert len({id(row["conditions"]) for row in rows}) == 1


def test_a_visit_of_too_many_conditions_rejects_its_own_documents_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fhir, "SHARED", 40)
    folder = exported(
        tmp_path / "bulk",
        DocumentReference=[
            document("d1", "1", "cough", **at("v1")),
            document("d2", "1", "fever", **at("v2")),
            document("d3", "2", "rash", **at("v3")),
        ],
        Condition=[
            *(having("v1", f"condition {n}") for n in range(4)),
            *(having("v2", f"condition {n}") for n in range(3)),
        ],
    )
    found = read(folder)
    assert said(found) == [("1", "fever"), ("2", "rash")] and found.rejected == {"too long": 1}
    (refused,) = [r for _, r in Fhir().collect(folder, Names(folder, {})) if isinstance(r, BadCell)]
    assert refused.cells["patient"] == "1" and refused.cells["text"] == "cough"


def test_a_document_with_two_faults_ends_nobody_elses_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text is not base64, and its visit has too many conditions. Twin: an error that is none
    of those for which a row is rejected ends the file, and the other patient is not read."""
    monkeypatch.setattr(fhir, "SHARED", 40)
    broken = document("d1", "1", "cough", **at("v1"))
    broken["content"][0]["attachment"]["data"] = "%%%"
    folder = exported(
        tmp_path / "bulk",
        DocumentReference=[broken, document("d2", "2", "rash", **at("v2"))],
        Condition=[having("v1", f"condition {n}") for n in range(9)],
    )
    found = read(folder)
    assert said(found) == [("2", "rash")] and found.rejected == {"wrong type": 1}
    (refused,) = [r for _, r in Fhir().collect(folder, Names(folder, {})) if isinstance(r, BadCell)]
    assert refused.cells["patient"] == "1"
    monkeypatch.setattr(fhir, "ODD", (KeyError,))
    assert said(read(folder, strict=False)) == []
