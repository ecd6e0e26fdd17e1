"""Records to tokens and targets, the contribution of each unit capped."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from fedtune.config import DataFile, ObjectiveTable, PrivacyTable, Study
from fedtune.data.files import Rejected
from fedtune.data.media import Media
from fedtune.data.records import Messages, Record, no_patients, read_records, table_of, unit_member
from fedtune.errors import DataError
from fedtune.modalities import Reader
from fedtune.objectives import Shape, find

Ids = npt.NDArray[np.int32]
Segment = tuple[str, bool]  # text, whether its tokens are targets
Tokens = tuple[list[int], list[bool]]  # token ids, whether each is a target

NO_TARGET = -100
LONG = 40  # characters from which a text is taken to be its record's own
_PAIR = ("chosen", "rejected")
CHARS = 40  # characters per token of max_length beyond which a text is not even tokenised


class Passage(NamedTuple):
    """input_ids (L,) int32; target_ids (L,) int32: the token that position t must predict, or -100
    where there is no loss."""

    input_ids: Ids
    target_ids: Ids


class Soft(NamedTuple):
    """What a teacher expects: outcomes (P, k) int32 (tokens, or labels) and their log-probabilities
    (P, k) fp32, at each of a record's P targets in turn; of a label, P = 1."""

    tokens: Ids
    logp: npt.NDArray[np.float32]


@dataclass(frozen=True, repr=False, eq=False)
class Example:
    """input_ids, target_ids: as in Passage; label: index in objective.labels, 1 or 0 of what is
    desirable or not, or -100; unit in 0..n_units-1; rejected: of a pair, the same prompt with the
    worse completion; media: the record's image or recording, of so many tiles; soft: what a teacher
    expects of it.

    The last target is not an input: nothing is computed that no loss reads."""

    input_ids: Ids
    target_ids: Ids
    label: int
    unit: int
    rejected: Passage | None = None
    media: Media | None = None
    tiles: int = 1
    soft: Soft | None = None

    @property
    def passages(self) -> tuple[Passage, ...]:
        """What the network reads of this record: one passage, or of a pair two."""
        own = Passage(self.input_ids, self.target_ids)
        return (own,) if self.rejected is None else (own, self.rejected)


@dataclass(frozen=True, repr=False, eq=False)
class Dataset:
    """Examples in file order, and the rejected records counted by reason.

    members: what tells the units and records apart from another dataset's (keys, contents), for the
    site's ledger, which keeps them hashed; content_hash: of all records, in no order; units: of
    each unit its key and its records, as in members."""

    examples: list[Example]
    n_units: int
    rejected: Counter[str]
    members: frozenset[bytes] = frozenset()
    units: tuple[tuple[bytes, ...], ...] = ()

    def without(self, out: Callable[[bytes], bool]) -> Dataset:
        """The same less the units whose key `out` is true of. Members stay: they were there."""
        kept = [number for number, unit in enumerate(self.units) if not out(unit[0])]
        new = {number: index for index, number in enumerate(kept)}
        examples = [replace(e, unit=new[e.unit]) for e in self.examples if e.unit in new]
        units = tuple(self.units[number] for number in kept)
        return replace(self, examples=examples, n_units=len(kept), units=units)

    @cached_property
    def content_hash(self) -> str:
        total = hashlib.sha256()
        for member in sorted(self.members):
            total.update(hashlib.sha256(member).digest())
        return "sha256:" + total.hexdigest()

    @cached_property
    def by_unit(self) -> list[list[int]]:
        """The indices of each unit's examples."""
        groups: list[list[int]] = [[] for _ in range(self.n_units)]
        for index, example in enumerate(self.examples):
            groups[example.unit].append(index)
        return groups


