"""Turn a record's text into token ids, and say which of them are to be predicted (the targets)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from fedtune.core.config import ObjectiveTable
from fedtune.core.data import chat
from fedtune.core.data.dataset import NO_TARGET, Passage
from fedtune.core.data.files import Rejected
from fedtune.core.data.records import Messages, Record
from fedtune.core.objectives._interface import RecordFormat

Segment = tuple[str, bool]  # text, whether its tokens are targets
Tokens = tuple[list[int], list[bool]]  # token ids, whether each is a target
USUAL = 4  # characters that count as one token in text that is not tokenised
CHARS = 40  # most characters of a text that are tokenised, for each token of max_length
BLOCK = 16  # messages that are rendered together again and again, to find where each answer lies
ALTERED = "turns altered by the chat template"  # why such a conversation is rejected
BEFORE = 256  # how many characters before a segment of a conversation are tokenised with it


class Tokenised(NamedTuple):
    """A tokenised record.

    - passages: the record's token sequences: one, or two for a preference pair (the prompt with the
      better answer, then the same prompt with the worse answer). Each sequence is two lists: the
      token ids, and whether each token is a target
    - label: the label's index in objective.labels; for a single answer that was judged, 1 if it is
      desirable, else 0; NO_TARGET if the record has neither a label nor a judgement
    - cut: how many tokens were left out; for a preference pair, of the passage that lost most. The
      number is an estimate if the record is plain text or a conversation, or if its text was too
      long to be tokenised as a whole"""

    passages: list[Tokens]
    label: int
    cut: int


def prompt_ids(
    prompt: str, objective: ObjectiveTable, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the token ids of a prompt as they stand before its completion in training. They may be
    more than objective.max_length. Of the prompt in its template only the first
    CHARS · max_length characters are read."""
    text = _in_template(prompt, objective)[: CHARS * objective.max_length]
    return [*_start(tokenizer), *_encode(text, tokenizer)]


def passage_of(
    prompt: str, completion: str, objective: ObjectiveTable, tokenizer: PreTrainedTokenizerBase
) -> Passage:
    """Tokenise a prompt and its completion as in training. For a text to classify, tokenise the
    prompt alone. If a head is trained, every token is an input and none is a target.

    - prompt: the text before the completion, without the template; for an objective that reads
      labels, the text to classify; "" if the completion is plain text
    - completion: the text whose tokens are targets; an objective that reads labels does not use it
    - objective: the plan's objective: template, max_length, overflow and append_eos
    - tokenizer: the tokenizer of the base that reads the passage

    Errors: Rejected, for instance if the text is too long."""
    kind = objective.resolved
    if kind.record_format == "label":
        record, labelled = Record("", prompt), False
    else:
        record, labelled = Record("", prompt, completion), True
    form: RecordFormat = "label" if kind.record_format == "label" else "text"
    (tokens,) = _tokenise(record, objective, tokenizer, form, labelled).passages
    return _passage(*tokens, kind.outputs > 0)


def _passage(tokens: list[int], targets: list[bool], scored: bool) -> Passage:
    """Make a Passage of a token sequence.

    - tokens: its token ids
    - targets: for each of them, whether it is to be predicted
    - scored: whether a head reads the whole text at its last token, so that no token is predicted
    """
    ids, hits = np.array(tokens, np.int32), np.array(targets, bool)
    if scored or not hits.any():
        return Passage(ids, np.full_like(ids, NO_TARGET))
    return Passage(ids[:-1], np.where(hits[1:], ids[1:], NO_TARGET).astype(np.int32))


