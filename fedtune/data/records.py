"""Records: validated rows of a data file. An unusable record is counted, never shown."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedtune.config import (
    Columns,
    DataFile,
    EvaluationTable,
    PublicTable,
    SelectionTable,
    SiteData,
)
from fedtune.config.site import SQL
from fedtune.data.cells import key_of, string_of, text_of
from fedtune.data.consent import NO_CONSENT, with_consent
from fedtune.data.dataset import Failed
from fedtune.data.files import Place, Rejected, placed_rows
from fedtune.data.media import Folder, Media
from fedtune.data.sources import SOURCES, Collection, Source
from fedtune.data.sources._interface import Names, Row
from fedtune.data.sources.csv import guessed
from fedtune.errors import ConfigError, DataError

TRUTH = ("true", "false", "1", "0", "yes", "no")  # a judgement: desirable or not, in turn
CHARACTERS = 16 * 2**20  # of one unit's text: 64 MiB, so that it leaves memory to others'
Messages = tuple[tuple[str, str], ...]  # (role, content)


@dataclass(frozen=True, repr=False, eq=False)
class Record:
    """One record; "" or () where the file has no such field.

    | columns          | fields                 |
    |------------------|------------------------|
    | messages         | messages               |
    | prompt           | prompt                 |
    | prompt + completion | prompt, completion  |
    | text             | completion             |
    | text + label     | prompt, label          |
    | prompt + chosen + rejected | prompt, completion, rejected |
    | prompt + completion + label | prompt, completion, label |
    | label alone, beside image or audio | label |

    media: the file that image or audio names; place: where it stands, for the site's own screen.
    Guarantee: repr shows neither content nor the unit's key."""

    unit: str
    prompt: str = ""
    completion: str = ""
    rejected: str = ""
    label: str = ""
    messages: Messages = ()
    media: Media | None = None
    place: Place | None = None


@dataclass(frozen=True, repr=False, eq=False)
class Read:
    """What a data file holds: its usable records in order, the rejected rows in order, how many
    rows there are in all, how many of each file data.filter left out and how many data.consent,
    and what its columns are called."""

    records: list[Record]
    failed: list[Failed]
    rows: int
    filtered_in: Counter[str]
    withheld_in: Counter[str]
    names: Names

    @property
    def filtered(self) -> int:
        """Count the rows that data.filter left out."""
        return self.filtered_in.total()

    @property
    def withheld(self) -> int:
        """Count the rows whose patients did not agree to their use."""
        return self.withheld_in.total()

    @property
    def rejected(self) -> Counter[str]:
        """Count the rejected rows by reason."""
        return Counter(failed.reason for failed in self.failed)


def unit_member(unit: str) -> bytes:
    """Return a patient's key in the form that the site's ledger hashes."""
    return b"unit\0" + unit.encode()


def content_of(record: Record) -> bytes:
    """Return the record's content without its patient."""
    more = [record.rejected] if record.rejected else []
    more += [record.media.digest.hex()] if record.media else []
    said = [record.prompt, record.completion, record.label, record.messages, *more]
    return json.dumps(said).encode()


def record_member(record: Record) -> bytes:
    """Return what a record says, whoever's it is, in the form that the site's ledger hashes."""
    return b"record\0" + content_of(record)


def table_of(file: DataFile) -> str:
    """Name the table of study.toml or site.toml that describes the file, for error messages."""
    public = {PublicTable: "public", SelectionTable: "selection", EvaluationTable: "evaluation"}
    return public.get(type(file), "data")