def load_dataset(
    file: DataFile,
    study: Study,
    tokenizer: PreTrainedTokenizerBase,
    *,
    labelled: bool = True,
    without: Callable[[str], bool] = lambda unit: False,
    known: Callable[[bytes], bool] = lambda member: False,
    few: bool = False,
    teach: Callable[[Record, Example], Soft] | None = None,
    reader: Reader | None = None,
) -> Dataset:
    """Read, tokenise and cap. reader: how the base reads records, where it reads more than text
    (modalities). labelled=False admits records that have nothing to predict.

    without: units to leave out (withdrawn consent); known: members of earlier loads of the same
    dataset, which the cap keeps before others; few: a dataset without two units is returned as it
    is, since on the wire nobody may tell; teach: what a teacher says of one record. [public] and
    [evaluation] files hold nobody's private records: their unit is the record.
    Errors: DataError for a file, a shape or (unless few) a set of records that cannot be used.
    Guarantee: an example depends on its own record alone; which of a patient's records are kept
    depends on that patient's records alone, not on their order, and stays as it was."""
    table = table_of(file)
    shape = check_shape(file, study, tokenizer, labelled, reader)
    unit = study.unit if table == "data" else "record"
    records, rejected = read_records(file, unit=unit, labelled=labelled, few=few)
    rejected = rejected.copy()
    found: list[tuple[Record, list[Tokens], int, int]] = []
    for record in records:
        if without(record.unit):
            continue
        try:
            placed, tiles = reader.place(record, study.objective) if reader else (record, 1)
            starts = reader is not None and reader.starts
            made = _tokenise(placed, study.objective, tokenizer, shape, labelled, starts)
            if reader:
                for ids, _ in made[0]:
                    reader.check(ids, tiles)
            found.append((record, *made, tiles))
        except Rejected as error:
            rejected[error.reason] += 1
    if not found and not few:
        raise _nothing_left(file.path, rejected, study.objective)
    if isinstance(study.privacy, PrivacyTable) and unit == "patient":
        most = study.privacy.max_records_per_unit
        kept = _capped([record for record, *_ in found], most, known)
        found = [found[index] for index in kept]
    numbers: dict[str, int] = {}
    scored = find(study.objective).outputs > 0
    examples = [
        _example(
            tokens,
            label,
            numbers.setdefault(record.unit, len(numbers)),
            scored,
            record.media,
            tiles,
        )
        for record, tokens, label, tiles in found
    ]
    if teach is not None:
        marks = [teach(record, e) for (record, *_), e in zip(found, examples, strict=True)]
        examples = [replace(e, soft=soft) for e, soft in zip(examples, marks, strict=True)]
    if labelled and table == "data" and len(numbers) < 2 and not few:
        raise DataError(
            f"{file.path}: all usable records are one {unit}'s, which can be neither protected "
            "nor trained on",
            f"at least 2 {unit}s",
            f"add records, or check {table}.columns.patient",
        )
    if table != "data":
        return Dataset(examples, len(numbers), rejected)
    kept_records = [record for record, *_ in found]
    members, units = _members(kept_records, unit), _units(kept_records, numbers)
    return Dataset(examples, len(numbers), rejected, members, units)


def dataset_of(
    records: list[Record],
    study: Study,
    tokenizer: PreTrainedTokenizerBase,
    teach: Callable[[Record, Example], Soft] | None = None,
) -> Dataset:
    """Public records, each a unit; of one to classify no label is asked. Errors: DataError."""
    shape = find(study.objective).shape
    rejected: Counter[str] = Counter()
    examples: list[Example] = []
    for record in records:
        try:
            found = _tokenise(record, study.objective, tokenizer, shape, shape != "label", False)
        except Rejected as error:
            rejected[error.reason] += 1
            continue
        example = _example(*found, len(examples), find(study.objective).outputs > 0, None, 1)
        soft = teach(record, example) if teach else None
        examples.append(replace(example, soft=soft))
    if not examples:
        raise DataError(f"none of {len(records)} public records can be used ({dict(rejected)})")
    return Dataset(examples, len(examples), rejected)


def check_shape(
    file: DataFile,
    study: Study,
    tokenizer: PreTrainedTokenizerBase,
    labelled: bool = True,
    reader: Reader | None = None,
) -> Shape:
    """Whether the file's columns suit the study, and what they hold; nothing is read.

    Evaluation records of a study on pairs or judgements are pairs. Errors: DataError."""
    table = table_of(file)
    columns, objective, at = file.columns, study.objective, f"{table}.columns"
    shape = find(objective).shape
    if table == "data" and study.unit == "patient" and not columns.patient:
        raise no_patients(table)
    _check_media(file, objective, reader)
    if shape == "label":
        if columns.messages or (labelled and not columns.label):
            raise DataError(
                "objective classify cannot use these columns", f"{at}.text and {at}.label"
            )
        if labelled and not objective.labels:
            raise DataError("objective.labels is empty", "the public list of classes")
        return shape
    if objective.template is not None and "{text}" not in objective.template:
        raise DataError("objective.template has no place for the prompt", "{text} in it")
    if columns.messages and not tokenizer.chat_template:
        raise DataError(
            f"the base has no chat template and {at}.messages is given",
            f"{at}.prompt and {at}.completion, or a chat base",
        )
    if labelled and shape != "text":
        needed = ("completion", "label") if shape == "judged" and table == "data" else _PAIR
        if not all(getattr(columns, name) for name in needed):
            expected = ", ".join(f"{at}.{name}" for name in ("prompt", *needed))
            raise DataError(f"objective {objective.name} cannot use these columns", expected)
        return "judged" if needed != _PAIR else "pair"
    if labelled and columns.prompt and not columns.completion:
        raise DataError(f"{at}.prompt is given without {at}.completion", "both")
    return "text"


