"""Build an assurance pack from its sections and a run: the content of assurance.json, and
assurance.html, a page that shows this content.

Each row of a section has one answer:

    shown          a mechanism, with evidence of this run
    built in       a mechanism with tests, of which this run recorded nothing
    not shown      this run lacks the evidence or the mechanism; the row says why
    organisation   only the organisation can say
    not opened     nobody read the source, so that nothing is claimed; it is not counted

A row with one of the first three answers may also have a blank, into which a person types what only
the organisation can say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from fedtune.core.errors import ConfigError
from fedtune.evidence.dossier.assurance.sections import NEEDS, Section, key
from fedtune.evidence.dossier.content import WHEN, Documents, look_up, notes
from fedtune.evidence.dossier.page import page

FORMAT = "fedtune-assurance-1"
JSON, PAGE = "assurance.json", "assurance.html"
SHOWN, BUILT_IN, NOT_SHOWN = "shown", "built in", "not shown"
THEIRS, NOT_OPENED = "organisation", "not opened"
ANSWERS = {
    SHOWN: "shown by this run",
    BUILT_IN: "built in and tested, no evidence in this run",
    NOT_SHOWN: "not shown by this run",
    THEIRS: "the organisation's alone",
}
HEAD = ["no.", "asks, in our words", "importance", "answer", "evidence", "test"]
WIDE = """header, main, footer, nav { max-width: 84rem; }
td .blank { display: block; padding: .25rem .4rem; margin: .25rem 0; }
td .typed { display: block; padding: 0 .4rem; margin: .25rem 0; }
section + section table { table-layout: fixed; min-width: 64rem; }
section + section td, section + section tbody th { overflow-wrap: anywhere; }
section + section thead th { width: 7%; } section + section thead th:nth-child(2) { width: 15%; }
section + section thead th:nth-child(3) { width: 10%; }
section + section thead th:nth-child(4) { width: 31%; }
section + section thead th:nth-child(5) { width: 20%; }
section + section thead th:nth-child(6) { width: 17%; }
"""
INTRODUCTION = (
    "Statements of standards and laws, each with what answers it in this run. The words are ours: "
    "the document that a section names has its own. An evaluation is the organisation's; nothing "
    "here states that a law or a standard is met, and a number of rows is no score.",
    "A figure names its field of the run when the pointer rests on it, and in assurance.json. "
    "`fedtune verify` looks each one up again. A test is a file of fedtune's repository: it shows "
    "that a mechanism works, not that it worked here. What is marked as a blank is for a person: "
    "`fedtune release --details FILE`.",
)


def build_pack(
    found: Documents,
    typed: Mapping[str, str],
    sections: Sequence[Section],
    names: AbstractSet[str],
) -> dict[str, Any]:
    """Build the content of assurance.json: the answer to each statement of the sections.

    - found: the documents of the run and of attacks on it, by file name
    - typed: the name of a blank -> the text that a person typed into it
    - sections: the statements to answer
    - names: the paths of the dossier's files in its folder, with the signature's, without the
      approvals'

    Errors: ConfigError if a value of the run cannot be shown in the format that a row asks for."""
    return {
        "format": FORMAT,
        "study": look_up(found, "report.json#/study", "plain"),
        "run by": look_up(found, "report.json#/fedtune", "plain"),
        "notes": notes(found),
        "sections": [_section(section, found, typed, names) for section in sections],
    }


def dump(content: Mapping[str, Any]) -> str:
    """Return the text of assurance.json with this content."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _section(
    section: Section, found: Documents, typed: Mapping[str, str], names: AbstractSet[str]
) -> dict[str, Any]:
    """Answer the rows of a section. Return the section's entry in assurance.json: a dict of its
    texts, the number of rows with each answer, the number of blanks, and the rows.

    - section: the content of its TOML file
    - found: the documents of the run and of attacks on it, by file name
    - typed: the name of a blank -> the text that a person typed into it
    - names: the paths of the dossier's files in its folder"""
    rows = [_row(section, row, found, typed, names) for row in section["row"]]
    counts = Counter(row["answer"] for row in rows)
    return {
        **{name: section.get(name, "") for name in ("id", "title", "from", "text")},
        "counts": {answer: counts[answer] for answer in ANSWERS},
        "blanks": sum("blank" in row for row in rows),
        "rows": rows,
    }


