"""Describe a site's records as a data sheet in Croissant's format, and attest that the sheet
describes them.

    SITE/sheet.toml         the fields that a person typed (core/config/sheet.py)
    DATA.croissant.json     beside the records, for this user alone: the typed fields, counts, and
                            hashes of the files
    STATE/sheet.json        the attestation: a hash of the records, and one of the sheet
    --public FILE           the typed fields alone

Guarantee: the public sheet is computed from the typed fields alone; its function gets no
records."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune.core.config import Site
from fedtune.core.config.sheet import Sheet, load_sheet, sheet_path, template
from fedtune.core.data.files import placed_rows
from fedtune.core.data.records import keys_of, read_file, source_of
from fedtune.core.errors import DataError, PolicyRefused
from fedtune.core.files import reading
from fedtune.core.files.writing import check_replaceable, create, replace
from fedtune.core.ledger.audit_log import AuditLog
from fedtune.homes.opening import find_ledger

ATTESTED = "sheet.json"  # in the state folder
CROISSANT = ".croissant.json"
_ATTEST = "the person who attests to the records runs `fedtune data describe SITE`"
CONFORMS = ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"]
CR, RAI = "http://mlcommons.org/croissant/", "http://mlcommons.org/croissant/RAI/"
PLAIN = (
    *("citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty", "fileObject"),
    *("fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField"),
    *("path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate"),
    *("separator", "source", "subField", "transform"),
)
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": CR,
    "rai": RAI,
    "sc": "https://schema.org/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{name: f"cr:{name}" for name in PLAIN},
}
MEDIA = {".jsonl": "application/jsonlines", ".csv": "text/csv", ".tsv": "text/tab-separated-values"}
# A field of the sheet, and Croissant's (1.0, RAI 1.0) or schema.org's name for it.
TERMS = {
    "description": "description",
    "licence": "license",
    "legal_basis": "usageInfo",
    "consent": "conditionsOfAccess",
    "language": "inLanguage",
    "attested_on": "datePublished",
    "attested_by": "accountablePerson",
    "publisher": "publisher",
    "provenance": "rai:dataCollection",
    "purpose": "rai:dataUseCases",
    "personal_information": "rai:personalSensitiveInformation",
    "de_identification": "rai:dataPreprocessingProtocol",
    "known_biases": "rai:dataBiases",
    "limitations": "rai:dataLimitations",
}


@dataclass(frozen=True)
class Described:
    """The result of `describe_data`.

    - sheet: the path of sheet.toml, which has the fields that a person typed
    - template: whether only an empty sheet was written
    - private, public: the paths of the private and the public sheet; None if not written
    - held: the names of the fields that a person filled in
    - rows, usable, units: the numbers of rows, of usable records and of units, which are for this
      site only"""

    sheet: Path
    template: bool
    private: Path | None = None
    public: Path | None = None
    held: tuple[str, ...] = ()
    rows: int = 0
    usable: int = 0
    units: int = 0


def describe_data(site: Site, public: Path | None = None) -> Described:
    """Write a site's data sheet beside its records, and attest that it describes them.

    If there is no sheet.toml, only an empty one is written, for a person to fill in.
    public: a file to which the typed fields, and nothing computed, are written too; policy.release
    must list "sheet" for this. None writes no such file.

    >>> import fedtune
    >>> _, site_file = fedtune.init("my-study")
    >>> fedtune.describe_data(fedtune.load_site(site_file)).template
    True

    Errors: ConfigError, DataError, PolicyRefused (the policy releases no sheet)."""
    typed, path = load_sheet(site), sheet_path(site)
    if public and "sheet" not in site.policy.release:
        raise PolicyRefused(
            'policy.release does not list "sheet"',
            todo='if the public sheet may leave the site, add "sheet" to policy.release',
        )
    if public:
        check_replaceable(public, ".json")
    if typed is None:
        create(path, template().encode(), private=True)
        return Described(path, True)
    unit = "patient" if site.data.columns.patient else "record"
    read = read_file(site.data, unit="patient" if unit == "patient" else "record", strict=True)
    book = find_ledger(site.home)
    counts = {
        "usable records": len(read.records),
        f"{unit}s": len({record.unit for record in read.records}),
        "rows that are not used": read.filtered + read.withheld + len(read.failed),
    }
    beside = site.data.path if _in_files(site) else path
    out = beside.with_name(beside.name + CROISSANT)
    content = private_sheet(typed, site, counts)
    replace(out, _json(content), private=True)
    if public:
        replace(public, _json(public_sheet(typed, site.site.name)))
    if book:
        AuditLog(book.folder, book.key).add("attest", sheet=_typed_hash(typed))
    attested = {"records": records_hash(site), "sheet": _typed_hash(typed)}
    when = {"attested": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    replace(site.site.state / ATTESTED, _json(attested | when), private=True)
    total = counts["usable records"] + counts["rows that are not used"]
    return Described(
        path, False, out, public, typed.held, total, counts["usable records"], counts[f"{unit}s"]
    )


def public_sheet(typed: Sheet, name: str) -> dict[str, Any]:
    """Build the public sheet, which may leave a site. It holds what a person typed (`typed`), under
    the site's public name `name`, and nothing else."""
    body: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS,
        "name": typed.title or name,
    }
    for field, term in TERMS.items():
        if said := getattr(typed, field).strip():
            body[term] = said
    if "publisher" in body:
        body["publisher"] = {"@type": "sc:Organization", "name": body["publisher"]}
        body["creator"] = body["publisher"]
    if "accountablePerson" in body:
        body["accountablePerson"] = {"@type": "sc:Person", "name": body["accountablePerson"]}
    if frame := [date for date in (typed.collected_from, typed.collected_to) if date.strip()]:
        body["rai:dataCollectionTimeFrame"] = frame
    return body


