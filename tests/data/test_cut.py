"""A record that is too long loses the start of its prompt, never its answer, and it is counted."""

from __future__ import annotations

import pytest

from fedtune.core.config import Columns, EvaluationTable
from fedtune.core.data import tokenize
from fedtune.core.data.dataset import Example
from fedtune.core.data.load import load_dataset
from fedtune.core.data.tokenize import passage_of
from tests.data.data_tokens_kit import (
    LABELLED,
    MESSAGES,
    PAIR,
    TEXT,
    Jsonl,
    MakeStudy,
    MakeTok,
    Tok,
    load,
    one,
    talk,
    targets,
)

WORDS = "".join(f"w{n} " for n in range(60))
CHOSEN = Columns(prompt="p", chosen="c", rejected="r")
LENGTH = 40


def whole(tok: Tok, example: Example) -> str:
    return tok.decode([*example.input_ids, example.target_ids[-1]])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [None, "Note: {text}\nDesk:"])
def test_the_answer_and_the_template_stay_and_the_end_of_the_text(
    jsonl: Jsonl, study: MakeStudy, make_tokenizer: MakeTok, bos: bool, template: str | None
) -> None:
    tok = make_tokenizer(bos=bos)
    plan = study(max_length=LENGTH, overflow="truncate", template=template)
    example = one(jsonl({"p": WORDS, "c": " heart"}), PAIR, plan, tok)
    text = whole(tok, example)
    assert targets(tok, example) == " heart<eos>" and example.cut
    assert len(example.input_ids) == LENGTH - 1  # of the last target nothing is predicted
    head, tail = ("<bos>" * bos + "Note: ", "w59 \nDesk:") if template else ("<bos>" * bos, "w59 ")
    assert text.startswith(head) and text.endswith(f"{tail} heart<eos>")
    own = text.removeprefix(head).removesuffix(f"{tail} heart<eos>")
    assert (own + "w59 ") in WORDS and WORDS.endswith(own + "w59 ")


def test_what_was_left_out_is_counted(jsonl: Jsonl, study: MakeStudy, tokenizer: Tok) -> None:
    """In tokens; of a text too long to be tokenised, about."""
    rows = [{"p": "why? ", "c": "w0 "}, {"p": WORDS, "c": "w0 "}, {"p": WORDS * 99, "c": "w0 "}]
    plan = study(max_length=LENGTH, overflow="truncate")
    data = load(jsonl(*rows), PAIR, plan, tokenizer)
    short, long, huge = data.examples
    exact = len(tokenizer.encode(WORDS + "w0 ", add_special_tokens=False)) + 2
    assert short.cut == 0 and 0 <= exact - (LENGTH + long.cut) <= 3
    assert 10 * long.cut < huge.cut < len(WORDS) * 99
    assert data.n_cut == 2 and data.share_read == pytest.approx(39 / (39 + long.cut))


@pytest.mark.parametrize("length", [12, 40])
def test_truncate_answer_keeps_the_prompt_and_the_beginning_of_each_answer(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, length: int
) -> None:
    plan = study(max_length=length, overflow="truncate_answer")
    example = one(jsonl({"p": "why? ", "c": WORDS}), PAIR, plan, tokenizer)
    text = whole(tokenizer, example)
    assert example.cut and len(example.input_ids) == length - 1
    assert text.removeprefix("<bos>").startswith("why? w0 ") and not text.endswith("<eos>")
    short = one(jsonl({"p": "why? ", "c": "w0 "}), PAIR, plan, tokenizer)
    assert not short.cut and targets(tokenizer, short) == "w0 <eos>"


