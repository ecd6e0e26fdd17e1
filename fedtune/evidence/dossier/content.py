"""Build the content of a dossier from fedtune's own texts (sections/*.toml), a run, and what a
person typed.

fedtune's texts hold no figure of a run. Each figure is a fact, which names where the run has it and
in which format it is shown. What neither fedtune nor the run can say is a blank, which a person
fills in (details.toml). A section consists of blocks:

    text = "…"                       a paragraph
    note = "…"                       a highlighted paragraph
    list = ["…"]                     a list
    limits = true                    the list that claim.limits returns
    picture = "name", alt, caption   one of diagrams.py
    curve = "caption"                the metric by ε, or by round if the run has no ε
    fact = "label", at = SOURCE      one figure of the run
    table = "caption", head, rows    a table of the package's own words
    table = "caption", each = SOURCE, key = "site", columns = [["ε", SOURCE, "epsilon"], …]
                                     a row for each entry at SOURCE, whose name replaces {key}
    blank = "key", label, help       a text that a person fills in
    when = "private"                 in any block: it is shown only for such runs (a key of WHEN)"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from math import isfinite
from typing import Any

from fedtune.core.config.held_out import CLASS
from fedtune.core.registry.metrics import METRICS
from fedtune.evidence.dossier.facts import MISSING, escape_key, resolve, show
from fedtune.report.claim import fallback, limits
from fedtune.report.gain import headline, is_start_released
from fedtune.report.teacher import teacher_left_out_line

FORMAT = "fedtune-dossier-1"
Block = dict[str, Any]
Documents = Mapping[str, Any]


def _report(found: Documents, *keys: str) -> Any:
    value: Any = found["report.json"]
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _collect_subjects(found: Documents) -> set[str]:
    return {line.about for line in headline(_report(found, "quality") or {})}


def _groups(found: Documents) -> set[str]:
    """Return the names of the columns by whose values, such as the sexes, the run compared groups
    of held-out patients. found: the run's documents by file name."""
    return {str(row["by"]) for row in _report(found, "held_out", "rows") or []} - {"", CLASS}


WHEN: dict[str, Callable[[Documents], bool]] = {
    "private": lambda found: bool(_report(found, "private")),
    "not private": lambda found: not _report(found, "private"),
    "declared": lambda found: bool(_report(found, "declared")),
    "all declared": lambda found: (
        bool(found["evidence.json"]["sites"])
        and {*(_report(found, "declared") or {})} >= {*found["evidence.json"]["sites"]}
    ),
    "free query": lambda found: bool(_report(found, "free_query")),
    "teacher left out": lambda found: bool(teacher_left_out_line(found["report.json"])),
    "patients": lambda found: _report(found, "privacy", "unit") == "patient",
    "records": lambda found: _report(found, "privacy", "unit") == "record",
    "continuous": lambda found: bool(_report(found, "continuous")),
    "measured": lambda found: isinstance(_report(found, "quality", "before"), Mapping),
    "not measured": lambda found: not isinstance(_report(found, "quality", "before"), Mapping),
    "own noise": lambda found: WHEN["private"](found) and not WHEN["shared"](found),
    "asked": lambda found: bool(_report(found, "privacy", "evaluation")),
    "shared": lambda found: fallback(_report(found, "privacy") or {}) is not None,
    "audited": lambda found: "audit.md" in found,
    "not audited": lambda found: "audit.md" not in found,
    "simulated": lambda found: bool(found.get("simulated")),
    "consortium": lambda found: not found.get("simulated"),
    "invented": lambda found: bool(_report(found, "invented")),
    "started": lambda found: "start" in _collect_subjects(found),
    "classes": lambda found: bool(_report(found, "quality", "classes")),
    "released": lambda found: "released" in _collect_subjects(found),
    "held out": lambda found: bool(_report(found, "held_out")),
    "resolved": lambda found: bool(_report(found, "held_out", "resolved")),
    "none resolved": lambda found: WHEN["held out"](found) and not WHEN["resolved"](found),
    "groups": lambda found: bool(_groups(found)),
    "no groups": lambda found: not _groups(found),
    "told": lambda found: bool(found.get("told")),
    "attacked": lambda found: "attack.json" in found,
}


def sections() -> list[dict[str, Any]]:
    """Load the dossier's texts that come with fedtune. Return a list of the contents of the TOML
    files in sections/, in the order of their names."""
    folder = resources.files("fedtune.evidence.dossier") / "sections"
    files = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda f: f.name
    )
    return [tomllib.loads(file.read_text(encoding="utf-8")) for file in files]


def blanks() -> Iterator[Mapping[str, str]]:
    """Yield each blank that a person may fill in, once, in the order of the sections. It is yielded
    as its block, a mapping with its key ("blank"), its "label" and its "help"."""
    seen = set[str]()
    for section in sections():
        for block in section["block"]:
            if "blank" in block and block["blank"] not in seen:
                seen.add(block["blank"])
                yield block


def notes(found: Documents) -> list[str]:
    """Return the highlighted texts of the first section of a run's dossier, for example that the
    run is not private. found: the run's documents by file name."""
    blocks = _blocks(sections()[0]["block"], found, {})
    return [block["note"] for block in blocks if block["kind"] == "note"]


