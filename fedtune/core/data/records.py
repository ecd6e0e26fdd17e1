"""Make records from the rows of a data file. An unusable row is counted, and never shown."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

from fedtune.core.config import (
    AcceptanceTable,
    Columns,
    DataFile,
    EvaluationTable,
    PublicTable,
    SelectionTable,
    SiteData,
)
from fedtune.core.config.site import SQL
from fedtune.core.data.cells import key_of, string_of, text_of
from fedtune.core.data.consent import NO_CONSENT, with_consent
from fedtune.core.data.conversion import Conversion
from fedtune.core.data.dataset import Failed
from fedtune.core.data.files import Place, Rejected, placed_rows
from fedtune.core.data.group_reader import NO_GROUPS, GroupReader
from fedtune.core.data.media import KINDS, UNIT_BYTES, Decoder, Folder, Media, UnitFiles
from fedtune.core.data.per_unit import per_unit
from fedtune.core.data.sources import SOURCES, Collection, Source
from fedtune.core.data.sources._interface import CHARACTERS, Names, Row
from fedtune.core.data.sources.csv import guess_format
from fedtune.core.errors import ConfigError, DataError

TRUTH = ("true", "false", "1", "0", "yes", "no")  # words of a judgement, in pairs: yes, then no
NO_ROW = "converted to no row"  # the reason of each row of a unit whose conversion returned no row
UNCONVERTED = "cannot be converted"  # the reason of each row of a unit whose conversion failed
Messages = tuple[tuple[str, str], ...]  # (role, content)


@dataclass(frozen=True, repr=False, eq=False)
class Record:
    """One record. Which fields hold its content follows from the file's columns, as in the table;
    the other content fields are "", () or None.

    | columns          | fields                 |
    |------------------|------------------------|
    | messages         | messages               |
    | prompt           | prompt                 |
    | prompt + completion | prompt, completion  |
    | text             | completion             |
    | text + label     | prompt, label          |
    | prompt + chosen + rejected | prompt, completion, rejected |
    | prompt + completion + label | prompt, completion, label |
    | label and image, audio or video, without text | label |

    - unit: the key of the record's unit; "" where only the record's content is needed
    - media: the content of the file that the column image, audio or video names
    - place: where the row was read, which only the site's own screen shows; None where `unit` is ""
    - groups: of a held-out record, the index of its group on each axis of the plan; else ()

    Guarantee: repr shows neither content nor the unit's key."""

    unit: str
    prompt: str = ""
    completion: str = ""
    rejected: str = ""
    label: str = ""
    messages: Messages = ()
    media: Media | None = None
    place: Place | None = None
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, repr=False, eq=False)
class Read:
    """What was read from a data file.

    - records: the usable records, in the order in which they were read
    - failed: the rejected rows
    - rows: the number of all rows
    - filtered_in, withheld_in: for each file's name, how many of its rows data.filter left out, and
      how many are of patients who did not consent
    - names: the names of the columns that the files have
    - undecoded: the sha256 of each image, recording or clip that was read and could not be used;
      it may be usable at a later reading"""

    records: list[Record]
    failed: list[Failed]
    rows: int
    filtered_in: Counter[str]
    withheld_in: Counter[str]
    names: Names
    undecoded: frozenset[bytes] = frozenset()

    @property
    def filtered(self) -> int:
        """The number of rows that data.filter left out."""
        return self.filtered_in.total()

    @property
    def withheld(self) -> int:
        """The number of rows of patients who did not consent."""
        return self.withheld_in.total()

    @property
    def rejected(self) -> Counter[str]:
        """The number of rejected rows, by reason."""
        return Counter(failed.reason for failed in self.failed)


def unit_member(unit: str) -> bytes:
    """Return the identifier that stands for a patient; the site's ledger stores its hash. unit: the
    patient's key."""
    return b"unit\0" + unit.encode()


def content_of(record: Record) -> bytes:
    """Return the record's content, without its patient, as bytes: equal content gives equal
    bytes."""
    more = [record.rejected] if record.rejected else []
    more += [record.media.file.hex()] if record.media else []
    said = [record.prompt, record.completion, record.label, record.messages, *more]
    return json.dumps(said).encode()