def test_an_answer_too_long_to_be_tokenised_is_cut_and_has_no_end(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tokenizer with tokens of fifty characters."""
    encode = tokenize._encode
    monkeypatch.setattr(tokenize, "_encode", lambda text, tok: encode(text[::50], tok))
    plan = study(max_length=LENGTH, overflow="truncate_answer")
    example = one(
        jsonl({"p": "a", "c": "w" * (tokenize.CHARS * LENGTH + 1)}), PAIR, plan, tokenizer
    )
    assert example.cut and "<eos>" not in whole(tokenizer, example)


def test_twin_a_cut_at_the_end_loses_the_answer(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_the_end(ids: list[int], head: int, own: int, excess: int) -> list[int]:
        return [*ids[: head + own - excess], *ids[head + own :]]

    monkeypatch.setattr(tokenize, "_without", at_the_end)
    plan = study(max_length=LENGTH, overflow="truncate")
    assert "w59" not in whole(tokenizer, one(jsonl({"p": WORDS, "c": "a"}), PAIR, plan, tokenizer))


def test_both_answers_of_a_pair_follow_the_same_prompt(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    plan = study(name="dpo", max_length=LENGTH, overflow="truncate")
    rows = [{"p": WORDS, "c": "short", "r": "quite a long answer"}]
    rows += [{"p": WORDS, "c": "quite a long answer", "r": "short"}]
    for example in load(jsonl(*rows), CHOSEN, plan, tokenizer).examples:
        better, worse = example.passages
        prompts = []
        for passage in (better, worse):
            first = int((passage.target_ids != -100).argmax()) + 1
            prompts.append(passage.input_ids[:first].tolist())
            shown = [t for t in passage.target_ids if t != -100]
            assert tokenizer.decode(shown) in ("short<eos>", "quite a long answer<eos>")
        assert prompts[0] == prompts[1] and tokenizer.decode(prompts[0]).endswith("w59 ")
        assert max(len(better.input_ids), len(worse.input_ids)) == LENGTH - 1 and example.cut


def test_a_prompt_leaves_room_for_the_longest_choice(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    path = jsonl({"p": WORDS, "c": "a"}, {"p": WORDS, "c": "the longest one"})
    table = EvaluationTable(
        path=path, columns=PAIR, metric="accuracy", choices=("a", "the longest one")
    )
    plan = study(max_length=LENGTH, overflow="truncate")
    data = load_dataset(table, plan, tokenizer)
    prompts = {
        tuple(e.input_ids[: int((e.target_ids != -100).argmax()) + 1]) for e in data.examples
    }
    assert len(prompts) == 1 and data.n_cut == 2


def test_a_label_of_a_causal_model_is_an_answer(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    plan = study(max_length=LENGTH, overflow="truncate")
    example = one(jsonl({"t": WORDS, "y": "heart"}), LABELLED, plan, tokenizer)
    assert targets(tokenizer, example) == "heart<eos>" and example.cut


def test_plain_text_loses_its_end(jsonl: Jsonl, study: MakeStudy, tokenizer: Tok) -> None:
    plan = study(max_length=LENGTH, overflow="truncate")
    example = one(jsonl({"t": WORDS}), TEXT, plan, tokenizer)
    assert WORDS.startswith(whole(tokenizer, example)) and example.cut
    assert not one(jsonl({"t": "w1"}), TEXT, plan, tokenizer).cut


def test_a_prompt_and_its_completion_given_one_by_one_are_cut_alike(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok
) -> None:
    plan = study(max_length=LENGTH, overflow="truncate")
    example = one(jsonl({"p": WORDS, "c": "a"}), PAIR, plan, tokenizer)
    passage = passage_of(WORDS, "a", plan.objective, tokenizer)
    assert passage.input_ids.tolist() == example.input_ids.tolist()


# ------------------------------------------------------------------------------- conversations

MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<eos>' }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("marked", [False, True])
def test_a_conversation_keeps_whole_exchanges(
    jsonl: Jsonl, study: MakeStudy, make_tokenizer: MakeTok, marked: bool
) -> None:
    tok = make_tokenizer(template=MARKED) if marked else make_tokenizer()
    path = jsonl(talk("Hi", "Hello", "and", "more", "and then", "no more"))
    full = one(path, MESSAGES, study(), tok)
    lengths = []
    for length in range(8, len(full.input_ids) + 3):
        plan = study(max_length=length, overflow="truncate")
        table = EvaluationTable(path=path, columns=MESSAGES)
        data = load_dataset(table, plan, tok, strict=False)
        said = [targets(tok, e) for e in data.examples]
        assert all(len(e.input_ids) < length for e in data.examples)
        lengths.append((said[0].replace("<eos>", ".") if said else "", data.n_cut))
    stops = "" if marked else "."
    expected = ["Hello" + stops, "Hello" + stops + "more" + stops]
    expected += [expected[-1] + "no more" + stops]
    found = list(dict.fromkeys(said for said, _ in lengths if said))
    assert found == expected
    assert {cut for said, cut in lengths if said and said != expected[-1]} == {1}
    assert lengths[-1] == (expected[-1], 0)
    assert lengths[0] == (("Hello", 1) if marked else ("", 0))


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_first_message_of_a_long_exchange_loses_its_start(
    jsonl: Jsonl, study: MakeStudy, make_tokenizer: MakeTok, marked: bool, system: str | None
) -> None:
    tok = make_tokenizer(template=MARKED) if marked else make_tokenizer()
    plan = study(max_length=96, overflow="truncate")
    path = jsonl(talk(WORDS, "Hello", "and", "more", system=system))
    example = one(path, MESSAGES, plan, tok)
    text = whole(tok, example)
    assert targets(tok, example).startswith("Hello") and example.cut
    assert "w59" in text and "w0 " not in text and "and" not in text
    assert len(example.input_ids) == 95
    if system:
        assert text.startswith(f"<|system|>{'' if marked else chr(10)}Be brief.")
    assert "<|user|>" in text and "<|assistant|>" in text


@pytest.mark.parametrize("name", ["causal_lm", "dpo"])
def test_an_answer_that_fits_nowhere_is_rejected(
    jsonl: Jsonl, study: MakeStudy, tokenizer: Tok, name: str
) -> None:
    plan = study(name=name, max_length=LENGTH, overflow="truncate")
    rows = [{"p": "x", "c": "a", "r": "b"} for _ in range(2)]
    rows[0]["c" if name == "causal_lm" else "r"] = WORDS
    columns = PAIR if name == "causal_lm" else CHOSEN
    data = load(jsonl(*rows), columns, plan, tokenizer, strict=False)
    assert len(data.examples) == 1 and data.rejected == {"answer too long": 1}
    assert data.counts.failed == (("data.jsonl", 1, "answer too long"),)
