"""Label preferences with models at the site (RLAIF), so that no text leaves. A generator writes two
answers to each record's prompt, and a judge chooses the better one.

Guarantee: the preference of a record depends only on this record, the models, the rubric and the
settings. The models see one record at a time, and no example from another record. Nothing is
batched, normalised or counted over records. So each output line depends on one unit, and a study
that trains on the lines with DP protects the unit as it would if it trained on the unit's records.
References: Bai et al. 2022, "Constitutional AI", section 4; Lee et al. 2023, "RLAIF", section 2
(both orders)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedtune.core.config import DataFile
from fedtune.core.config.study import holds_prompt_once
from fedtune.core.data import chat
from fedtune.core.data.files import Rejected
from fedtune.core.data.records import Record, read_records, table_of
from fedtune.core.data.tokenize import passage_of, prompt_ids
from fedtune.core.errors import ConfigError, DataError, InputError
from fedtune.core.files.writing import check_replaceable, replace
from fedtune.core.models.loaded import LoadedModel, load
from fedtune.core.progress import report
from fedtune.derive.lineage import require_private
from fedtune.derive.settings import RUBRIC, LabelSettings
from fedtune.derive.writing import write

ABOUT = ".about.json"


class Judge(Protocol):
    def margin(self, prompt: str, first: str, second: str) -> float:
        """Compare two answers to a prompt. Return a number above 0 if `first` is the better answer,
        below 0 if `second` is, and 0 if neither is. If the two answers are swapped, the number
        changes its sign only."""


@dataclass(frozen=True, repr=False)
class VerdictJudge:
    """A judge that asks a language model "A or B?" twice, once with the answers in each order, so
    that a preference of the model for the first or the second place cancels out.

    - model: the language model
    - rubric: the text of the question, put before the prompt and the answers"""

    model: LoadedModel
    rubric: str = RUBRIC

    def margin(self, prompt: str, first: str, second: str) -> float:
        return (self._odds(prompt, first, second) - self._odds(prompt, second, first)) / 2

    def _odds(self, prompt: str, a: str, b: str) -> float:
        """Ask which of two answers to the prompt is better: `a`, shown as answer A, or `b`, shown
        as answer B. Return the model's log-probability of "A" as the next token minus that of "B".
        Errors: Rejected if the question is too long for the model."""
        question = (
            f"{self.rubric}\n\nQuestion:\n{prompt.strip()}\n\nAnswer A:\n{a.strip()}\n\n"
            f"Answer B:\n{b.strip()}\n\nSay A or B."
        )
        tokenizer: Any = self.model.tokenizer
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": question}]
            text = chat.render(tokenizer, turns, tokenize=False, add_generation_prompt=True)
            ids, space = tokenizer.encode(text, add_special_tokens=False), ""
        else:
            ids, space = tokenizer.encode(question + "\nThe better answer is"), " "
        if len(ids) > self.model.room:
            raise Rejected("too long")
        letter_ids = [
            tokenizer.encode(space + letter, add_special_tokens=False)[-1] for letter in "AB"
        ]
        # In fp32: the log-odds of two answers often differ by less than bf16 resolves.
        odds = self.model.next_tokens(np.array(ids), np.array([len(ids) - 1]))[0, letter_ids]
        return float(odds[0] - odds[1])


@dataclass(frozen=True, repr=False)
class RewardJudge:
    """A judge that scores each of two answers by itself, and compares the scores. model: a finished
    run of objective reward."""

    model: LoadedModel

    def margin(self, prompt: str, first: str, second: str) -> float:
        return self.score(prompt, first) - self.score(prompt, second)

    def score(self, prompt: str, answer: str) -> float:
        return float(self.model.scores(self.passage(prompt, answer))[0])

    def passage(self, prompt: str, answer: str) -> np.ndarray:
        """Return the token ids of a prompt and its answer, as the reward run read such pairs in its
        training. Errors: Rejected, for instance if prompt and answer are too long."""
        assert self.model.study is not None
        return passage_of(
            prompt, answer, self.model.study.objective, self.model.tokenizer
        ).input_ids


def load_judge(source: str, digest: str | None = None, rubric: str = RUBRIC) -> Judge:
    """Load the model that chooses between two answers. A run of objective reward becomes a
    RewardJudge, which compares the scores of its head. Any other model becomes a VerdictJudge,
    which asks the model which answer is better.

    - source: pypi:NAME, a folder (of a base or a run) or a hub id
    - digest: the digest that the model must have; None: any
    - rubric: the question that a VerdictJudge asks; a RewardJudge does not use it

    Errors: ConfigError, ModelError; Refused if the model is a run without privacy, or was derived
    from one; InputError if a run has no report."""
    model = load(source, digest)
    require_private(model, "judge", source)
    if model.study is not None and model.study.objective.resolved.scores:
        return RewardJudge(model)
    return VerdictJudge(_require_writer(model, "judge"), rubric)


def load_generator(source: str, digest: str | None = None) -> LoadedModel:
    """Load a language model that writes answers to prompts, and check that it may be used for this.

    - source: pypi:NAME, a folder (of a base or a run) or a hub id
    - digest: the digest that the model must have; None: any

    Errors: ConfigError, ModelError; Refused if the model is a run without privacy, or was derived
    from one; InputError if a run has no report."""
    model = load(source, digest)
    require_private(model, "generator", source)
    return _require_writer(model, "generator")


def prompt_template(writer: LoadedModel) -> str | None:
    """Return the template that is put around each prompt for this writer: a text with {text} in the
    prompt's place. For a run this is the template of its study. For a base with a chat template it
    is a user turn of the chat template, since without such a turn the base hardly answers. None for
    a base without a chat template, or whose template does not write the prompt exactly once: its
    prompts stay as they are."""
    if writer.study is not None:
        return writer.study.objective.template
    tokenizer: Any = writer.tokenizer
    if not tokenizer.chat_template:
        return None
    turn = [{"role": "user", "content": "{text}"}]
    text = str(chat.render(tokenizer, turn, tokenize=False, add_generation_prompt=True))
    if tokenizer.bos_token_id is not None and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(tokenizer.bos_token)  # the tokenizer puts it in front by itself
    return text if holds_prompt_once(text) else None


def write_preferences(
    file: DataFile,
    out: Path,
    writer: LoadedModel,
    judge: Judge,
    settings: LabelSettings,
    *,
    exclude_unit: Callable[[str], bool] = lambda unit: False,
    costs: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Have a model write two answers to each record's prompt and a judge choose the better one.
    Write to `out` one line for each record: {"prompt", "chosen", "rejected"} and, if the file names
    patients, "patient". Write to `out`.about.json the models' digests, the settings, and for each
    reason how many records were left out.

    - file: the records' file and columns, of which one must be a prompt
    - out: a .jsonl file; one that exists is replaced
    - writer: the model that writes two answers to each prompt
    - judge: chooses the better of two answers
    - settings: length, temperature and seed of the answers, and the template around a prompt; here
      a template of None means that nothing is put around it
    - exclude_unit: is called with the key of each record's unit (the patient's, or the record's own
      if the file names no patients); returns whether to leave the record out, as after a withdrawal
    - costs: what the training of writer and judge cost, for those that are runs, by "generator" and
      "judge"; about.json then has it as "costs"

    Only this user can read both files, which are written at the end. Returns the content of
    about.json. Errors: ConfigError, InputError, DataError."""
    columns = file.columns
    if not columns.prompt:
        table = table_of(file)
        raise ConfigError("the file names no prompt", f"{table}.columns.prompt, or --column prompt")
    if out.suffix != ".jsonl":
        raise InputError(f"{out}: unsupported suffix", ".jsonl")
    if settings.template is not None and not holds_prompt_once(settings.template):
        raise ConfigError(
            "the template around a prompt does not hold {text} exactly once",
            "{text} once, in the prompt's place",
            "correct --template",
        )
    check_replaceable(out, ".jsonl")
    if out.exists() and file.path and out.samefile(file.path):
        raise InputError(
            f"{out}: is the file of the records", "another file", "choose another --out"
        )
    patients = bool(columns.patient)
    unit = "patient" if patients else "record"
    records, rejected = read_records(file, unit="patient" if patients else "record", labelled=False)
    left_out = Counter(rejected)
    lines = []
    for number, record in enumerate(records):
        if not exclude_unit(record.unit):
            try:
                row = preference(record, writer, judge, settings)
                key = {"patient": record.unit} if patients else {}
                lines.append(json.dumps(row | key, ensure_ascii=False))
            except Rejected as error:
                left_out[error.reason] += 1
        report("writing and judging", number + 1, len(records))
    if not lines:
        counts = ", ".join(f"{n} {reason}" for reason, n in left_out.most_common())
        raise DataError(f"{file.path}: gave no preference pair ({counts})", "at least 1 pair")
    about = {
        "unit": unit,
        "preferences": len(lines),
        "left_out": dict(left_out),
        "generator": writer.digest,
        "judge": getattr(getattr(judge, "model", None), "digest", None),
        "judged_by": "score" if isinstance(judge, RewardJudge) else "verdict, both orders",
        "rubric": hashlib.sha256(getattr(judge, "rubric", "").encode()).hexdigest(),
        "settings": vars(settings),
        **({"costs": dict(costs)} if costs else {}),
    }
    replace(out, "".join(line + "\n" for line in lines).encode(), private=True)
    text = json.dumps(about, indent=2, sort_keys=True, ensure_ascii=False)
    replace(out.with_name(out.name + ABOUT), (text + "\n").encode(), private=True)
    return about


