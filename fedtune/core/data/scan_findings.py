"""What a scan found in a text: identifiers of persons, and what is done with them."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fedtune.core.config.scan import KINDS


class Finding(NamedTuple):
    """One identifier of a person that was found in a text.

    - kind: one of KINDS
    - start, end: where it is, in characters of the text
    - score: how certain it is, from 0 to 1"""

    kind: str
    start: int
    end: int
    score: float


def pack(findings: Sequence[Finding]) -> bytes:
    """Return findings as JSON, the form in which a child process sends them."""
    return json.dumps(findings).encode()


def unpack(answer: bytes, length: int) -> list[Finding]:
    """Return the findings that `pack` wrote as JSON. answer: that JSON, from a process that is not
    trusted; length: the number of characters of the scanned text. Errors: ValueError if `answer`
    is no JSON, or if what it holds cannot be findings in such a text."""
    given = json.loads(answer)
    if not isinstance(given, list):
        raise ValueError("no list of findings")
    findings = list[Finding]()
    for entry in given:
        kind, start, end, score = entry
        places = type(start) is int and type(end) is int and 0 <= start < end <= length
        if kind not in KINDS or not places or type(score) is not float or not 0 <= score <= 1:
            raise ValueError("no finding in this text")
        findings.append(Finding(kind, start, end, score))
    return findings


def choose(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings in the text's order. Of two that overlap, the one with the higher score
    is returned; of equal scores, the longer."""
    best = list[Finding]()  # sorted by start; no two overlap, so that a hit has two neighbours
    for hit in sorted(findings, key=lambda f: (-f.score, f.start - f.end, f.start)):
        at = bisect_left(best, hit.start, key=_start)
        after = at == len(best) or hit.end <= best[at].start
        if after and (at == 0 or best[at - 1].end <= hit.start):
            best.insert(at, hit)
    return best


def redact(text: str, findings: Sequence[Finding]) -> str:
    """Return the text with each identifier replaced by its kind, as in "[name]". Identifiers that
    overlap are replaced together, by the kind of the one with the highest score.

    >>> redact("Dr Lee rang", [Finding("name", 3, 6, 0.9)])
    'Dr [name] rang'
    """
    chosen = choose(findings)
    parts = list[str]()
    at = 0
    next_ = 0
    for start, end in _unite(findings):
        first = next_  # each chosen finding is a hit, so it lies in one of the spans
        while next_ < len(chosen) and chosen[next_].start < end:
            next_ += 1
        kind = max(chosen[first:next_], key=_score).kind
        parts += [text[at:start], f"[{kind}]"]
        at = end
    return "".join([*parts, text[at:]])


def _score(finding: Finding) -> float:
    return finding.score


def _start(finding: Finding) -> int:
    return finding.start


def _unite(findings: Iterable[Finding]) -> list[tuple[int, int]]:
    """Return the spans (start, end) that the findings cover, overlapping findings as one span."""
    spans = list[tuple[int, int]]()
    for finding in sorted(findings, key=_start):
        if spans and finding.start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], finding.end))
        else:
            spans.append((finding.start, finding.end))
    return spans