def _check_media(file: DataFile, objective: ObjectiveTable, reader: Reader | None) -> None:
    """Whether the base reads the kind of file that the columns name. Errors: DataError."""
    at, wanted = f"{table_of(file)}.columns", reader.column if reader else None
    for kind in ("image", "audio"):
        if getattr(file.columns, kind) and kind != wanted:
            raise DataError(
                f"{at}.{kind} is given, and the base reads no {kind}",
                f"{at}.{wanted}" if wanted else "text alone",
                "name a base that reads it, or leave the column out",
            )
        if kind == wanted and not getattr(file.columns, kind):
            raise DataError(
                f"the base reads {kind} and text, and no {kind} column is named", f"{at}.{kind}"
            )
    if wanted == "audio":
        given = [key for key in ("prompt", "messages") if getattr(file.columns, key)]
        given += ["text"] if file.columns.text and file.columns.label else []
        if given or objective.template is not None:
            raise DataError(
                f"a speech base reads no prompt ({', '.join(given) or 'objective.template'})",
                f"{at}.audio with {at}.text (what is said) or {at}.label (classify)",
            )


def _nothing_left(path: Path, rejected: Counter[str], objective: ObjectiveTable) -> DataError:
    if set(rejected) == {"unknown label"}:
        return DataError(
            f"{path}: no record has a label that objective.labels lists",
            f"one of {', '.join(objective.labels)}",
            "compare the label column with objective.labels",
        )
    counts = ", ".join(f"{n} {reason}" for reason, n in rejected.most_common())
    todo = ""
    if rejected["too long"]:
        todo = 'raise objective.max_length, or set objective.overflow = "truncate"'
    return DataError(f"{path}: all records are rejected ({counts})", "at least 2 usable ones", todo)


def _capped(records: list[Record], most: int, known: Callable[[bytes], bool]) -> list[int]:
    """Indices of at most `most` records of each unit, in order: those kept before, then those of
    smallest sha256."""
    groups: defaultdict[str, list[tuple[bool, str, int]]] = defaultdict(list)
    for index, record in enumerate(records):
        body = _canonical(record)
        order = (not known(b"record\0" + body), hashlib.sha256(body).hexdigest(), index)
        groups[record.unit].append(order)
    return sorted(index for group in groups.values() for *_, index in sorted(group)[:most])


def _canonical(r: Record) -> bytes:
    more = [r.rejected] if r.rejected else []
    more += [r.media.digest.hex()] if r.media else []
    return json.dumps([r.prompt, r.completion, r.label, r.messages, *more]).encode()


def _members(records: list[Record], unit: str) -> frozenset[bytes]:
    """Each patient's key, each record, its file, and each of its longer texts: the same text or
    file under another column or shape is still the same."""
    found = set()
    for record in records:
        found.add(b"record\0" + _canonical(record))
        if unit == "patient":
            found.add(unit_member(record.unit))
        if record.media:
            found.add(b"media\0" + record.media.digest)
        texts = _texts(record)
        found |= {b"text\0" + text.encode() for text in texts if len(text) >= LONG}
    return frozenset(found)


def _units(records: list[Record], numbers: dict[str, int]) -> tuple[tuple[bytes, ...], ...]:
    """Of each unit its key and its records, as `_members` has them."""
    found: list[list[bytes]] = [[unit_member(unit)] for unit in numbers]
    for record in records:
        found[numbers[record.unit]].append(b"record\0" + _canonical(record))
    return tuple(map(tuple, found))


def _texts(record: Record) -> list[str]:
    said = (content for _, content in record.messages)
    return [record.prompt, record.completion, record.rejected, *said]


