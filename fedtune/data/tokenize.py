"""Tokenisation: from a record's text to tokens and targets."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from fedtune.config import ObjectiveTable
from fedtune.data.dataset import NO_TARGET, Passage
from fedtune.data.files import Rejected
from fedtune.data.records import (
    Messages,
    Record,
)
from fedtune.objectives import resolve
from fedtune.objectives._interface import RecordFormat

Segment = tuple[str, bool]  # text, whether its tokens are targets
Tokens = tuple[list[int], list[bool]]  # token ids, whether each is a target
CHARS = 40  # characters per token of max_length beyond which a text is not even tokenised


def prompt_ids(
    prompt: str, objective: ObjectiveTable, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Tokenise `prompt` as in training: the tokens before its completion."""
    return _prompted(Record("", prompt), objective, tokenizer, append_eos=False)[0]


def passage_of(
    prompt: str, completion: str, objective: ObjectiveTable, tokenizer: PreTrainedTokenizerBase
) -> Passage:
    """Tokenise a prompt and its completion as in training; where a head is trained, all of it, and
    of a text to classify the prompt alone. Errors: Rejected."""
    kind = resolve(objective)
    if kind.record_format == "label":
        tokens, _ = _classify(
            Record("", prompt), objective, tokenizer, labelled=False, starts=False
        )
    else:
        tokens = _written(Record("", prompt, completion), objective, tokenizer, labelled=True)
    return _passage(*tokens, kind.outputs > 0)


def _passage(tokens: list[int], targets: list[bool], scored: bool) -> Passage:
    """Make a passage. scored: a head reads the whole text with its last token, and predicts no
    token."""
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
    starts: bool,
) -> tuple[list[Tokens], int]:
    """Return at most max_length token ids with their targets, of a pair the worse ones too; and the
    label's index."""
    if record_format == "label":
        tokens, label = _classify(record, objective, tokenizer, labelled, starts)
        return [tokens], label
    tokens = _written(record, objective, tokenizer, labelled)
    if record_format == "unpaired_preference":
        return [tokens], int(record.label)
    if record_format == "text":
        return [tokens], NO_TARGET
    worse = replace(record, completion=record.rejected)
    return [tokens, _written(worse, objective, tokenizer, labelled)], NO_TARGET


def _written(
    record: Record, objective: ObjectiveTable, tokenizer: PreTrainedTokenizerBase, labelled: bool
) -> Tokens:
    """Tokenise a prompt and its completion."""
    huge = sum(map(len, _texts(record))) > CHARS * objective.max_length
    if huge and objective.overflow == "reject":
        raise Rejected("too long")
    if record.messages:
        ids, hits = _chat(record.messages, objective.max_length, tokenizer)
    else:
        ids, hits = _prompted(record, objective, tokenizer, append_eos=not huge)
    if not ids:
        raise Rejected("empty text")
    hits[0] = False  # nothing precedes the first token, so nothing predicts it
    if any(hits):
        last = len(hits) - hits[::-1].index(True)
        ids, hits = ids[:last], hits[:last]
    if len(ids) > objective.max_length:
        if objective.overflow == "reject":
            raise Rejected("too long")
        ids, hits = ids[: objective.max_length], hits[: objective.max_length]
    if labelled and not any(hits):
        raise Rejected("no target within max_length")
    return ids, hits


def _classify(
    record: Record,
    objective: ObjectiveTable,
    tokenizer: PreTrainedTokenizerBase,
    labelled: bool,
    starts: bool,
) -> tuple[Tokens, int]:
    """Tokenise text with the tokenizer's own special tokens, which truncation keeps; without them
    where it `starts` with them already."""
    if labelled and record.label not in objective.labels:
        raise Rejected("unknown label")
    text = record.prompt or record.completion
    if len(text) > CHARS * objective.max_length and objective.overflow == "reject":
        raise Rejected("too long")
    text = text[: CHARS * objective.max_length]
    cut = objective.overflow == "truncate"
    encoded = tokenizer(
        text,
        add_special_tokens=not starts,
        truncation=cut,
        max_length=objective.max_length if cut else None,
        verbose=False,
    )
    ids: list[int] = list(encoded["input_ids"])
    if not ids:
        raise Rejected("empty text")
    if len(ids) > objective.max_length:
        raise Rejected("too long")
    label = objective.labels.index(record.label) if labelled else NO_TARGET
    return (ids, [False] * len(ids)), label


