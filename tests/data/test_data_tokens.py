"""Targets are exactly the right tokens; a patient's share is capped whatever the order."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
from transformers.utils import logging as transformers_logging

from fedtune.core.config import Columns, PublicTable
from fedtune.core.data import chat
from fedtune.core.data.dataset import Example
from fedtune.core.data.load import load_dataset
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
    load,
    one,
    talk,
    targets,
)


def whole(tok: Tok, example: Example) -> str:
    return tok.decode([*example.input_ids, example.target_ids[-1]])


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


def test_too_long_is_rejected_or_the_prompt_loses_its_start(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    fits, long, no_room = (
        {"p": "1234", "c": "abc"},
        {"p": "1234", "c": "abcd"},
        {"p": "x" * 8, "c": "abcdefgh"},
    )
    path = jsonl(fits, long, fits, no_room)
    data = load(path, PAIR, study(max_length=8), tokenizer)
    assert (len(data.examples), data.rejected) == (2, {"too long": 2})
    data = load(path, PAIR, study(max_length=8, overflow="truncate"), tokenizer)
    assert [whole(tokenizer, e) for e in data.examples] == [
        "1234abc<eos>",
        "234abcd<eos>",
        "1234abc<eos>",
    ]
    assert [e.cut for e in data.examples] == [False, True, False] and data.n_cut == 1
    assert data.rejected == {"answer too long": 1}
    assert data.counts.failed == (("data.jsonl", 4, "answer too long"),)


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
    plan = study(max_length=64, overflow="truncate")
    assert "1 answer too long" in str(error_of(path, columns, plan, tokenizer))
    example = one(jsonl({"p": huge, "c": "x"} | talk(huge, "x")), columns, plan, tokenizer)
    assert len(example.input_ids) == 63 and example.cut
    assert targets(tokenizer, example) == "x<eos>" and "yyyyyyyy" in whole(tokenizer, example)
    assert "yyyyyyyy" in whole(tokenizer, one(jsonl({"t": huge}), TEXT, plan, tokenizer))
    assert max(seen) < 2 * 40 * 64


def test_ten_thousand_tokens(
    jsonl: Jsonl, study: MakeStudy, make_tokenizer: MakeTok, caplog: pytest.LogCaptureFixture
) -> None:
    path = jsonl({"t": "xab" * 5000})
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 512
    transformers_logging.enable_propagation()
    try:  # a record's length is private: the library's warning about it must not be written
        example = one(path, TEXT, study(max_length=8192, overflow="truncate"), tokenizer)
    finally:
        transformers_logging.disable_propagation()
    assert len(example.input_ids) == 8191
    assert not caplog.records
    assert "1 too long" in str(error_of(path, TEXT, study(max_length=8192), tokenizer))


def test_a_cut_text_has_no_eos_even_where_it_has_few_tokens(
    jsonl: Jsonl, study: MakeStudy, encoder_tokenizer: Tok
) -> None:
    tok = copy.deepcopy(encoder_tokenizer)
    tok.eos_token = "[SEP]"
    path = jsonl({"t": "lion cat" + " " * 2000 + "dog"})
    example = one(path, TEXT, study(max_length=8, overflow="truncate"), tok)
    assert targets(tok, example) == "cat" and example.cut


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


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_every_answer_of_a_chat_of_many_messages_is_found(
    jsonl: Jsonl, study: MakeStudy, make_tokenizer: MakeTok, system: str | None
) -> None:
    said = [f"{role}{n}" for n in range(50) for role in ("question", "answer")]
    template = str(make_tokenizer().chat_template).replace("|>\n'", "|>'")
    for prefix_space in (False, True):
        tok = make_tokenizer(prefix_space=prefix_space, template=template)
        body = talk(*said, system=system)
        example = one(jsonl(body), MESSAGES, study(max_length=8192), tok)
        assert targets(tok, example) == "".join(text + "<eos>" for text in said[1::2])
        kept = [*example.input_ids, example.target_ids[-1]]
        assert kept == tok.apply_chat_template(body["m"])["input_ids"][: len(kept)]
        assert not example.cut


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many messages are rendered, and how many characters are tokenised."""
    done, render, encode = Counter[str](), chat.render, Tok.encode

    def rendering(tokenizer: Tok, turns: list[dict[str, str]], **options: Any) -> Any:
        done["messages"] += len(turns)
        return render(tokenizer, turns, **options)

    def encoding(self: Tok, text: str, **options: Any) -> Any:
        done["characters"] += len(text)
        return encode(self, text, **options)

    monkeypatch.setattr(chat, "render", rendering)
    monkeypatch.setattr(Tok, "encode", encoding)
    return done