def build(found: Documents, typed: Mapping[str, str]) -> dict[str, Any]:
    """Build the content of dossier.json from a run and what a person typed. found: the run's
    documents by file name (`facts.documents`). typed: a blank's key -> the text that a person typed
    into it."""
    return {
        "format": FORMAT,
        "study": look_up(found, "report.json#/study", "plain"),
        "run by": look_up(found, "report.json#/fedtune", "plain"),
        "sections": [
            {
                "id": section["id"],
                "title": section["title"],
                "blocks": [*_blocks(section["block"], found, typed)],
            }
            for section in sections()
        ],
    }


def dump_content(content: Mapping[str, Any]) -> str:
    """Return the text of dossier.json with this content."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _blocks(
    blocks: list[Block], found: Documents, typed: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    for block in blocks:
        if not all(WHEN[when](found) for when in _as_list(block.get("when", []))):
            continue
        if "fact" in block:
            fact = look_up(found, block["at"], block.get("show", "plain"))
            yield {"kind": "fact", "label": block["fact"], "fact": fact}
        elif "each" in block:
            yield _table(block, found)
        elif "table" in block:
            yield {"kind": "table", **{key: block[key] for key in ("table", "head", "rows")}}
        elif "blank" in block:
            answer = typed.get(block["blank"], "").strip()
            shown = {key: block[key] for key in ("blank", "label", "help")}
            yield {"kind": "blank", **shown, "typed": answer}
        elif "picture" in block:
            unit = str(_report(found, "privacy", "unit") or "record")
            shown = {key: block[key] for key in ("picture", "alt", "caption")}
            yield {"kind": "picture", **shown, "unit": unit}
        elif "curve" in block:
            yield from _curve(block["curve"], found)
        elif "limits" in block:
            unit = _report(found, "privacy", "unit") or "record"
            yield {"kind": "list", "list": limits(str(unit), WHEN["shared"](found))}
        else:
            kind = next(
                kind for kind in ("heading", "text", "note", "list", "code") if kind in block
            )
            yield {"kind": kind, kind: block[kind]}


def _curve(caption: str, found: Documents) -> Iterator[dict[str, Any]]:
    """Yield one block, the curve of the run's metric, with a point for each round of which the
    metric (and for a private run ε) is known. Yield nothing if there is no such round, or the
    metric of the base alone is not known.

    caption: the text below the curve; found: the run's documents by file name."""
    quality, rounds = _report(found, "quality") or {}, _report(found, "rounds") or []
    metric, private = quality.get("metric"), WHEN["private"](found)
    name = escape_key(str(metric))
    places = {row["round"]: place for place, row in enumerate(rounds)}
    points = []
    for place, row in enumerate(quality.get("by_round") or []):
        if (at := places.get(row["round"])) is None:
            continue
        spent = (f"report.json#/rounds/{at}/epsilon", "largest")
        across = spent if private else (f"report.json#/rounds/{at}/round", "plain")
        value = (f"report.json#/quality/by_round/{place}/{name}", "plain")
        point = [look_up(found, *across), look_up(found, *value)]
        if all(fact and isfinite(float(fact["shown"])) for fact in point):
            points.append(point)
    base = look_up(found, f"report.json#/quality/before/{name}", "plain")
    which = "trained" if is_start_released(quality) else "after"  # the trained model's figures
    bounds = f"report.json#/quality/gain/intervals/{name}/{which}"
    if metric in METRICS and base and points:
        yield {
            "kind": "curve",
            "curve": caption,
            "across": "ε of the site that spent most until then" if private else "round",
            "metric": look_up(found, "report.json#/quality/metric", "plain"),
            "base": base,
            "start": look_up(found, f"report.json#/quality/start/{name}", "plain"),
            "points": points,
            "interval": [look_up(found, f"{bounds}/{edge}", "plain") for edge in (0, 1)],
        }


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def look_up(found: Documents, source: str, how: str) -> dict[str, str] | None:
    """Look up one fact of a run. Return a dict of texts: "shown" (the value), "source" and "how"
    (as given). Return None if the run has no such value.

    - found: the run's documents by file name
    - source: a document's file name, "#", and the JSON pointer of the value in this document
    - how: the format in which the value is shown, one of facts.SHOWN"""
    value = resolve(found, source)
    if value is MISSING or value is None:
        return None
    return {"shown": show(value, how), "source": source, "how": how}


def _table(block: Block, found: Documents) -> dict[str, Any]:
    entries = resolve(found, block["each"])
    keys = sorted(entries) if isinstance(entries, Mapping) else []
    if isinstance(entries, list):
        keys = [str(number) for number in range(len(entries))]
    columns = block["columns"]
    rows = []
    for key in keys:
        cells = [
            look_up(found, source.replace("{key}", escape_key(key)), how)
            for _, source, how in columns
        ]
        rows.append([key, *cells] if "key" in block else cells)
    head = [*([block["key"]] if "key" in block else []), *(name for name, _, _ in columns)]
    return {"kind": "table", "table": block["table"], "head": head, "rows": rows}
