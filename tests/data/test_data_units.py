"""Whose records are whose: caps, memory, names, and what is an error."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedtune.core.config import Columns, Study
from fedtune.core.data import load as tokens
from fedtune.core.data.dataset import Example, SoftTargets
from fedtune.core.data.files import Rejected
from fedtune.core.data.records import Record, unit_member
from tests.data.data_tokens_kit import (
    LABELLED,
    MESSAGES,
    PAIR,
    SECRET,
    TEXT,
    Jsonl,
    MakeStudy,
    MakeTok,
    Tok,
    error_of,
    kept,
    load,
    talk,
)


def test_units(jsonl: Jsonl, study: MakeStudy, tokenizer: Tok) -> None:
    columns = Columns(text="t", patient="who")
    path = jsonl(*({"t": f"text {i}", "who": who} for i, who in enumerate("bab")))
    data = load(path, columns, study(privacy={"unit": "patient"}), tokenizer)
    assert (data.n_units, data.by_unit) == (2, [[0, 1], [2]])
    data = load(path, columns, study(), tokenizer)
    assert (data.n_units, data.by_unit) == (3, [[0], [1], [2]])


ROWS = st.lists(
    st.tuples(st.sampled_from("abc"), st.text("xyz", min_size=1, max_size=3)), max_size=20
)


@settings(max_examples=60, deadline=None)
@example(rows=[("a", "xx"), *[("a", "x")] * 4], seed=0)
@given(rows=ROWS, seed=st.integers(0, 1000))
def test_the_cap_depends_on_the_patients_own_records_alone(
    rows: list[tuple[str, str]], seed: int, make_tokenizer: MakeTok
) -> None:
    tok = make_tokenizer()
    plan = Study.model_validate_json(
        json.dumps(
            {
                "study": {"name": "s"},
                "base": {"model": "m"},
                "objective": {"name": "causal_lm"},
                "training": {"sampling_rate": 1.0, "learning_rate": 0.1, "rounds": 1},
                "clipping": {},
                "privacy": {
                    "epsilon": 1.0,
                    "delta": 1e-5,
                    "unit": "patient",
                    "max_records_per_unit": 3,
                },
            }
        )
    )
    always = [("d", "x"), ("e", "y"), ("e", "x")]
    first = kept(rows + always, plan, tok)
    for who in "abcde":
        mine = [row for row in rows + always if row[0] == who]
        assert len(first.get(who, [])) == min(3, len(mine))
    shuffled = rows + always
    random.Random(seed).shuffle(shuffled)
    assert kept(shuffled, plan, tok) == first
    without_a = kept([row for row in rows if row[0] != "a"] + always, plan, tok)
    assert without_a == {who: texts for who, texts in first.items() if who != "a"}


CAP = {"unit": "patient", "max_records_per_unit": 2}
WHO = Columns(text="t", patient="who")
NOTE = "no acute findings; discharged home"  # of many patients, word for word


def grown(
    jsonl: Jsonl, study: MakeStudy, tok: Tok, *others: dict[str, Any]
) -> dict[bytes, list[list[int]]]:
    """What eight patients train on after their file has grown; `others` were in it from the first.
    Each had one note of their own; now there is NOTE, and a note that sorts before it."""
    plan = study(privacy=CAP)
    first = [{"t": f"note {p}", "who": p} for p in range(8)]
    before = load(jsonl(*first, *others), WHO, plan, tok)
    more = [{"t": t, "who": p} for p in range(8) for t in (NOTE, f"another {p} of {p % 3}")]
    memory = before.members.__contains__
    after = load(jsonl(*first, *others, *more), WHO, plan, tok, is_known_member=memory)
    texts = [[after.examples[i].input_ids.tolist() for i in unit] for unit in after.by_unit]
    return dict(zip(after.keys, texts, strict=True))


def test_what_a_patient_keeps_follows_from_that_patients_past_alone(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    """Not from whether somebody else has the same note."""
    alone = grown(jsonl, study, tokenizer)
    beside = grown(jsonl, study, tokenizer, {"t": NOTE, "who": "a"})
    assert beside.pop(unit_member("a")) and beside == alone
    assert all(len(texts) == 2 for texts in alone.values())


def test_a_memory_that_patients_share_is_caught(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: kept before, by anybody."""
    monkeypatch.setattr(
        tokens, "_trained_member", lambda record: b"kept" + tokens.content_of(record)
    )
    with pytest.raises(AssertionError):
        test_what_a_patient_keeps_follows_from_that_patients_past_alone(jsonl, study, tokenizer)


