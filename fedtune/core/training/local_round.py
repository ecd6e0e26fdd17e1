"""Train a site's local round: noised steps on its copy of the adapter give the update."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from fedtune.core.config import Study
from fedtune.core.dp.mechanism import RowGradients
from fedtune.core.dp.plan import StepPlan
from fedtune.core.dp.steplog import StepLog
from fedtune.core.errors import ModelError
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import LARGEST, Arrays
from fedtune.core.models.network import Network
from fedtune.core.models.random_records import random_records
from fedtune.core.models.rank_slice import ALL
from fedtune.core.progress import report
from fedtune.core.training.round_loss import RoundLoss
from fedtune.core.training.unit_gradients import UnitGradientEngine


def local_round(
    study: Study,
    data: CachedDataset,
    plan: StepPlan,
    log: StepLog,
    round_: int,
    adapter: Arrays,
    recompute: bool = False,
    columns: slice = ALL,
    losses: RoundLoss | None = None,
) -> Arrays:
    """Train `local_steps` steps from `adapter`. Return what they changed, the trained arrays minus
    `adapter`, in fp32 by name.

    - study: the plan, whose [training] and [objective] say how a step is computed
    - data: the site's tokenised records, with the network that trains
    - plan: draws each step's rows (units or records) and, in a private study, clips their gradients
      and adds the noise
    - log: the site's step log, in which `plan` writes each noised step
    - round_: the round's number, from 1, for the learning rate and the log
    - adapter: the trainable arrays with which the round starts, by name; the network holds them
      again afterwards
    - recompute: whether to use activation checkpointing; ignored with Opacus' engine, whose hooks
      do not work with it
    - columns: the columns of each B that are trained and returned; by default all
    - losses: an object to which the records' losses are added; they are private and not returned.
      None: they are not recorded

    If a B has a public preconditioner M, the steps train a tensor X with B = B₀ + M X, and the
    change of X is returned for this B: the noise in X is the same in every direction. Only the
    noised mean gradient reaches the optimiser, so momentum, decay and the proximal term (Li et al.
    2020) are post-processing. The optimiser starts afresh each round, so that a round leaves no
    state but its update."""
    network = data.network
    network.load_trainable(adapter)
    objective = study.objective.resolved
    engine = UnitGradientEngine(
        data,
        objective,
        sampling_unit=study.sampling_unit,
        engine=study.training.engine,
        columns=columns,
        losses=None if objective.directions else losses,  # meaningless for class statistics
    )
    optimizer = _optimizer(study, engine.trained, round_)
    start = [t.clone() for t in engine.trained]
    for step in range(study.training.local_steps):
        rows = _report_progress(engine, step, study.training.local_steps)
        with network.recomputing(recompute and engine.name == "one-pass"):
            noised = plan.step(engine.n_rows, engine.dimension, rows, log, round_)
        gradients = torch.split(noised, [t.numel() for t in engine.trained])
        for parameter, gradient, initial in zip(engine.trained, gradients, start, strict=True):
            proximal = study.training.proximal_mu * (parameter - initial)
            parameter.grad = gradient.view(parameter.shape).to(parameter) + proximal
        optimizer.step()
        optimizer.zero_grad()
        for parameter in engine.trained:  # noised values; no adapter may have larger entries
            parameter.clamp_(-LARGEST, LARGEST)
        engine.write()
    changes = zip(network.update_parameters(), engine.trained, start, strict=True)
    update = {name: (now - before).cpu().numpy() for name, now, before in changes}
    network.load_trainable(adapter)
    return update


def local_sum(
    study: Study,
    data: CachedDataset,
    plan: StepPlan,
    log: StepLog,
    round_: int,
    adapter: Arrays,
    recompute: bool = False,
    losses: RoundLoss | None = None,
) -> npt.NDArray[np.int64]:
    """Compute what a site contributes to a round of shared noise: the sum of its rows' clipped
    gradients, with this site's share of the noise. Return it in multiples of the plan's grid, int64
    (d,), all tensors one after another in the order of their names, as on the wire.

    - study: the plan, whose [objective] and [training] say how the gradients are computed
    - data: the site's tokenised records, with the network
    - plan: draws the rows (units or records), clips their gradients and, in a private study, adds
      this site's share of the noise
    - log: the site's step log, in which `plan` writes the noised step
    - round_: the round's number, from 1, for the log
    - adapter: the trainable arrays at which the gradients are computed, by name
    - recompute: whether to use activation checkpointing; ignored with Opacus' engine
    - losses: an object to which the records' losses are added; they are private and not returned.
      None: they are not recorded

    No optimiser runs here. It runs at the coordinator, on the mean of all sites."""
    network = data.network
    network.load_trainable(adapter)
    objective, unit = study.objective.resolved, study.sampling_unit
    name = study.training.engine
    heard = None if objective.directions else losses  # meaningless for class statistics
    engine = UnitGradientEngine(data, objective, unit, name, losses=heard)
    with network.recomputing(recompute and engine.name == "one-pass"):
        rows = _report_progress(engine, 0, 1)
        total = plan.noised_sum(engine.n_rows, engine.dimension, rows, log, round_)
    parts = torch.split(total, [t.numel() for t in engine.trained])
    by_name = dict(zip(network.update_parameters(), parts, strict=True))
    return np.concatenate([by_name[key].numpy() for key in sorted(by_name)])


def _report_progress(engine: UnitGradientEngine, step: int, steps: int) -> RowGradients:
    """Return a function that computes rows' gradients as `engine` does, and meanwhile shows on this
    machine's screen how much of the round is done. The screen shows steps and per cent of a step,
    never the number of drawn rows. step: the number of the step, from 0; steps: how many steps the
    round has."""

    def on_work(done: int, total: int) -> None:
        report("training", 100 * step + 100 * done // total, 100 * steps)

    return partial(engine, on_work=on_work)


def _optimizer(study: Study, parameters: list[torch.Tensor], round_: int) -> torch.optim.Optimizer:
    t = study.training
    kind = torch.optim.SGD if t.optimizer == "sgd" else torch.optim.AdamW
    return kind(parameters, lr=t.rate(round_), weight_decay=t.weight_decay)


def check_trains(study: Study, network: Network, columns: slice = ALL) -> None:
    """Check on generated records that a step without noise lowers their loss and, in a private
    study, that a row's gradient does not depend on how many other rows are computed with it.
    network: the network that the site built for the study; columns: the columns of each B that the
    site trains, by default all.

    In a real round the noise moves the adapter even if nothing is learned, so a wiring fault would
    spend ε unnoticed. This check finds the fault before any ε is spent. Errors: ModelError."""
    data = CachedDataset(network, random_records(network, study))
    objective, engine_name = study.objective.resolved, study.training.engine
    engine = UnitGradientEngine(data, objective, engine=engine_name, columns=columns)
    n = data.dataset.n_units
    subset = list(range(n - 1, n // 3, -1))
    with network.loaded(trainable=_scatter(network.trainable())):  # B and a head are 0 at first
        independent = torch.equal(engine.matrix(subset), engine.matrix(range(n))[subset])
    with network.loaded():
        loss = _mean_loss(data, study)
        gradient = engine.matrix(range(n)).mean(dim=0)
        norm = float(gradient.norm())
        # How far a step may go depends on the base; the direction must help at some length.
        lowered = norm > 0 and any(
            _loss_after(data, study, engine, gradient, length / norm) < loss
            for length in (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
        )
    if study.private and not independent:
        raise ModelError(
            "on this machine a record's gradient depends on the other records of its batch",
            "equal gradients, to the last bit",
            "use another processor or build of PyTorch; no ε was spent",
        )
    if not lowered:
        raise ModelError(
            "a step without noise on generated records did not lower their loss",
            "a lower loss",
            "check lora.modules and base; no ε was spent",
        )


def _scatter(arrays: Arrays) -> Arrays:
    """Add random numbers to each entry of `arrays`, as large as those of a trained adapter."""
    draw = np.random.default_rng(0)
    return {
        name: array + (0.1 * draw.standard_normal(array.shape)).astype(array.dtype)
        for name, array in arrays.items()
    }


def _loss_after(
    data: CachedDataset,
    study: Study,
    engine: UnitGradientEngine,
    gradient: torch.Tensor,
    rate: float,
) -> float:
    """Move the trained tensors by -`rate` · `gradient`, compute the mean loss of `data` there, move
    the tensors back, and return the loss.

    - data: the generated records, with the network
    - study: the plan, whose objective gives the loss
    - engine: holds the trained tensors, and writes them to the network
    - gradient: the gradient of all trained tensors, one after another, (d,)"""
    start = [t.clone() for t in engine.trained]
    steps = torch.split(gradient, [t.numel() for t in engine.trained])
    for parameter, step in zip(engine.trained, steps, strict=True):
        parameter.sub_(rate * step.view(parameter.shape).to(parameter))
    engine.write()
    loss = _mean_loss(data, study)
    for parameter, initial in zip(engine.trained, start, strict=True):
        parameter.copy_(initial)
    engine.write()
    return loss


@torch.no_grad()
def _mean_loss(data: CachedDataset, study: Study) -> float:
    objective = study.objective.resolved
    indices = range(len(data.dataset.examples))
    return float(
        torch.cat([objective.losses(data.network, b) for b in data.batches(indices)]).mean()
    )