def record_member(record: Record) -> bytes:
    """Return the identifier that stands for a record's content; the site's ledger stores its hash.
    Equal records of two patients have the same identifier."""
    return b"record\0" + content_of(record)


def table_of(file: DataFile) -> str:
    """Return the name of the table of study.toml or site.toml that describes the file, such as
    "data", for error messages."""
    named = {PublicTable: "public", SelectionTable: "selection", EvaluationTable: "evaluation"}
    return {**named, AcceptanceTable: "acceptance"}.get(type(file), "data")


def read_records(
    file: DataFile,
    *,
    unit: Literal["record", "patient"] = "record",
    labelled: bool = True,
    strict: bool = True,
) -> tuple[list[Record], Counter[str]]:
    """Read the usable records in file order, and count the rejected ones by reason.

    - unit: "patient": a record's key is the patient's. "record": each record has a key of its own,
      the hash of its content and its number among records of the same content (not the row's
      number, which would change when another row is added or removed)
    - labelled: whether a record must have a completion, a label or an assistant turn; public text,
      for example, need not
    - strict: whether to raise the errors marked "if strict" below too, for a person who can correct
      the file

    Errors: DataError as in `files.rows`, and if the unit is "patient" and no patient column is
    named; if strict, also if the file has no record. ConfigError as in `source_of`.
    Guarantee: if not strict, a record is made of its own row alone, or, with data.convert, of the
    rows of its unit alone."""
    read = read_file(file, unit=unit, labelled=labelled, strict=strict)
    return read.records, read.rejected


def read_file(
    file: DataFile,
    *,
    unit: Literal["record", "patient"] = "record",
    labelled: bool = True,
    strict: bool = True,
    groups: GroupReader = NO_GROUPS,
) -> Read:
    """Read a data file as `read_records` does, and return all that is known of it: records, places,
    rejected rows, counts and columns. groups: finds the groups of a row; its columns are read too.

    Errors, Guarantee: as for read_records."""
    table = table_of(file)
    if unit == "patient" and not file.columns.patient:
        raise no_patients(table)
    reading = _Reading(file, unit, labelled, groups)
    names, keep = Names(file.where, keys_of(file) | groups.keys), find_kept_values(file)
    count = 0
    filtered_in = Counter[str]()
    withheld_in = Counter[str]()
    declared_size = file.declared_size if isinstance(file, SiteData) else 0
    decoding = Decoder(reading.kind, declared_size) if reading.kind else nullcontext()
    with converting(file, declared_size) as convert, decoding as decoder:
        waiting: dict[str, list[tuple[Place, Row]]] = {}
        for place, row in site_rows(file, names, strict):
            count += 1
            if row is NO_CONSENT:
                withheld_in[place.file] += 1
            elif isinstance(row, str):
                reading.reject(place, row)
            elif not _is_kept(row, keep):
                filtered_in[place.file] += 1
            elif convert is None:
                reading.take(place, row)
            elif key := reading.key_in(place, row):
                waiting.setdefault(key, []).append((place, row))
        for key in list(waiting):
            _take_converted(reading, waiting.pop(key), convert)
        if decoder:
            reading.decode(decoder)
    if not count and strict:
        raise DataError(
            f"{file.where}: the file has no records", "at least 2 records", f"check {table}.path"
        )
    undecoded = frozenset(reading.undecoded)
    return Read(reading.records, reading.failed, count, filtered_in, withheld_in, names, undecoded)


@dataclass(frozen=True, repr=False, eq=False)
class _Undecoded:
    """A record whose file is not read yet. name: the file's name in the row; key: the patient's
    key, "" if the unit is the record."""

    place: Place
    record: Record
    key: str
    name: str


