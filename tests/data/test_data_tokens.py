"""Targets are exactly the right tokens; a patient's share is capped whatever the order."""

from __future__ import annotations

import copy
import json
import random
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fedtune.config import Columns, DataFile, EvaluationTable, PublicTable, Study
from fedtune.data import load as tokens
from fedtune.data.dataset import Dataset, Example, Soft
from fedtune.data.files import Rejected
from fedtune.data.load import load_dataset
from fedtune.data.records import Record, unit_member
from fedtune.errors import DataError

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


def whole(tok: Tok, example: Example) -> str:
    return tok.decode([*example.input_ids, example.target_ids[-1]])


def talk(*contents: str, system: str | None = None) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"m": first + turns}


# ------------------------------------------------------------------------------------------ targets


def test_completion_and_eos_are_the_targets(jsonl: Jsonl, study: MakeStudy, tokenizer: Tok) -> None:
    example = one(jsonl({"p": "Is it?", "c": " Yes"}), PAIR, study(), tokenizer)
    assert whole(tokenizer, example) == "Is it? Yes<eos>"
    assert targets(tokenizer, example) == " Yes<eos>"
    assert example.input_ids.dtype == example.target_ids.dtype == np.int32
    assert example.label == -100
    # Position t predicts the token at t + 1.
    following = [*example.input_ids[1:], tokenizer.eos_token_id]
    shown = example.target_ids != -100
    assert np.array_equal(example.target_ids[shown], np.array(following)[shown])


def test_eos_can_be_left_out(jsonl: Jsonl, study: MakeStudy, tokenizer: Tok) -> None:
    path = jsonl({"p": "Is it?", "c": "A"})
    assert targets(tokenizer, one(path, PAIR, study(append_eos=False), tokenizer)) == "A"


def test_template_goes_round_the_prompt(jsonl: Jsonl, study: MakeStudy, tokenizer: Tok) -> None:
    path = jsonl({"p": "{text} {0}?", "c": "A"})
    plan = study(template="Q {x}: {text}\nA:")
    assert whole(tokenizer, one(path, PAIR, plan, tokenizer)) == "Q {x}: {text} {0}?\nA:A<eos>"
    assert targets(tokenizer, one(path, PAIR, plan, tokenizer)) == "A<eos>"


