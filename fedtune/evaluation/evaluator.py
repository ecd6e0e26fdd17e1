"""Measure how good a model is on records: on public ones during a run, and afterwards on any file
of records that a person names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from fedtune.core import modalities
from fedtune.core.bases.find import find_base, load_tokenizer
from fedtune.core.config import EvaluationTable, Study
from fedtune.core.data.dataset import NO_TARGET, Dataset, Example
from fedtune.core.data.load import load_dataset
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import Arrays
from fedtune.core.models.network import Network
from fedtune.core.models.prefix_store import HiddenStates
from fedtune.core.objectives._interface import Batch, RecordFormat
from fedtune.core.objectives._tokens import likelihood
from fedtune.core.progress import reporter
from fedtune.core.registry import process_cache
from fedtune.core.registry.metrics import METRICS
from fedtune.evaluation.choices import (
    by_record,
    choice_ids,
    first_logits,
    single_tokens,
    with_choice,
)
from fedtune.evaluation.groups import groups_of
from fedtune.evaluation.metrics import intervals
from fedtune.evaluation.pairs import PairScores, pair_facts, round_figures
from fedtune.report.change_plan import Look
from fedtune.report.scores import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFERENCES = ("preference", "unpaired_preference")
# File -> the hidden states of its public records below the first layer with an adapter. They are
# kept after a run, since the next run in this process, such as a trial or a site alone, often
# measures on the same records.
_states: dict[str, list[HiddenStates]] = process_cache.register("states of public records", {})
_MOST = 2  # the largest number of files: [selection], which chooses steps, and [evaluation]


def check_evaluation(study: Study) -> None:
    """Check that the study's [evaluation] records can be measured: that metric, columns, choices
    and groups fit. Does nothing if the study has no such records. Only the file and the base's
    tokenizer are read, not the base's weights.

    Errors: ConfigError if the metric, the choices or the groups do not fit; DataError if the
    records cannot be used."""
    table, objective = study.evaluation, study.objective.resolved
    if table is None:
        return
    _check(table, study.objective.name, objective.record_format)
    base = find_base(study.base.model, study.base.digest)
    tokenizer = load_tokenizer(base)
    reader = modalities.reader(base, tokenizer, study.base.modality)
    data = load_dataset(table, study, tokenizer, reader=reader)
    if study.schedule and study.schedule.groups:
        groups_of(table, tuple(study.schedule.groups), data)
    if METRICS[table.metric].by_class and objective.record_format != "label":
        _choice_tokens(tokenizer, data, table.choices, study.objective.max_length)


class Evaluator:
    """Evaluates adapters on the study's [evaluation] records, as often as needed.

    The constructor builds the network, reads the records, and computes the frozen layers below the
    adapters once for each record.

    - study: the plan, with an [evaluation] table
    - frozen: the frozen arrays with which the adapters were trained, such as A; None: those that
      the plan determines
    - read: a function that is called with the network and returns the records, which replace those
      of the table's file; None: the file is read. The hidden states of a file's records are kept in
      this process for later evaluators; those of other records are freed with this object.

    Errors: ConfigError if the metric does not fit the objective; DataError if the records cannot be
    used."""

    def __init__(
        self,
        study: Study,
        frozen: Arrays | None = None,
        read: Callable[[Network], Dataset] | None = None,
    ) -> None:
        table = study.evaluation
        if table is None:
            raise ConfigError(
                "the study has no [evaluation] table", "an [evaluation] table with path and columns"
            )
        self._objective = study.objective.resolved
        self.metric, self.classify = table.metric, self._objective.record_format == "label"
        self._labels = study.objective.labels if self.classify else ()
        self.paired = self._objective.record_format in PREFERENCES
        _check(table, study.objective.name, self._objective.record_format)
        self.network: Network = build(study)
        # Scoring an adapter does not need the preconditioner, or the basis of class statistics,
        # with which it was trained.
        lora = study.lora and study.lora.model_copy(update={"preconditioner": None})
        objective = study.objective.model_copy(update={"basis_digest": None})
        plain = study.model_copy(update={"lora": lora, "objective": objective})
        self._factor = self.network.adopt(plain, frozen or {})
        if read:
            data = read(self.network)
        else:
            data = load_dataset(table, study, self.network.tokenizer, reader=self.network.reader)
        self.rejected, self.n_cut = data.rejected, data.n_cut
        columns = tuple(study.schedule.groups) if study.schedule and not read else ()
        self.groups = groups_of(table, columns, data) if columns else {}
        self._records = CachedDataset(self.network, data)
        self._gold = np.array([e.label if self.classify else -1 for e in data.examples])
        self._untouched: Scores | None = None
        self._single: torch.Tensor | None = None  # the choices' tokens, if each choice has one
        self._with_choices: CachedDataset | None = None  # otherwise each record with every choice
        self._choices = len(table.choices)
        if METRICS[self.metric].by_class and not self.classify:
            self._read_choices(data, table.choices, study.objective.max_length)
        assess = self._pairs if self.paired else self._classes if self.classify else self._tokens
        self._assess: Callable[[Batch, Scores], None] = assess
        cached = [data for data in (self._records, self._with_choices) if data is not None]
        for records in cached:
            records.warm()
        if not read:
            _keep(str(table.where), [state for records in cached for state in records.states])

    def __len__(self) -> int:
        return len(self._gold)

    @property
    def examples(self) -> list[Example]:
        """The records, tokenised."""
        return self._records.dataset.examples

    @property
    def lacking(self) -> tuple[str, ...]:
        """The names of the study's classes to which no record belongs; () if records have no
        classes."""
        found = set(self._gold.tolist())
        return tuple(n for i, n in enumerate(self._labels) if i not in found)

    def measure(self, adapter: Arrays | None) -> dict[str, float]:
        """Measure the model with `adapter` on the records. Return the study's metric, under its
        name, and "loss" (nats, mean over records). adapter: None stands for the base alone, whose
        head, if the study trains one, is zero."""
        scores = self.scores(adapter)
        return {name: scores.value(name) for name in dict.fromkeys((self.metric, "loss"))}

    def follow(self, adapter: Arrays | None) -> dict[str, float]:
        """Measure the model after a round on the records. Return, by name, the figures by which a
        run's rounds are followed: the study's metric and "loss". For preference pairs three more
        figures show whether the model's text gets worse: margin, chosen_logp and kl
        (evaluation.pairs.pair_facts explains them). These need a second pass, by the base alone.
        adapter: None for the base alone."""
        scores = self.scores(adapter, with_kl=adapter is not None)
        names = dict.fromkeys((str(self.metric), "loss"))
        figures = {name: scores.value(name) for name in names}
        if self.paired:
            before = scores if adapter is None else self.untouched
            figures |= round_figures(before, scores, self.beta)
        return figures

    @property
    def untouched(self) -> Scores:
        """The scores of the base alone. They are computed when they are first asked for."""
        if self._untouched is None:
            self._untouched = self.scores(None)
        return self._untouched

    @property
    def beta(self) -> float:
        """The objective's β, which turns log-ratios into rewards; 1 if it has none."""
        return float(getattr(self._objective, "beta", 1.0))

    def look(self, champion: Arrays, challenger: Arrays) -> Look:
        """Score two adapters, the champion in use and the challenger, on the same records. Return
        both adapters' scores record by record, as a Look, by which the adapters can be compared. It
        also holds each record's groups, if the study's [schedule] names groups."""
        before, after = self.scores(champion), self.scores(challenger)
        return Look.at(str(self.metric), before, after, self.groups)

    def gain(self, adapter: Arrays, start: Arrays | None = None) -> dict[str, Any]:
        """Return the gain of `adapter` over the base alone, as a dict with the keys below. An
        interval is a list [low, high].

        - records: the number of records
        - intervals: for the metric and for "loss" a dict of three 95 % intervals: "before" (of the
          base), "after" (of the adapter) and "change". The first two are Wilson's if the value is a
          share of records, else from a bootstrap over the records; "change" is from a paired
          bootstrap
        - change: the interval of the metric's change
        - over_start: the interval of the metric's change against `start`, the adapter of the public
          start; absent if `start` is None
        - pairs: the dict that evaluation.pairs.pair_facts returns; only for preference pairs"""
        before, after = self.untouched, self.scores(adapter, with_kl=True)
        bounds = {
            name: {key: list(bound) for key, bound in intervals(before, after, name).items()}
            for name in dict.fromkeys((str(self.metric), "loss"))
        }
        change = bounds[str(self.metric)]["change"]
        facts = {"records": len(self), "change": change, "intervals": bounds}
        if start is not None:
            over = intervals(self.scores(start), after, str(self.metric))["change"]
            facts["over_start"] = list(over)
        return facts | self.pairs_of(before, after)

    def by_class(self, adapter: Arrays) -> list[dict[str, Any]]:
        """Return a dict for each of the study's classes; [] if records have no class. Its entries
        are "name", "records" (how many records have this class), "recall" (None if there are no
        such records) and "predicted" (how many of all records are predicted to have this class)."""
        scores = self.scores(adapter) if self._labels else self.untouched
        rows = []
        for index, name in enumerate(self._labels):
            own = scores.gold == index
            recall = float((scores.chosen[own] == index).mean()) if own.any() else None
            predicted = int((scores.chosen == index).sum())
            rows.append(
                {"name": name, "records": int(own.sum()), "recall": recall, "predicted": predicted}
            )
        return rows

    def pairs_of(self, before: Scores, after: Scores) -> dict[str, Any]:
        """Describe how training changed the figures of preference pairs. Return {"pairs": dict},
        with the dict that `pair_facts` returns, or {} if the records are not preference pairs.
        before, after: the scores of the base and of the adapter."""
        if not self.paired:
            return {}
        own = self._objective.record_format == "preference"
        return {"pairs": pair_facts(before, after, self.beta, own_loss=own)}

    @torch.no_grad()
    def scores(self, adapter: Arrays | None, *, with_kl: bool = False) -> Scores:
        """Score every record with `adapter`, or with the base alone if it is None. The network's
        arrays are restored afterwards.

        with_kl: whether to compute, for preference pairs, also the KL divergence from the base,
        which takes a second pass."""
        self.network.load_frozen(self._factor)  # another study may have used the network since
        trainable = self.network.zero() if adapter is None else adapter
        with self.network.loaded(trainable=trainable):
            n = len(self)
            exact, chosen = np.zeros(n, bool), np.full(n, -1)
            scores = Scores(np.zeros(n), np.ones(n), exact, chosen, self._gold, np.zeros(n))
            scores.pairs = PairScores.empty(n) if self.paired else None
            classes = self.classify or self._single is not None
            scores.confidence = np.zeros(n) if classes else None
            measuring = reporter("measuring on the records")
            for batch in self._records.batches(range(n), on_work=measuring):
                self._assess(batch, scores)
                if scores.pairs is not None:
                    scores.pairs.add(self.network, batch, with_kl=with_kl)
            if self._with_choices is not None:
                scores.chosen, scores.confidence = self._most_likely(self._with_choices)
            return scores

    # ------------------------------------------------------------------------------ one batch

    def _classes(self, batch: Batch, scores: Scores) -> None:
        hidden = self.network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)
        logits = self.network.logits(self.network.pool(hidden, batch.mask))
        index = batch.index.numpy()
        loss = functional.cross_entropy(logits, batch.label, reduction="none")
        scores.loss[index] = loss.double().cpu().numpy()
        self._choose(logits, index, scores)
        scores.exact[index] = scores.chosen[index] == scores.gold[index]

    def _choose(self, logits: torch.Tensor, index: np.ndarray, scores: Scores) -> None:
        """Enter the likeliest class of each record, and its probability, into `scores`. logits: (B,
        K), one row for each record and one column for each class; index: (B,), the numbers under
        which `scores` holds these records."""
        scores.chosen[index] = logits.argmax(dim=1).cpu().numpy()
        if scores.confidence is not None:
            shares = torch.softmax(logits.double(), dim=1)
            scores.confidence[index] = shares.amax(dim=1).cpu().numpy()

    def _pairs(self, batch: Batch, scores: Scores) -> None:
        """Enter the margin and the loss of a batch of pairs into `scores`. The margin is the better
        answer's score minus the worse one's. The score is the trained head's; without a head, it is
        the mean log-likelihood of the answer's tokens, so that a longer answer has no advantage."""
        index = batch.index.numpy()
        if self.network.head is None:
            preference = likelihood(self.network, batch).mean
        else:
            hidden = self.network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)
            preference = self.network.logits(self.network.pool(hidden, batch.mask))[:, 0]
        better, worse = preference.view(-1, 2).unbind(dim=1)
        scores.margin[index] = (better - worse).double().cpu().numpy()
        if self._objective.record_format == "preference":
            losses = self._objective.losses(self.network, batch)
        else:  # kto, whose loss needs judgements: report the better completion's mean nats
            losses = -better
        scores.loss[index] = losses.double().cpu().numpy()

    def _tokens(self, batch: Batch, scores: Scores) -> None:
        hidden = self.network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)
        total, count, right = by_record(self.network, hidden, batch)
        index = batch.index.numpy()
        scores.loss[index], scores.tokens[index] = total / count, count
        scores.exact[index] = right == count
        if self._single is not None:
            self._choose(first_logits(self.network, hidden, batch, self._single), index, scores)

    def _most_likely(self, with_choices: CachedDataset) -> tuple[np.ndarray, np.ndarray]:
        """Find the choice that the model finds likeliest for each record. Return two arrays (n,):
        the number of this choice, and its likelihood divided by that of all choices together. The
        log-likelihood of a choice is summed over its tokens. with_choices: each record once with
        every choice."""
        likelihood = np.zeros(len(self) * self._choices)
        comparing = reporter("comparing the choices on the records")
        for batch in with_choices.batches(range(len(likelihood)), on_work=comparing):
            hidden = self.network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)
            likelihood[batch.index.numpy()] = -by_record(self.network, hidden, batch)[0]
        by_choice = likelihood.reshape(-1, self._choices)
        above = by_choice - by_choice.max(axis=1, keepdims=True)
        return by_choice.argmax(axis=1), 1 / np.exp(above).sum(axis=1)

    # -------------------------------------------------------------------------------- choices

    def _read_choices(self, data: Dataset, choices: Sequence[str], max_length: int) -> None:
        ids, gold = _choice_tokens(self.network.tokenizer, data, choices, max_length)
        self._gold[:] = gold
        self._single = single_tokens(ids, self.network)
        if self._single is None:
            examples = [with_choice(example, i) for example in data.examples for i in ids]
            self._with_choices = CachedDataset(
                self.network, Dataset(examples, data.n_units, data.rejected)
            )