class _Reading:
    """Collects the records and the rejected rows while a data file is read. Each record is made
    from its own row."""

    def __init__(
        self,
        file: DataFile,
        unit: Literal["record", "patient"],
        labelled: bool,
        groups: GroupReader = NO_GROUPS,
    ) -> None:
        self.records: list[Record] = []
        self.failed: list[Failed] = []
        self.undecoded: set[bytes] = set()
        self._columns, self._by_patient = file.columns, unit == "patient"
        self._folder = Folder(file.path if file.path.is_dir() else file.path.parent)
        self.kind = next((kind for kind in KINDS if getattr(file.columns, kind)), None)
        self._undecoded: list[_Undecoded] = []
        self._copies, self._held = Counter[bytes](), Counter[str]()
        self._rows = 0
        self._made = per_unit(_RowReader(file.columns, labelled, groups), (Record, str))

    def reject(self, place: Place, reason: str) -> None:
        """Note that the row at `place` is rejected, and why."""
        self.failed.append(Failed(*place, str(reason)))  # without a row's cells

    def key_in(self, place: Place, row: Row) -> str:
        """Return the key by which rows of one unit are collected before they are converted: the
        patient's or, if the unit is the record, a number that no other row gets. If the patient's
        key cannot be read, reject the row and return ""."""
        self._rows += 1
        if not self._by_patient:
            return str(self._rows)
        try:
            return key_of(row.get(self._columns.patient or ""))
        except Rejected as error:
            self.reject(place, error.reason)
            return ""

    def take(self, place: Place, row: Row, key: str = "") -> None:
        """Make a record of a row and add it, or reject the row. If the record names an image,
        recording or clip, `decode` adds it later. key: the patient's key; "" if it is to be read
        from the row."""
        try:
            if self._by_patient and not key:
                key = key_of(row.get(self._columns.patient or ""))
            (made,) = self._made([row]) or ["cannot be read"]
            if isinstance(made, str):
                raise Rejected(made)
            self._add(place, row, made, key)
        except Rejected as error:
            self.reject(place, error.reason)
        except (ConfigError, MemoryError):  # an extra is not installed; not this row's fault
            raise
        except Exception:  # a library may raise anything on a bad row: reject that row alone
            self.reject(place, "cannot be read")

    def _add(self, place: Place, row: Row, record: Record, key: str) -> None:
        if not self.kind:
            self._add_whole(place, record, key)
            return
        named = text_of(row.get(self._columns.media or ""))
        self._undecoded.append(_Undecoded(place, record, key, named))

    def decode(self, decoder: Decoder) -> None:
        """Read and decode the files that the records so far name, one unit's at a time, and add
        these records in the order of their rows. A record whose file cannot be used is rejected."""
        waiting = self._undecoded
        units = defaultdict[str, list[int]](list)
        for number, row in enumerate(waiting):
            units[row.key if self._by_patient else str(number)].append(number)
        decoded: dict[int, Media | str] = {}
        bodies: dict[bytes, bytes] = {}  # equal files share one body
        for numbers in units.values():
            of_name = self._decode_unit([waiting[number].name for number in numbers], decoder)
            for number in numbers:
                media = of_name[waiting[number].name]
                if isinstance(media, Media):
                    media = replace(media, body=bodies.setdefault(media.digest, media.body))
                decoded[number] = media
        for number, row in enumerate(waiting):
            media = decoded[number]
            if isinstance(media, str):
                self.reject(row.place, media)
                continue
            try:
                self._add_whole(row.place, replace(row.record, media=media), row.key)
            except Rejected as error:
                self.reject(row.place, error.reason)

    def _decode_unit(self, names: Sequence[str], decoder: Decoder) -> dict[str, Media | str]:
        """Read and decode one unit's files, each once, and forget their contents. Return by name
        what is kept of the file, or the reason why it cannot be used."""
        assert self.kind is not None
        unit = UnitFiles(self._folder, self.kind, UNIT_BYTES)
        contents = {name: unit.read(name) for name in dict.fromkeys(names)}
        files = list(dict.fromkeys(c for c in contents.values() if isinstance(c, bytes)))
        found = dict(zip(files, decoder.decode(files), strict=True))
        failed = (content for content, media in found.items() if isinstance(media, str))
        self.undecoded.update(hashlib.sha256(content).digest() for content in failed)
        return {
            name: found[content] if isinstance(content, bytes) else content
            for name, content in contents.items()
        }

    def _add_whole(self, place: Place, record: Record, key: str) -> None:
        if not self._by_patient:
            digest = hashlib.sha256(content_of(record))
            key = f"{digest.hexdigest()} {self._copies[digest.digest()]}"
            self._copies[digest.digest()] += 1
        self._held[key] += _characters(record)
        if self._held[key] > CHARACTERS:
            raise Rejected("too long")
        self.records.append(replace(record, unit=key, place=place))

    @property
    def by_patient(self) -> bool:
        """Whether the unit is the patient, so that one unit may have several rows."""
        return self._by_patient

    def patient_of(self, row: Row) -> str:
        """Return the key of the patient to whom the row belongs; "" if the unit is the record."""
        return key_of(row.get(self._columns.patient or "")) if self._by_patient else ""

    def names_media_of(self, rows: Sequence[Row]) -> Callable[[Row], bool]:
        """Return a function that takes a row which a conversion made. It returns false if that row
        names an image, recording or clip whose name is in no cell of `rows`, the unit's rows before
        the conversion; else it returns true."""
        column = self._columns.media
        own = {value for row in rows for value in row.values() if isinstance(value, str)}

        def is_own(row: Row) -> bool:
            named = row.get(column or "")
            return not isinstance(named, str) or column is None or named in own

        return is_own


