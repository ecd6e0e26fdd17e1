"""Define the table [data.scan] of site.toml, which decides what happens to records in which the
scan finds an identifier."""

from __future__ import annotations

from typing import Literal

from fedtune.core.config.types import Fraction, Table

Kind = Literal[
    "name", "place", "address", "postcode", "date", "age", "phone", "email", "us_ssn", "mrn",
    "nhs_number", "health_plan", "account", "licence", "vehicle", "device", "url", "ip", "uuid",
]  # fmt: skip
# What the scan looks for -> the paragraph of 45 CFR 164.514(b)(2)(i), HIPAA's Safe Harbor list.
# Not looked for: (P) biometric identifiers and (Q) photographs, which are no text.
KINDS: dict[Kind, str] = {
    "name": "A",
    "place": "B",
    "address": "B",
    "postcode": "B",
    "date": "C",
    "age": "C",
    "phone": "D",  # and (E), fax
    "email": "F",
    "us_ssn": "G",
    "mrn": "H",
    "nhs_number": "H",
    "health_plan": "I",
    "account": "J",
    "licence": "K",
    "vehicle": "L",
    "device": "M",
    "url": "N",
    "ip": "O",
    "uuid": "R",
}


class ScanTable(Table):
    """What happens to a record in which the scan finds an identifier; needs fedtune[scan].

    - action: "warn" trains on the record as it is and counts it in reports; "redact" replaces the
      identifier; "leave_out" leaves the record out
    - kinds: the kinds of identifiers that count
    - threshold: the least score, between 0 and 1, with which a finding counts"""

    action: Literal["warn", "redact", "leave_out"]  # warn: it trains as it is; reports count it
    kinds: tuple[Kind, ...] = tuple(KINDS)
    threshold: Fraction = 0.35  # the least score that counts