def test_a_patient_keeps_what_was_kept(jsonl: Jsonl, study: MakeStudy, tokenizer: Tok) -> None:
    plan = study(privacy=CAP)
    rows = [{"t": f"note {n}", "who": "a"} for n in range(9)]
    two = load(jsonl(*rows[:2], {"t": "x", "who": "b"}), WHO, plan, tokenizer)
    nine = load(
        jsonl(*rows, {"t": "x", "who": "b"}),
        *(WHO, plan, tokenizer),
        is_known_member=two.members.__contains__,
    )
    assert [e.input_ids.tolist() for e in nine.examples] == [
        e.input_ids.tolist() for e in two.examples
    ]


def test_a_record_is_named_by_what_it_says_and_not_by_where_it_stands(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    rows = [{"t": text} for text in ("a b", "c d", "a b", "e f")]
    keys = load(jsonl(*rows), TEXT, study(), tokenizer).keys
    assert len(set(keys)) == 4
    fewer = load(jsonl(*rows[1:]), TEXT, study(), tokenizer).keys
    assert set(fewer) < set(keys) and len(fewer) == 3
    others = load(jsonl({"t": "u v"}, {"t": "w x"}), TEXT, study(), tokenizer).keys
    assert not set(others) & set(keys)
    calls = iter([True, True, False, False])  # who is asked whether a record has withdrawn
    withdrawn = load(jsonl(*rows), TEXT, study(), tokenizer, exclude_unit=lambda unit: next(calls))
    assert withdrawn.n_units == 4  # patients withdraw; a record has no key of a patient


class Fails:
    """A library that one text makes fail."""

    def __init__(self, tokenizer: Tok, error: type[BaseException] = MemoryError) -> None:
        self._tokenizer, self._error = tokenizer, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: Any) -> list[int]:
        if SECRET in text:
            raise self._error(text)
        return list(self._tokenizer.encode(text, **options))


def test_what_one_record_makes_a_library_do_costs_that_record_alone(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl({"t": "x"}, {"t": SECRET}, {"t": "y"})

    def read(tok: Any, teach: Any = None) -> tuple[int, Any]:
        try:
            data = load(path, TEXT, study(), tok, soft_targets=teach)
        except (MemoryError, Rejected):
            pytest.fail("one record's error is everybody's")
        return len(data.examples), data.rejected

    assert read(Fails(tokenizer)) == (2, {"cannot be read": 1})
    assert "MemoryError" in caplog.text and SECRET not in caplog.text
    # A panic of Rust code, such as a tokenizer's pattern that gives up, is no Exception.
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    try:
        found = read(Fails(tokenizer, panic))
    except panic:
        pytest.fail("one record's panic ends the process")
    assert found == (2, {"cannot be read": 1}) and SECRET not in caplog.text
    with pytest.raises(KeyboardInterrupt):  # a person's wish is none of a record's faults
        read(Fails(tokenizer, KeyboardInterrupt))

    def teach(record: Record, example: Example) -> SoftTargets:
        if record.completion == "x":
            raise Rejected("too long")
        return SoftTargets(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32))

    assert read(tokenizer, teach) == (2, {"too long": 1})
    two = [{"t": "x", "who": 1}, {"t": SECRET, "who": 1}]
    others = [{"t": f"y {who}", "who": who} for who in (2, 3)]
    columns, plan = Columns(text="t", patient="who"), study(privacy={"unit": "patient"})
    kept = load(jsonl(*two, *others), columns, plan, Fails(tokenizer, panic))
    assert len(kept.examples) == 3, "one record's panic costs its patient's others"


