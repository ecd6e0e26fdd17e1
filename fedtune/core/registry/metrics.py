"""List the metrics that a report may hold, and say of each how it is read (`Metric`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Values of evaluation.metric.
MetricName = Literal["loss", "perplexity", "exact_match", "accuracy", "f1", "preference"]


@dataclass(frozen=True)
class Metric:
    """A metric's properties.

    - higher_is_better: whether a larger value is better
    - bounded: whether it lies between 0 and 1
    - share: whether it is a share of records, whose interval is then Wilson's
    - by_class: whether it can be measured only if each record has a class
    - loggable: whether a log may hold it, because it is measured on public records in each round"""

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
    # Of preference pairs: the implied reward's margin, the better answers' nats per token, and the
    # divergence from the base in nats per token.
    "margin": Metric(higher_is_better=True),
    "chosen_logp": Metric(higher_is_better=True),
    "kl": Metric(higher_is_better=False),
    # Only in the reports of a distilled student and of an improved policy.
    "divergence": Metric(higher_is_better=False, loggable=False),
    "reward": Metric(higher_is_better=True, loggable=False),
    "unscored": Metric(higher_is_better=False, bounded=True, loggable=False),
}
OTHER = Metric(higher_is_better=True, loggable=False)  # a metric of another release's report


def metric(name: object) -> Metric:
    """Return the properties of the metric `name`; OTHER if this release does not know it."""
    return METRICS.get(str(name), OTHER)
