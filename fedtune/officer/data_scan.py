"""Scan a site's records for identifiers, for the person who is responsible for them.

Guarantee: the result holds rows, kinds and counts, and no part of a text. It stays at the site."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from fedtune.core.config import Site, SiteData
from fedtune.core.config.scan import KINDS, ScanTable
from fedtune.core.data.children import ChildFailed
from fedtune.core.data.records import Record, read_file
from fedtune.core.data.scan import TOO_LONG, Scanner, is_too_long, texts_of
from fedtune.core.data.scan_findings import choose
from fedtune.core.progress import report

log = logging.getLogger("fedtune.data")


@dataclass(frozen=True)
class ScannedRow:
    """A row in which identifiers were found: the file's name, the row's number (as in `fedtune data
    report`), and the number of findings of each kind."""

    file: str
    row: int
    kinds: dict[str, int]


@dataclass(frozen=True)
class DataScan:
    """The result of a scan.

    - action: the action that [data.scan] sets, "" without that table
    - records: number of records read
    - failed: number of rows that cannot be read or scanned
    - rows: the rows in which identifiers were found"""

    site: str
    action: str
    records: int
    failed: int
    rows: list[ScannedRow]

    @property
    def findings(self) -> Counter[str]:
        """Count the findings in all rows by their kind."""
        return sum((Counter(row.kinds) for row in self.rows), Counter())

    def rows_with(self, kind: str) -> int:
        """Return the number of rows with at least one finding of this kind."""
        return sum(kind in row.kinds for row in self.rows)

    def table(self) -> list[tuple[str, str, int, int]]:
        """Return a row for each kind of identifier that was found: the kind, its paragraph in
        HIPAA's list of identifiers, the number of findings, and the number of rows with one."""
        found = self.findings
        return [(k, KINDS[k], found[k], self.rows_with(k)) for k in KINDS if found[k]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"findings": dict(self.findings)}


def data_scan(site: Site) -> DataScan:
    """Look for identifiers, such as names and dates, in the records that training would read. This
    takes some 50 ms for each record, and needs no study.

    Errors: DataError (no file, other columns), ModelError (fedtune[scan] is not installed, or its
    model cannot be fetched), InfrastructureError.

    >>> import fedtune
    >>> fedtune.data_scan(fedtune.load_site("no/site.toml"))
    Traceback (most recent call last):
      ...
    fedtune.core.errors.ConfigError: ...
    """
    data: SiteData = site.data
    table = data.scan or ScanTable(action="warn")
    read = read_file(data, unit="patient" if data.columns.patient else "record", labelled=False)
    rows, failed = [], len(read.failed)
    with Scanner(table.kinds, table.threshold) as scanner:
        for number, record in enumerate(read.records, 1):
            kinds = _kinds(scanner, record)
            failed += kinds is None
            if kinds and record.place:
                rows.append(ScannedRow(*record.place, dict(kinds)))
            report("scanning", number, len(read.records))
    action = data.scan.action if data.scan else ""
    return DataScan(site.site.name, action, len(read.records), failed, rows)


def _kinds(scanner: Scanner, record: Record) -> Counter[str] | None:
    """Count a record's findings by kind. Return None, and log a warning, if the record cannot be
    scanned. scanner: finds the identifiers in a text."""
    try:
        if is_too_long(record):
            log.warning("a record cannot be scanned (%s)", TOO_LONG)
            return None
        found = scanner(texts_of(record))
    except ChildFailed:
        log.warning("a record cannot be scanned (its scan failed or took too long)")
        return None
    return Counter(finding.kind for findings in found for finding in choose(findings))