def _keep(file: str, states: list[HiddenStates]) -> None:
    """Keep the hidden states of a file's records in this process, so that later evaluators need not
    compute them. States are kept for the newest _MOST files only; those of older files are
    dropped."""
    _states.pop(file, None)
    _states[file] = states
    for old in [*_states][:-_MOST]:
        del _states[old]


def _choice_tokens(
    tokenizer: PreTrainedTokenizerBase, data: Dataset, choices: Sequence[str], max_length: int
) -> tuple[list[list[int]], list[int]]:
    """Return two lists: the token ids of each choice, and for each record the number of the choice
    that is its completion.

    - tokenizer: the base's tokenizer
    - data: the evaluation records, tokenised by this tokenizer
    - choices: the texts in evaluation.choices
    - max_length: objective.max_length; if it cut a completion off, the error says so, instead of
      saying that the completion is no choice

    Errors: ConfigError if two choices have the same tokens, or one is empty; DataError if a
    completion is not a choice, or was cut off."""
    ids = choice_ids(tokenizer, choices)
    end = [tokenizer.eos_token_id]
    gold = []
    cut = 0
    # White space at the end is ignored, unless two choices differ by it alone.
    texts = [str(tokenizer.decode(i)).rstrip() for i in ids]
    texts = texts if len(set(texts)) == len(texts) else []
    for example in data.examples:
        target = example.target_ids[example.target_ids != NO_TARGET].tolist()
        choice_index = next((k for k, i in enumerate(ids) if target in (i, i + end)), -1)
        if choice_index < 0 and texts:
            said = str(tokenizer.decode(target[:-1] if target[-1:] == end else target)).rstrip()
            choice_index = texts.index(said) if said in texts else -1
        full = len(example.input_ids) >= max_length - 1
        cut += choice_index < 0 and full and any(target == i[: len(target)] for i in ids)
        gold.append(choice_index)
    of, unmatched = len(gold), gold.count(-1) - cut
    if unmatched:
        raise DataError(
            f"evaluation: {unmatched} of {of} completions are none of evaluation.choices",
            "each completion exactly as one of the choices, spaces at its start included",
        )
    if cut:
        raise DataError(
            f"evaluation: objective.max_length = {max_length} cuts {cut} of {of} completions off",
            "room for each prompt with its whole completion",
            "raise objective.max_length, or shorten the prompts",
        )
    return ids, gold


def _check(table: EvaluationTable, objective: str, record_format: RecordFormat) -> None:
    classify = record_format == "label"
    if (table.metric == "preference") != (record_format in PREFERENCES) and table.metric != "loss":
        raise ConfigError(
            f'evaluation.metric = "{table.metric}" does not fit objective {objective}',
            "loss or preference" if record_format in PREFERENCES else "another metric",
        )
    if classify and table.metric in ("perplexity", "exact_match"):
        raise ConfigError(
            f'evaluation.metric = "{table.metric}" does not fit objective classify',
            "loss, accuracy or f1",
        )
    if METRICS[table.metric].by_class and not classify and len(table.choices) < 2:
        raise ConfigError(
            f'evaluation.metric = "{table.metric}" needs evaluation.choices',
            "the possible completions, at least two",
        )