def _prompted(
    record: Record,
    objective: ObjectiveTable,
    tokenizer: PreTrainedTokenizerBase,
    append_eos: bool,
) -> Tokens:
    """Tokenise prompt and completion separately, so that the boundary is as in generation. The
    completion and its eos are targets; plain text is a completion without prompt."""
    prompt, completion = record.prompt, record.completion or record.label
    if prompt and objective.template is not None:
        prompt = objective.template.replace("{text}", prompt)
    bos = tokenizer.bos_token_id
    start = [bos] if bos is not None and tokenizer.encode("")[:1] == [bos] else []
    segments = [(text, hit) for text, hit in ((prompt, False), (completion, True)) if text]
    ids, hits = _joined(segments, start, objective.max_length, tokenizer, continued=False)
    eos = tokenizer.eos_token_id
    if completion and append_eos and objective.append_eos and eos is not None:
        ids, hits = [*ids, eos], [*hits, True]
    return ids, hits


def _chat(messages: Messages, max_length: int, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Apply the model's own template; the assistant turns, up to their eos, are targets."""
    messages_ = [{"role": role, "content": content} for role, content in messages]
    try:
        if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
            encoded: Any = tokenizer.apply_chat_template(
                messages_,
                return_assistant_tokens_mask=True,
                truncation=True,
                max_length=max_length + 1,
                tokenizer_kwargs={"verbose": False},
            )
            return list(encoded["input_ids"]), [bool(hit) for hit in encoded["assistant_masks"]]
        segments = _turns(messages_, tokenizer)
    except (TemplateError, ValueError, TypeError):
        raise Rejected("bad message roles") from None
    return _joined(segments, [], max_length, tokenizer, continued=True)


def _turns(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Split the rendered chat at the ends of the assistant turns. What the template puts in front
    (a system prompt, role headers) and after an answer's eos, which is never generated, is context.
    """

    def render(count: int, header: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                turns[:count], tokenize=False, add_generation_prompt=header
            )
        )

    full, eos, at = render(len(turns)), tokenizer.eos_token, 0
    segments: list[Segment] = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        through = render(index + 1)
        contexts = [
            head for head in (render(index, True), render(index)) if through.startswith(head)
        ]
        if not contexts or not full.startswith(through) or len(contexts[0]) < at:
            raise Rejected("turns altered by the chat template")
        answer = through[len(contexts[0]) :]
        if eos and eos in answer:
            answer = answer[: answer.rindex(eos) + len(eos)]
        segments += [(full[at : len(contexts[0])], False), (answer, True)]
        at = len(contexts[0]) + len(answer)
    return segments or [(full, False)]


def _joined(
    segments: list[Segment],
    start: list[int],
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    continued: bool,
) -> Tokens:
    """Tokenise segments one by one, until there are more than max_length tokens. continued: as if
    after other text, for tokenizers that put a space in front of a text."""
    ids, hits, prefix = list(start), [False] * len(start), ""
    for text, hit in segments:
        if len(ids) > max_length:
            break
        text = text[: CHARS * max_length]
        new: list[int] = tokenizer.encode(prefix + text, add_special_tokens=False, verbose=False)
        if continued:
            length = len(ids)
            if new[:length] == ids:
                new = new[length:]
            else:
                new = tokenizer.encode(text, add_special_tokens=False, verbose=False)
            prefix += text
        ids += new
        hits += [hit] * len(new)
    return ids, hits


def _texts(record: Record) -> list[str]:
    contents = (content for _, content in record.messages)
    return [record.prompt, record.completion, record.rejected, *contents]