def _tokenise(
    record: Record,
    objective: ObjectiveTable,
    tokenizer: PreTrainedTokenizerBase,
    record_format: RecordFormat,
    labelled: bool,
    starts: bool = False,
    lead: str = "",
    choices: Sequence[str] = (),
) -> Tokenised:
    """Tokenise a record to at most max_length token ids, each a target or not.

    - record: its texts, messages and label are used; its patient, place and file are not
    - objective: the plan's objective: max_length, overflow, template, append_eos and labels
    - tokenizer: the base's tokenizer
    - record_format: "label": a text to classify; "preference": an answer and a worse one;
      "unpaired_preference": an answer whose label is its judgement; else "text"
    - labelled: whether to reject a record that has nothing to predict, and a text to classify whose
      label is not in objective.labels
    - starts: whether a text to classify begins with the base's start tokens already
    - lead: text that the base puts in front of the record's own text; it is never cut
    - choices: further answers to the same prompt; if the prompt is cut, it must leave room for each

    Guarantee: the result depends on this record and on public values alone.
    | a record that is too long       | what overflow = "truncate" does                         |
    |---------------------------------|---------------------------------------------------------|
    | a prompt and its answer         | the start of the record's own prompt is left out        |
    | a conversation                  | as many exchanges stay as fit; if the first does not,   |
    |                                 | the start of its user's text is left out                |
    | plain text, a text to classify  | the end is left out                                     |
    | an answer that does not fit     | the record is rejected                                  |
    With overflow = "reject" a record that is too long is rejected, whatever it is; with
    "truncate_answer" its end is left out.
    Errors: Rejected."""
    if record_format == "label":
        return _classify(record, objective, tokenizer, labelled, starts)
    huge = sum(map(len, _texts(record))) > CHARS * objective.max_length
    if huge and objective.overflow == "reject":
        raise Rejected("too long")
    if record.messages:
        tokens, cut = _chat(record.messages, objective, tokenizer, lead)
        passages = [tokens]
    elif record.prompt == lead and not record.label:
        tokens, cut = _plain(record, objective, tokenizer, huge)
        passages = [tokens]
    else:
        passages, cut = _tokenize_answers(
            record, objective, tokenizer, record_format == "preference", lead, choices
        )
    for ids, hits in passages:
        if not ids:
            raise Rejected("empty text")
        hits[0] = False  # nothing precedes the first token, so nothing predicts it
        if labelled and not any(hits):
            raise Rejected("no target within max_length")
    label = int(record.label) if record_format == "unpaired_preference" else NO_TARGET
    return Tokenised(passages, label, cut)


def _tokenize_answers(
    record: Record,
    objective: ObjectiveTable,
    tokenizer: PreTrainedTokenizerBase,
    paired: bool,
    lead: str,
    choices: Sequence[str],
) -> tuple[list[Tokens], int]:
    """Tokenise a prompt and its answers separately, since the prompt stands alone when a model
    generates. Return one passage for each answer, all with the same prompt, and how many tokens
    were left out. The tokens of an answer and of the eos after it are targets.

    - record: the prompt, with `lead` in front, and the answer: the completion, or the label if
      there is no completion
    - objective: the plan's objective
    - tokenizer: the base's
    - paired: whether record.rejected is a second answer to the prompt
    - lead: text that the base puts in front of the record's own text; it is never cut
    - choices: further answers to the same prompt; if the prompt is cut, it must leave room for each

    Errors: Rejected."""
    most, truncate = objective.max_length, objective.overflow == "truncate"
    texts = [record.completion or record.label, *([record.rejected] if paired else [])]
    if objective.overflow == "truncate_answer":
        prompt = lead + record.prompt[len(lead) :][: CHARS * most]
        return _beginnings(prompt, texts, objective, tokenizer)
    if any(len(text) > CHARS * most for text in texts):
        raise Rejected("answer too long" if truncate else "too long")
    answers = [_answer(text, objective, tokenizer) for text in texts]
    own = record.prompt[len(lead) :]
    shown = own[-CHARS * most :]
    ids = [*_start(tokenizer), *_encode(_in_template(lead + shown, objective), tokenizer)]
    room = [*answers, *(_answer(choice, objective, tokenizer) for choice in choices if truncate)]
    excess = len(ids) + max(map(len, room)) - most
    if excess > 0:
        if not truncate:
            raise Rejected("too long")
        before = (objective.template or "").partition("{text}")[0]
        head = len(_start(tokenizer)) + len(_encode(before + lead, tokenizer))
        ids = _without(ids, head, len(_encode(shown, tokenizer)), excess)
    hits = [False] * len(ids)
    passages = [([*ids, *answer], [*hits, *[True] * len(answer)]) for answer in answers]
    return passages, max(excess, 0) + _estimate(len(own) - len(shown))


