"""What test_data_tokens.py and test_data_units.py share."""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from fedtune.core.config import Columns, DataFile, EvaluationTable, Study
from fedtune.core.data.dataset import Dataset, Example
from fedtune.core.data.load import load_dataset
from fedtune.core.errors import DataError

Jsonl = Callable[..., Path]
MakeStudy = Callable[..., Study]
MakeTok = Callable[..., PreTrainedTokenizerBase]
Tok = PreTrainedTokenizerBase
SECRET = "Zaphod-Beeblebrox-1979"
PAIR = Columns(prompt="p", completion="c")
TEXT = Columns(text="t")
LABELLED = Columns(text="t", label="y")
MESSAGES = Columns(messages="m")


def load(path: Path, columns: Columns, study: Study, tok: Tok, **options: Any) -> Dataset:
    return load_dataset(DataFile(path=path, columns=columns), study, tok, **options)


def one(path: Path, columns: Columns, study: Study, tok: Tok) -> Example:
    """The only example of a held-out file of one record."""
    (example,) = load_dataset(EvaluationTable(path=path, columns=columns), study, tok).examples
    return example


def targets(tok: Tok, example: Example) -> str:
    return tok.decode([t for t in example.target_ids if t != -100])


def talk(*contents: str, system: str | None = None) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"m": first + turns}


def kept(rows: list[tuple[str, str]], plan: Study, tok: Tok) -> dict[str, list[str]]:
    """What is left of each patient, found again by the patient's letter at the text's start."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        lines = (json.dumps({"t": f"{who}{who}{text}", "who": who}) for who, text in rows)
        path.write_text("\n".join(lines))
        data = load(path, Columns(text="t", patient="who"), plan, tok)
    texts: dict[str, list[str]] = {}
    for group in data.by_unit:
        found = sorted(targets(tok, data.examples[index]) for index in group)
        assert len({text[0] for text in found}) == 1
        texts[found[0][0]] = found
    return texts


def error_of(path: Path, columns: Columns, study: Study, tok: Tok, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        load(path, columns, study, tok, **options)
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown + str(caught.value) + repr(caught.value)
    return caught.value