def read_records(
    file: DataFile,
    *,
    unit: Literal["record", "patient"] = "record",
    labelled: bool = True,
    strict: bool = True,
) -> tuple[list[Record], Counter[str]]:
    """Read the usable records in file order, and count the rejected ones by reason.

    labelled=False admits records without completion, label or assistant turn (public text). Where
    the unit is the record, it goes by what it says and, of several that say the same, by which of
    them it is: a row number would change when another row is added or taken out.
    Errors: DataError as `rows` has it, and if strict where the file holds no record; ConfigError
    where a site names a source that is not installed, or options that it does not have.
    Guarantee: if not strict, a record is made of its own row alone, whatever the others are."""
    read = read_file(file, unit=unit, labelled=labelled, strict=strict)
    return read.records, read.rejected


def read_file(
    file: DataFile,
    *,
    unit: Literal["record", "patient"] = "record",
    labelled: bool = True,
    strict: bool = True,
) -> Read:
    """Read a data file as read_records does, and keep where each row stands.

    Errors, Guarantee: those of read_records."""
    table = table_of(file)
    if unit == "patient" and not file.columns.patient:
        raise no_patients(table)
    records: list[Record] = []
    failed: list[Failed] = []
    copies, held = Counter[bytes](), Counter[str]()
    names = Names(file.where, keys_of(file))
    folder = Folder(file.path if file.path.is_dir() else file.path.parent)
    count, filtered_in, withheld_in = 0, Counter[str](), Counter[str]()
    keep = kept_of(file)
    for place, row in site_rows(file, names, strict):
        count += 1
        try:
            if row is NO_CONSENT:
                withheld_in[place.file] += 1
                continue
            if isinstance(row, str):
                raise Rejected(row)
            if not _is_kept(row, keep):
                filtered_in[place.file] += 1
                continue
            key = key_of(row.get(file.columns.patient or "")) if unit == "patient" else ""
            record = _record(row, key, file.columns, labelled)
            if column := file.columns.media:
                kind: Literal["image", "audio"] = "image" if file.columns.image else "audio"
                record = replace(record, media=folder.read(text_of(row.get(column)), kind))
            if unit == "record":
                digest = hashlib.sha256(content_of(record))
                key = f"{digest.hexdigest()} {copies[digest.digest()]}"
                copies[digest.digest()] += 1
            held[key] += _characters(record)
            if held[key] > CHARACTERS:
                raise Rejected("too long")
            records.append(replace(record, unit=key, place=place))
        except Rejected as error:
            failed.append(Failed(*place, error.reason))
        except (ConfigError, MemoryError):  # an extra is not installed; not this row's fault
            raise
        except Exception:  # a library may raise anything on a bad row: reject that row alone
            failed.append(Failed(*place, "cannot be read"))
    if not count and strict:
        raise DataError(
            f"{file.where}: the file has no records", "at least 2", f"check {table}.path"
        )
    return Read(records, failed, count, filtered_in, withheld_in, names)


def kept_of(file: DataFile) -> Mapping[str, tuple[str, ...]]:
    """Return which values of which columns data.filter asks for, with what the source asks for
    where it does not say."""
    if not isinstance(file, SiteData):
        return {}
    source = source_of(file)
    kept = source.kept if isinstance(source, Collection) else {}
    return {**kept, **file.kept_values}


def site_rows(file: DataFile, names: Names, strict: bool) -> Iterator[tuple[Place, Row | str]]:
    """Yield a file's rows as placed_rows does, with NO_CONSENT in place of those of a site whose
    patients did not agree to their use.

    Errors: as read_records."""
    rows = placed_rows(file.path, names.keys, strict=strict, source=source_of(file), names=names)
    return with_consent(rows, file) if isinstance(file, SiteData) else rows


def source_of(file: DataFile) -> Source | None:
    """Build the source that site.toml names for a file; None: it goes by the suffix. How a public
    CSV is written is guessed; a site's never, where one row would have a say in how others are
    read.

    Errors: ConfigError where it is not installed, does not have the options, or knows patients and
    data.columns.patient does not name their column."""
    if not isinstance(file, SiteData):
        return guessed(file.path, keys_of(file).values())
    if file.url:
        return SOURCES.build(SQL, {**file.options, "url": file.url})
    source = SOURCES.build(file.source, file.options) if file.source else None
    if isinstance(source, Collection) and source.patient not in ("", file.columns.patient):
        table = table_of(file)
        raise ConfigError(
            f"{table}.source = {file.source!r} tells patients apart, and nobody's records would be "
            "protected together",
            f'{table}.columns.patient = "{source.patient}"',
        )
    return source