def _estimate(characters: int) -> int:
    """Estimate how many tokens a text of `characters` characters would have, for a text that is
    left out before it is tokenised."""
    return -(-characters // USUAL)


def _left_out(texts: Sequence[str], kept: int) -> int:
    """Estimate how many tokens of the texts are left out if `kept` tokens stay. The result is at
    least 1."""
    return max(1, _estimate(sum(map(len, texts))) - kept)


def _beginnings(
    prompt: str, texts: list[str], objective: ObjectiveTable, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Tokens], int]:
    """Tokenise a prompt, and of each answer as much as fits after it, so that a model learns how a
    long answer begins. Return a passage for each answer, and how many tokens were left out of the
    answer that lost most, which is an estimate for a very long answer.

    - prompt: the text that the base puts first, then the record's prompt, without the template
    - texts: the answers to the prompt, two for a preference pair
    - objective: the plan's objective
    - tokenizer: the base's"""
    most, limit = objective.max_length, CHARS * objective.max_length
    ids = [*_start(tokenizer), *_encode(_in_template(prompt, objective), tokenizer)]
    passages, cut = list[Tokens](), 0
    for text in texts:
        huge = len(text) > limit
        answer = _encode(text[:limit], tokenizer) if huge else _answer(text, objective, tokenizer)
        hits = [False] * len(ids) + [True] * len(answer)
        passages.append(([*ids, *answer][:most], hits[:most]))
        cut = max(cut, max(len(hits) - most, 0) + _estimate(max(len(text) - limit, 0)))
    return passages, cut


def _without(ids: list[int], head: int, own: int, excess: int) -> list[int]:
    """Shorten a sequence of token ids by `excess` ids from the beginning of the record's own text,
    and return the ids that stay.

    - ids: the token ids of a prompt, or of a conversation up to its first answer
    - head: the number of ids before the record's own text: start tokens, template and lead
    - own: the number of ids of the record's own text, the only ones that may be left out
    - excess: by how many ids the passage is too long, at least 1

    Errors: Rejected if none of the `own` ids would stay, since an answer to an empty prompt teaches
    nothing."""
    if excess >= own:
        raise Rejected("answer too long")
    return [*ids[:head], *ids[head + excess :]]


