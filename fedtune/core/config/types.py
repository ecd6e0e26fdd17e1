"""Define the types of the values in study.toml and site.toml, and the ranges that they allow."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)

from fedtune.core.config.address import host_and_port
from fedtune.core.files import reading


def _between(least: float, most: float) -> AfterValidator:
    """Return a check for pydantic that refuses a number below `least` or above `most`. The ranges
    are wide; they only refuse numbers with which a computation would take very long."""

    def check(value: float) -> float:
        if not least <= value <= most:
            raise ValueError(f"must be between {least:g} and {most:g}")
        return value

    return AfterValidator(check)


def _file(value: Any) -> Any:
    if isinstance(value, str | Path) and (why := reading.refuse_path(value)):
        raise ValueError(f"is not a path: {why}")
    if value == "":
        raise ValueError("must not be empty")
    return value


def _address(value: str) -> str:
    host_and_port(value)
    return value


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _between(1e-9, 1e9)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), _between(0, 1e9)]
Fraction = Annotated[float, Field(gt=0, le=1), _between(1e-6, 1)]
Delta = Annotated[float, Field(gt=0, lt=1), _between(1e-12, 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Rank = Annotated[int, Field(ge=1, le=8192)]
Layers = Annotated[int, Field(ge=1, le=10_000)]
Number = Annotated[int, Field(ge=1, le=10**6)]  # a count of repetitions at a site
Noise = Annotated[float, Field(gt=0), _between(1e-3, 1e6)]  # σ; the accountant's range
MOST_NAMES = 1000  # most names in one list of a plan, which somebody else wrote
MOST_CHARACTERS = 16_384  # of a plan's text: twice the longest record in one-letter tokens
Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Names = Annotated[tuple[Text, ...], Field(max_length=MOST_NAMES)]
MOST_ROWS = 1000  # of one unit in a step: the accountant's work grows with it


def _place(value: Any, info: ValidationInfo) -> Any:
    """Turn a path that Python code gives as a str into a Path. If the values come from a file (JSON
    mode), a str is returned unchanged, since pydantic then makes the Path itself. Errors:
    ValueError if the text is empty or cannot be a path."""
    text = isinstance(_file(value), str) and info.mode == "python"
    return Path(value) if text else value


Place = Annotated[Path, BeforeValidator(_place)]
Source = Annotated[str, BeforeValidator(_file)]  # of a model: a folder, or a name
Address = Annotated[str, AfterValidator(_address)]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # Ed25519, hexadecimal
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Encoding = Literal["float32", "float16", "int8"]
SheetField = Literal[  # of a site's data sheet: core/config/sheet.py
    "title",
    "description",
    "publisher",
    "provenance",
    "licence",
    "legal_basis",
    "consent",
    "purpose",
    "collected_from",
    "collected_to",
    "language",
    "personal_information",
    "de_identification",
    "attested_by",
    "attested_on",
    "known_biases",
    "limitations",
]
COUNTS = re.compile(r"record|patient|unit|count|new|arriv|least|batch|threshold|size|after")
BY_COUNT = (
    "rounds start by the clock alone; a round that starts when enough records have arrived "
    "publishes their number"
)


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def _parse_duration(value: Any) -> Any:
    """Convert a duration such as "1h" to seconds, an int. A value that is no str is returned
    unchanged. Errors: ValueError if the text is no duration."""
    if isinstance(value, str):
        if COUNTS.search(value):
            raise ValueError(BY_COUNT)
        match = re.fullmatch(r"(\d{1,9}) ?([smhdw])", value)
        if not match:
            raise ValueError('must be seconds, or a number with s, m, h, d or w, as in "1h"')
        return int(match[1]) * UNITS[match[2]]
    return value


def format_duration(seconds: int) -> str:
    """Return a duration as text in the form of study.toml: 3600 seconds are "1h"."""
    unit = max((u for u, n in UNITS.items() if seconds % n == 0), key=lambda u: UNITS[u])
    return f"{seconds // UNITS[unit]}{unit}"


def _moment(value: str) -> str:
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise ValueError('must be a date and time with an offset, as in "2026-01-05T02:00:00Z"')
    return at.isoformat()


Every = Annotated[int, BeforeValidator(_parse_duration), Field(ge=1, le=31_622_400)]
Moment = Annotated[str, AfterValidator(_moment)]


def merge_tables(table: Any, changes: Any) -> Any:
    """Return a copy of the dict `table` in which the values of `changes` replace those of the same
    key; where both values are dicts, these are merged in the same way. If either argument is no
    dict, return `changes`."""
    if not isinstance(changes, dict) or not isinstance(table, dict):
        return changes
    return table | {key: merge_tables(table.get(key), value) for key, value in changes.items()}


def _json_value(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)


class Table(BaseModel):
    """The base of all configuration tables: an immutable object with the values of one TOML table.
    It is strict about types (the text "3" is not taken for 3), and refuses unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        hide_input_in_errors=True,  # a url may have a password in it
    )

    def changed(self, **changes: Any) -> Self:
        """Return a validated copy with some values changed. A dict changes a nested table, as in
        `study.changed(training={"rounds": 3}, privacy={"epsilon": 3.0})`.

        Errors: pydantic.ValidationError."""
        table = merge_tables(self.model_dump(mode="json"), changes)
        return type(self).model_validate_json(json.dumps(table, default=_json_value))

    def anchored(self, folder: Path) -> Self:
        """Return a copy in which every path is absolute; relative paths are taken from `folder`."""
        changes: dict[str, Any] = {}
        for key in type(self).model_fields:
            value = getattr(self, key)
            if isinstance(value, Path):
                changes[key] = folder / value
            elif isinstance(value, Table):
                changes[key] = value.anchored(folder)
        return self.model_copy(update=changes)


