"""Answer a few of the study's own public prompts with the base alone and with a run's adapter.

    RUN/answers.json    the prompts, the expected answers, and both models' answers

People read them on the run's page or in a terminal. The file holds text of [evaluation] records,
which the plan declares public. It stays in the run's folder: no signature covers it, and neither
`export` nor `release` copies it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from fedtune.core.config import Columns, DataFile
from fedtune.core.data.cells import key_of, text_of
from fedtune.core.data.files import Rejected, rows
from fedtune.core.data.records import _messages
from fedtune.core.data.sources._interface import Row
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.files.writing import replace
from fedtune.core.progress import report
from fedtune.core.run_folder import ANSWERS
from fedtune.evaluation.generate import Writer
from fedtune.evaluation.predict import predict
from fedtune.evaluation.predictions import Predictions
from fedtune.runs.run import Run

Pair = tuple[dict[str, Any], dict[str, Any]]  # the answers of base and adapter
COUNT, NEW_TOKENS = 4, 64
FORMAT = "fedtune-answers-1"


class Asked(NamedTuple):
    """One prompt of the [evaluation] file.

    - row: the number of its row in the file, from 1
    - prompt: its text
    - expected: the expected answer; "" if the row has none
    - record: the whole row, as it was read"""

    row: int
    prompt: str
    expected: str
    record: Row


def answers(run: Run, count: int = COUNT, *, max_new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """Answer `count` of the study's [evaluation] prompts with the base and with the run's adapter.

    The rows are spread evenly over the file, and chosen before any prompt is answered. In a study
    with labels or choices, an answer is the likeliest label or choice with its probability. In any
    other study it is the greedy text of at most `max_new_tokens` tokens. The answers are stored in
    the run's answers.json, which the run's page shows. Returns the content of this file.

    >>> import fedtune
    >>> fedtune.answers(fedtune.Run("runs/none"))
    Traceback (most recent call last):
      ...
    fedtune.core.errors.InputError: ...

    Errors: ConfigError if there are no [evaluation] records, or none with a prompt in words;
    DataError; ModelError; InfrastructureError if the file cannot be written."""
    study = run.study
    if (table := study.evaluation) is None:
        raise ConfigError(
            f"{run.folder}: its study has no [evaluation] records",
            "a study with [evaluation] records",
        )
    objective = study.objective.resolved
    labelled = objective.record_format == "label"
    if table.columns.media or (objective.outputs and not labelled):
        raise ConfigError(
            f"{run.folder}: its prompts are not text, or its answers are scores",
            "a run of text that answers with text, or with one of its labels or choices",
            f"to see its predictions: `fedtune predict {run.folder} --data FILE`",
        )
    asked = choose_rows(DataFile(path=table.path, columns=table.columns), count)
    if labelled or len(table.choices) > 1:
        kind, pairs = "label", _labels(run, asked)
    else:
        kind, pairs = "text", _texts(run, asked, max_new_tokens)
    link = run.folder / "adapter"
    found = {
        "format": FORMAT,
        "kind": kind,
        "made": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "version": os.readlink(link) if link.is_symlink() else "",
        "answers": [
            {"row": one.row, "prompt": one.prompt, "expected": one.expected}
            | {"base": base, "adapter": adapter}
            for one, (base, adapter) in zip(asked, pairs, strict=True)
        ],
    }
    content = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    replace(run.folder / ANSWERS, content.encode(), private=True)
    return found


def choose_rows(file: DataFile, count: int) -> list[Asked]:
    """Choose `count` rows of the file that have a prompt, spread evenly over the file; all of them
    if there are fewer. Errors: DataError if no row has a prompt."""
    columns = file.columns
    parts = {part: getattr(columns, part) for part in ("messages", "prompt", "text")}
    keys = {f"evaluation.columns.{part}": str(name) for part, name in parts.items() if name}
    usable = list(_select_usable(columns, list(rows(file.path, keys))))
    if not usable:
        raise DataError(f"{file.path}: no row has a prompt of one turn", "at least one such row")
    count = min(count, len(usable))
    return [usable[n * len(usable) // count] for n in range(count)]


def _select_usable(columns: Columns, found: Sequence[Row | str]) -> Iterator[Asked]:
    for number, row in enumerate(found, 1):
        if not isinstance(row, str):
            try:
                yield Asked(number, *_words(columns, row), row)
            except Rejected:
                continue


def _words(columns: Columns, row: Row) -> tuple[str, str]:
    """Return a row's prompt and its expected answer; the answer is "" if the row has none. columns:
    the names of the columns that hold them. A conversation must be one message of a user, with or
    without the assistant's reply. Errors: Rejected if a conversation has another form, or a cell
    holds no text."""
    if columns.messages:
        turns = _messages(row.get(columns.messages), labelled=False)
        if [role for role, _ in turns] not in (["user"], ["user", "assistant"]):
            raise Rejected("bad message roles")
        return turns[0][1], turns[1][1] if len(turns) > 1 else ""
    prompt = text_of(row.get(columns.prompt or columns.text or ""))
    if columns.label and columns.text:
        return prompt, key_of(row.get(columns.label))
    answer = columns.completion or columns.chosen
    return prompt, text_of(row.get(answer)).strip() if answer else ""


def _labels(run: Run, asked: list[Asked]) -> list[Pair]:
    records = [one.record for one in asked]
    base, adapter = (predict(run, records, base_alone=alone) for alone in (True, False))
    return list(zip(_find_likeliest(base), _find_likeliest(adapter), strict=True))


def _find_likeliest(made: Predictions) -> Iterator[dict[str, Any]]:
    """Yield for each record a dict with its likeliest label ("answer") and the label's probability
    ("probability"). "answer" is None if two labels are equally likely. Both are None for a record
    that cannot be used."""
    for label, shares in zip(made.predicted, made.probabilities, strict=True):
        most = float(shares.max()) if label is not None else None
        tied = most is not None and int((shares == most).sum()) > 1
        yield {"answer": None if tied or label is None else label.strip(), "probability": most}


def _texts(run: Run, asked: list[Asked], max_new_tokens: int) -> list[Pair]:
    writer, made = Writer(run), []
    for number, one in enumerate(asked, 1):
        base, adapter = writer(one.prompt, max_new_tokens)
        made.append(({"answer": base}, {"answer": adapter}))
        report("answering", number, len(asked))
    return made
