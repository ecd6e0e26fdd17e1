"""Compute the identifiers of records, called members. The ledger stores their hashes, by which it
recognises a record in another file, dataset or format."""

from __future__ import annotations

from fedtune.core.config import SiteData
from fedtune.core.data.load import LONG
from fedtune.core.data.records import Record, read_file, record_member, unit_member
from fedtune.core.data.tokenize import _texts


def identity_of(record: Record, by_patient: bool) -> set[bytes]:
    """Return the identifiers ("members") that stand for a record: one for its whole content; one
    for its image or recording; one for its longest text, if this has at least LONG characters; and
    one for its patient, if by_patient is true.

    Shorter texts give none, since many records may share a question or an instruction."""
    members = {record_member(record)}
    if record.media:
        members.add(_media_member(record.media.file))
    longest = max(_texts(record), key=len)
    if len(longest) >= LONG:
        members.add(b"text\0" + longest.encode())
    if by_patient:
        members.add(unit_member(record.unit))
    return members


def identities(data: SiteData, patients: bool = True) -> list[set[bytes]]:
    """Read a site's dataset, and return for each usable record the set of its identifiers
    (`identity_of`). An image, recording or clip that was read but cannot be used may be usable at a
    later reading, so a set with its identifier alone is returned for it too.

    patients: whether a record's patient is among its identifiers; without a patient column it never
    is.

    Errors: DataError, ConfigError, as in `read_records`."""
    by_patient = data.columns.patient is not None
    read = read_file(data, unit="patient" if by_patient else "record")
    found = [identity_of(record, by_patient and patients) for record in read.records]
    return [*found, *({_media_member(file)} for file in sorted(read.undecoded))]


def _media_member(file: bytes) -> bytes:
    """Return the identifier of the file with the sha256 `file`."""
    return b"media\0" + file