def test_the_work_for_a_chat_grows_with_its_messages_and_not_with_their_square(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, work: Counter[str]
) -> None:
    """A coordinator waits while a site reads its records, before anything is charged."""
    costs = []
    for exchanges in (50, 200):
        work.clear()
        path = jsonl(talk(*["Hi", "Hello"] * exchanges))
        one(path, MESSAGES, study(max_length=8192), tokenizer)
        costs.append(dict(work))
    assert costs[1]["messages"] < 5 * costs[0]["messages"]
    assert costs[1]["characters"] < 5 * costs[0]["characters"]


@pytest.mark.parametrize("overflow", ["reject", "truncate", "truncate_answer"])
def test_of_a_chat_no_more_messages_are_rendered_than_max_length_has_tokens(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, work: Counter[str], overflow: str
) -> None:
    said = ["a", "b"] * 1500
    plan = study(max_length=64, overflow=overflow)
    if overflow == "reject":
        path = jsonl(talk(*said), talk(*said))
        assert "2 too long" in str(error_of(path, MESSAGES, plan, tokenizer)) and not work
        return
    example = one(jsonl(talk(*said)), MESSAGES, plan, tokenizer)
    assert targets(tokenizer, example).startswith("b<eos>b<eos>") and example.cut
    assert len(example.input_ids) <= 63 and work["messages"] < 1000
    users = [{"role": "user", "content": "a"}] * 3000
    path = jsonl(*[{"m": [*users, {"role": "assistant", "content": "b"}]}] * 2)
    work.clear()
    reason = "2 no target within max_length"
    if overflow == "truncate":
        reason = "2 answer too long"
    assert reason in str(error_of(path, MESSAGES, plan, tokenizer)) and work["messages"] < 1000


def test_a_chat_template_that_counts_messages_writes_a_long_chat_otherwise(
    jsonl: Jsonl, study: MakeStudy, make_tokenizer: MakeTok
) -> None:
    counting = "{% for m in messages %}{{ loop.index ~ m['role'] ~ m['content'] }}{% endfor %}"
    tok, plan = make_tokenizer(template=counting), study(max_length=8192)
    assert one(jsonl(talk(*["a", "b"] * 8)), MESSAGES, plan, tok)
    path = jsonl(*[talk(*[SECRET, "b"] * 9)] * 2)
    assert "2 turns altered by the chat template" in str(error_of(path, MESSAGES, plan, tok))


def test_a_text_to_classify_loses_its_end(
    jsonl: Jsonl, study: MakeStudy, encoder_tokenizer: Tok
) -> None:
    path = jsonl(*[{"t": "lion " * 20, "y": "a"}] * 2)
    plan = study(name="classify", labels=["a"], max_length=8)
    assert "2 too long" in str(error_of(path, LABELLED, plan, encoder_tokenizer))
    plan = study(name="classify", labels=["a"], max_length=8, overflow="truncate")
    data = load(path, LABELLED, plan, encoder_tokenizer)
    assert data.examples[0].input_ids.tolist() == [1, 3, 3, 3, 3, 3, 3, 2] and data.n_cut == 2