def test_no_cap_without_privacy(jsonl: Jsonl, study: MakeStudy, tokenizer: Tok) -> None:
    path = jsonl(*({"t": f"text {i}", "who": "same"} for i in range(40)))
    data = load(path, Columns(text="t", patient="who"), study(), tokenizer)
    assert len(data.examples) == data.n_units == 40


def test_the_same_file_gives_the_same_dataset(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    path = jsonl(*({"t": f"text {i % 7}", "who": i % 3} for i in range(30)))
    plan = study(privacy={"unit": "patient", "max_records_per_unit": 4})
    columns = Columns(text="t", patient="who")
    one, two = (load(path, columns, plan, tokenizer) for _ in range(2))
    assert [e.input_ids.tolist() for e in one.examples] == [
        e.input_ids.tolist() for e in two.examples
    ]
    assert one.by_unit == two.by_unit


def test_one_unit_is_an_error(jsonl: Jsonl, study: MakeStudy, tokenizer: Tok) -> None:
    assert "at least 2 records" in str(error_of(jsonl({"t": SECRET}), TEXT, study(), tokenizer))
    path = jsonl({"t": SECRET, "who": SECRET}, {"t": "other", "who": SECRET})
    columns = Columns(text="t", patient="who")
    plan = study(privacy={"unit": "patient"})
    assert "at least 2 patients" in str(error_of(path, columns, plan, tokenizer))
    assert "data.columns.patient" in str(error_of(path, TEXT, plan, tokenizer))
    assert len(load(jsonl({"t": "x"}), TEXT, study(), tokenizer, labelled=False).examples) == 1


def test_all_rejected_is_an_error_with_counts(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    path = jsonl({"t": SECRET * 9}, {"t": SECRET * 9}, {"t": [SECRET]}, SECRET.encode())
    message = str(error_of(path, TEXT, study(max_length=8), tokenizer))
    assert "(2 too long, 1 wrong type, 1 not JSON)" in message
    assert "objective.max_length" in message


def test_no_known_label_is_an_error(jsonl: Jsonl, study: MakeStudy, encoder_tokenizer: Tok) -> None:
    plan = study(name="classify", labels=["yes", "no"])
    path = jsonl({"t": "lion", "y": SECRET}, {"t": "cat", "y": SECRET})
    message = str(error_of(path, LABELLED, plan, encoder_tokenizer))
    assert "objective.labels" in message and "yes, no" in message


def test_shapes_that_do_not_fit_the_objective(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, make_tokenizer: MakeTok
) -> None:
    path = jsonl({"p": SECRET, "t": SECRET} | talk(SECRET, SECRET))
    classify = study(name="classify", labels=["a"])
    for columns in (TEXT, PAIR, MESSAGES):
        assert "data.columns.label" in str(error_of(path, columns, classify, tokenizer))
    message = str(error_of(path, LABELLED, study(name="classify"), tokenizer))
    assert "objective.labels is empty" in message
    prompt_only = Columns(prompt="p")
    assert "data.columns.completion" in str(error_of(path, prompt_only, study(), tokenizer))
    mute = make_tokenizer(template=None)
    assert "no chat template" in str(error_of(path, MESSAGES, study(), mute))


def test_nothing_of_the_content_in_a_repr(jsonl: Jsonl, study: MakeStudy, tokenizer: Tok) -> None:
    data = load(jsonl(*[{"p": SECRET, "c": SECRET}] * 2), PAIR, study(), tokenizer)
    shown = repr(data) + repr(data.examples) + str(data.examples[0])
    assert SECRET not in shown and str(data.examples[0].input_ids[0]) + "," not in shown
