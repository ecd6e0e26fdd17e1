"""Predict with a finished run: each record's class, the likeliest of declared choices, or a
reward's score."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedtune.core.config import Columns, DataFile, Study
from fedtune.core.data.cells import text_of
from fedtune.core.data.dataset import Dataset, Example
from fedtune.core.data.files import Rejected, rows
from fedtune.core.data.load import UnitReader
from fedtune.core.data.media import KINDS, Decoder, Folder, Kind, Media
from fedtune.core.data.records import Record, _messages
from fedtune.core.data.sources import csv
from fedtune.core.data.sources._interface import BadCell, Names, Row, find_unclean
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.files import reading
from fedtune.core.models.adapter_files import pick_arrays
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.progress import report
from fedtune.evaluation.choices import (
    by_record,
    choice_ids,
    first_logits,
    single_tokens,
    with_choice,
)
from fedtune.evaluation.predictions import Carried, Predictions, check_ids
from fedtune.runs.run import Run

log = logging.getLogger("fedtune.data")

Records = DataFile | Path | str | Iterable[Mapping[str, Any] | str]
LINES = ".txt"  # suffix of a file with one text a line, for a run with a head
LARGEST = 2**30  # largest size of such a file, in bytes
CHUNK = 1024  # the number of records whose states are in memory at a time


def predict(
    run: Run,
    records: Records,
    choices: Sequence[str] = (),
    *,
    base_alone: bool = False,
    ids: Sequence[str] = (),
) -> Predictions:
    """Predict the label, or a reward's score, of each record with a finished run.

    Args:
        records: a .csv, .jsonl or .parquet file, given by its path (with the study's columns) or as
            a DataFile with columns of its own; or a .txt file with one text a line; or rows in
            memory: dicts, texts, or a DataFrame. No label is read.
        choices: the completions to choose from, for a run without a head; by default those of the
            study.
        base_alone: whether to predict without the adapter. A head is then zero, so that all its
            classes are equally likely.
        ids: columns of the records that are copied to their predictions, such as a key.

    A trained head gives each class a probability, and a reward head gives each prompt with its
    completion a score. A causal model predicts the choice of highest log-likelihood, as `evaluate`
    does. The result holds one prediction for each record, in the records' order. For a record that
    cannot be used it holds the reason instead.

    >>> import fedtune
    >>> fedtune.predict(fedtune.Run("runs/none"), ["Does it hurt?"])
    Traceback (most recent call last):
      ...
    fedtune.core.errors.InputError: ...

    Errors: ConfigError if there are no choices, if choices are given for a run with a head, or if a
    name in `ids` is also the name of a column of predictions; DataError; ModelError."""
    study = run.study
    headed = study.objective.resolved.outputs > 0
    table = study.evaluation
    offered = () if headed else tuple(choices) or (table.choices if table else ())
    if len(offered) < 2 and not headed:
        raise ConfigError(
            f"{run.place}: has no head, and no choices were given",
            "a run that trained a head, or at least two choices",
            "--choice TEXT for each, with its leading space; for free text, use `fedtune generate`",
        )
    if headed and choices:
        raise ConfigError(f"{run.place}: its head already has classes", "no --choice")
    ids = tuple(dict.fromkeys(ids))
    check_ids(ids)
    asked = _Asked.of(study, records, headed, ids)
    source = _rows(records, asked)  # before the model is loaded, so that errors come early
    outputs: list[np.ndarray] = []
    reasons: list[str] = []
    with Decoder(asked.kind) if asked.kind else nullcontext() as decoder:
        predictor = _Predictor(run, asked, offered, base_alone, decoder)
        for start in range(0, len(source), CHUNK):
            chunk = source[start : start + CHUNK]
            values, why = predictor(chunk)
            outputs.append(values)
            reasons += why
            report("predicting", len(reasons), len(source))
    carried = {name: _column(source, name) for name in ids}
    return Predictions(predictor.labels, np.concatenate(outputs), tuple(reasons), carried)


def _column(source: Sequence[Row | str], name: str) -> tuple[Carried, ...]:
    """Return the cells of the column `name`, one for each row of `source`. The cells stay as they
    are if all are numbers, all booleans or all texts, and every file format can hold them;
    otherwise they become texts. None stands for a cell that is missing or unreadable. source: rows,
    each a dict, or the reason (a text) why it was rejected."""
    cells: list[Carried] = []
    for row in source:
        row = row.cells if isinstance(row, BadCell) else row
        value = row.get(name) if isinstance(row, dict) else None
        if isinstance(value, float) and not math.isfinite(value):
            value = None
        if value is not None and not isinstance(value, bool | int | float):
            value = None if find_unclean(text := str(value)) else text
        cells.append(value)
    kinds = {type(cell) for cell in cells if cell is not None}
    large = any(isinstance(cell, int) and abs(cell) >= 2**63 for cell in cells)
    if len(kinds) > 1 or large:
        cells = [None if cell is None else str(cell) for cell in cells]
    return tuple(cells)


class _Asked(NamedTuple):
    """Which columns of the records are read.

    - columns: part of a record, such as "prompt" -> the column that holds it
    - keys: configuration key -> the column that it names
    - folder: the folder in which images and recordings are found"""

    columns: dict[str, str]
    keys: dict[str, str]
    folder: Path  # of images and recordings

    @property
    def kind(self) -> Kind | None:
        """Return the kind of the files that the rows name, such as images; None if the rows name no
        files."""
        return next((kind for kind in KINDS if kind in self.columns), None)

    @classmethod
    def of(cls, study: Study, records: Records, headed: bool, ids: Sequence[str]) -> _Asked:
        """Choose which columns to read: those of the given DataFile or, if `records` is no
        DataFile, those of the study's [evaluation] table. If they name no column for a part of a
        record, such as its prompt, the part is read from the column with the part's own name.

        - study: the run's plan
        - records: what `predict` was given: a file or rows, of which nothing is read yet
        - headed: whether the run trained a head. Without one, only a record's prompt (or
          conversation) is read, and its image or recording
        - ids: further columns that the records must have"""
        given = records.columns if isinstance(records, DataFile) else None
        path = records.path if isinstance(records, DataFile) else records
        table = study.evaluation
        named = given or (table.columns if table else Columns(text="text"))
        if not headed:
            parts = ["messages"] if named.messages else ["prompt"]
            if named.media and named.text:  # the text is a recording's transcript, not a prompt
                parts = []
        elif study.objective.resolved.record_format == "label":
            parts = ["text"] if named.text or not named.media else []
        else:
            parts = ["prompt", "completion"]
        parts += [kind for kind in KINDS if getattr(named, kind)]
        of_study = table is not None and not given
        columns = {part: getattr(named, part) or part for part in parts}
        keys = {
            f"evaluation.columns.{part}" if of_study else f"--column {part}=NAME": column
            for part, column in columns.items()
        }
        keys |= {f"--id {column}": column for column in ids}
        folder = Path(path).parent if isinstance(path, Path | str) else Path()
        return cls(columns, keys, folder)


def _rows(records: Records, asked: _Asked) -> list[Row | str]:
    """Read all rows of a file, or rows in memory. Each is returned as a dict of its cells or, if it
    was rejected, as the reason (a text).

    - records: what `predict` was given: a file or rows
    - asked: the columns to read

    Errors: DataError if the file cannot be read, or there are no records."""
    if isinstance(records, DataFile | Path | str):
        path = records.path if isinstance(records, DataFile) else Path(records)
        if path.is_dir():
            raise DataError(f"{path}: is a folder", "one file, so that its rows can be joined back")
        lines = path.suffix.lower() == LINES
        source = csv.guess_format(path, asked.keys.values())
        found = _lines(path, asked) if lines else list(rows(path, asked.keys, source=source))
    else:
        path = Path("records")
        found = list(_list_rows(records, asked))
    if not found:
        raise DataError(f"{path}: there are no records", "at least one record")
    return found


def _lines(path: Path, asked: _Asked) -> list[Row | str]:
    """Read a text file as rows, one for each line. A row is a dict with the text under the run's
    text column or, if the line is unusable, the reason (a text). path: the text file; asked: the
    columns that the run reads. Errors: DataError if the run reads any column but the text."""
    if list(asked.columns) != ["text"] or len(asked.keys) > 1:
        more = [key for key, column in asked.keys.items() if column not in asked.columns.values()]
        raise DataError(
            f"{path}: lines of text have no columns, and this run reads "
            f"{', '.join([*asked.columns, *more])}",
            "a .csv, .jsonl or .parquet file",
        )
    content = reading.content(path, "one text a line", kind=DataError, most=LARGEST)
    lines = content.removeprefix(b"\xef\xbb\xbf").splitlines()
    texts = (line.decode("utf-8", "surrogateescape") for line in lines)
    return [find_unclean(text) or {asked.columns["text"]: text} for text in texts]


def _list_rows(records: Iterable[Any], asked: _Asked) -> Iterator[Row | str]:
    """Yield rows that were given in memory, each as a dict of its cells. A plain text becomes such
    a dict if the run reads one column; anything else is yielded as the reason (a text) why it is
    unusable.

    - records: dicts, texts, or a DataFrame
    - asked: the columns to read

    Errors: DataError if a column is missing."""
    names = Names(Path("records"), asked.keys)
    if hasattr(records, "to_dict"):  # a DataFrame, in which NaN stands for a missing value
        frame: Any = records
        records = frame.astype(object).where(frame.notna(), None).to_dict("records")
    for row in records:
        if isinstance(row, str) and len(asked.columns) == 1:
            row = dict.fromkeys(asked.columns.values(), row)
        if isinstance(row, Mapping):
            names.object(dict(row))
            yield dict(row)
        else:
            yield "wrong type"
    names.require()


class _Predictor:
    """Computes a run's outputs for rows: the logits or the score of its head or, if it has no head,
    the log-likelihoods of the choices. It is called with a chunk of rows at a time.

    - run: the finished run, or a site's personal model
    - asked: the columns to read
    - choices: the completions to choose from; () for a run with a head
    - base_alone: whether adapter and head are set to zero, so that the base alone predicts
    - decoder: decodes the files that the rows name; None if they name none
    - labels (an attribute, not a parameter): the classes or choices, in the order of the outputs;
      () for a reward head

    Errors: ConfigError, ModelError."""

    def __init__(
        self,
        run: Run,
        asked: _Asked,
        choices: tuple[str, ...],
        base_alone: bool,
        decoder: Decoder | None,
    ) -> None:
        study, saved = run.study, run.adapter()
        objective = study.objective.resolved
        self._asked, self._folder, self._decoder = asked, Folder(asked.folder), decoder
        self._network: Network = build(study)
        if study.lora:  # the saved A is loaded, however it was initialised
            adopted = {"a_init": "public", "a_digest": None, "preconditioner": None}
            study = study.model_copy(update={"lora": study.lora.model_copy(update=adopted)})
        # With class statistics, a finished run holds the head that was built from them, and no
        # basis.
        asked_of = study.objective.model_copy(update={"basis_digest": None})
        study = study.model_copy(update={"objective": asked_of})
        frozen = {name: value for name, value in saved.items() if "lora_A" in name}
        self._frozen = self._network.adopt(study, frozen)
        trained = pick_arrays(saved, self._network.parameters(), run.place)
        self._trained = self._network.zero() if base_alone else trained
        tokenizer = self._network.tokenizer
        self.labels = choices or (() if objective.scores else study.objective.labels)
        self._ids = choice_ids(tokenizer, choices) if choices else []
        self._single = single_tokens(self._ids, self._network) if choices else None
        # The prompt is cut as if the longest choice followed, so that all choices have one prompt.
        sizes = [len(ids) for ids in self._ids]
        self._longest = choices[sizes.index(max(sizes))] if choices else ""
        self._reader = UnitReader(
            study.objective,
            tokenizer,
            objective.record_format if objective.record_format == "label" else "text",
            scored=objective.outputs > 0,
            labelled=bool(choices),
            reader=self._network.reader,
        )

    def __call__(self, chunk: Sequence[Row | str]) -> tuple[np.ndarray, list[str]]:
        """Compute the outputs of a chunk of n rows. Return two things: the outputs (n, K), NaN for
        a row that cannot be used; and for each row the reason why it cannot be used, or "". chunk:
        rows, each a dict of its cells, or the reason (a text) why it was rejected."""
        read = [self._example(row) for row in chunk]
        at = [n for n, example in enumerate(read) if isinstance(example, Example)]
        outputs = np.full((len(read), max(1, len(self.labels))), np.nan)
        if at:
            outputs[at] = self._score([read[n] for n in at])  # type: ignore[misc]
        return outputs, ["" if isinstance(e, Example) else e for e in read]

    def _example(self, row: Row | str) -> Example | str:
        """Tokenise one row. Return it as an Example or, if it cannot be used, the reason (a text).
        row: a dict of its cells, or the reason (a text) why it was rejected, which is returned as
        it is."""
        if isinstance(row, str):
            return row
        try:
            unit = self._reader([self._record(row)])
        except Rejected as error:
            return error.reason
        except ConfigError:  # an optional package is not installed
            raise
        except Exception as error:  # a library's error, whose message may quote the record
            log.warning("a record cannot be read (%s)", type(error).__name__)
            return "cannot be read"
        return unit.examples[0] if unit.examples else unit.rejected[0][1]

    def _record(self, row: Row) -> Record:
        columns, media = self._asked.columns, self._media(row)
        if "messages" in columns:
            turns = _messages(row.get(columns["messages"]), labelled=False)
            if turns[-1][0] == "assistant":  # the conversation ends with an answer: leave it out
                turns = turns[:-1]
            return Record("", messages=(*turns, ("assistant", self._longest)), media=media)
        text = text_of(row.get(columns["text"])) if "text" in columns else ""
        prompt = text_of(row.get(columns["prompt"])) if "prompt" in columns else text
        answer = (
            text_of(row.get(columns["completion"])) if "completion" in columns else self._longest
        )
        return Record("", prompt, answer, media=media)

    def _media(self, row: Row) -> Media | None:
        """Return the image or recording that a row names, decoded; None if the run's rows name no
        files. Errors: Rejected."""
        kind = self._asked.kind
        if kind is None or self._decoder is None:
            return None
        content = self._folder.read(text_of(row.get(self._asked.columns[kind])), kind)
        (found,) = self._decoder.decode([content])
        if isinstance(found, str):
            raise Rejected(found)
        return found

    @torch.no_grad()
    def _score(self, examples: list[Example]) -> np.ndarray:
        network = self._network
        one_by_one = bool(self._ids) and self._single is None
        if one_by_one:
            examples = [with_choice(example, ids) for example in examples for ids in self._ids]
        width = 1 if one_by_one or not self.labels else len(self.labels)
        outputs = np.empty((len(examples), width))
        network.load_frozen(self._frozen)  # another study may have used the network since
        with network.loaded(trainable=self._trained):
            data = CachedDataset(network, Dataset(examples, len(examples), Counter()))
            data.warm()
            for batch in data.batches(range(len(examples))):
                hidden = network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)
                if one_by_one:
                    values = -by_record(network, hidden, batch)[0][:, None]
                elif self._single is not None:
                    values = _fp64(first_logits(network, hidden, batch, self._single))
                else:
                    values = _fp64(network.logits(network.pool(hidden, batch.mask)))
                outputs[batch.index.numpy()] = values
        return outputs.reshape(-1, len(self._ids)) if one_by_one else outputs


def _fp64(values: torch.Tensor) -> np.ndarray:
    array: np.ndarray = values.double().cpu().numpy()
    return array
