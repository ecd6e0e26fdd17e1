"""A site's local round: noised steps on its own adapter copy, and the difference they made."""

from __future__ import annotations

import torch

from fedtune.config import Study
from fedtune.dp.plan import StepPlan
from fedtune.dp.steplog import StepLog
from fedtune.errors import ModelError
from fedtune.models.cache import CachedDataset
from fedtune.models.lora import LARGEST, Arrays
from fedtune.models.network import Network
from fedtune.models.random_records import random_records
from fedtune.models.rank_slice import ALL, slice_update
from fedtune.objectives import resolve
from fedtune.training.unit_gradients import UnitGradientEngine


def local_round(
    study: Study,
    data: CachedDataset,
    plan: StepPlan,
    log: StepLog,
    round_: int,
    adapter: Arrays,
    recompute: bool = False,
    columns: slice = ALL,
) -> Arrays:
    """`local_steps` steps from `adapter`; returns trained minus given, fp32 by name.
    recompute: keep no activations within a block; Opacus' hooks cannot, and go without. columns:
    of each B these alone are trained, and returned; the others stay as given.

    Only the noised mean gradient reaches the optimiser, so momentum, decay and the proximal term
    (Li et al. 2020) are post-processing. The optimiser starts afresh each round: nothing of a
    round is left behind but its update."""
    network = data.network
    network.load_trainable(adapter)
    engine = UnitGradientEngine(
        data,
        resolve(study.objective),
        by=study.drawn,
        engine=study.training.engine,
        columns=columns,
    )
    optimizer = _optimizer(study, engine.trained)
    start = [t.clone() for t in engine.trained]
    for _ in range(study.training.local_steps):
        with network.recomputing(recompute and engine.name == "one-pass"):
            noised = plan.step(engine.n_rows, engine.dimension, engine, log, round_)
        pieces = torch.split(noised, [t.numel() for t in engine.trained])
        for part, piece, before in zip(engine.trained, pieces, start, strict=True):
            pull = study.training.proximal_mu * (part - before)
            part.grad = piece.view(part.shape).to(part) + pull
        optimizer.step()
        optimizer.zero_grad()
        for part in engine.trained:  # noised values: nothing that a site computes from is larger
            part.clamp_(-LARGEST, LARGEST)
    trained = network.trainable()
    network.load_trainable(adapter)
    return slice_update({name: trained[name] - adapter[name] for name in trained}, columns)


def _optimizer(study: Study, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    t = study.training
    kind = torch.optim.SGD if t.optimizer == "sgd" else torch.optim.AdamW
    return kind(parameters, lr=t.learning_rate, weight_decay=t.weight_decay)


def check_trains(study: Study, network: Network, columns: slice = ALL) -> None:
    """One σ = 0 step on generated records must move the adapter and lower their loss, and the rows
    of a private study must not depend on how many there are.

    Under DP the noise moves every adapter, so movement in a real round proves nothing; a wiring
    fault that spends ε and learns nothing shows here, before any is spent.
    Errors: ModelError."""
    data = CachedDataset(network, random_records(network, study))
    objective, wanted = resolve(study.objective), study.training.engine
    engine = UnitGradientEngine(data, objective, engine=wanted, columns=columns)
    with network.loaded():
        loss = _mean_loss(data, study)
        n = data.dataset.n_units
        rows, some = engine.matrix(range(n)), list(range(n - 1, n // 3, -1))
        same = torch.equal(engine.matrix(some), rows[some])
        gradient = rows.mean(dim=0)
        norm = float(gradient.norm())
        # How far a step may go depends on the base; the direction must help at some length.
        lowered = norm > 0 and any(
            _loss_after(data, study, engine, gradient, length / norm) < loss
            for length in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
        )
    if study.private and not same:
        raise ModelError(
            "this machine gives a record another gradient when others are beside it",
            "the same, to the last bit",
            "another processor or build of PyTorch; no ε was spent",
        )
    if not lowered:
        raise ModelError(
            "a step without noise on generated records did not lower their loss",
            "the adapter to learn",
            "check lora.modules and base; no ε was spent",
        )


def _loss_after(
    data: CachedDataset,
    study: Study,
    engine: UnitGradientEngine,
    gradient: torch.Tensor,
    rate: float,
) -> float:
    start = [t.clone() for t in engine.trained]
    pieces = torch.split(gradient, [t.numel() for t in engine.trained])
    for part, piece in zip(engine.trained, pieces, strict=True):
        part.sub_(rate * piece.view(part.shape).to(part))
    loss = _mean_loss(data, study)
    for part, old in zip(engine.trained, start, strict=True):
        part.copy_(old)
    return loss


@torch.no_grad()
def _mean_loss(data: CachedDataset, study: Study) -> float:
    objective = resolve(study.objective)
    everything = range(len(data.dataset.examples))
    return float(
        torch.cat([objective.losses(data.network, b) for b in data.batches(everything)]).mean()
    )
