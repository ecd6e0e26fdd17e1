"""Hold a model's scores on records, and compute the metrics from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fedtune.evaluation.pairs import PairScores

# The fields of Scores from which each metric is computed.
FIELDS = {
    "loss": ("loss",),
    "perplexity": ("loss", "tokens"),
    "exact_match": ("exact",),
    "preference": ("margin",),
    "accuracy": ("chosen", "gold"),
    "f1": ("chosen", "gold"),
}
Columns = Mapping[str, Sequence[float]]


@dataclass
class Scores:
    """A model's scores on n records.

    - loss: (n,) in nats, the mean over a record's target tokens. If the records are pairs of
      answers or judged completions, it is the objective's loss
    - tokens: (n,) number of target tokens
    - exact: (n,) whether greedy decoding gives the completion exactly
    - chosen, gold: (n,) index of the class that the model chose, and of the right one; -1 without
      classes
    - margin: (n,) how much the better completion of a pair is preferred; below 0 if the worse one
      is preferred
    - pairs: likelihoods and lengths of the answers, if the records are pairs of answers; else None
    - confidence: (n,) probability of the chosen class, None without classes"""

    loss: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray
    chosen: np.ndarray
    gold: np.ndarray
    margin: np.ndarray
    pairs: PairScores | None = None
    confidence: np.ndarray | None = None

    def with_rows_of(self, other: Scores, rows: np.ndarray) -> Scores:
        """Return a copy of these scores in which some records have the scores of `other`: those for
        which the mask `rows`, (n,), is true. The copy has no `pairs` and no `confidence`."""
        return Scores(
            loss=np.where(rows, other.loss, self.loss),
            tokens=np.where(rows, other.tokens, self.tokens),
            exact=np.where(rows, other.exact, self.exact),
            chosen=np.where(rows, other.chosen, self.chosen),
            gold=np.where(rows, other.gold, self.gold),
            margin=np.where(rows, other.margin, self.margin),
        )

    def columns(self, metric: str) -> dict[str, list[float]]:
        """Return those fields of the scores from which `metric` is computed: name of the field ->
        one number for each record."""
        return {name: np.asarray(getattr(self, name), float).tolist() for name in FIELDS[metric]}

    @classmethod
    def of_columns(cls, columns: Columns) -> Scores:
        """Build scores from some of their fields, name -> (n,) numbers, as `columns` returns them;
        the other fields are filled with zeros. Errors: ValueError if the fields differ in length or
        hold a number that is not finite."""
        given = {name: np.array(column, float) for name, column in columns.items()}
        n = len(next(iter(given.values())))
        if any(array.shape != (n,) or not np.isfinite(array).all() for array in given.values()):
            raise ValueError("the columns of scores have different lengths, or a number not finite")
        none = dict.fromkeys(("loss", "tokens", "exact", "chosen", "gold", "margin"), np.zeros(n))
        return cls(**(none | given))

    def value(self, metric: str, rows: np.ndarray | slice = slice(None)) -> float:
        """Compute a metric over all records, or over those that `rows` selects: a slice, or an
        array of indices or booleans."""
        loss, tokens = self.loss[rows], self.tokens[rows]
        if metric == "loss":
            return float(loss.mean())
        if metric == "perplexity":  # a mean over tokens, not over records
            return float(np.exp(min((loss * tokens).sum() / tokens.sum(), 700.0)))
        if metric == "exact_match":
            return float(self.exact[rows].mean())
        if metric == "preference":  # a tie counts as half a win
            margin = self.margin[rows]
            return float((margin > 0).mean() + (margin == 0).mean() / 2)
        chosen, gold = self.chosen[rows], self.gold[rows]
        return float((chosen == gold).mean()) if metric == "accuracy" else _f1(chosen, gold)


def _f1(chosen: np.ndarray, gold: np.ndarray) -> float:
    """Compute macro F1 over the classes that occur in `gold` or `chosen`."""
    per_class = [
        2 * ((chosen == k) & (gold == k)).sum() / ((chosen == k).sum() + (gold == k).sum())
        for k in np.union1d(chosen, gold)
    ]
    return float(np.mean(per_class))