@dataclass(frozen=True)
class _RowReader:
    """A function that takes a list of rows and makes a record of each, from that row alone. It
    returns a list that holds for each row the record or, if the row is rejected, the reason (a
    str). The records' unit and place are not set."""

    columns: Columns
    labelled: bool
    groups: GroupReader

    def __call__(self, rows: list[Row]) -> list[Record | str]:
        return [self._attempt(row) for row in rows]

    def _attempt(self, row: Row) -> Record | str:
        try:
            record = _record(row, self.columns, self.labelled)
            return replace(record, groups=self.groups(row))
        except Rejected as error:
            return error.reason


Convert = Callable[[Sequence[Row]], "list[Row] | None"]


@contextmanager
def converting(file: DataFile, declared_size: int = 0) -> Iterator[Convert | None]:
    """A context manager that starts a site's converter for the length of the block. It yields a
    function that returns the converted rows of one unit, or None if the conversion failed; if the
    site names no converter, it yields None. declared_size: the site's declared size if its whole
    dataset is read, else 0.

    Errors: ConfigError, InfrastructureError as for Conversion."""
    if not isinstance(file, SiteData) or file.convert is None:
        yield None
        return
    with Conversion(file.convert, declared_size) as conversion:
        yield per_unit(conversion, dict)


def count_otherwise_alone(file: SiteData, sample: int) -> int:
    """Check before a study whether a site's plug-in converts each unit by itself. Return for how
    many units it gives two different results: one when a process converts several units, each in a
    child of its own, and another when a new process converts that unit alone. The first `sample`
    units are tried. Return 0 without a plug-in.

    Errors: as for read_records, if not strict."""
    if file.convert is None:
        return 0
    unit: Literal["record", "patient"] = "patient" if file.columns.patient else "record"
    reading, units = _Reading(file, unit, labelled=False), dict[str, list[Row]]()
    for place, row in site_rows(file, Names(file.where, keys_of(file)), strict=False):
        if isinstance(row, dict) and (key := reading.key_in(place, row)):
            if key not in units and len(units) == sample:
                break
            units.setdefault(key, []).append(row)
    # If there are fewer units than `sample`, as many processes are started all the same.
    tried = [*units.values(), *([] for _ in range(sample - len(units)))]
    with converting(file) as convert:
        assert convert is not None
        together = [convert(rows) for rows in tried]
    otherwise = 0
    for rows, expected in zip(tried, together, strict=True):
        with converting(file) as convert:
            assert convert is not None
            otherwise += convert(rows) != expected
    return otherwise


