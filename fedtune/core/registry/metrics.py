"""The table of the metrics that a report may hold: direction, bounds, interval, loggable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Values of evaluation.metric.
MetricName = Literal["loss", "perplexity", "exact_match", "accuracy", "f1", "preference"]


@dataclass(frozen=True)
class Metric:
    """A metric's properties.

    - higher_is_better: the direction
    - bounded: whether it lies between 0 and 1
    - share: whether it is a share of records, whose interval is Wilson's
    - by_class: whether it needs a class of each record
    - loggable: whether a log may hold it, since it is measured on public records each round
    """

    higher_is_better: bool
    bounded: bool = False
    share: bool = False
    by_class: bool = False
    loggable: bool = True


METRICS: dict[str, Metric] = {
    "loss": Metric(higher_is_better=False),
    "perplexity": Metric(higher_is_better=False),
    "exact_match": Metric(higher_is_better=True, bounded=True, share=True),
    "accuracy": Metric(higher_is_better=True, bounded=True, share=True, by_class=True),
    "f1": Metric(higher_is_better=True, bounded=True, by_class=True),
    "preference": Metric(higher_is_better=True, bounded=True, share=True),
    # Of pairs, beside the share in order: implied-reward margin, nats per token of the better
    # answers, nats per token from the base.
    "margin": Metric(higher_is_better=True),
    "chosen_logp": Metric(higher_is_better=True),
    "kl": Metric(higher_is_better=False),
    # Of a distilled student, and of an improved policy: in their reports alone.
    "divergence": Metric(higher_is_better=False, loggable=False),
    "reward": Metric(higher_is_better=True, loggable=False),
    "unscored": Metric(higher_is_better=False, bounded=True, loggable=False),
}
OTHER = Metric(higher_is_better=True, loggable=False)  # of a report by another release


def metric(name: object) -> Metric:
    """Look up a metric by name; OTHER if this release does not know it."""
    return METRICS.get(str(name), OTHER)
