"""Read a file of public prompts at the coordinator, and describe it for a report."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from fedtune.core.config import ObjectiveTable, PublicTable
from fedtune.core.data.files import Rejected
from fedtune.core.data.records import Record, read_records
from fedtune.core.data.tokenize import prompt_ids
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.models.loaded import LoadedModel
from fedtune.core.progress import report
from fedtune.derive.writing import write


@dataclass(frozen=True, repr=False)
class Prompts:
    """The public prompts that were read from a file.

    - records: one for each prompt; completion is "" if the file has none
    - about: what the report says of the file: its "digest", its "licence", the number of "prompts"
      that were read, and the number of records that were "left_out", i.e. unusable"""

    records: list[Record]
    about: dict[str, Any]


def read(file: PublicTable) -> Prompts:
    """Read a file of public prompts, and describe it for a report.

    Errors: DataError if the file cannot be read or has fewer than 4 usable prompts; ConfigError if
    it has no licence or no prompt column."""
    if not file.licence.strip():
        raise ConfigError("--licence is empty", "the licence of the prompts, such as CC0-1.0")
    if file.columns.messages or not (file.columns.prompt or file.columns.text):
        raise ConfigError("the prompts have no prompt column", "--column prompt=NAME")
    records, rejected = read_records(file, labelled=False)
    records = [r if r.prompt else replace(r, prompt=r.completion, completion="") for r in records]
    digest = hashlib.sha256()
    for record in records:
        for part in (record.prompt, record.completion):
            digest.update(hashlib.sha256(part.encode()).digest())
    if len(records) < 4:
        raise DataError(f"{file.path}: {len(records)} usable prompts", "at least 4 prompts")
    about = {
        "digest": "sha256:" + digest.hexdigest(),
        "licence": file.licence,
        "prompts": len(records),
        "left_out": sum(rejected.values()),
    }
    return Prompts(records, about)


def complete_prompts(
    records: list[Record],
    writer: LoadedModel,
    objective: ObjectiveTable,
    new_tokens: int,
    seed: int,
) -> tuple[list[Record], Counter[str]]:
    """Let `writer` complete the records that have no completion. Return two things: all usable
    records, and a Counter that says for each reason how many records were left out for it.

    - records: the public prompts; the result has the same order
    - writer: the model that writes the completions
    - objective: the plan's table, for the template around a prompt and the largest length
    - new_tokens: the most tokens of a completion
    - seed: determines, together with a record's prompt, the random draws of its completion

    Errors: DataError if no record is usable."""
    completed_records: list[Record] = []
    left_out: Counter[str] = Counter()
    for number, record in enumerate(records):
        try:
            if not record.completion:
                record = _complete(record, writer, objective, new_tokens, seed)
            completed_records.append(record)
        except Rejected as error:
            left_out[error.reason] += 1
        report("the teacher is writing", number + 1, len(records))
    if not completed_records:
        counts = ", ".join(f"{n} {reason}" for reason, n in left_out.most_common())
        todo = "another teacher, or prompts with completions"
        if "too long" in left_out:
            todo = "fewer --new-tokens, or shorter prompts"
        raise DataError(f"no prompt can be used ({counts})", todo=todo)
    return completed_records, left_out


def _complete(
    record: Record, writer: LoadedModel, objective: ObjectiveTable, new_tokens: int, seed: int
) -> Record:
    """Let `writer` complete a record's prompt. Return the record with the completion.

    - record: a public prompt without a completion
    - writer: the model that writes the completion
    - objective: the plan's table, for the template around the prompt and the largest length
    - new_tokens: the most tokens of the completion
    - seed: determines, together with the prompt, the random draws of the completion

    Errors: Rejected if the prompt leaves no space for `new_tokens`, or the completion is empty."""
    ids = prompt_ids(record.prompt, objective, writer.tokenizer)
    if len(ids) + new_tokens > min(objective.max_length, writer.room):
        raise Rejected("too long")
    (token_ids,) = write(writer, ids, 1, new_tokens, f"{seed}\n{record.prompt}".encode())
    text = str(writer.tokenizer.decode(token_ids, skip_special_tokens=True))
    if not text.strip():
        raise Rejected("an empty answer")
    return replace(record, completion=text)
