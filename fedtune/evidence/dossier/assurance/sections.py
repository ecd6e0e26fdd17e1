"""Load the sections of an assurance pack. Each is one TOML file, for a standard, a law or a house
rule, with these keys.

id, title                  the section's id, in lower case, and its title
from                       where its statements were read: a document and its version
text = "…"                 whom the section is for, and what it leaves out; optional

[[row]]                    a statement
id = "5.1.06"              its number in the document, or a name if the number was not read
asks = "…"                 what it asks, in words of one's own
importance = "mandatory"   as the document has it; optional
mechanism = "…"            what answers it in fedtune; if its only evidence is tests, the answer is
                           "built in" and not "shown"
facts = [["label", SOURCE, FORMAT], …]   evidence: figures of the run (facts.py)
files = ["run/plan.json"] evidence: files of the dossier; "run/adapter/" is a folder
tests = ["tests/…"]        files of fedtune's repository that show that the mechanism works
needs = ["private"]        the mechanism is claimed only for such runs (NEEDS)
organisation = "…"         what only the organisation can say: a blank, for a person to fill
blank = "purpose"          the blank is one of the dossier's own, and is typed once
unopened = "name"          nobody read this source: the row has no number and is not counted"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fedtune.core.errors import ConfigError
from fedtune.core.files import reading
from fedtune.evidence.dossier.content import blanks as dossier_blanks
from fedtune.evidence.dossier.facts import DOCUMENTS, SHOWN

Section = dict[str, Any]
FOLDER = "assurance"  # a hospital's own section files, in a dossier
ATTACKS = ("attack.json", "audit.json")  # what an attack on the run's plan found, in a dossier
# What a row may need, and why nothing is claimed of a run without it.
NEEDS = {
    "private": "this run is not differentially private",
    "patients": "this run protects records one by one, not patients",
    "shared": "each site added its own noise; the sites shared none",
    "measured": "no quality was measured",
    "held out": "no site was asked about held-out records",
    "audited": "nobody ran `fedtune audit --run` on this run",
    "attacked": "no result of `fedtune attack` came with it (`fedtune release --attacks`)",
    "consortium": "a simulation: one machine ran all sites, without a network",
}
EXPECTED = "a section of an assurance pack (docs/verify.md)"
SHOWN_AT = "docs/verify.md shows a section of an assurance pack"
SECTION = {"id": str, "title": str, "from": str, "text": str, "row": list}
ROW = {
    **dict.fromkeys(("id", "asks", "importance", "mechanism", "organisation"), str),
    **dict.fromkeys(("blank", "unopened"), str),
    **dict.fromkeys(("facts", "files", "tests", "needs"), list),
}


def package_sections() -> list[Section]:
    """Load the sections that come with fedtune, in the order of their file names. Return a list of
    the files' contents."""
    with resources.as_file(resources.files("fedtune.evidence.dossier.assurance")) as package:
        return _load(package / "sections")