def test_prompt_and_completion_never_share_a_token(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    assert len(tokenizer.encode("11")) == 1
    example = one(jsonl({"p": "1", "c": "1"}), PAIR, study(), tokenizer)
    assert targets(tokenizer, example) == "1<eos>"
    assert len(example.input_ids) == 2


def test_plain_text_is_all_target(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, make_tokenizer: MakeTok
) -> None:
    path = jsonl({"t": "lion"})
    assert targets(tokenizer, one(path, TEXT, study(), tokenizer)) == "ion<eos>"
    single = jsonl({"t": "l"}, {"t": "li"}, {"t": "lion"})
    data = load(single, TEXT, study(append_eos=False), tokenizer)
    assert [targets(tokenizer, e) for e in data.examples] == ["i", "ion"]
    assert data.rejected == {"no target within max_length": 1}
    path = jsonl({"t": "lion"})
    with_bos = make_tokenizer(bos=True)
    example = one(path, TEXT, study(), with_bos)
    assert targets(with_bos, example) == "lion<eos>"
    assert whole(with_bos, example) == "<bos>lion<eos>"


def test_label_is_the_completion_of_a_causal_model(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    example = one(jsonl({"t": "big cat:", "y": "lion"}), LABELLED, study(), tokenizer)
    assert targets(tokenizer, example) == "lion<eos>"


def test_chat_loss_is_on_every_assistant_turn(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    path = jsonl(talk("Hi", "Hello", "Sure?", "\nYes", "ok"))
    example = one(path, MESSAGES, study(), tokenizer)
    assert targets(tokenizer, example) == "Hello<eos>\nYes<eos>"
    text = "<|system|>Be kind.<eos>\n<|user|>\nHi<eos>\n<|assistant|>\nHello<eos>\n"
    assert whole(tokenizer, example) == text + "<|user|>\nSure?<eos>\n<|assistant|>\n\nYes<eos>"
    # The header's newline and the answer's would merge, and never do when generating.
    assert tokenizer.encode("\n\n")[0] not in example.input_ids


def test_chat_keeps_the_given_system_message(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    example = one(jsonl(talk("Hi", "Hello", system="Be brief.")), MESSAGES, study(), tokenizer)
    assert whole(tokenizer, example).startswith("<|system|>\nBe brief.<eos>\n<|user|>")
    assert targets(tokenizer, example) == "Hello<eos>"


def test_chat_template_with_generation_marks(
    jsonl: Jsonl, study: MakeStudy, make_tokenizer: MakeTok
) -> None:
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<eos>' }}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    tok = make_tokenizer(template=template)
    example = one(jsonl(talk("Hi", "Hello", "Sure?", "Yes")), MESSAGES, study(), tok)
    assert targets(tok, example) == "HelloYes"
    assert whole(tok, example) == "<|user|>Hi<|assistant|>Hello<eos><|user|>Sure?<|assistant|>Yes"


def test_chat_template_whose_header_the_answer_does_not_continue(
    jsonl: Jsonl, study: MakeStudy, make_tokenizer: MakeTok
) -> None:
    chat = str(make_tokenizer().chat_template)
    tok = make_tokenizer(template=chat.replace("'<|assistant|>\n' }}", "'<|assistant|>\n#' }}"))
    example = one(jsonl(talk("Hi", "Hello")), MESSAGES, study(), tok)
    assert targets(tok, example) == "<|assistant|>\nHello<eos>"


def test_chat_of_a_tokenizer_that_puts_a_space_in_front(
    jsonl: Jsonl, study: MakeStudy, make_tokenizer: MakeTok
) -> None:
    chat = str(make_tokenizer().chat_template)
    tok = make_tokenizer(prefix_space=True, template=chat.replace("|>\n'", "|>'"))
    example = one(jsonl(talk("Hi", "Hello")), MESSAGES, study(), tok)
    rendered = tok.apply_chat_template(talk("Hi", "Hello")["m"])["input_ids"]
    kept = [*example.input_ids, example.target_ids[-1]]
    assert kept == rendered[: len(kept)]
    assert targets(tok, example) == "Hello<eos>"


def test_chat_template_that_refuses_or_alters_turns(
    jsonl: Jsonl, study: MakeStudy, make_tokenizer: MakeTok
) -> None:
    refusing = "{{ raise_exception(messages[0]['content']) }}"
    altering = "{% for m in messages %}{{ loop.revindex ~ m['content'] }}{% endfor %}"
    for template, reason in [
        (refusing, "2 bad message roles"),
        (altering, "2 turns altered by the chat template"),
    ]:
        path = jsonl(talk(SECRET, "a", "b", "c"), talk(SECRET, "a", "b", "c"))
        error = error_of(path, MESSAGES, study(), make_tokenizer(template=template))
        assert reason in str(error)


def test_encoder_gets_text_and_label(
    jsonl: Jsonl, study: MakeStudy, encoder_tokenizer: Tok
) -> None:
    plan = study(name="classify", labels=["a", "b"])
    path = jsonl({"t": "lion cat", "y": "b"}, {"t": "dog", "y": "a"}, {"t": "dog", "y": "c"})
    data = load(path, LABELLED, plan, encoder_tokenizer)
    assert [e.label for e in data.examples] == [1, 0]
    assert data.examples[0].input_ids.tolist() == [1, 3, 4, 2]
    assert (data.examples[0].target_ids == -100).all()
    assert data.rejected == {"unknown label": 1}


def test_public_text_has_no_targets(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, encoder_tokenizer: Tok
) -> None:
    path = jsonl({"p": "lion"})
    columns = Columns(prompt="p")
    file = PublicTable(path=path, columns=columns, licence="CC0")
    patients = study(privacy={"unit": "patient"})
    (example,) = load_dataset(file, patients, tokenizer, labelled=False).examples
    assert tokenizer.decode(example.input_ids) == "lion"
    assert (example.target_ids == -100).all()
    (example,) = load(
        path, columns, study(name="classify"), encoder_tokenizer, labelled=False
    ).examples
    assert (example.input_ids.tolist(), example.label) == ([1, 3, 2], -100)


# ------------------------------------------------------------------------------------------- length


def test_too_long_is_rejected_or_cut_at_the_end(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    fits, long, no_room = (
        {"p": "1234", "c": "abc"},
        {"p": "1234", "c": "abcd"},
        {"p": "x" * 8, "c": "a"},
    )
    path = jsonl(fits, long, fits, no_room)
    data = load(path, PAIR, study(max_length=8), tokenizer)
    assert (len(data.examples), data.rejected) == (2, {"too long": 2})
    data = load(path, PAIR, study(max_length=8, overflow="truncate"), tokenizer)
    assert [targets(tokenizer, e) for e in data.examples] == ["abc<eos>", "abcd", "abc<eos>"]
    assert data.rejected == {"no target within max_length": 1}


@pytest.mark.parametrize("columns", [PAIR, MESSAGES])
def test_a_huge_record_is_not_tokenised(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, monkeypatch: Any, columns: Columns
) -> None:
    huge = "y" * 2_000_000
    path = jsonl({"p": "x", "c": huge} | talk("x", huge))
    seen: list[int] = []
    encode = type(tokenizer).encode

    def spy(self: Any, text: str, **options: Any) -> Any:
        seen.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "encode", spy)
    assert "1 too long" in str(error_of(path, columns, study(max_length=64), tokenizer))
    assert not seen
    example = one(path, columns, study(max_length=64, overflow="truncate"), tokenizer)
    assert len(example.input_ids) == 63
    assert set(targets(tokenizer, example)) == {"y"}
    assert max(seen) < 2 * 40 * 64


def test_ten_thousand_tokens(
    jsonl: Jsonl, study: MakeStudy, make_tokenizer: MakeTok, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl({"p": "x", "c": "ab" * 5000})
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 512
    transformers_logging.enable_propagation()
    try:  # a record's length is private: the library's warning about it must not be written
        example = one(path, PAIR, study(max_length=8192, overflow="truncate"), tokenizer)
    finally:
        transformers_logging.disable_propagation()
    assert len(example.input_ids) == 8191
    assert not caplog.records
    assert "1 too long" in str(error_of(path, PAIR, study(max_length=8192), tokenizer))


def test_a_cut_text_has_no_eos_even_where_it_has_few_tokens(
    jsonl: Jsonl, study: MakeStudy, encoder_tokenizer: Tok
) -> None:
    tok = copy.deepcopy(encoder_tokenizer)
    tok.eos_token = "[SEP]"
    path = jsonl({"p": "lion", "c": "cat" + " " * 2000 + "dog"})
    example = one(path, PAIR, study(max_length=8, overflow="truncate"), tok)
    assert targets(tok, example) == "cat"


def test_a_long_chat_is_tokenised_no_further_than_needed(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, monkeypatch: Any
) -> None:
    calls: list[int] = []
    encode = type(tokenizer).encode

    def spy(self: Any, text: str, **options: Any) -> Any:
        calls.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "encode", spy)
    one(
        jsonl(talk(*["Hi", "Hello"] * 20)),
        MESSAGES,
        study(max_length=64, overflow="truncate"),
        tokenizer,
    )
    assert len(calls) < 12


def test_truncated_chat_and_encoder(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, encoder_tokenizer: Tok
) -> None:
    start = len(tokenizer.encode("<|system|>Be kind.<eos>\n<|user|>\nHi<eos>\n<|assistant|>\n"))
    path = jsonl(talk("Hi", "Hello", "and", "more"))
    plan = study(max_length=start + 3, overflow="truncate")
    assert targets(tokenizer, one(path, MESSAGES, plan, tokenizer)) == "Hel"
    path = jsonl(*[{"t": "lion " * 20, "y": "a"}] * 2)
    plan = study(name="classify", labels=["a"], max_length=8)
    assert "2 too long" in str(error_of(path, LABELLED, plan, encoder_tokenizer))
    plan = study(name="classify", labels=["a"], max_length=8, overflow="truncate")
    data = load(path, LABELLED, plan, encoder_tokenizer)
    assert data.examples[0].input_ids.tolist() == [1, 3, 3, 3, 3, 3, 3, 2]


# -------------------------------------------------------------------------------------------- units


def test_units(jsonl: Jsonl, study: MakeStudy, tokenizer: Tok) -> None:
    columns = Columns(text="t", patient="who")
    path = jsonl(*({"t": f"text {i}", "who": who} for i, who in enumerate("bab")))
    data = load(path, columns, study(privacy={"unit": "patient"}), tokenizer)
    assert (data.n_units, data.by_unit) == (2, [[0, 1], [2]])
    data = load(path, columns, study(), tokenizer)
    assert (data.n_units, data.by_unit) == (3, [[0], [1], [2]])


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


ROWS = st.lists(
    st.tuples(st.sampled_from("abc"), st.text("xyz", min_size=1, max_size=3)), max_size=20
)


@settings(max_examples=60, deadline=None)
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
    after = load(jsonl(*first, *others, *more), WHO, plan, tok, known=memory)
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
    monkeypatch.setattr(tokens, "_kept", lambda record: b"kept" + tokens.content_of(record))
    with pytest.raises(AssertionError):
        test_what_a_patient_keeps_follows_from_that_patients_past_alone(jsonl, study, tokenizer)


def test_a_patient_keeps_what_was_kept(jsonl: Jsonl, study: MakeStudy, tokenizer: Tok) -> None:
    plan = study(privacy=CAP)
    rows = [{"t": f"note {n}", "who": "a"} for n in range(9)]
    two = load(jsonl(*rows[:2], {"t": "x", "who": "b"}), WHO, plan, tokenizer)
    nine = load(
        jsonl(*rows, {"t": "x", "who": "b"}),
        *(WHO, plan, tokenizer),
        known=two.members.__contains__,
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
    withdrawn = load(jsonl(*rows), TEXT, study(), tokenizer, without=lambda unit: next(calls))
    assert withdrawn.n_units == 4  # patients withdraw; a record has no key of a patient


class Fails:
    """A library that one text makes fail."""

    def __init__(self, tokenizer: Tok) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, **options: Any) -> list[int]:
        if SECRET in text:
            raise MemoryError(text)
        return list(self._tokenizer.encode(text, **options))


def test_what_one_record_makes_a_library_do_costs_that_record_alone(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl({"t": "x"}, {"t": SECRET}, {"t": "y"})

    def read(tok: Any, teach: Any = None) -> tuple[int, Any]:
        try:
            data = load(path, TEXT, study(), tok, teach=teach)
        except (MemoryError, Rejected):
            pytest.fail("one record's error is everybody's")
        return len(data.examples), data.rejected

    assert read(Fails(tokenizer)) == (2, {"cannot be read": 1})
    assert "MemoryError" in caplog.text and SECRET not in caplog.text

    def teach(record: Record, example: Example) -> Soft:
        if record.completion == "x":
            raise Rejected("too long")
        return Soft(np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32))

    assert read(tokenizer, teach) == (2, {"too long": 1})


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


# ------------------------------------------------------------------------------------------- errors


def error_of(path: Path, columns: Columns, study: Study, tok: Tok, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        load(path, columns, study, tok, **options)
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown + str(caught.value) + repr(caught.value)
    return caught.value


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
    assert "{text}" in str(error_of(path, PAIR, study(template="no place"), tokenizer))
    mute = make_tokenizer(template=None)
    assert "no chat template" in str(error_of(path, MESSAGES, study(), mute))


def test_nothing_of_the_content_in_a_repr(jsonl: Jsonl, study: MakeStudy, tokenizer: Tok) -> None:
    data = load(jsonl(*[{"p": SECRET, "c": SECRET}] * 2), PAIR, study(), tokenizer)
    shown = repr(data) + repr(data.examples) + str(data.examples[0])
    assert SECRET not in shown and str(data.examples[0].input_ids[0]) + "," not in shown