def keys_of(file: DataFile) -> dict[str, str]:
    """Map each configuration key that names a column to the column."""
    table, named = table_of(file), file.columns.model_dump()
    keys = {f"{table}.columns.{key}": column for key, column in named.items() if column}
    if isinstance(file, SiteData):
        keys |= {f"{table}.filter.{column}": column for column in kept_of(file)}
        if file.consent and file.consent.column:
            keys[f"{table}.consent.column"] = file.consent.column
    return keys


def _is_kept(row: Row, keep: Mapping[str, Sequence[str]]) -> bool:
    """Return whether the row has one of the values that data.filter asks for, in each of its
    columns."""
    for column, values in keep.items():
        try:
            if key_of(row.get(column)) not in values:
                return False
        except Rejected:  # no value, or none that can be compared
            return False
    return True


def no_patients(table: str) -> DataError:
    return DataError(
        'the study protects patients (privacy.unit = "patient") and no patient column is named',
        f"{table}.columns.patient",
        "name the column that tells one patient from another",
    )


def _record(row: Row, unit: str, columns: Columns, labelled: bool) -> Record:
    if columns.messages:
        return Record(unit, messages=_messages(row.get(columns.messages), labelled))
    if columns.prompt:
        prompt = text_of(row.get(columns.prompt))
        answer = row.get(columns.completion or columns.chosen or "")
        absent = answer is None or (isinstance(answer, str) and not answer.strip())
        completion = "" if absent and not labelled else text_of(answer)
        if columns.chosen and labelled:
            return Record(unit, prompt, completion, text_of(row.get(columns.rejected or "")))
        desirable = _truth(row.get(columns.label)) if columns.label and labelled else ""
        return Record(unit, prompt, completion, label=desirable)
    text = text_of(row.get(columns.text)) if columns.text else ""
    if not columns.label:
        return Record(unit, completion=text)
    label = row.get(columns.label)
    return Record(unit, text, label="" if label is None and not labelled else key_of(label))


def _characters(record: Record) -> int:
    turns = sum(len(role) + len(content) for role, content in record.messages)
    texts = (record.prompt, record.completion, record.rejected, record.label)
    return turns + sum(map(len, texts))


def _truth(value: object) -> str:
    """Return whether a completion is desirable, "1" or "0"."""
    value_text = str(value).lower() if isinstance(value, bool) else key_of(value).lower()
    if value_text not in TRUTH:
        raise Rejected("unknown label")
    return "1" if TRUTH.index(value_text) % 2 == 0 else "0"


def _messages(value: object, labelled: bool) -> Messages:
    """Read chat messages. Roles: an optional system message, then user first; an assistant turn
    where labelled."""
    if isinstance(value, str):  # a CSV cell, or a Parquet string column
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Rejected("not JSON") from None
    if value is None:
        raise Rejected("missing value")
    if not isinstance(value, list):
        raise Rejected("wrong type")
    if not value:
        raise Rejected("empty text")
    messages = tuple(_message(item) for item in value)
    roles = [role for role, _ in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken[:1] != ["user"] or not set(spoken) <= {"user", "assistant"}:
        raise Rejected("bad message roles")
    if labelled and "assistant" not in spoken:
        raise Rejected("bad message roles")
    return messages


def _message(item: object) -> tuple[str, str]:
    if not isinstance(item, dict):
        raise Rejected("wrong type")
    role, content = string_of(item.get("role")), item.get("content")
    # An empty system message is the usual way to keep out a template's own.
    return role, string_of(content) if role == "system" else text_of(content)