def _answer(text: str, objective: ObjectiveTable, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    eos = tokenizer.eos_token_id
    ends = [eos] if text and objective.append_eos and eos is not None else []
    return [*_encode(text, tokenizer), *ends]


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("")[:1] == [bos] else []


def _in_template(prompt: str, objective: ObjectiveTable) -> str:
    if prompt and objective.template is not None:
        return objective.template.replace("{text}", prompt)
    return prompt


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not text:
        return []
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _classify(
    record: Record,
    objective: ObjectiveTable,
    tokenizer: PreTrainedTokenizerBase,
    labelled: bool,
    starts: bool,
) -> Tokenised:
    """Tokenise a text to classify. Unless `starts` is true, the tokenizer adds its special tokens,
    which truncation keeps. White space around a label does not count. No token is a target.

    - record: the text is its prompt, or its completion if it has no prompt
    - objective: the plan's objective: labels, max_length and overflow
    - tokenizer: the base's tokenizer
    - labelled: whether the label must be one of objective.labels; if not, it is not read, and the
      result's label is NO_TARGET
    - starts: whether the text begins with the base's start tokens already

    Errors: Rejected."""
    labels = [label.strip() for label in objective.labels]
    if labelled and record.label.strip() not in labels:
        raise Rejected("unknown label")
    text, most = record.prompt or record.completion, objective.max_length
    truncate = objective.overflow != "reject"
    if len(text) > CHARS * most and not truncate:
        raise Rejected("too long")
    shown = text[: CHARS * most]
    ids: list[int] = list(
        tokenizer(shown, add_special_tokens=not starts, verbose=False)["input_ids"]
    )
    if not ids:
        raise Rejected("empty text")
    cut = max(len(ids) - most, 0) + _estimate(len(text) - len(shown))
    if len(ids) > most:
        if not truncate:
            raise Rejected("too long")
        ids = list(
            tokenizer(
                shown,
                add_special_tokens=not starts,
                truncation=True,
                max_length=most,
                verbose=False,
            )["input_ids"]
        )
    label = labels.index(record.label.strip()) if labelled else NO_TARGET
    return Tokenised([(ids, [False] * len(ids))], label, cut)


def _plain(
    record: Record, objective: ObjectiveTable, tokenizer: PreTrainedTokenizerBase, huge: bool
) -> tuple[Tokens, int]:
    """Tokenise plain text as a completion without a prompt. If it is too long, its beginning is
    kept, without an eos. Return two values: the tokens, and an estimate of how many were left out.

    - record: the text is its completion; its prompt is "", or the base's lead, which is no target
    - objective: the plan's objective
    - tokenizer: the base's
    - huge: whether the text is so long that it is not tokenised to its end

    Errors: Rejected if the text is too long and overflow is "reject"."""
    most = objective.max_length
    prompt = _in_template(record.prompt, objective)
    segments = [(text, hit) for text, hit in ((prompt, False), (record.completion, True)) if text]
    ids, hits, _, whole = _join_segments(
        segments, _start(tokenizer), most, tokenizer, continued=False
    )
    eos = tokenizer.eos_token_id
    if record.completion and not huge and objective.append_eos and eos is not None:
        ids, hits = [*ids, eos], [*hits, True]
    if len(ids) > most and objective.overflow == "reject":
        raise Rejected("too long")
    cut = len(ids) > most or not whole
    return (ids[:most], hits[:most]), _left_out(_texts(record), most) if cut else 0


# ------------------------------------------------------------------------------- conversations


def _chat(
    messages: Messages, objective: ObjectiveTable, tokenizer: PreTrainedTokenizerBase, lead: str
) -> tuple[Tokens, int]:
    """Tokenise a conversation by the base's chat template. Return two values: the tokens, and how
    many were left out. The tokens of the assistant's turns, each up to and with its eos, are
    targets.

    - messages: (role, content) of each message
    - objective: the plan's objective; its template is not used
    - tokenizer: the base's, with the chat template
    - lead: text that the base puts in front of the first user message; it is never cut

    Errors: Rejected."""
    most = objective.max_length
    read, complete = _first_messages(messages, most)
    if not complete and objective.overflow == "reject":
        raise Rejected("too long")
    ids, hits, ends, whole = _conversation(read, most, tokenizer)
    whole = whole and complete
    if any(hits) and whole:
        last = len(hits) - hits[::-1].index(True)
        ids, hits = ids[:last], hits[:last]
    if len(ids) <= most and whole:
        return (ids, hits), 0
    texts = [content for _, content in messages]
    if objective.overflow == "reject":
        raise Rejected("too long")
    if objective.overflow == "truncate_answer":
        return (ids[:most], hits[:most]), _left_out(texts, most)
    fit = max((end for end in ends if end <= most), default=0)
    if not any(role == "assistant" for role, _ in messages):
        fit = most
    if fit:
        return (ids[:fit], hits[:fit]), _left_out(texts, fit)
    exchange = _first_exchange(messages, objective, tokenizer, lead)
    return exchange, _left_out(texts, len(exchange[0]))


def _first_messages(messages: Messages, max_length: int) -> tuple[Messages, bool]:
    """Return two values: the beginning of a conversation, which is long enough for max_length
    tokens, and whether it holds every message up to the last answer uncut (in a conversation
    without an answer: every message).

    The beginning has at most max_length + 1 messages, since each has at least one token. Once it
    has an answer and more than 4 · CHARS · max_length characters, no message follows. Of each
    message at most 4 · CHARS · max_length characters stay."""
    limit = 4 * CHARS * max_length
    answers = [at for at, (role, _) in enumerate(messages, 1) if role == "assistant"]
    first, last = (answers[0], answers[-1]) if answers else (0, len(messages))
    found: list[tuple[str, str]] = []
    characters = 0
    for role, content in messages[: max_length + 1]:
        if characters > limit and len(found) >= first:
            break
        found.append((role, content[:limit]))
        characters += len(content)
    cut = any(len(content) > limit for _, content in messages[:last])
    return tuple(found), len(found) >= last and not cut


def _first_exchange(
    messages: Messages, objective: ObjectiveTable, tokenizer: PreTrainedTokenizerBase, lead: str
) -> Tokens:
    """Tokenise the messages up to and with the assistant's first answer. If they are too long, so
    much of the start of the user's first text is left out that the whole answer fits.

    - messages: (role, content) of each message, one of the assistant's among them
    - objective: the plan's objective
    - tokenizer: the base's, with the chat template
    - lead: text that the base puts in front of the user's first text; it stays

    Errors: Rejected."""
    most, limit = objective.max_length, CHARS * objective.max_length
    roles = [role for role, _ in messages]
    first, user = [*messages[: roles.index("assistant") + 1]], roles.index("user")
    own = first[user][1][len(lead) :].strip()[-limit:]
    first[user] = ("user", lead + own)
    # The system's message may be empty; each other message has a token, and stays.
    if len(first) > most + 1 or any(len(text) > len(lead) + limit for _, text in first):
        raise Rejected("answer too long")
    ids, hits, ends, _ = _conversation(tuple(first), len(first) * (len(lead) + limit), tokenizer)
    last = max(ends, default=0)
    rendered = _render([{"role": role, "content": text} for role, text in first], tokenizer)
    before = rendered[: max(_rfind(rendered, first[-1][1].strip()), 0)]
    at = _rfind(before, own)
    if not last or at < 0:
        raise Rejected("too long")
    head, length = len(_encode(rendered[:at], tokenizer)), len(_encode(own, tokenizer))
    excess = last - most
    kept = _without(list(range(last)), head, length, excess) if excess > 0 else list(range(last))
    return [ids[index] for index in kept], [hits[index] for index in kept]


def _conversation(
    messages: Messages, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> Joined:
    """Tokenise a conversation by the base's chat template, segment by segment, until there are more
    than max_length tokens. If the template itself marks the assistant's turns, it is tokenised as a
    whole, up to 4 · CHARS · max_length tokens. The caller cuts the result.
    Errors: Rejected if the template refuses the messages."""
    messages_ = [{"role": role, "content": content} for role, content in messages]
    try:
        if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
            limit = 4 * CHARS * max_length  # tokens of so many characters at most
            encoded: Any = chat.render(
                tokenizer,
                messages_,
                return_assistant_tokens_mask=True,
                truncation=True,
                max_length=limit + 1,
                tokenizer_kwargs={"verbose": False},
            )
            hits = [bool(hit) for hit in encoded["assistant_masks"]]
            ends = [at for at in range(1, len(hits)) if hits[at - 1] and not hits[at]]
            whole = len(hits) <= limit
            if whole and hits and hits[-1]:
                ends.append(len(hits))
            return Joined(list(encoded["input_ids"]), hits, ends, whole)
    except (TemplateError, ValueError, TypeError):
        raise Rejected("bad message roles") from None
    return _join_segments(_turns(messages_, tokenizer), [], max_length, tokenizer, continued=True)


def _turns(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Segment]:
    """Render messages by the base's chat template, and yield the text in segments, each marked as
    target or not. The assistant's answers, each up to and with its eos, are targets. The template's
    own text (a system prompt, role headers, what follows an eos) and the other messages are not,
    since a model never generates them.

    Where an answer lies is found by rendering the messages up to it. So that the work grows with
    the number of messages and not with its square, this is done in blocks of BLOCK messages. When a
    later block is rendered, one short exchange stands in place of all messages before the block.
    The text of the block must be the same as in the whole conversation.

    Errors: Rejected if the template refuses the messages, if it alters a message when others
    follow, or if it writes a message differently after a longer conversation."""
    full = _render(turns, tokenizer)
    if not any(turn["role"] == "assistant" for turn in turns):
        yield full, False
        return
    system = turns[:1] if turns[0]["role"] == "system" else []
    stand_ins = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    stand_ins = [{**turn, "content": "x"} for turn in system] + stand_ins
    starts = [0, *range(len(system) + BLOCK, len(turns), BLOCK)]
    at = begins = 0  # characters of `full` before the next segment, and before the block
    for start, end in zip(starts, [*starts[1:], len(turns)], strict=True):
        block = _Block(turns[start:end], stand_ins if start else [], tokenizer)
        for index, turn in enumerate(block.turns):
            if turn["role"] != "assistant":
                continue
            through = block.render(index + 1)
            contexts = [
                head
                for head in (block.render(index, True), block.render(index))
                if through.startswith(head)
            ]
            context = begins + len(contexts[0]) if contexts else -1
            if not full.startswith(through, begins) or context < at:
                raise Rejected(ALTERED)
            answer = through[len(contexts[0]) :]
            if eos := tokenizer.eos_token:
                last = answer.rfind(eos)
                answer = answer[: last + len(eos)] if last >= 0 else answer
            yield full[at:context], False
            yield answer, True
            at = context + len(answer)
        begins += len(block.render(len(block.turns)))


class _Block:
    """Messages of a conversation that follow each other, and their text by the base's chat
    template. before: short messages that stand in place of those before the block; [] if there are
    none."""

    def __init__(
        self,
        turns: list[dict[str, str]],
        before: list[dict[str, str]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.turns, self._before, self._tokenizer = turns, before, tokenizer
        self._lead = _render(before, tokenizer) if before else ""

    def render(self, count: int, header: bool = False) -> str:
        """Return the text of the block's first `count` messages. header: whether the header of the
        assistant's next message follows. Errors: Rejected, as for `_turns`."""
        text = _render([*self._before, *self.turns[:count]], self._tokenizer, header)
        if not text.startswith(self._lead):
            raise Rejected(ALTERED)
        return text[len(self._lead) :]


def _rfind(text: str, part: str) -> int:
    """Return what `text.rfind(part)` returns. The time that `rfind` takes may grow with the product
    of both lengths; here it grows with their sum."""
    at = text[::-1].find(part[::-1])
    return -1 if at < 0 else len(text) - at - len(part)


def _render(
    turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, header: bool = False
) -> str:
    try:
        return str(chat.render(tokenizer, turns, tokenize=False, add_generation_prompt=header))
    except (TemplateError, ValueError, TypeError):
        raise Rejected("bad message roles") from None


class Joined(NamedTuple):
    """The tokens of several segments, i.e. texts that are tokenised one after another.

    - ids: the token ids
    - hits: for each token, whether it is a target
    - ends: for each complete target segment, the number of tokens up to its end
    - whole: whether every segment was tokenised to its end"""

    ids: list[int]
    hits: list[bool]
    ends: list[int]
    whole: bool


def _join_segments(
    segments: Iterable[Segment],
    start: list[int],
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    continued: bool,
) -> Joined:
    """Tokenise segments one by one until they exceed max_length tokens. The result may be longer
    than max_length; the caller cuts it.

    - segments: the texts in order, and whether each one's tokens are targets
    - start: token ids that stand before the first segment and are no targets
    - max_length: once there are more tokens than this, no further segment is read. If a segment has
      more than CHARS · max_length characters, only the first CHARS · max_length of them are read,
      and no later segment
    - tokenizer: the base's tokenizer, which adds no special tokens here
    - continued: whether each segment is tokenised as a continuation of the BEFORE characters before
      it, which is needed for tokenizers that put a space in front of a text. If a segment's first
      characters change the tokens before it, this segment and all later ones are tokenised by
      themselves"""
    ids = list(start)
    hits = [False] * len(start)
    before, read = "", 0  # the last characters that were read, and the number of all of them
    ends: list[int] = []
    for text, hit in segments:
        if len(ids) > max_length:
            return Joined(ids, hits, ends, False)
        shown = text[: CHARS * max_length]
        new = list[int]()
        if continued:
            known = ids if read <= BEFORE else _encode(before, tokenizer)
            both = _encode(before + shown, tokenizer)
            continued, new = both[: len(known)] == known, both[len(known) :]
        if not continued:
            new = _encode(shown, tokenizer)
        before, read = (before + shown)[-BEFORE:], read + len(shown)
        ids += new
        hits += [hit] * len(new)
        if len(shown) < len(text):
            return Joined(ids, hits, ends, False)
        ends += [len(ids)] if hit else []
    return Joined(ids, hits, ends, True)


def _texts(record: Record) -> list[str]:
    contents = (content for _, content in record.messages)
    return [record.prompt, record.completion, record.rejected, *contents]