class Columns(Table):
    """The columns of a file of records.

    Each field is the name of a column in the file, or None. The text of a record stands in exactly
    one of these sets of columns: `messages`, `prompt` + `completion`, `prompt` + `chosen` +
    `rejected` (a preference), `prompt` + `completion` + `label` (a judgement), `text`, or `text` +
    `label`.

    One of `image`, `audio` and `video` may be named besides; the text may then be `label` alone.
    The cells of that column hold the path of a file, relative to the data file's folder and inside
    that folder. Records with the same value in the column `patient` are one patient's."""

    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    text: str | None = None
    label: str | None = None
    image: str | None = None
    audio: str | None = None
    # Omitted where there is none, so that such plans keep their digest.
    video: str | None = Field(default=None, exclude_if=lambda name: name is None)
    patient: str | None = None

    @property
    def media(self) -> str | None:
        return self.image or self.audio or self.video

    @model_validator(mode="after")
    def _check_shape(self) -> Columns:
        shapes = [bool(self.messages), bool(self.prompt), bool(self.text)]
        if sum(map(bool, (self.image, self.audio, self.video))) > 1:
            raise ValueError("name one of image, audio or video")
        if sum(shapes) != 1 and not (self.media and self.label and not any(shapes)):
            raise ValueError("name exactly one of messages, prompt or text")
        if self.completion and not self.prompt:
            raise ValueError("completion needs prompt")
        if bool(self.chosen) != bool(self.rejected) or (self.chosen and not self.prompt):
            raise ValueError("chosen and rejected need each other and prompt")
        if self.chosen and self.completion:
            raise ValueError("name either completion, or chosen and rejected")
        if self.label and not (self.text or self.completion or self.media):
            raise ValueError("label needs text, or prompt and completion, or image, audio or video")
        return self


class DataFile(Table):
    """The table of study.toml or site.toml that names a file of records (.jsonl, .csv, .parquet or
    .arrow, by suffix) or a folder of such files."""

    path: Place
    columns: Columns

    @property
    def where(self) -> Path | str:
        """The path of the records or, for a database, its name, as errors and messages show it."""
        return self.path
