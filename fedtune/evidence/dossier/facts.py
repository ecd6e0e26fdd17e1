"""Look up facts of a run for a dossier. A fact is a value of the run, together with its source and
the format in which it is shown.

A source names a file of the run and a JSON pointer in it (RFC 6901), as
report.json#/privacy/epsilon does. A person with the run's folder can look up each figure; `fedtune
verify` does so for all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedtune.core.config.known_bases import upstream_of
from fedtune.core.files import reading
from fedtune.core.registry.rounding import percent, rounded_up
from fedtune.evidence.told import FOLDER as TOLD
from fedtune.evidence.told import read_told
from fedtune.report.claim import assumptions, best_guess, fallback, protects, strength
from fedtune.report.declared import declared_line
from fedtune.report.gain import headline
from fedtune.report.held_out import text_row

DOCUMENTS = ("report.json", "plan.json", "evidence.json")
MISSING = object()
NUMBER = re.compile(r"[+-]?\d[\d.,]*(?:e[+-]?\d+)?")
# The parts of a page that are not text: its head and its pictures. A head is matched only at the
# beginning of the page, so that no other text can pass for one.
HEAD = re.compile(
    r"(?s)\A(?:<!DOCTYPE html>\n<html lang=\"en\">\n<head>.*?</head>|---\n.*?\n---\n)"
)
PICTURE = re.compile(r"src=\"data:image/(?:png|svg\+xml);base64,[A-Za-z0-9+/=]*\"")
MOST = 500  # a value that is text is cut after so many characters


def documents(run: Path) -> dict[str, Any]:
    """Read those files of a run from which facts are taken, and the sites' statements about its
    model. Return a dict from file name to content; the statements are under "told". Errors:
    InputError."""
    most = reading.LARGE
    found = {name: reading.json_in(run / name, "a run's file", most=most) for name in DOCUMENTS}
    return found | {TOLD: [asdict(one) for one in read_told(run) if not one.problem]}


def resolve(found: Mapping[str, Any], source: str) -> Any:
    """Return the value that a source names in a run's documents; MISSING if there is no such value.
    found: the documents, file name -> content; source: FILE#POINTER, where POINTER is a JSON
    pointer.

    >>> resolve({"report.json": {"privacy": {"epsilon": 8.0}}}, "report.json#/privacy/epsilon")
    8.0"""
    name, _, pointer = source.partition("#")
    value: Any = found.get(name, MISSING)
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, Mapping):
            value = value.get(key, MISSING)
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return MISSING
    return value


def escape_key(key: str) -> str:
    """Escape a key so that it can be a part of a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")


def show(value: Any, how: str) -> str:
    """Format a value of a run as one line of text, cut off after MOST characters. how: the format's
    name, a key of SHOWN.

    Errors: KeyError if this release does not know the format."""
    text = " ".join("".join(c if c.isprintable() else " " for c in SHOWN[how](value)).split())
    return text if len(text) <= MOST else text[: MOST - 1] + "…"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(value[key])}" for key in sorted(value)) or "none"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}" if value != int(value) else f"{value:.0f}"
    return str(value)


def _interval(value: Any) -> str:
    low, high = value
    return f"{_plain(float(low))} to {_plain(float(high))}"


def _find_line(quality: Any, about: str) -> str:
    """Find the sentence on quality that a report has about a subject; "not measured" if it has
    none. quality: the report's table "quality"; about: the subject, such as "start" for the public
    start."""
    found = (line.text for line in headline(quality) if line.about == about)
    return next(found, "not measured")


def _upstream(value: Any) -> str:
    found = upstream_of(str(value))
    return str(found) if found else base_name(str(value))


def base_name(name: str) -> str:
    """Return a base's name in a form that may be published. It is the name as given, except for a
    folder on the coordinator's machine: then it is a fixed text, without the path. name: the base's
    name in the plan.

    >>> base_name("/home/ada/models/llama")
    'a local folder, known by its digest'
    """
    return "a local folder, known by its digest" if Path(name).is_absolute() else name


SHOWN: dict[str, Callable[[Any], str]] = {
    "plain": _plain,
    "epsilon": rounded_up,
    "largest": lambda value: rounded_up(max(value.values())),  # value: site -> figure
    "count": lambda value: str(len(value)),
    "names": lambda value: ", ".join(sorted(value)),
    "date": lambda value: str(value)[:10],
    "interval": _interval,
    "guess": lambda value: percent(best_guess(value)),
    "strength": strength,
    "assumptions": lambda value: assumptions(fallback(value) or {}) or "nothing",
    "fallback": lambda value: rounded_up((fallback(value) or value)["epsilon"]),
    "protects": lambda value: protects(str(value)),
    "gain over public text": lambda value: _find_line(value, "start"),
    "gain over the base": lambda value: _find_line(value, "base"),
    "released": lambda value: _find_line(value, "released"),
    "declared": lambda value: declared_line({"declared": value}) or "none",
    "upstream": _upstream,
    "base": lambda value: base_name(str(value)),
    "key": lambda value: f"{str(value)[:16]}…",
    "held out of": lambda row: text_row(row)[0],
    "held out at": lambda row: text_row(row)[1],
    "held out units": lambda row: text_row(row)[2],
    "held out score": lambda row: text_row(row)[3],
    "held out interval": lambda row: text_row(row)[4],
}


def facts_in(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield every fact in a dossier's content, i.e. each mapping with the key "source", however
    deep it lies."""
    pending: list[Any] = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            if "source" in value:
                yield value
            pending += value.values()
        elif isinstance(value, list):
            pending += value


def find_contradiction(content: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Compare every fact of a dossier with its run. Return the first one that contradicts the run,
    as the text "shown (source)"; "" if every fact agrees.

    - content: the content of dossier.json or assurance.json
    - found: the documents of the run and of attacks on it, by file name"""
    for fact in facts_in(content):
        source, how = str(fact["source"]), str(fact.get("how"))
        value = resolve(found, source)
        try:
            said = show(value, how) if value is not MISSING else None
        except (KeyError, TypeError, ValueError, ArithmeticError):
            said = None
        if said is None or said != fact.get("shown"):
            return f"{str(fact.get('shown'))[:40]} ({source[:80]})"
    return ""


def numbers(shown: str) -> list[str]:
    """List the numbers in a page's text, in order. Numbers in the head of an HTML page or of a
    model card, and in an HTML page's pictures, are left out.

    >>> numbers("ε = 7.99 for 2 sites")
    ['7.99', '2']
    """
    return NUMBER.findall(PICTURE.sub("", HEAD.sub("", shown, count=1)))
