"""How good the model is on public or released records: per round, and of a finished run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from fedtune import modalities
from fedtune.config import DataFile, EvaluationTable, Study
from fedtune.data.tokens import NO_TARGET, Dataset, Example, load_dataset
from fedtune.errors import ConfigError, DataError
from fedtune.models.base import find_base, load_tokenizer
from fedtune.models.cache import Batch, Cached
from fedtune.models.lora import Arrays
from fedtune.models.network import Network, build
from fedtune.objectives import Shape, find
from fedtune.objectives._tokens import likelihood

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOWER = ("loss", "perplexity")  # is better
CHOSEN = ("accuracy", "f1")  # need a choice per record
ROWS = 512  # positions whose logits over the vocabulary are held at once
RESAMPLES = 1000


@dataclass
class Scores:
    """Per record: loss (n,) nats, mean over its targets (of a pair or a judged completion, the
    objective's own); tokens (n,) targets; exact (n,) greedy decoding gives the completion; chosen
    (n,) and gold (n,) class indices, -1 where not asked; margin (n,) by which the better completion
    of a pair is preferred."""

    loss: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray
    chosen: np.ndarray
    gold: np.ndarray
    margin: np.ndarray

    def value(self, metric: str, rows: np.ndarray | slice = slice(None)) -> float:
        """One figure over all records, or over `rows` (a bootstrap sample)."""
        loss, tokens = self.loss[rows], self.tokens[rows]
        if metric == "loss":
            return float(loss.mean())
        if metric == "perplexity":  # over tokens, not over records
            return float(np.exp(min((loss * tokens).sum() / tokens.sum(), 700.0)))
        if metric == "exact_match":
            return float(self.exact[rows].mean())
        if metric == "preference":  # a tie is half of one
            margin = self.margin[rows]
            return float((margin > 0).mean() + (margin == 0).mean() / 2)
        chosen, gold = self.chosen[rows], self.gold[rows]
        return float((chosen == gold).mean()) if metric == "accuracy" else _f1(chosen, gold)


@dataclass(frozen=True)
class Compared:
    """The metric of two adapters on the same records, and the share of resamples of those records
    in which the second is better."""

    before: float
    after: float
    sure: float


def check_evaluation(study: Study) -> None:
    """Whether the study's [evaluation], if it has one, can be measured: its metric, columns and
    choices, from the file and the base's tokenizer alone.

    Errors: ConfigError, DataError, as Evaluator's."""
    table, objective = study.evaluation, find(study.objective)
    if table is None:
        return
    _check(table, study.objective.name, objective.shape)
    base = find_base(study.base.model, study.base.digest)
    tokenizer = load_tokenizer(base)
    data = load_dataset(table, study, tokenizer, reader=modalities.reader(base, tokenizer))
    if table.metric in CHOSEN and objective.shape != "label":
        _spelled(tokenizer, data, table.choices, study.objective.max_length)


class Evaluator:
    """The study's [evaluation] records, ready to be measured again and again.

    What is frozen below the adapters is computed once, here. Errors: ConfigError where the metric
    does not fit the objective, DataError for the file."""

    def __init__(self, study: Study, frozen: Arrays | None = None) -> None:
        table = study.evaluation
        if table is None:
            raise ConfigError("the study has no [evaluation] table", "one, with path and columns")
        self._objective = find(study.objective)
        self.metric, self.classify = table.metric, self._objective.shape == "label"
        self.paired = self._objective.shape in ("pair", "judged")
        _check(table, study.objective.name, self._objective.shape)
        self.network: Network = build(study)
        self._factor = self.network.adopt(study, frozen or {})
        data = load_dataset(table, study, self.network.tokenizer, reader=self.network.reader)
        self.rejected = data.rejected
        self._records = Cached(self.network, data)
        self._gold = np.array([e.label if self.classify else -1 for e in data.examples])
        self._single: torch.Tensor | None = None  # the token of each choice, where each has one
        self._spelled: Cached | None = None  # else every record with every choice
        self._choices = len(table.choices)
        if self.metric in CHOSEN and not self.classify:
            self._read_choices(data, table.choices, study.objective.max_length)
        assess = self._pairs if self.paired else self._classes if self.classify else self._tokens
        self._assess: Callable[[Batch, Scores], None] = assess
        for cached in (self._records, self._spelled):
            if cached is not None:
                cached.warm()

    def __len__(self) -> int:
        return len(self._gold)

    def measure(self, adapter: Arrays | None) -> dict[str, float]:
        """The study's metric and the loss (nats, mean over records) with `adapter`; None is the
        untouched base (a trained head counts as untouched at its public start, zero)."""
        scores = self.scores(adapter)
        return {name: scores.value(name) for name in dict.fromkeys((self.metric, "loss"))}

    def compare(self, champion: Arrays, challenger: Arrays) -> Compared:
        """A paired bootstrap over the records (Efron & Tibshirani 1993, chapter 16); a tie is not
        better. The same adapters on the same records always give the same answer."""
        before, after = self.scores(champion), self.scores(challenger)
        sign = -1 if self.metric in LOWER else 1
        better = [
            sign * (after.value(self.metric, rows) - before.value(self.metric, rows)) > 0
            for rows in _resamples(len(self))
        ]
        pair = before.value(self.metric), after.value(self.metric)
        return Compared(*pair, float(np.mean(better)))

    @torch.no_grad()
    def scores(self, adapter: Arrays | None) -> Scores:
        """Every record's own figures. The network's arrays are put back afterwards."""
        self.network.load_frozen(self._factor)  # the network may have served another study since
        before = self.network.trainable()
        zero = {name: np.zeros_like(value) for name, value in before.items()}
        self.network.load_trainable(zero if adapter is None else adapter)
        try:
            n = len(self)
            exact, chosen = np.zeros(n, bool), np.full(n, -1)
            scores = Scores(np.zeros(n), np.ones(n), exact, chosen, self._gold, np.zeros(n))
            for batch in self._records.batches(range(n)):
                self._assess(batch, scores)
            if self._spelled is not None:
                scores.chosen = self._most_likely(self._spelled)
            return scores
        finally:
            self.network.load_trainable(before)

    # ------------------------------------------------------------------------------ one batch

    def _classes(self, batch: Batch, scores: Scores) -> None:
        hidden = self.network.hidden(batch.prefix, batch.mask, seen=batch.seen)
        logits = self.network.logits(self.network.pool(hidden, batch.mask))
        index = batch.index.numpy()
        loss = functional.cross_entropy(logits, batch.label, reduction="none")
        scores.loss[index] = loss.double().cpu().numpy()
        scores.chosen[index] = logits.argmax(dim=1).cpu().numpy()
        scores.exact[index] = scores.chosen[index] == scores.gold[index]

    def _pairs(self, batch: Batch, scores: Scores) -> None:
        """Preferred is what the model scores higher (a trained head) or would rather write: the
        higher likelihood per token, so that neither a short nor a long completion gains by it."""
        index = batch.index.numpy()
        if self.network.head is None:
            said = likelihood(self.network, batch).mean
        else:
            hidden = self.network.hidden(batch.prefix, batch.mask, seen=batch.seen)
            said = self.network.logits(self.network.pool(hidden, batch.mask))[:, 0]
        better, worse = said.view(-1, 2).unbind(dim=1)
        scores.margin[index] = (better - worse).double().cpu().numpy()
        if self._objective.shape == "pair":
            losses = self._objective.losses(self.network, batch)
        else:  # judgements are evaluated on pairs: how likely the better completion is
            losses = -better
        scores.loss[index] = losses.double().cpu().numpy()

    def _tokens(self, batch: Batch, scores: Scores) -> None:
        hidden = self.network.hidden(batch.prefix, batch.mask, seen=batch.seen)
        total, count, right = self._by_record(hidden, batch)
        index = batch.index.numpy()
        scores.loss[index], scores.tokens[index] = total / count, count
        scores.exact[index] = right == count
        if self._single is not None:
            first = (batch.target_ids != NO_TARGET).int().argmax(dim=1)
            rows = torch.arange(len(first), device=first.device)
            logits = self.network.logits(hidden[rows, first], self._single)
            scores.chosen[index] = logits.argmax(dim=1).cpu().numpy()

    def _by_record(
        self, hidden: torch.Tensor, batch: Batch
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(summed loss, targets, targets that are the most likely token), each (B,).

        Greedy decoding gives the completion exactly where every target is the most likely token
        after the targets before it, so one pass over the true text tells, without decoding."""
        rows, at = torch.nonzero(batch.target_ids != NO_TARGET, as_tuple=True)
        loss, hit = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
        for i in range(0, len(rows), ROWS):
            part = slice(i, i + ROWS)
            target = batch.target_ids[rows[part], at[part]]
            logits = self.network.logits(hidden[rows[part], at[part]])
            loss[part] = functional.cross_entropy(logits, target, reduction="none")
            hit[part] = logits.argmax(dim=1) == target
        size, of = len(batch.index), rows.cpu().numpy()
        total = np.bincount(of, loss.double().numpy(), size)
        right = np.bincount(of, hit.double().numpy(), size)
        return total, np.bincount(of, minlength=size), right

    def _most_likely(self, spelled: Cached) -> np.ndarray:
        """The choice of highest log-likelihood, summed over its tokens, (n,)."""
        likelihood = np.zeros(len(self) * self._choices)
        for batch in spelled.batches(range(len(likelihood))):
            hidden = self.network.hidden(batch.prefix, batch.mask, seen=batch.seen)
            likelihood[batch.index.numpy()] = -self._by_record(hidden, batch)[0]
        best: np.ndarray = likelihood.reshape(-1, self._choices).argmax(axis=1)
        return best

    # -------------------------------------------------------------------------------- choices

    def _read_choices(self, data: Dataset, choices: Sequence[str], max_length: int) -> None:
        ids, gold = _spelled(self.network.tokenizer, data, choices, max_length)
        self._gold[:] = gold
        if all(len(i) == 1 for i in ids):
            self._single = torch.tensor([i[0] for i in ids], device=self.network.device)
        else:
            every = [_spell(example, i) for example in data.examples for i in ids]
            self._spelled = Cached(self.network, Dataset(every, data.n_units, data.rejected))


def _spelled(
    tokenizer: PreTrainedTokenizerBase, data: Dataset, choices: Sequence[str], max_length: int
) -> tuple[list[list[int]], list[int]]:
    """The tokens of each choice, and which of them each record's completion is.

    Errors: ConfigError (choices that are no choices), DataError (a completion that is none)."""
    ids = [tokenizer.encode(choice, add_special_tokens=False) for choice in choices]
    if len({tuple(i) for i in ids}) < len(ids) or not all(ids):
        raise ConfigError("evaluation.choices: two are the same to this base, or one is empty")
    end, gold, cut = [tokenizer.eos_token_id], [], 0
    for example in data.examples:
        target = example.target_ids[example.target_ids != NO_TARGET].tolist()
        found = next((k for k, i in enumerate(ids) if target in (i, i + end)), -1)
        full = len(example.input_ids) >= max_length - 1
        cut += found < 0 and full and any(target == i[: len(target)] for i in ids)
        gold.append(found)
    of, strange = len(gold), gold.count(-1) - cut
    if strange:
        raise DataError(
            f"evaluation: {strange} of {of} completions are none of evaluation.choices",
            "each completion exactly as one of the choices, spaces included",
        )
    if cut:
        raise DataError(
            f"evaluation: objective.max_length = {max_length} cuts {cut} of {of} completions off",
            "room for each prompt with its whole completion",
            "raise objective.max_length, or shorten the prompts",
        )
    return ids, gold


def _spell(example: Example, choice: list[int]) -> Example:
    """The example's prompt, completed with `choice` in place of its own completion."""
    prompt = example.input_ids[: int((example.target_ids != NO_TARGET).argmax()) + 1]
    ids = np.concatenate([prompt, np.array(choice[:-1], np.int32)])
    targets = np.full(len(ids), NO_TARGET, np.int32)
    targets[len(prompt) - 1 :] = choice
    return replace(example, input_ids=ids, target_ids=targets)


def _check(table: EvaluationTable, objective: str, shape: Shape) -> None:
    classify = shape == "label"
    if (table.metric == "preference") != (shape in ("pair", "judged")) and table.metric != "loss":
        raise ConfigError(
            f'evaluation.metric = "{table.metric}" does not fit objective {objective}',
            "loss or preference" if shape in ("pair", "judged") else "another metric",
        )
    if classify and table.metric in ("perplexity", "exact_match"):
        raise ConfigError(
            f'evaluation.metric = "{table.metric}" does not fit objective classify',
            "loss, accuracy or f1",
        )
    if table.metric in CHOSEN and not classify and len(table.choices) < 2:
        raise ConfigError(
            f'evaluation.metric = "{table.metric}" needs evaluation.choices',
            "the possible completions, at least two",
        )


def _f1(chosen: np.ndarray, gold: np.ndarray) -> float:
    """Macro F1 over the classes that occur in `gold` or `chosen`."""
    each = [
        2 * ((chosen == k) & (gold == k)).sum() / ((chosen == k).sum() + (gold == k).sum())
        for k in np.union1d(chosen, gold)
    ]
    return float(np.mean(each))


# ----------------------------------------------------------------------------- a finished run


def evaluate(
    run: Path, data: DataFile, metric: str | None = None, choices: Sequence[str] = ()
) -> dict[str, Any]:
    """Base and adapter of a finished run on the records of `data`.

    `metric` and `choices` are the study's own where left out. Returns metric, records, rejected,
    before and after (measures by name) and interval: 95 % intervals of before, after (Wilson for a
    share of records, else bootstrap over records) and change (paired bootstrap).
    Errors: ConfigError, DataError, ModelError."""
    from fedtune.runs import load_adapter, load_plan, picked

    study = load_plan(run)
    old = study.evaluation
    table = EvaluationTable.model_validate(
        {
            "path": data.path,
            "columns": data.columns,
            "metric": metric or (old.metric if old else "loss"),
            "choices": tuple(choices) or (old.choices if old else ()),
        }
    )
    saved = load_adapter(run / "adapter")
    changes: dict[str, Any] = {"evaluation": table}
    if study.lora:  # what was saved is what counts, wherever A came from and whether it was trained
        changes["lora"] = study.lora.model_copy(update={"a_init": "public", "a_digest": None})
    frozen = {name: value for name, value in saved.items() if "lora_A" in name}
    study = study.model_copy(update=changes)
    check_evaluation(study)
    evaluator = Evaluator(study, frozen)
    after = evaluator.scores(picked(saved, evaluator.network.parameters(), run / "adapter"))
    before = evaluator.scores(None)
    names = tuple(dict.fromkeys((table.metric, "loss")))
    return {
        "metric": table.metric,
        "records": len(evaluator),
        "rejected": dict(evaluator.rejected),
        "before": {name: before.value(name) for name in names},
        "after": {name: after.value(name) for name in names},
        "interval": intervals(before, after, table.metric),
    }


def intervals(before: Scores, after: Scores, metric: str) -> dict[str, tuple[float, float]]:
    """95 % intervals of both figures and of their difference on the same records."""
    n = len(before.loss)
    drawn = _resamples(n)
    pairs = np.array([[s.value(metric, rows) for s in (before, after)] for rows in drawn])
    low, high = np.quantile(pairs, (0.025, 0.975), axis=0)
    change = np.quantile(pairs[:, 1] - pairs[:, 0], (0.025, 0.975))
    found = {
        "before": (float(low[0]), float(high[0])),
        "after": (float(low[1]), float(high[1])),
        "change": (float(change[0]), float(change[1])),
    }
    if metric in ("accuracy", "exact_match", "preference"):
        for name, scores in (("before", before), ("after", after)):
            found[name] = wilson(scores.value(metric), n)
    return found


def _resamples(n: int) -> list[np.ndarray]:
    """Rows drawn with replacement, always the same ones."""
    random = np.random.default_rng(0)
    return [random.integers(0, n, n) for _ in range(RESAMPLES)]


def fingerprint(path: Path) -> str:
    """sha256 of a file, or of the files in a folder by name; "" where nothing is there."""
    found = sorted(path.iterdir()) if path.is_dir() else [path]
    total = hashlib.sha256()
    for each in found:
        if each.is_file():
            content = hashlib.sha256(each.read_bytes()).hexdigest()
            total.update(f"{each.name} {content}\n".encode())
    return total.hexdigest() if any(each.is_file() for each in found) else ""


def wilson(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of n records (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (middle - half) / scale, (middle + half) / scale