def private_sheet(typed: Sheet, site: Site, counts: dict[str, int]) -> dict[str, Any]:
    """Build the private sheet, which stays beside the records: what was typed, with counts, and
    each file with its size and hash. typed: the fields that a person filled in. counts: the name of
    each figure about the records → its value."""
    body = public_sheet(typed, site.site.name)
    body["variableMeasured"] = [
        {"@type": "sc:PropertyValue", "name": name, "value": value}
        for name, value in counts.items()
    ]
    body["distribution"] = [
        {
            "@type": "cr:FileObject",
            "@id": file.name,
            "name": file.name,
            "contentUrl": file.name,
            "contentSize": f"{file.stat().st_size} B",
            "encodingFormat": MEDIA.get(file.suffix.lower(), "application/octet-stream"),
            "sha256": _sha256(file),
        }
        for file in (_files(site.data.path) if _in_files(site) else ())
    ]
    return body


def records_hash(site: Site) -> str:
    """Return a hash of a site's records. If they are files, it is computed from each file's name
    and bytes; otherwise from every row, whether or not the patient consented. Images, recordings
    and clips that the rows name count only in the folder that data.path names. Errors:
    DataError."""
    total = hashlib.sha256()
    if _in_files(site):
        for file in _files(site.data.path):
            name = file.relative_to(site.data.path) if site.data.path.is_dir() else file.name
            total.update(os.fsencode(name) + f" {_sha256(file)}\n".encode())
        return total.hexdigest()
    data = site.data
    for _, row in placed_rows(data.path, keys_of(data), strict=True, source=source_of(data)):
        total.update((json.dumps(row, sort_keys=True, default=str) + "\n").encode())
    return total.hexdigest()


def check_attested(site: Site) -> None:
    """If the policy requires a data sheet, check that sheet and records have not changed since they
    were attested. Errors: those of `check_sheet` and `check_attested_records`."""
    check_sheet(site)
    check_attested_records(site)


def check_sheet(site: Site) -> None:
    """If the policy requires a data sheet, check that somebody attested its content. No record is
    read.

    Errors: PolicyRefused, ConfigError, InputError."""
    if not site.policy.data_sheet:
        return
    typed = load_sheet(site)
    if typed is None or not (site.site.state / ATTESTED).exists():
        raise PolicyRefused(
            "policy.data_sheet asks for a data sheet, and nobody has attested one here",
            "an attested data sheet",
            _ATTEST,
        )
    _check_unchanged(site, "sheet", _typed_hash(typed))


def check_attested_records(site: Site) -> None:
    """If the policy requires a data sheet, check that the records are those that somebody attested.
    The result depends on the records, so it is only for this machine and never an answer to a
    coordinator.

    Errors: PolicyRefused, InputError, DataError."""
    if site.policy.data_sheet:
        _check_unchanged(site, "records", records_hash(site))


def _check_unchanged(site: Site, what: str, now: str) -> None:
    path = site.site.state / ATTESTED
    attested = reading.json_in(path, "what `fedtune data describe` wrote", _ATTEST)
    if attested.get(what) != now:
        raise PolicyRefused(
            f"{what}: changed since the data sheet was attested (policy.data_sheet)",
            "the records and the sheet that somebody attested",
            _ATTEST,
        )


def _in_files(site: Site) -> bool:
    """Return whether the site's records are files. They are not if data.url is set: the records are
    then in a database, and data.path is only the folder of their images or recordings."""
    return site.data.url is None and site.data.path.exists()


def _typed_hash(typed: Sheet) -> str:
    return hashlib.sha256(typed.model_dump_json().encode()).hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """Yield the paths of the files of the records, sorted, without the sheets that `describe_data`
    wrote. path: the file of the records, or their folder, of which all files at any depth are
    taken."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    yield from (
        file for file in files if os.path.isfile(file) and not file.name.endswith(CROISSANT)
    )


def _sha256(path: Path) -> str:
    try:
        with reading.open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path.parent}: a file cannot be read ({error.strerror})") from None


def _json(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode()
