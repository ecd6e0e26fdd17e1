"""Define the measures of a model on records, each a function of sums over patients.

A measure is computed from a few numbers for each record, which are added up over a patient's
records and then over patients. So a resample of patients costs one product of matrices, whatever
the measure.

| measure          | definition                                                             |
| accuracy, exact_match, preference | share of records that are right, as in report.scores  |
| recall: CLASS    | share of a class's records that are predicted as this class            |
| f1               | macro F1 over the classes that occur                                   |
| loss             | mean over records                                                      |
| perplexity       | exponential of the mean loss over tokens                               |
| ece              | expected calibration error: over BINS equal bins of the chosen class's |
|                  | probability, how far it is from the share that is right, weighted by   |
|                  | records (Naeini et al. 2015)                                           |
| overconfidence   | mean probability of the chosen class, minus the share that is right    |"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.core.registry.metrics import METRICS
from fedtune.report.scores import Scores

Array = npt.NDArray[np.float64]
BINS = 10
RECALL = "recall: "  # before a class's name, in the name of a measure
GAP = "overconfidence"


@dataclass(frozen=True)
class Measure:
    """A measure of a model.

    - parts: computes d numbers for each of n records, (n, d)
    - figure: computes the measure from the sums (…, d) of these numbers over some patients' records
    - share: whether the measure is a share of records. Each record then has two numbers: whether it
      counts as a success, and whether it is in the share's denominator
    - macro: whether classes count equally, however few their records are
    - errs: true for f1 and ece. If the sample has only right answers or only wrong ones, resamples
      show nothing of what the model does on other records, so that the interval of such a measure
      is widened (`Sample.bound_unseen`)"""

    name: str
    higher_is_better: bool
    parts: Callable[[Scores], Array]
    figure: Callable[[Array], Array]
    share: bool = False
    macro: bool = False
    errs: bool = False


def measures_of(scores: Scores, labels: Sequence[str]) -> dict[str, Measure]:
    """Return name → measure, for all measures that can be computed for the scored records. Which
    measures these are depends on the kind of record: pairs of answers, texts, or records of
    classes. scores: a model's scores on the records. labels: the names of classes or choices."""
    if scores.pairs is not None or scores.margin.any():
        return {m.name: m for m in (_mean("preference", _in_order, share=True), _LOSS)}
    if scores.confidence is None:
        exact = _mean("exact_match", lambda s: s.exact.astype(float), share=True)
        return {m.name: m for m in (_LOSS, _PERPLEXITY, exact)}
    classes = [_recall(index, name) for index, name in enumerate(labels)]
    found = (
        _mean("accuracy", _mark_right, share=True),
        _f1(len(labels)),
        _LOSS,
        _ECE,
        _GAP,
        *classes,
    )
    return {m.name: m for m in found}


def _mark_right(scores: Scores) -> Array:
    return np.asarray(scores.chosen == scores.gold, dtype=float)


def _in_order(scores: Scores) -> Array:
    return np.asarray((1 + np.sign(scores.margin)) / 2, dtype=float)


def _ratio(sums: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def _mean(name: str, value: Callable[[Scores], Array], *, share: bool = False) -> Measure:
    def parts(scores: Scores) -> Array:
        values = value(scores)
        return np.stack([values, np.ones(len(values))], axis=1)

    higher = METRICS[name].higher_is_better if name in METRICS else False
    return Measure(name, higher, parts, _ratio, share=share)


def _recall(index: int, name: str) -> Measure:
    def parts(scores: Scores) -> Array:
        own = scores.gold == index
        return np.stack([own & (scores.chosen == index), own], axis=1).astype(float)

    return Measure(RECALL + name, True, parts, _ratio, share=True)


def _f1(classes: int) -> Measure:
    def parts(scores: Scores) -> Array:
        indices = np.arange(classes)
        gold, chosen = scores.gold[:, None] == indices, scores.chosen[:, None] == indices
        return np.concatenate([gold & chosen, gold.astype(int) + chosen], axis=1).astype(float)

    def figure(sums: Array) -> Array:
        right, all_ = sums[..., :classes], sums[..., classes:]
        by_class = np.divide(2 * right, all_, out=np.zeros_like(right), where=all_ > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(by_class.sum(axis=-1) / (all_ > 0).sum(axis=-1))

    return Measure("f1", True, parts, figure, macro=True, errs=True)


def bins_of(scores: Scores) -> Array:
    """Return an array (n, BINS, 3) that sorts n records into bins by the probability of the chosen
    class. In the bin of this probability a record has three values: 1, the probability, and whether
    the class is right. In all other bins the record has zeros."""
    assert scores.confidence is not None
    at = np.minimum((scores.confidence * BINS).astype(int), BINS - 1)
    cells = np.zeros((len(at), BINS, 3))
    said = np.stack([np.ones(len(at)), scores.confidence, _mark_right(scores)], axis=1)
    cells[np.arange(len(at)), at] = said
    return cells


def _ece(sums: Array) -> Array:
    cells = sums.reshape(*sums.shape[:-1], BINS, 3)
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = np.abs(cells[..., 1] - cells[..., 2]).sum(axis=-1)
        return np.asarray(gap / cells[..., 0].sum(axis=-1))


def _perplexity(sums: Array) -> Array:
    return np.asarray(np.exp(np.minimum(_ratio(sums), 700.0)))


def _token_losses(scores: Scores) -> Array:
    return np.stack([scores.loss * scores.tokens, scores.tokens], axis=1)


_LOSS = _mean("loss", lambda scores: scores.loss)
_PERPLEXITY = Measure("perplexity", False, _token_losses, _perplexity)
_ECE = Measure("ece", False, lambda s: bins_of(s).reshape(len(s.loss), -1), _ece, errs=True)
_GAP = _mean(GAP, lambda s: np.asarray(s.confidence) - _mark_right(s))
