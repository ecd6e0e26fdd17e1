"""Our own converters give the same for a unit in any order, alone, and together with others."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtune.core.config import Columns, DataFile
from fedtune.core.data import load as loading
from fedtune.core.data.dataset import Dataset, Example, SoftTargets
from fedtune.core.data.load import load_dataset
from fedtune.core.data.records import Record
from tests.data.data_tokens_kit import Jsonl, MakeStudy, MakeTok

Rows = list[dict[str, Any]]
UNITS = "abcdefg"
ONE_BROKEN: tuple[Any, ...] = (None, "", "\0", 7, ["x"], "w" * 40_000, "é" * 300)


def words(draw: random.Random, most: int = 40) -> str:
    return " ".join(draw.choice(("fever", "pain", "día", "11", "x\n\ny")) for _ in range(most))


def chat(draw: random.Random) -> Any:
    turns = [{"role": r, "content": words(draw, 9)} for r in ("user", "assistant") * 2]
    return draw.choice((turns, turns[:2], turns[1:], [{"role": "system", "content": ""}, *turns]))


KINDS: dict[str, tuple[dict[str, str], dict[str, Any], dict[str, Callable[..., Any]]]] = {
    "text": ({"text": "t"}, {"overflow": "truncate"}, {"t": words}),
    "prompts": (
        {"prompt": "p", "completion": "c"},
        {"overflow": "truncate", "template": "Q: {text} A:"},
        {"p": words, "c": lambda draw: words(draw, draw.randint(1, 9))},
    ),
    "too long is rejected": (
        {"text": "t"},
        {},
        {"t": lambda draw: words(draw, draw.randint(1, 30))},
    ),
    "chats": ({"messages": "m"}, {"overflow": "truncate"}, {"m": chat}),
    "classes": (
        {"text": "t", "label": "y"},
        {"name": "classify", "labels": ["cat", "dog"], "overflow": "truncate"},
        {"t": words, "y": lambda draw: draw.choice(("cat", " dog ", "cow"))},
    ),
    "pairs": (
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"name": "dpo", "overflow": "truncate"},
        {"p": words, "c": lambda draw: words(draw, 5), "r": lambda draw: words(draw, 9)},
    ),
}


def rows_of(kind: str) -> Rows:
    draw, cells = random.Random(0), KINDS[kind][2]
    rows = []
    for who in UNITS * 5:
        row = {"who": who} | {name: make(draw) for name, make in cells.items()}
        if draw.random() < 0.2:
            row[draw.choice([*cells])] = draw.choice(ONE_BROKEN)
        rows.append(row)
    return rows


def teacher(record: Record, example: Example) -> SoftTargets:
    count = len(example.input_ids)
    return SoftTargets(np.full((count, 1), len(record.completion), np.int32), np.zeros((count, 1)))


def bits(data: Dataset) -> dict[bytes, list[Any]]:
    """Map each unit to its examples, as bytes."""

    def of(example: Example) -> Any:
        passages = [(p.input_ids.tobytes(), p.target_ids.tobytes()) for p in example.passages]
        assert example.soft is not None
        return passages, example.label, example.cut, example.soft.tokens.tobytes()

    groups = zip(data.keys, data.by_unit, strict=True)
    return {key: [of(data.examples[index]) for index in group] for key, group in groups}


@pytest.fixture
def loaded(
    jsonl: Jsonl, study: MakeStudy, make_tokenizer: MakeTok
) -> Callable[[str, Rows], dict[bytes, list[Any]]]:
    def load(kind: str, rows: Rows) -> dict[bytes, list[Any]]:
        columns, objective, _ = KINDS[kind]
        privacy = {"unit": "patient", "max_records_per_unit": 3}
        file = DataFile(path=jsonl(*rows), columns=Columns(patient="who", **columns))
        plan = study(privacy=privacy, max_length=128, **objective)
        tokenizer = make_tokenizer(bos=True)
        return bits(load_dataset(file, plan, tokenizer, strict=False, soft_targets=teacher))

    return load


def in_other_company(kind: str, load: Callable[[str, Rows], dict[bytes, list[Any]]]) -> bool:
    """Return whether each unit is the same in the reverse order of units, and alone."""
    rows = rows_of(kind)
    together = load(kind, rows)
    assert len(together) == len(UNITS) and any(len(of) == 3 for of in together.values())
    by_unit = {who: [row for row in rows if row["who"] == who] for who in UNITS}
    reverse = load(kind, [row for who in reversed(UNITS) for row in by_unit[who]])
    alone = [load(kind, by_unit[who]) for who in UNITS]
    return reverse == together == {key: value for one in alone for key, value in one.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_is_the_same_in_any_company(
    kind: str, loaded: Callable[[str, Rows], dict[bytes, list[Any]]]
) -> None:
    assert in_other_company(kind, loaded)


@pytest.mark.parametrize("kind", KINDS)
def test_a_converter_with_memory_is_caught(
    kind: str,
    loaded: Callable[[str, Rows], dict[bytes, list[Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The twin: once in a while a record is made of what another one was."""
    honest, seen = loading._tokenise, list[Any]()

    def remembering(record: Record, *rest: Any) -> Any:
        seen.append(honest(record, *rest))
        return seen[-2] if len(seen) % 7 == 0 else seen[-1]

    monkeypatch.setattr(loading, "_tokenise", remembering)
    assert not in_other_company(kind, loaded)


def test_what_makes_examples_learns_neither_whose_they_are_nor_where_they_stand(
    loaded: Callable[[str, Rows], dict[bytes, list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    met, honest = list[Record](), loading._tokenise

    def meeting(record: Record, *rest: Any) -> Any:
        met.append(record)
        return honest(record, *rest)

    monkeypatch.setattr(loading, "_tokenise", meeting)
    assert loaded("text", rows_of("text"))
    assert met and {(record.unit, record.place) for record in met} == {("", None)}
