"""Audit one training run: fair coins decide which canaries (test units) are included, and the audit
guesses the coins."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedtune.audit.bounds import one_run_epsilon
from fedtune.audit.gaussian import CEILING, CONFIDENCE
from fedtune.core.bases.find import find_base
from fedtune.core.config import Study
from fedtune.core.data.dataset import Dataset
from fedtune.core.dp import accountant, clip
from fedtune.core.dp.plan import DpPlan, plan_for_site
from fedtune.core.dp.steplog import events
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import Arrays
from fedtune.core.models.network import Network
from fedtune.core.models.tiny import generate_records, tiny_network
from fedtune.core.training.local_round import local_round
from fedtune.core.training.selftest import MemoryLog
from fedtune.core.training.unit_gradients import UnitGradientEngine

# Fixed before anything is measured.
CANARIES = 1024
GUESSED = 0.25  # share of the canaries that are guessed, those with the most extreme scores
MOST_STEPS = 20  # the largest number of steps; the claimed ε is that of the steps that ran


@dataclass(frozen=True)
class OneRun:
    """The result of the audit of one run.

    - m: the number of canaries (test units), for each of which a coin decided whether it was
      included
    - guesses, correct: how many of the coins were guessed, and how many of the guesses were right
    - claimed: ε of the `steps` that ran
    - audited, ceiling: lower bounds on ε at 95 % and at 99.9 % confidence, which assume nothing
      about the mechanism"""

    m: int
    guesses: int
    correct: int
    steps: int
    delta: float
    claimed: float
    audited: float
    ceiling: float

    @property
    def passed(self) -> bool:
        return self.ceiling <= self.claimed


def one_run(
    study: Study, network: Network | None = None, canaries: int = CANARIES, steps: int = MOST_STEPS
) -> OneRun:
    """Train `study` once on generated canaries (test units), with the shipped code of a site's
    round, and guess which of them were included. Return how many guesses were made and how many of
    them were right, with the claimed ε and the lower bounds on it.

    - study: a private study; its optimiser and its bound C are replaced as described below
    - network: the network to train, by default the study's architecture at tiny size
    - canaries: the largest number of canaries. It is reduced to half of the number of trained
      parameters, since more canaries would hide each other. A canary is one unit: a record of
      random tokens or, if records are drawn, as many equal records as the plan allows a unit.
    - steps: the largest number of steps; the plan's own number if that is smaller

    The attacker sees every update that leaves the site and knows all canaries. The optimiser is SGD
    with one local step, so that an update holds all of the noised sum (any other optimiser is
    post-processing of it). C is a quarter of the canaries' median gradient norm, so that nearly all
    are clipped; ε does not depend on C.
    Guarantee: no record is read. If the training loop is correct, `ceiling`, the lower bound at
    99.9 % confidence, exceeds the claimed ε with probability below 10⁻³.
    Reference: Steinke, Nasr & Jagielski 2023, "Privacy auditing with one (1) training run"."""
    network = network or tiny_network(study, find_base(study.base.model, study.base.digest))
    start = network.trainable()
    canaries = max(2, min(canaries, sum(a.size for a in start.values()) // 2))
    training = study.training.model_copy(
        update={"optimizer": "sgd", "local_steps": 1, "weight_decay": 0.0, "proximal_mu": 0.0}
        | {"learning_rate_schedule": "constant"}
    )
    loop = study.model_copy(update={"training": training})
    plan = plan_for_site(study, canaries)
    canary_units = _canaries(study, network, canaries)
    engine = UnitGradientEngine(
        CachedDataset(network, canary_units),
        study.objective.resolved,
        study.sampling_unit,
        study.training.engine,
    )
    norms = engine.matrix(range(engine.n_rows)).norm(dim=1)
    plan = replace(plan, max_grad_norm=float(norms.median()) / 4)
    coins = np.unpackbits(np.frombuffer(os.urandom(-(-canaries // 8)), np.uint8))[:canaries] > 0
    member = CachedDataset(network, _select_members(canary_units, coins))
    log = MemoryLog()
    attacker = _Attacker(plan, canaries)
    adapter = start
    with network.loaded(trainable=start):
        for round_ in range(1, min(steps, plan.steps) + 1):
            clipped = _clip_units(engine, canary_units, plan)
            update = local_round(loop, member, plan, log, round_, adapter)
            attacker.observe(clipped, _sum(update, plan, training.learning_rate))
            adapter = {name: a + update.get(name, 0) for name, a in adapter.items()}
            network.load_trainable(adapter)
    claimed = accountant.epsilon(events(log.steps()), plan.delta)
    return _result(attacker.scores(), coins, len(log.lines), plan.delta, claimed)


def _result(
    scores: np.ndarray, coins: np.ndarray, steps: int, delta: float, claimed: float
) -> OneRun:
    """Guess the coins of the canaries with the lowest and with the highest scores, and bound ε by
    the number of right guesses.

    - scores: (canaries,), higher for a canary that more probably took part
    - coins: bool (canaries,), whether each canary took part
    - steps: the number of steps that ran
    - delta: the plan's δ
    - claimed: ε of these steps at this δ"""
    per_side = max(1, int(len(coins) * GUESSED / 2))
    order = np.argsort(scores)
    correct = int(coins[order[-per_side:]].sum() + (~coins[order[:per_side]]).sum())
    m, guesses = len(coins), 2 * per_side
    return OneRun(
        m=m,
        guesses=guesses,
        correct=correct,
        steps=steps,
        delta=delta,
        claimed=claimed,
        audited=one_run_epsilon(m, guesses, correct, delta, CONFIDENCE),
        ceiling=one_run_epsilon(m, guesses, correct, delta, CEILING),
    )


class _Attacker:
    """Estimates which canaries took part in training, by a regression of the noised sums on the
    canaries' clipped gradients.

    Each sum is q G'b + noise, where G holds the canaries' clipped gradients, and b is 1 for each
    canary that took part, else 0. The noise's standard deviation is estimated outside the span of
    G, so that a run with less noise than claimed is attacked at its actual noise. A canary's score
    is the posterior mean of its b under a Gaussian prior of variance 1/4; it is the best linear
    estimate. The evidence of all rounds is added up."""

    def __init__(self, plan: DpPlan, canaries: int) -> None:
        self._rate = plan.sampling_rate
        self._least = (1e-3 * plan.max_grad_norm) ** 2
        self._precision = 4.0 * np.eye(canaries)
        self._evidence = np.zeros(canaries)

    def observe(self, gradients: torch.Tensor, noised_sum: np.ndarray) -> None:
        """Add the evidence of one step. gradients: (canaries, d), the vector that each canary adds
        to the sum if it is drawn; noised_sum: (d,)."""
        expected = gradients.numpy() * self._rate
        gram, projection = expected @ expected.T, expected @ noised_sum
        ridge = 1e-9 * np.trace(gram) / len(gram) * np.eye(len(gram))
        outside = noised_sum @ noised_sum - projection @ np.linalg.solve(gram + ridge, projection)
        variance = max(self._least, float(outside) / (expected.shape[1] - len(expected)))
        self._precision += gram / variance
        self._evidence += (projection - gram.sum(axis=1) / 2) / variance

    def scores(self) -> np.ndarray:
        return np.asarray(np.linalg.solve(self._precision, self._evidence))


def _canaries(study: Study, network: Network, count: int) -> Dataset:
    single = generate_records(study, network, [1] * count, stream=1)
    copies = study.records_per_draw
    examples = [example for example in single.examples for _ in range(copies)]
    return Dataset(examples, count, Counter())


def _select_members(everyone: Dataset, coins: np.ndarray) -> Dataset:
    new_index = np.cumsum(coins) - 1
    members = [e for e in everyone.examples if coins[e.unit]]
    renamed = [replace(e, unit=int(new_index[e.unit])) for e in members]
    return Dataset(renamed, int(coins.sum()), Counter())


def _clip_units(engine: UnitGradientEngine, everyone: Dataset, plan: DpPlan) -> torch.Tensor:
    """Compute what each canary adds to a step's sum if it is drawn: the sum of its rows' clipped
    gradients, fp64 (canaries, d). everyone: the records of all canaries; each has the same number
    of rows."""
    rows = engine.matrix(range(engine.n_rows))
    parts = clip.clip(rows, plan.max_grad_norm, plan.clipping, plan.gamma)
    return parts.view(everyone.n_units, plan.records, -1).sum(dim=1)


def _sum(update: Arrays, plan: DpPlan, learning_rate: float) -> np.ndarray:
    """Recover from the update of one SGD step the noised sum (d,) that it was made of."""
    flat = np.concatenate([update[name].ravel() for name in sorted(update)])
    return flat.astype(np.float64) * (-plan.divisor / learning_rate)