def prompt_ids(
    prompt: str, objective: ObjectiveTable, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """What stands before a completion of `prompt`, as training saw it."""
    return _prompted(Record("", prompt), objective, tokenizer, append_eos=False)[0]


def passage_of(
    prompt: str, completion: str, objective: ObjectiveTable, tokenizer: PreTrainedTokenizerBase
) -> Passage:
    """A prompt and its completion, as training saw them; where a head is trained, all of it, and of
    a text to classify the prompt alone. Errors: Rejected."""
    if find(objective).shape == "label":
        tokens, _ = _classify(
            Record("", prompt), objective, tokenizer, labelled=False, starts=False
        )
    else:
        tokens = _written(Record("", prompt, completion), objective, tokenizer, labelled=True)
    return _passage(*tokens, find(objective).outputs > 0)


def _example(
    tokens: list[Tokens], label: int, unit: int, scored: bool, media: Media | None, tiles: int
) -> Example:
    own, *worse = (_passage(*each, scored) for each in tokens)
    return Example(*own, label, unit, worse[0] if worse else None, media, tiles)


def _passage(tokens: list[int], targets: list[bool], scored: bool) -> Passage:
    """scored: a head reads the whole text, its last token too, and predicts no token of it."""
    ids, hits = np.array(tokens, np.int32), np.array(targets, bool)
    if scored or not hits.any():
        return Passage(ids, np.full_like(ids, NO_TARGET))
    return Passage(ids[:-1], np.where(hits[1:], ids[1:], NO_TARGET).astype(np.int32))


# ----------------------------------------------------------------------------- one record's tokens


def _tokenise(
    record: Record,
    objective: ObjectiveTable,
    tokenizer: PreTrainedTokenizerBase,
    shape: Shape,
    labelled: bool,
    starts: bool,
) -> tuple[list[Tokens], int]:
    """Token ids of at most max_length with their targets, of a pair the worse ones too; and the
    label's index."""
    if shape == "label":
        tokens, label = _classify(record, objective, tokenizer, labelled, starts)
        return [tokens], label
    tokens = _written(record, objective, tokenizer, labelled)
    if shape != "pair":
        return [tokens], int(record.label) if shape == "judged" else NO_TARGET
    worse = replace(record, completion=record.rejected)
    return [tokens, _written(worse, objective, tokenizer, labelled)], NO_TARGET


def _written(
    record: Record, objective: ObjectiveTable, tokenizer: PreTrainedTokenizerBase, labelled: bool
) -> Tokens:
    """A prompt and what was written after it."""
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
    """The text with the tokenizer's own special tokens, which truncation leaves in place; without
    them where it `starts` with them already."""
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
    """Prompt, then completion, tokenised apart so that the boundary is the one met when generating.
    The completion and its eos are targets; plain text is a completion without prompt."""
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
    """The model's own template; the assistant turns, up to their eos, are targets."""
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
            marked: Any = tokenizer.apply_chat_template(
                turns,
                return_assistant_tokens_mask=True,
                truncation=True,
                max_length=max_length + 1,
                tokenizer_kwargs={"verbose": False},
            )
            return list(marked["input_ids"]), [bool(hit) for hit in marked["assistant_masks"]]
        segments = _turns(turns, tokenizer)
    except (TemplateError, ValueError, TypeError):
        raise Rejected("bad message roles") from None
    return _joined(segments, [], max_length, tokenizer, continued=True)


def _turns(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Split the rendered chat at the ends of the assistant turns. What the template puts in front
    (a system prompt, role headers) and after an answer's eos, which nobody generates, is context.
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
        heads = [head for head in (render(index, True), render(index)) if through.startswith(head)]
        if not heads or not full.startswith(through) or len(heads[0]) < at:
            raise Rejected("turns altered by the chat template")
        answer = through[len(heads[0]) :]
        if eos and eos in answer:
            answer = answer[: answer.rindex(eos) + len(eos)]
        segments += [(full[at : len(heads[0])], False), (answer, True)]
        at = len(heads[0]) + len(answer)
    return segments or [(full, False)]


def _joined(
    segments: list[Segment],
    start: list[int],
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    continued: bool,
) -> Tokens:
    """Segments tokenised one by one, until there are more than max_length tokens. continued: as
    the text before them would have it, for tokenizers that put a space in front of a text."""
    ids, hits, before = list(start), [False] * len(start), ""
    for text, hit in segments:
        if len(ids) > max_length:
            break
        text = text[: CHARS * max_length]
        new: list[int] = tokenizer.encode(before + text, add_special_tokens=False, verbose=False)
        if continued:
            known = len(ids)
            if new[:known] == ids:
                new = new[known:]
            else:
                new = tokenizer.encode(text, add_special_tokens=False, verbose=False)
            before += text
        ids += new
        hits += [hit] * len(new)
    return ids, hits