def preference(
    record: Record, writer: LoadedModel, judge: Judge, settings: LabelSettings
) -> dict[str, str]:
    """Have a model write two answers to one record's prompt and a judge choose the better one.
    Return a dict of three texts: "prompt", "chosen" and "rejected".

    - record: only its prompt is read
    - writer: the model that writes the answers
    - judge: chooses the better of the two
    - settings: length, temperature and seed of the answers, and the template around the prompt; a
      template of None means that nothing is put around it

    Errors: Rejected if the texts are too long for a model or for the settings, if an answer is
    empty, if the two answers are equal, or if the judge prefers neither."""
    ids = prompt_ids(record.prompt, settings.objective, writer.tokenizer)
    if len(ids) + settings.new_tokens > min(settings.max_length, writer.room):
        raise Rejected("too long")
    stream = f"{settings.seed}\n{record.prompt}".encode()
    written = write(writer, ids, 2, settings.new_tokens, stream, settings.temperature)
    first, second = (_text(writer, answer) for answer in written)
    if not first.strip() or not second.strip():
        raise Rejected("an empty answer")
    if first == second:
        raise Rejected("two equal answers")
    margin = judge.margin(record.prompt, first, second)
    if margin == 0 or margin != margin:
        raise Rejected("no preference")
    better, worse = (first, second) if margin > 0 else (second, first)
    return {"prompt": record.prompt, "chosen": better, "rejected": worse}


def _text(writer: LoadedModel, ids: list[int]) -> str:
    return str(writer.tokenizer.decode(ids, skip_special_tokens=True)).replace("\0", "")


def _require_writer(model: LoadedModel, role: str) -> LoadedModel:
    if model.base.kind != "causal" or model.head is not None:
        raise ConfigError(
            f"the {role} {model.base.name} does not generate text", "a language model"
        )
    return model
