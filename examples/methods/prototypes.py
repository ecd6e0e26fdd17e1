"""DP prototypes: one noised mean a class on a frozen encoder, and the nearest of them.

What: Wahdany, Jagielski, Dziedzic and Boenisch 2025, "Differentially private prototypes for
imbalanced transfer learning" (AAAI, arXiv:2406.08039), DPPL-Mean: the mean of each
class's features is released with noise once, and a text has the class of the nearest mean (Snell
et al. 2017, "Prototypical networks for few-shot learning", section 2.3).

Carried by a strategy beside fedtune's objective `prototypes`, which sums features of length 1 at
most by class, with a count in each class's last column, under one clip. Dividing the noised sum by
the noised count gives the class's prototype. Differences from the paper: features are projected on
public directions, of which the sections' descriptions span fewer than the encoder has; a count is
released too, since the number of a class's records is private; the noise is Gaussian, where the
paper's is that of pure or concentrated DP. fedtune's own `discriminant` uses the same sums and adds
what public records say: priors of the means and a covariance.

Guarantee: a record is in one class, so one clip of its row bounds what it does to all sums and
counts together; everything here is post-processing of their noised sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from examples.methods import Settings
from examples.write import Table
from fedtune.strategies._posterior import Head
from fedtune.strategies.discriminant import DIRECTIONS, MEAN, NOISED, PRECISION, Discriminant


@dataclass
class NearestMean(Discriminant):
    """Build a head that finds the nearest of the classes' noised means; a class of less than one
    unit by its noised count has its mean at the centre of the public records."""

    def make_head(self) -> Head:
        """Build the head of all rounds so far: logits -‖f - p‖²/2 + ‖f‖²/2 = p·f - ‖p‖²/2."""
        sums = self._state[NOISED] / float(self._state[PRECISION])
        counts = sums[:, -1:] / self._count_weight
        means = np.where(counts >= 1, sums[:, :-1] / np.maximum(counts, 1), 0.0)
        weight = means @ self._state[DIRECTIONS][: self._released]
        bias = -(means**2).sum(axis=1) / 2 - weight @ self._state[MEAN]
        return replace(super().make_head(), weight=weight, bias=bias)


def statistics(strategy: str) -> Table:
    """Make the changes to a plan by which its sites send class statistics, and `strategy` makes a
    head of them. The public records are the sections' descriptions, see `compare`."""
    return {
        "start": None,
        "lora": None,
        "objective": {"name": "prototypes", "options": {"directions": 19, "count_weight": 0.5}},
        "public": {
            "path": "public.jsonl",
            "licence": "CC BY 4.0",
            "columns": {"text": "dialogue", "label": "section"},
        },
        "training": {"rounds": 1, "sampling_rate": 1.0, "learning_rate": 1.0},
        "clipping": {"max_grad_norm": 1.1181, "mode": "flat"},
        "strategy": {"name": strategy, "weights": "declared", "options": None},
    }


PLANS: dict[str, Table] = {"mts_dialog": statistics("nearest_mean")}


def _directions(*numbers: int) -> list[Table]:
    return [{"objective": {"options": {"directions": number}}} for number in numbers]


TRIED: dict[str, Settings] = {
    "mts_dialog": {epsilon: _directions(8, 13, 19) for epsilon in (1.0, 3.0, 8.0)}
}