def _take_converted(
    reading: _Reading, placed: list[tuple[Place, Row]], convert: Convert | None
) -> None:
    """Convert one unit's rows, and add the records made of the result to `reading`. Reject every
    row of the unit if the conversion failed or made no row, or if it made several rows and the unit
    is the record. placed: the unit's rows, each with its place."""
    assert convert is not None
    rows = [row for _, row in placed]
    converted = convert(rows)
    if not converted or (len(converted) > 1 and not reading.by_patient):
        for place, _ in placed:
            reading.reject(place, NO_ROW if converted == [] else UNCONVERTED)
        return
    first, key = placed[0][0], reading.patient_of(rows[0])
    is_own = reading.names_media_of(rows)
    for row in converted:
        if is_own(row):
            reading.take(first, row, key)
        else:
            reading.reject(first, "missing media file")


def find_kept_values(file: DataFile) -> Mapping[str, tuple[str, ...]]:
    """Return the values by which rows are filtered, as a dict: column -> the values of which a row
    must have one. They are the values in data.filter and, for columns that data.filter does not
    name, the values that the source itself requires (`Collection.kept`)."""
    if not isinstance(file, SiteData):
        return {}
    source = source_of(file)
    kept = source.kept if isinstance(source, Collection) else {}
    return {**kept, **file.kept_values}


def site_rows(file: DataFile, names: Names, strict: bool) -> Iterator[tuple[Place, Row | str]]:
    """Yield (place, row) for each row of a file, as `placed_rows` does. For a site's own file,
    NO_CONSENT is yielded in place of each row whose patient did not consent.

    Errors: as read_records."""
    rows = placed_rows(file.path, names.keys, strict=strict, source=source_of(file), names=names)
    return with_consent(rows, file) if isinstance(file, SiteData) else rows


def source_of(file: DataFile) -> Source | None:
    """Return the source that reads a file: for a site's file the source that site.toml names, or
    None if the file's suffix decides. For a public CSV file the delimiter and the encoding are
    guessed from its content. For a site's CSV file they never are, since one row would then affect
    how others are read.

    Errors: ConfigError if the source is not installed, does not have the options, or has a patient
    column that data.columns.patient does not name."""
    if not isinstance(file, SiteData):
        return guess_format(file.path, keys_of(file).values())
    if file.url:
        return SOURCES.build(SQL, {**file.options, "url": file.url})
    source = SOURCES.build(file.source, file.options) if file.source else None
    if isinstance(source, Collection) and source.patient not in ("", file.columns.patient):
        table = table_of(file)
        raise ConfigError(
            f"{table}.source = {file.source!r} has a patient column, and "
            f"{table}.columns.patient does not name it, so that a patient's records "
            "would not be protected together",
            f'{table}.columns.patient = "{source.patient}"',
        )
    return source


def keys_of(file: DataFile) -> dict[str, str]:
    """Return the columns that a file must have, as a dict: a configuration key, such as
    "data.columns.text" -> the column that the key names."""
    table, named = table_of(file), file.columns.model_dump()
    keys = {f"{table}.columns.{key}": column for key, column in named.items() if column}
    if isinstance(file, SiteData) and file.convert:  # the files need not have the others
        keys = {key: column for key, column in keys.items() if column == file.columns.patient}
    if isinstance(file, SiteData):
        keys |= {f"{table}.filter.{column}": column for column in find_kept_values(file)}
        if file.consent and file.consent.column:
            keys[f"{table}.consent.column"] = file.consent.column
    return keys


def _is_kept(row: Row, keep: Mapping[str, Sequence[str]]) -> bool:
    """Return whether the row has, in each column of `keep`, one of the values that `keep` gives for
    it."""
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


def _record(row: Row, columns: Columns, labelled: bool) -> Record:
    unit = ""  # the row's record is made without it
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
    """Convert a cell that judges a completion to "1" (desirable) or "0". Errors: Rejected if the
    cell says neither."""
    value_text = str(value).lower() if isinstance(value, bool) else key_of(value).lower()
    if value_text not in TRUTH:
        raise Rejected("unknown label")
    return "1" if TRUTH.index(value_text) % 2 == 0 else "0"


def _messages(value: object, labelled: bool) -> Messages:
    """Return the chat messages in a cell, each as (role, content). value: a list of messages, or
    its JSON text. Errors: Rejected if `value` is no such list or is empty, if the first message
    after at most one system message is not a user's, if a later message is neither a user's nor an
    assistant's, or if `labelled` is true and no message is an assistant's."""
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