def all_sections(folder: Path | None) -> list[Section]:
    """Load the sections that come with fedtune and, after them, those of a hospital's folder.
    Return a list of the files' contents. folder: the hospital's folder; None if there is none.

    Errors: InputError if a file cannot be read; ConfigError if the folder holds no section, a file
    is not one, or two sections have the same id."""
    found = package_sections()
    if folder is not None:
        if not (own := _load(folder)):
            raise ConfigError(
                f"{folder}: holds no section",
                "files NAME.toml, each a section of an assurance pack",
                f"add one; {SHOWN_AT}",
            )
        found += own
    names = [section["id"] for section in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two sections are called {name!r}", "another id", f"see {folder}")
    return found


def blanks(sections: Sequence[Section]) -> Iterator[tuple[Section, Mapping[str, Any]]]:
    """Yield, in order, (section, row) for each row that asks the organisation for a text which no
    other part of the dossier asks for. Rows that name one of the dossier's own blanks (`blank`) are
    left out."""
    for section in sections:
        for row in section["row"]:
            if "organisation" in row and "blank" not in row:
                yield section, row


def key(section: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return the name under which a file of details (details.toml) holds the text for the blank of
    a row in a section: the name of the dossier's blank that the row names; if it names none,
    SECTION/ROW, from the ids of both."""
    return str(row.get("blank") or f"{section['id']}/{row['id']}")


def _load(folder: Path) -> list[Section]:
    return [_read(path) for path in sorted(folder.glob("*.toml"))]


def _read(path: Path) -> Section:
    """Read one section from its TOML file and check it. Errors: InputError if the file cannot be
    read; ConfigError if it is not a section."""
    section = reading.toml_in(path, EXPECTED)
    _check_kinds(f"{path}", section, SECTION)
    for name in ("id", "title", "from", "row"):
        if not section.get(name):
            raise ConfigError(f"{path}: has no {name}", EXPECTED)
    if not re.fullmatch(r"[a-z0-9-]{1,40}", section["id"]):
        raise ConfigError(f"{path}: id {section['id'][:40]!r}", "small letters, digits and hyphens")
    known = {block["blank"] for block in dossier_blanks()}
    seen = set[str]()
    for number, row in enumerate(section["row"], 1):
        where = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise ConfigError(f"{where} is no table", EXPECTED)
        _check_kinds(where, row, ROW)
        _check_row(where, row, known)
        if row["id"] in seen:
            raise ConfigError(f"{where}: there are two rows {row['id']!r}", "one for a statement")
        seen.add(row["id"])
    return section


def _check_kinds(where: str, table: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    for name, value in table.items():
        if name not in kinds:
            raise ConfigError(f"{where}: unknown key {name!r}", ", ".join(kinds))
        if not isinstance(value, kinds[name]):
            kind = "a text" if kinds[name] is str else "a list"
            raise ConfigError(f"{where}: {name} is not {kind}", EXPECTED)


def _check_row(where: str, row: Mapping[str, Any], known: set[str]) -> None:
    """Check a row of a section's file: it has the required keys, and everything exists that it
    names under `needs`, `facts` (sources and formats) and `blank`. where: the file and the row, for
    an error's text; known: the names of the dossier's own blanks. Errors: ConfigError."""
    for name in ("id", "asks"):
        if not row.get(name):
            raise ConfigError(f"{where}: has no {name}", EXPECTED)
    if not {"mechanism", "organisation", "unopened"} & {*row}:
        raise ConfigError(
            f"{where}: has no answer",
            "one of the keys mechanism, organisation and unopened",
            f"add one; {SHOWN_AT}",
        )
    if "mechanism" in row and not any(row.get(name) for name in ("facts", "files", "tests")):
        raise ConfigError(
            f"{where}: a mechanism without evidence",
            "one of the keys facts, files and tests",
            f"add one; {SHOWN_AT}",
        )
    for need in row.get("needs", []):
        if need not in NEEDS:
            raise ConfigError(f"{where}: unknown entry {need!r} in needs", ", ".join(NEEDS))
    for fact in row.get("facts", []):
        if not (isinstance(fact, list) and len(fact) == 3 and {*map(type, fact)} == {str}):
            raise ConfigError(f"{where}: a fact is no list", '["label", "SOURCE", "FORMAT"]')
        document, how = fact[1].partition("#")[0], fact[2]
        if document not in (*DOCUMENTS, *ATTACKS):
            raise ConfigError(f"{where}: no source {document!r}", ", ".join(DOCUMENTS + ATTACKS))
        if how not in SHOWN:
            raise ConfigError(f"{where}: unknown format {how!r}", ", ".join(SHOWN))
    for name in ("files", "tests"):
        if not all(isinstance(item, str) for item in row.get(name, [])):
            raise ConfigError(f"{where}: {name} is not a list of texts", EXPECTED)
    if "blank" in row and (row["blank"] not in known or "organisation" not in row):
        raise ConfigError(
            f"{where}: the key `blank` is {row['blank']!r}, which is not one of the dossier's "
            "blanks, or the key `organisation` is missing",
            f"the key `organisation`, and as `blank` one of {', '.join(known)}",
        )