def _row(
    section: Section,
    row: Mapping[str, Any],
    found: Documents,
    typed: Mapping[str, str],
    names: AbstractSet[str],
) -> dict[str, Any]:
    """Answer one row of a section. Return the row's entry in assurance.json, a dict.

    - section: the content of its TOML file
    - row: the row in it
    - found: the documents of the run and of attacks on it, by file name
    - typed: the name of a blank -> the text that a person typed into it
    - names: the paths of the dossier's files in its folder"""
    shown: dict[str, Any] = {name: row.get(name, "") for name in ("id", "asks", "importance")}
    if "unopened" in row:
        return shown | {"answer": NOT_OPENED, "unopened": row["unopened"]}
    why = _missing(row, found)
    if "mechanism" in row and not why:
        facts = [
            _fact(section, row, found, *fact)
            for fact in row.get("facts", [])
            if fact[1].partition("#")[0] in found  # an attack's file may not have come with the run
        ]
        files = [name for name in row.get("files", []) if _is_there(name, names)]
        evident = bool(files) or any(one["fact"] for one in facts)
        if evident or not (row.get("facts") or row.get("files")):
            shown |= {"answer": SHOWN if evident else BUILT_IN, "mechanism": row["mechanism"]}
            shown |= {"facts": facts, "files": files, "tests": row.get("tests", [])}
        else:
            why = "the run recorded nothing of it"
    if why:
        shown |= {"answer": NOT_SHOWN, "why": why}
    if "organisation" in row:
        name = key(section, row)
        shown |= {"blank": name, "help": row["organisation"], "typed": typed.get(name, "").strip()}
    return {"answer": THEIRS} | shown


def _fact(
    section: Section, row: Mapping[str, Any], found: Documents, label: str, source: str, how: str
) -> dict[str, Any]:
    """Look up a fact that a row of the assurance pack names. Return {"label", "fact"}; "fact" is a
    dict as `look_up` returns it, or None if the run has no such value.

    - section, row: that row, and the section of the pack to which it belongs; an error's text gives
      the ids of both
    - found: the documents of the run and of attacks on it, by file name
    - label: the figure's name for people
    - source: a document and a JSON pointer in it, as in facts.py
    - how: the format in which the figure is shown, one of facts.SHOWN

    Errors: ConfigError if the run's value cannot be shown in this format."""
    try:
        return {"label": label, "fact": look_up(found, source, how)}
    except (ArithmeticError, AttributeError, TypeError, ValueError):
        raise ConfigError(
            f"section {section['id']}, row {row['id']}: {source} cannot be shown as {how!r}",
            "a format that fits it",
        ) from None


def _missing(row: Mapping[str, Any], found: Documents) -> str:
    """Return which of the row's requirements ("needs") this run does not meet, as one text in
    words; "" if it meets all. found: the documents of the run and of attacks on it, by file
    name."""
    return "; ".join(NEEDS[need] for need in row.get("needs", []) if not WHEN[need](found))


def _is_there(name: str, names: AbstractSet[str]) -> bool:
    path = name.partition("#")[0]
    return path in names or (path.endswith("/") and any(one.startswith(path) for one in names))


def pack_page(pack: Mapping[str, Any]) -> str:
    """Return the text of assurance.html, the page of an assurance pack. pack: the content of
    assurance.json."""
    return page(_as_blocks(pack), "Assurance pack", JSON, WIDE)


def _as_blocks(pack: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the content of assurance.json to the form that `page` renders, in which a section is
    a list of blocks."""
    summary = {
        "kind": "table",
        "table": "Statements by answer",
        "head": ["section", *ANSWERS.values(), "blanks for people in these rows"],
        "rows": [
            [section["title"], *map(str, (*section["counts"].values(), section["blanks"]))]
            for section in pack["sections"]
        ],
    }
    first = [{"kind": "note", "note": text} for text in pack["notes"]]
    first += [{"kind": "text", "text": text} for text in INTRODUCTION]
    start = {"id": "how-to-read", "title": "How to read this", "blocks": [*first, summary]}
    sections = [start, *({**s, "blocks": _blocks(s)} for s in pack["sections"])]
    return {"study": pack["study"], "run by": pack["run by"], "sections": sections}


def _blocks(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    texts = [text for text in (section["text"], f"Read in: {section['from']}.") if text]
    rows = [_cells(row) for row in section["rows"]]
    table = {"kind": "table", "table": section["title"], "head": HEAD, "rows": rows}
    return [*({"kind": "text", "text": text} for text in texts), table]


def _cells(row: Mapping[str, Any]) -> list[Any]:
    if row["answer"] == NOT_OPENED:
        said = f"Source not opened: {row['unopened']}. Nothing is claimed, and it is not counted."
        return [row["id"], row["asks"], row["importance"], said, "–", "–"]
    answer: list[Any] = [row["mechanism"]] if "mechanism" in row else []
    if "why" in row:
        answer.append(f"Not shown: {row['why']}.")
    if "blank" in row:
        answer.append({name: row[name] for name in ("blank", "help", "typed")})
    evidence = [*row.get("facts", []), *(f"`{name}`" for name in row.get("files", []))]
    tests = [f"`{name}`" for name in row.get("tests", [])]
    none = "none in this run" if row["answer"] == BUILT_IN else "–"
    importance = row["importance"] or "–"
    return [row["id"], row["asks"], importance, answer, evidence or none, tests or "–"]
