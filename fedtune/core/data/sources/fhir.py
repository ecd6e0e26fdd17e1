"""Read the folder of a FHIR bulk export: FHIR R4 as newline-delimited JSON."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedtune.core.data.sources._interface import BadCell, Collection, Names, Row
from fedtune.core.data.sources.jsonl import json_lines
from fedtune.core.errors import ConfigError, DataError

RESOURCES = ("DocumentReference", "Condition")
COLUMNS = (
    *("patient", "text", "id", "status", "doc_status", "replaced", "type", "category", "date"),
    *("site", "site_name", "custodian", "encounter", "conditions", "gender", "age"),
    *("code", "clinical_status", "verification_status"),
)
SUFFIX = ".ndjson"
DAY = re.compile(r"(\d{4})-(\d{2})-(\d{2})")
ODD = (TypeError, ValueError, AttributeError, KeyError, RecursionError)  # for a malformed resource
Key = tuple[str, str]  # a patient, and the id of a resource that is that patient's


# Most characters of a text that all documents of an encounter, or of a patient, have in common:
# each document becomes a row with this text, and all rows are read before the ledger is charged.
SHARED = 100_000


class TooLong(Exception):
    """The conditions of an encounter have more than SHARED characters together."""


@dataclass(frozen=True)
class Fhir(Collection):
    """Reads documents or, if `resource` is "Condition", conditions from the .ndjson files of a bulk
    export. A file's name says which resources it has, as in DocumentReference.000.ndjson. Rows have
    the columns of COLUMNS, patient among them.

    A document's text is its first attachment of the type `content_type`, which stands in the
    document as base64 or in a contained resource. A reference from one resource to another counts
    only if both belong to the same patient.

    Left out are documents whose status is not "current" and conditions that were entered in error,
    unless data.filter names `status`; and documents that another document of the patient replaces,
    unless data.filter names `replaced`."""

    kept: ClassVar = {"status": ("current",), "replaced": ("no",)}
    patient: ClassVar = "patient"

    resource: str = "DocumentReference"
    content_type: str = "text/plain"

    def __post_init__(self) -> None:
        if self.resource not in RESOURCES:
            raise ConfigError(
                f"data.options.resource = {self.resource!r}", f"one of {', '.join(RESOURCES)}"
            )

    def collect(self, where: Path, names: Names) -> Iterator[tuple[str, Row | str]]:
        files = _files(where, self.resource)
        names.header(list(COLUMNS))
        is_document = self.resource == "DocumentReference"
        encounters, people = _encounters(where), _people(where)
        conditions = _conditions(where) if is_document else _Conditions({})
        replaced = _list_replaced(files) if is_document else set()
        for path in files:
            try:
                for number, line in json_lines(path):
                    names.row = number
                    if isinstance(line, str):
                        cells = line.cells if isinstance(line, BadCell) else {}
                        if cells.get("resourceType") == self.resource and _patient(cells):
                            row = self._row(cells, encounters, conditions, replaced, people)
                            read = row.cells if isinstance(row, BadCell) else row
                            yield path.name, BadCell(line, read)
                        else:
                            yield path.name, str(line)
                    elif line.get("resourceType") == self.resource:
                        yield path.name, self._row(line, encounters, conditions, replaced, people)
            except OSError:  # an unreadable file does not affect the others
                names.row = 0
                yield path.name, "cannot be read"

    def _row(
        self,
        line: Row,
        encounters: dict[Key, dict[str, str]],
        conditions: _Conditions,
        replaced: set[Key],
        people: dict[str, dict[str, str]],
    ) -> Row | BadCell:
        """Convert a resource of the export to a row, a dict by column. If that is not possible,
        return a BadCell: the reason, with the cells that can be read.

        - line: the resource, as its line of JSON gives it
        - encounters: the organisation of each encounter (`_encounters`)
        - conditions: the conditions of each encounter (`_conditions`); none if the rows are
          conditions themselves
        - replaced: the documents that another document replaces (`_list_replaced`)
        - people: gender and date of birth of each patient (`_people`)"""
        try:
            return self._cells(line, encounters, conditions, replaced, people)
        except TooLong:
            reason = "too long"
        except ODD:
            reason = "wrong type"
        # Without conditions, so that nothing but ODD can be raised: any other error would end the
        # reading of everybody's rows after this one.
        for shown in (line, {**line, "content": None}):
            with suppress(*ODD):
                cells = self._cells(shown, encounters, _Conditions({}), replaced, people)
                return BadCell(reason, cells)
        return BadCell(reason, {"patient": _patient(line) or None})

    def _cells(
        self,
        line: Any,
        encounters: dict[Key, dict[str, str]],
        conditions: _Conditions,
        replaced: set[Key],
        people: dict[str, dict[str, str]],
    ) -> Row:
        """Return the row that a resource becomes, a dict by column. A cell whose value the export
        does not give is None or "". Arguments as for `_row`. Errors: one of ODD, if the resource
        does not have the form that FHIR prescribes."""
        patient, context = _patient(line), _table(line.get("context"))
        visit = line.get("encounter") or next(iter(_tables(context.get("encounter"))), None)
        key = patient, _reference(visit, "Encounter")
        known = encounters.get(key, {})
        row: Row = {
            "patient": patient or None,
            "id": line.get("id"),
            "encounter": key[1] or None,
            "site": known.get("site"),
            "site_name": known.get("site_name"),
            "gender": people.get(patient, {}).get("gender"),
        }
        born = people.get(patient, {}).get("born", "")
        if self.resource == "Condition":
            code = _table(line.get("code"))
            return row | {
                "text": _name_concept(code) or None,
                "code": _codes(code) or None,
                "clinical_status": _codes(_table(line.get("clinicalStatus"))) or None,
                "verification_status": _codes(_table(line.get("verificationStatus"))) or None,
                "date": (date := line.get("recordedDate") or line.get("onsetDateTime")),
                "age": _age(born, date),
                "status": _condition_status(line),
                "replaced": "no",
            }
        custodian = _table(line.get("custodian"))
        return row | {
            "text": self._text(line),
            "status": line.get("status"),
            "doc_status": line.get("docStatus"),
            "replaced": "yes" if (patient, str(line.get("id"))) in replaced else "no",
            "type": _name_concept(_table(line.get("type"))) or None,
            "category": next(map(_name_concept, _tables(line.get("category"))), "") or None,
            "date": line.get("date"),
            "age": _age(born, line.get("date")),
            "custodian": _reference(custodian, "Organization") or None,
            "site": known.get("site") or _reference(custodian, "Organization") or None,
            "site_name": known.get("site_name") or custodian.get("display"),
            "conditions": conditions.of_visit(key) or None,
        }

    def _text(self, line: Any) -> str | None:
        """Return the document's text; None if the export does not hold it. Errors: ValueError if it
        is not base64."""
        contained = {
            str(one.get("id")): one
            for one in _tables(line.get("contained"))
            if one.get("resourceType") == "Binary"
        }
        for content in _tables(line.get("content")):
            attachment = _table(content.get("attachment"))
            kind = str(attachment.get("contentType", "")).partition(";")[0].strip().lower()
            if kind != self.content_type:
                continue
            data, url = attachment.get("data"), str(attachment.get("url", ""))
            if data is None and url.startswith("#"):
                data = contained.get(url[1:], {}).get("data")
            if data is not None:
                return _decode_attachment(str(data))
        return None


def _files(where: Path, resource: str) -> list[Path]:
    """Return the export's files that hold one kind of resource; a file's name says which it holds.

    - where: the export's folder
    - resource: the kind, such as "DocumentReference"

    Errors: DataError if `where` is not a folder, or has no such file."""
    if not where.is_dir():
        raise DataError(f"{where}: no folder", f"a bulk export's folder of {SUFFIX} files")
    found = sorted(p for p in where.iterdir() if p.suffix == SUFFIX and resource in p.name)
    if not found:
        raise DataError(
            f"{where}: no file of {resource}",
            f"files with the resource in their name, such as {resource}.000{SUFFIX}",
        )
    return [path for path in found if os.path.isfile(path)]


def _resources(where: Path, resource: str) -> Iterator[Any]:
    """Yield each resource of one kind that can be read from the export's folder `where`, as the
    object in its line of JSON. Lines that cannot be read are left out."""
    for path in sorted(where.iterdir()):
        if path.suffix == SUFFIX and resource in path.name and os.path.isfile(path):
            yield from _lines(path, resource)


def _lines(path: Path, resource: str) -> Iterator[Any]:
    try:
        for _, line in json_lines(path):
            if isinstance(line, dict) and line.get("resourceType") == resource:
                yield line
    except OSError:
        return


def _encounters(where: Path) -> dict[Key, dict[str, str]]:
    """Return the organisation of each encounter, as a dict: (patient, the encounter's id) ->
    {"site": the organisation's id, "site_name": its name}, each "" if the export does not give it,
    or if it has more than SHARED characters.
    If several encounters have the same id, the one whose content sorts first counts."""
    found: dict[Key, dict[str, str]] = {}
    for line in _resources(where, "Encounter"):
        try:
            provider = _table(line.get("serviceProvider"))
            key = _patient(line), str(line["id"])
            site = {
                "site": _reference(provider, "Organization"),
                "site_name": str(provider.get("display", "")),
            }
        except ODD:
            continue
        site = {name: value if len(value) <= SHARED else "" for name, value in site.items()}
        if key[0] and (key not in found or sorted(site.items()) < sorted(found[key].items())):
            found[key] = site
    return found


def _people(where: Path) -> dict[str, dict[str, str]]:
    """Return what is known of each patient, as a dict: the patient's id -> {"gender": ..., "born":
    date of birth}, as far as the export gives them in at most SHARED characters. If several
    resources have the same id, the one whose content sorts first counts."""
    found: dict[str, dict[str, str]] = {}
    for line in _resources(where, "Patient"):
        told = {"gender": line.get("gender"), "born": line.get("birthDate")}
        person = {
            name: value
            for name, value in told.items()
            if isinstance(value, str) and len(value) <= SHARED
        }
        key = line.get("id")
        if isinstance(key, str) and (
            key not in found or sorted(person.items()) < sorted(found[key].items())
        ):
            found[key] = person
    return found


def _age(born: str, date: Any) -> int | None:
    """Return a patient's age at a date, in whole years. Return None if `born` or `date` is not
    given to the day, or if the date is before birth."""
    days = [DAY.match(value) if isinstance(value, str) else None for value in (born, date)]
    if not all(days):
        return None
    birth, then = ([int(part) for part in day.groups()] for day in days if day)
    years = then[0] - birth[0] - (then[1:] < birth[1:])
    return years if years >= 0 else None


class _Conditions:
    """The conditions of each encounter, as one text. `found`: (patient, the encounter's id) -> the
    names of the conditions that refer to it."""

    def __init__(self, found: dict[Key, set[str]]) -> None:
        self._found, self._texts = found, dict[Key, str]()

    def of_visit(self, key: Key) -> str:
        """Return the names of an encounter's conditions, sorted. The text is made once, whatever
        the number of the encounter's documents. key: (patient, the encounter's id). Errors:
        TooLong."""
        if key not in self._texts:
            self._texts[key] = "; ".join(sorted(self._found.get(key, ())))
        if len(self._texts[key]) > SHARED:
            raise TooLong
        return self._texts[key]


def _conditions(where: Path) -> _Conditions:
    """Read the conditions of each encounter. Conditions entered in error are left out."""
    found: dict[Key, set[str]] = {}
    for line in _resources(where, "Condition"):
        try:
            key = _patient(line), _reference(line.get("encounter"), "Encounter")
            said = _name_concept(_table(line.get("code")))
            in_error = _condition_status(line) != "current"
        except ODD:
            continue
        if all(key) and said and not in_error:
            found.setdefault(key, set()).add(said)
    return _Conditions(found)


def _list_replaced(files: list[Path]) -> set[Key]:
    """Return the documents, each as (patient, id), that another document of the same patient
    replaces. A document of another patient does not count, since one patient's document would then
    decide what happens to another's. files: those that hold documents."""
    found: set[Key] = set()
    for path in files:
        for line in _lines(path, "DocumentReference"):
            try:
                if line.get("status") == "entered-in-error":
                    continue
                targets = {
                    _reference(each.get("target"), "DocumentReference")
                    for each in _tables(line.get("relatesTo"))
                    if each.get("code") == "replaces"
                }
                patient, own = _patient(line), str(line.get("id"))
            except ODD:
                continue
            found |= {(patient, target) for target in targets - {own, ""} if patient}
    return found


def _patient(line: Any) -> str:
    return _reference(line.get("subject"), "Patient")


def _reference(value: Any, kind: str) -> str:
    """Return the id in a reference to another resource, without server and version. Return "" if
    `value` is no reference, if it points to a resource of another kind than `kind`, or if it points
    into the resource in which it stands."""
    text = _table(value).get("reference")
    if not isinstance(text, str) or text.startswith("#"):
        return ""
    text = text.partition("/_history/")[0].strip()
    if text.startswith(f"{kind}?"):  # a search for the resource, as in a bundle
        return text.partition("|")[2] or text.partition("?")[2]
    if text.startswith("urn:"):
        return text.rpartition(":")[2]
    before, _, last = text.rpartition("/")
    return last if before.rpartition("/")[2] == kind else ""


def _condition_status(line: Any) -> str:
    codes = _codes(_table(line.get("verificationStatus")))
    return "entered-in-error" if "entered-in-error" in codes.split() else "current"


def _name_concept(concept: dict[str, Any]) -> str:
    """Return the name of a coded concept: its text, or else the first name that one of its codings
    has; "" if there is none."""
    text = concept.get("text")
    if isinstance(text, str) and text.strip():
        return text
    names = (coding.get("display") for coding in _tables(concept.get("coding")))
    return next((name for name in names if isinstance(name, str) and name.strip()), "")


def _codes(concept: dict[str, Any]) -> str:
    codes = (coding.get("code") for coding in _tables(concept.get("coding")))
    return " ".join(code for code in codes if isinstance(code, str))


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _tables(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _decode_attachment(data: str) -> str:
    """Decode an attachment's base64 to text. Bytes that are not UTF-8 become lone surrogates,
    because of which the row is rejected later. Errors: ValueError if it is not base64."""
    try:
        raw = base64.b64decode("".join(data.split()), validate=True)
    except binascii.Error as error:
        raise ValueError from error
    return raw.decode("utf-8", "surrogateescape")
