"""Convert records to tokens and targets, and limit how many records of one unit take part."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fedtune.core.config import DataFile, EvaluationTable, ObjectiveTable, SiteData, Study
from fedtune.core.data.chat import check_draws_nothing
from fedtune.core.data.dataset import Counts, Dataset, Example, Failed, SoftTargets
from fedtune.core.data.files import Rejected
from fedtune.core.data.group_reader import group_reader
from fedtune.core.data.media import KINDS
from fedtune.core.data.per_unit import per_unit
from fedtune.core.data.reader import Reader
from fedtune.core.data.records import (
    Read,
    Record,
    content_of,
    no_patients,
    read_file,
    record_member,
    table_of,
    unit_member,
)
from fedtune.core.data.scan import scanning
from fedtune.core.data.tokenize import _passage, _texts, _tokenise
from fedtune.core.data.unusable import nothing_left, one_unit
from fedtune.core.errors import DataError, is_fault
from fedtune.core.objectives._interface import RecordFormat

log = logging.getLogger("fedtune.data")

LONG = 40  # a text of at least so many characters is taken to identify its record
_PAIR = ("chosen", "rejected")


# Records of a unit that a ledger remembers as trained on. With the unit's key they fill the 8 KiB
# of disk that are reserved for each unit (files/room.py), so that whether they are remembered never
# depends on how much of the disk is free, which may follow from records.
REMEMBERED = 39


class Unit(NamedTuple):
    """What became of one unit's records.

    - records, examples: the records that train, and the example made of each. `unit` of these
      examples is still 0; load_dataset sets it
    - rejected: the unusable records, each with the reason
    - over_cap: how many usable records the cap on a unit's records left out
    - remembered: those of `records` that the ledger remembers as trained on, at most REMEMBERED"""

    records: list[Record]
    examples: list[Example]
    rejected: list[tuple[Record, str]]
    over_cap: int
    remembered: list[Record]


@dataclass(frozen=True, repr=False)
class UnitReader:
    """A function that turns one unit's records into examples: it tokenises them, limits their
    number, and adds a teacher's targets if there is a teacher.

    It sees one unit at a time, and itself holds public values alone.

    - objective: the plan's objective, of which max_length, overflow, template and labels are used
    - tokenizer: the base's
    - record_format: which of a record's fields are read (`check_columns`)
    - scored: whether a head is trained, which reads the text at its last token
    - labelled: whether a record that has nothing to predict is rejected
    - reader: how the base reads images, recordings or clips; None if it reads text alone
    - soft_targets: computes a teacher's targets for a record and its example; None: no teacher
    - max_records: the cap on one unit's records; None: no cap
    - choices: the answers that evaluation chooses from; if a prompt is cut, it must leave room for
      them
    - scan: applies a site's [data.scan] to one unit's records; None: no record is scanned

    Guarantee: which of a unit's records train, and on which tokens, depends on that unit's records
    and on which of them trained before. If a library fails on a record, only that record is
    rejected.
    """

    objective: ObjectiveTable
    tokenizer: PreTrainedTokenizerBase
    record_format: RecordFormat
    scored: bool
    labelled: bool = True
    reader: Reader | None = None
    soft_targets: Callable[[Record, Example], SoftTargets] | None = None
    max_records: int | None = None
    choices: tuple[str, ...] = ()
    scan: Callable[[list[Record]], list[Record | str]] | None = None

    def __call__(
        self, records: Sequence[Record], is_kept: Callable[[Record], bool] = lambda record: False
    ) -> Unit:
        """Turn the records of one unit into examples, in the file's order, and return what became
        of them. If the unit has more usable records than max_records, those on which the unit
        trained before (is_kept(record)) are preferred, then those whose content has the smallest
        sha256."""
        rejected: list[tuple[Record, str]] = []
        nameless = [replace(record, unit="", place=None) for record in records]
        scanned = self._scan(nameless)
        made = per_unit(self._examples, (Example, str))(scanned)
        usable = _select_passed(_outcomes(records, scanned, made), rejected)
        over_cap = len(usable)
        if self.max_records is not None:
            usable = _cap_records(usable, self.max_records, is_kept)
        over_cap -= len(usable)
        if self.soft_targets is not None:
            made = per_unit(self._examples_with_targets, (Example, str))(usable)
            read, scanned = [o.record for o in usable], [o.scanned for o in usable]
            usable = _select_passed(_outcomes(read, scanned, made), rejected)
        remembered = _cap_records(usable, REMEMBERED, is_kept)
        return Unit(
            records=[outcome.record for outcome in usable],
            examples=[outcome.example for outcome in usable],
            rejected=rejected,
            over_cap=over_cap,
            remembered=[outcome.record for outcome in remembered],
        )

    def _scan(self, records: list[Record]) -> list[Record | str]:
        if self.scan is None:
            return [*records]
        scanned = per_unit(self.scan, (Record, str))(records)
        return ["cannot be read"] * len(records) if scanned is None else scanned

    def _examples(self, scanned: list[Record | str]) -> list[Example | str]:
        return [self._attempt(self._example, s) if isinstance(s, Record) else s for s in scanned]

    def _examples_with_targets(self, usable: list[_Outcome]) -> list[Example | str]:
        return [self._attempt(self._add_targets, o.scanned, o.example) for o in usable]

    def _attempt(self, make: Callable[..., Example], *arguments: Any) -> Example | str:
        """Make a record's example by calling `make` with `arguments`. Return the example or, if the
        record is rejected or a library fails on it, the reason as a text."""
        try:
            return make(*arguments)
        except Rejected as error:
            return error.reason
        except BaseException as error:  # of a library; it may quote the record
            if not is_fault(error):
                raise
            log.warning("a record cannot be read (%s)", type(error).__name__)
            return "cannot be read"

    def _example(self, record: Record) -> Example:
        placed = record
        tiles = 1
        starts = False
        if self.reader:
            placed, tiles = self.reader.place(record, self.objective)
            starts = self.reader.starts
        tokenised = _tokenise(
            placed,
            self.objective,
            self.tokenizer,
            self.record_format,
            self.labelled,
            starts,
            _lead(record, placed),
            self.choices,
        )
        if self.reader:
            for ids, _ in tokenised.passages:
                self.reader.check(ids, tiles)
        passages = [_passage(ids, targets, self.scored) for ids, targets in tokenised.passages]
        return Example(
            input_ids=passages[0].input_ids,
            target_ids=passages[0].target_ids,
            label=tokenised.label,
            unit=0,
            rejected=passages[1] if len(passages) > 1 else None,
            media=record.media,
            tiles=tiles,
            cut=tokenised.cut,
            groups=record.groups,
        )

    def _add_targets(self, record: Record, example: Example) -> Example:
        assert self.soft_targets is not None
        return replace(example, soft=self.soft_targets(record, example))


def _lead(record: Record, placed: Record) -> str:
    """Return the text that the base's reader put in front of the record's prompt or first user
    message; "" if there is none. placed: the record as the reader returned it (Reader.place)."""
    if record.messages:
        texts = zip(record.messages, placed.messages, strict=True)
        own, text = next((own, text) for (role, own), (_, text) in texts if role == "user")
    else:
        own, text = record.prompt, placed.prompt
    return text.removesuffix(own)


@dataclass(frozen=True, repr=False)
class _Outcome:
    """What became of one record that trains.

    - record: the record as it was read, by which the ledger knows it
    - scanned: the record as it trains: without its unit's key and, if the site's scan redacts, with
      identifiers replaced
    - example: the example that was made of `scanned`"""

    record: Record
    scanned: Record
    example: Example


def _outcomes(
    records: Sequence[Record], scanned: Sequence[Record | str], made: list[Example | str] | None
) -> Iterator[tuple[Record, Record | str, Example | str]]:
    """Return each record with what the scan left of it and what was made of that: an example, or
    the reason why it has none. made: one for each record, in order; None if the conversion of the
    whole unit failed, which is then the reason for every record."""
    return zip(records, scanned, made or ["cannot be read"] * len(records), strict=True)


def _select_passed(
    outcomes: Iterable[tuple[Record, Record | str, Example | str]],
    rejected: list[tuple[Record, str]],
) -> list[_Outcome]:
    """Return an _Outcome for each record of which an example was made. Append (record, reason) to
    `rejected` for each of the others. outcomes: what `_outcomes` returned."""
    passed = list[_Outcome]()
    for record, scanned, made in outcomes:
        if isinstance(scanned, Record) and isinstance(made, Example):
            passed.append(_Outcome(record, scanned, made))
        else:
            rejected.append((record, str(made)))
    return passed


def _cap_records(
    usable: list[_Outcome], limit: int, is_kept: Callable[[Record], bool]
) -> list[_Outcome]:
    """Choose at most `limit` of one unit's records, and return their outcomes in the order of
    `usable`. Records on which the unit trained before (is_kept(record)) are chosen first, then
    those whose content has the smallest sha256."""
    order = sorted(
        (not is_kept(one.record), hashlib.sha256(content_of(one.record)).hexdigest(), index)
        for index, one in enumerate(usable)
    )
    return [usable[index] for index in sorted(index for _, _, index in order[:limit])]


def load_dataset(
    file: DataFile,
    study: Study,
    tokenizer: PreTrainedTokenizerBase,
    *,
    labelled: bool = True,
    exclude_unit: Callable[[str], bool] = lambda unit: False,
    is_known_member: Callable[[bytes], bool] = lambda member: False,
    strict: bool = True,
    soft_targets: Callable[[Record, Example], SoftTargets] | None = None,
    reader: Reader | None = None,
) -> Dataset:
    """Read a dataset, tokenise it, and limit how many records of a patient take part.

    - file: the table of study.toml or site.toml that names the file, or the database, and columns
    - study: the plan, whose objective, unit and cap on a patient's records are applied
    - tokenizer: the tokenizer of the base that is trained
    - labelled: False also admits records that have nothing to predict
    - exclude_unit: a function that says whether to leave out the patient with a key; it is not
      called if the unit is the record
    - is_known_member: a function that says whether an earlier load of the dataset had a member
      (`_trained_member`), i.e. trained on that record. The cap prefers such records
    - strict: whether to raise the errors marked "if strict" below too, for a person who can correct
      the files
    - soft_targets: computes a teacher's targets for one record; None: no teacher
    - reader: how the base reads records, if it reads more than text (modalities); None for text

    A site's records, held-out ones included, have the study's unit, and the result also has the
    units' keys and the members by which the ledger remembers them. [public], [selection] and
    [evaluation] of a study hold no private records, and their unit is the record.
    Errors: DataError for a path or columns that cannot be used; if strict, also as in `files.rows`,
    if no record is usable, or if all of a site's labelled records belong to one unit.
    Guarantee: if not strict, whether a unit trains, and on what, depends on its own rows and on
    which of its records trained before. Adding or removing one unit changes nothing for the others.
    """
    table = table_of(file)
    record_format = check_columns(file, study, tokenizer, labelled, reader)
    unit = study.unit if table == "data" else "record"
    groups = group_reader(file, study)
    cap = study.max_records_per_unit if unit == "patient" else None
    scored = study.objective.resolved.outputs > 0
    choices = file.choices if isinstance(file, EvaluationTable) else ()
    by_unit: dict[str, list[Record]] = {}
    # The scan starts before a record is read: a model that cannot be loaded is the site's error.
    scans = scanning(file.scan, file.declared_size) if isinstance(file, SiteData) else nullcontext()
    with scans as scan:
        read = read_file(file, unit=unit, labelled=labelled, strict=strict, groups=groups)
        for record in read.records:
            by_unit.setdefault(record.unit, []).append(record)
        unit_reader = UnitReader(
            study.objective, tokenizer, record_format, scored, labelled, reader, soft_targets, cap,
            choices, scan,
        )  # fmt: skip
        read_units = {
            key: unit_reader(unit_records, lambda record: is_known_member(_trained_member(record)))
            for key, unit_records in by_unit.items()
            if not (unit == "patient" and exclude_unit(key))
        }
    units = {key: unit_result for key, unit_result in read_units.items() if unit_result.records}
    counts = _counts(read, list(read_units.values()))
    rejected = Counter(failed.reason for failed in counts.failed)
    if strict and not units:
        raise nothing_left(file.where, rejected, study.objective, read)
    if strict and labelled and table == "data" and len(units) < 2:
        raise one_unit(file.where, unit)
    examples = [
        replace(example, unit=number)
        for number, unit_result in enumerate(units.values())
        for example in unit_result.examples
    ]
    if table != "data":
        return Dataset(examples, len(units), rejected, counts=counts)
    member = unit_member if unit == "patient" else _row_member
    keys = tuple(map(member, units))
    training = [record for unit_result in units.values() for record in unit_result.records]
    remembered = [record for unit_result in units.values() for record in unit_result.remembered]
    trained = frozenset(map(_trained_member, remembered))
    trained |= frozenset(keys) if unit == "patient" else frozenset()
    members = trained | _members(training)
    return Dataset(examples, len(units), rejected, members, keys, counts, trained)


def _counts(read: Read, units: Sequence[Unit]) -> Counts:
    """Count what became of the rows of a file. read: what was read from the file: its rows and
    records. units: the units that were made of these records; a record that is in no unit counts as
    excluded."""
    rejected = [(record.place, reason) for unit in units for record, reason in unit.rejected]
    over_cap = sum(unit.over_cap for unit in units)
    here = sum(len(unit.records) for unit in units) + len(rejected) + over_cap
    return Counts(
        rows=read.rows,
        filtered=read.filtered,
        withheld=read.withheld,
        duplicates=count_duplicates(read.records),
        over_cap=over_cap,
        excluded=len(read.records) - here,
        failed=(*read.failed, *(Failed(*place, why) for place, why in rejected if place)),
    )


def count_duplicates(records: Sequence[Record]) -> int:
    """Count the records whose content an earlier record has too, of the same or another patient."""
    return len(records) - len({hashlib.sha256(content_of(record)).digest() for record in records})


def check_columns(
    file: DataFile,
    study: Study,
    tokenizer: PreTrainedTokenizerBase,
    labelled: bool = True,
    reader: Reader | None = None,
) -> RecordFormat:
    """Check that the file's columns fit the study, and return the format, i.e. which fields of a
    record are read. No file is read.

    - file: the table of study.toml or site.toml whose columns are checked
    - study: the plan, whose objective and unit say which columns are needed
    - tokenizer: the base's tokenizer; it needs a chat template if the column `messages` is named
    - labelled: whether records need a label or an answer; False: a record may have neither
    - reader: how the base reads images, recordings or clips; None: no such column may be named

    The format is the objective's ("label", "preference", "unpaired_preference" or "text"), with two
    exceptions. If `labelled` is false it is "text", unless the objective's is "label". If the study
    learns from judgements ("unpaired_preference"), records other than a site's are preference
    pairs.
    Errors: DataError."""
    table = table_of(file)
    columns, objective = file.columns, study.objective
    at = f"{table}.columns"
    record_format = objective.resolved.record_format
    if table == "data" and study.unit == "patient" and not columns.patient:
        raise no_patients(table)
    _check_media(file, study, reader)
    if record_format == "label":
        if columns.messages or (labelled and not columns.label):
            raise DataError(
                f"objective {objective.name} cannot use these columns", f"{at}.text and {at}.label"
            )
        if labelled and not objective.labels:
            raise DataError("objective.labels is empty", "the public list of classes")
        return record_format
    if columns.messages and not tokenizer.chat_template:
        raise DataError(
            f"{at}.messages is given, and the base has no chat template",
            f"{at}.prompt and {at}.completion, or a chat base",
        )
    if columns.messages:
        check_draws_nothing(tokenizer)
    if labelled and record_format != "text":
        judged = record_format == "unpaired_preference" and table == "data"
        needed = ("completion", "label") if judged else _PAIR
        if not all(getattr(columns, name) for name in needed):
            expected = ", ".join(f"{at}.{name}" for name in ("prompt", *needed))
            raise DataError(f"objective {objective.name} cannot use these columns", expected)
        return "unpaired_preference" if judged else "preference"
    if labelled and columns.prompt and not columns.completion:
        raise DataError(f"{at}.prompt is given without {at}.completion", "both columns")
    return "text"


def _check_media(file: DataFile, study: Study, reader: Reader | None) -> None:
    """Check that the file's columns fit what the base reads. If it reads images, recordings or
    clips, the column of that kind must be named, and no column of another kind. A base for
    recordings reads no prompt; a base for clips reads no text if the study has no [lora] table.
    reader: how the base reads such files; None if it reads text alone. Errors: DataError."""
    at, required = f"{table_of(file)}.columns", reader.column if reader else None
    for kind in KINDS:
        if getattr(file.columns, kind) and kind != required:
            raise DataError(
                f"{at}.{kind} is given, and the base reads no {kind}",
                f"{at}.{required}" if required else "no such column",
                "name a base that reads it, or leave the column out",
            )
        if kind == required and not getattr(file.columns, kind):
            raise DataError(
                f"the base reads {kind} and text, and no {kind} column is named", f"{at}.{kind}"
            )
    if required == "audio":
        unsupported = [key for key in ("prompt", "messages") if getattr(file.columns, key)]
        unsupported += ["text"] if file.columns.text and file.columns.label else []
        if unsupported or study.objective.template is not None:
            raise DataError(
                f"a speech base reads no prompt ({', '.join(unsupported) or 'objective.template'})",
                f"{at}.audio with {at}.text (what is said) or {at}.label (classify)",
            )
    texts = (file.columns.text, file.columns.prompt, file.columns.messages)
    if required == "video" and study.lora is None and any(texts):
        raise DataError(
            "a study that trains a head alone reads each clip without a text",
            f"{at}.video with {at}.label, or a [lora] table",
        )


def _row_member(key: str) -> bytes:
    return b"row\0" + key.encode()


def _trained_member(record: Record) -> bytes:
    """Return the member (identifier) that says "this unit trains on this record". It holds the
    unit's hash, so equal records of two units have two members."""
    unit_hash = hashlib.sha256(unit_member(record.unit)).digest()
    return b"kept\0" + unit_hash + content_of(record)


def _members(records: list[Record]) -> frozenset[bytes]:
    """Return the identifiers ("members") that say nothing of which unit a record belongs to: for
    each record one for its content, one for its file, and one for each of its texts of at least
    LONG characters. By these `fedtune doctor` finds records that two datasets have in common, even
    if a text or file is in another column or format."""
    members = set()
    for record in records:
        members.add(record_member(record))
        if record.media:
            members.add(b"media\0" + record.media.file)
        members |= text_members(record)
    return frozenset(members)


def text_members(record: Record) -> set[bytes]:
    """Return the members (identifiers) that stand for a record's texts, one for each text of at
    least LONG characters, in the form that the ledger hashes."""
    return {b"text\0" + text.encode() for text in _texts(record) if len(text) >= LONG}
