"""Class prototypes: one noised sum of vectors for each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedtune.core.objectives._interface import Batch, Network, Objective, RecordFormat, require
from fedtune.core.registry.arrays import MOST_DIRECTIONS

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prototypes(Objective):
    """Sums of the records' vectors by class, and the classes' counts, from which the coordinator
    makes a linear classifier.

    A record's statistics are a matrix with one row for each class. The frozen base's vector of the
    record is projected on `directions` public directions and bounded to length 1; it stands in the
    row of the record's class, followed by `count_weight`. The loss is minus the inner product of
    this matrix with the trained sums, so that its gradient is minus the record's statistics,
    whatever was trained before. All that is done with their noised sum is post-processing.
    | a label that is none of the classes, a vector that is not finite | statistics of zero |

    Reference: Snell et al. 2017, "Prototypical networks for few-shot learning", section 2.3 (class
    means as a classifier); Hastie et al. 2009, "The elements of statistical learning", section 4.3
    (linear discriminants)."""

    record_format: ClassVar[RecordFormat] = "label"

    directions: int = 32
    count_weight: float = 0.5

    def __post_init__(self) -> None:
        limit = MOST_DIRECTIONS
        require(1 <= self.directions <= limit, "directions", f"a number from 1 to {limit}")
        require(0.01 <= self.count_weight <= 100, "count_weight", "a number from 0.01 to 100")

    @property
    def outputs(self) -> int:
        return len(self.labels)

    def may_run_beside(self, batch: Batch) -> bool:
        return True

    def losses(self, network: Network, batch: Batch) -> torch.Tensor:
        """Compute the loss of each record, (B,) fp32: minus the inner product of its statistics
        with the trained sums. The statistics are a matrix with the features of the record's vector
        and `count_weight` in the row of its class, and zeros elsewhere."""
        hidden = network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)
        vectors = network.pool(hidden, batch.mask)
        products = network.class_sums(vectors, self.count_weight)
        own = products.gather(1, batch.label.clamp_min(0)[:, None])[:, 0]
        return -own * (batch.label >= 0)
