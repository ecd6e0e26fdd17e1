"""Compute preconditioner, first steps and head from public text with answers, at the coordinator.
They cost no ε, since neither the text nor the base holds private records."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.special import logsumexp  # type: ignore[import-untyped]

from fedtune.core.config import PreconditionerTable, Study
from fedtune.core.errors import ConfigError, ModelError
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import LARGEST, Arrays
from fedtune.core.models.network import Network
from fedtune.core.models.preconditioner import (
    factor_of,
    factor_of_columns,
    move_adapter,
    multiply_by_m,
    name_for,
)
from fedtune.core.objectives._interface import Batch
from fedtune.core.progress import report, reporter
from fedtune.core.training import engines

_CHUNK_BYTES = 128 * 2**20  # the size of the fp32 gradients that are in memory at a time
# The ridge penalty of a head's regression on vectors of length 1. Of the values tried between 0.003
# and 0.0001, the middle two did as well as any on MTS-Dialog and ACI-Bench, with 30 to 50 % of the
# public records.
PENALTY = 3e-4


def output_factors(study: Study, data: CachedDataset, table: PreconditionerTable) -> Arrays:
    """Compute the plan's preconditioner from the public records. Return a factor W, fp32 (outputs,
    table.rank), for each B of the adapter, by the name under which it is sent.

    Each public record's gradient, at the loaded adapter, of all trainable parameters together is
    scaled to length 1. The second moment of one B is G = Σ g gᵀ, where the sum is over the columns
    g of all records' gradients of this B. W follows from G (core/models/preconditioner.py).

    table: the plan's table of the preconditioner, which gives the damping and the preconditioner's
    rank (not the adapter's). Errors: ModelError if the public records give no gradient, or the
    gradient engine does not watch a layer; ConfigError if a B belongs to a projector, whose input
    has several rows for one record."""
    named, total = data.network.parameters(), len(data.dataset.examples)
    curvatures = {
        name: _Curvature(len(b), b.shape[1], total)
        for name, b in named.items()
        if ".lora_B." in name
    }
    for gradients in _gradients(study, data, "measuring gradients of public text"):
        lengths = _lengths(gradients)
        for name, curvature in curvatures.items():
            curvature.add(gradients[name] / lengths[:, None, None])
    factors = Arrays()
    for number, (name, curvature) in enumerate(curvatures.items()):
        report("computing the preconditioner", number, len(curvatures))
        factors[name_for(name)] = curvature.factor(table.rank, table.damping)
    return factors


def trained_on(study: Study, data: CachedDataset, adapter: Arrays, step: int) -> Arrays:
    """Train `adapter` for one step on all public records and return the new adapter, fp32.

    - study: the plan, with a table [start]
    - data: the public records with their answers, and the network that computes their gradients
    - adapter: the trainable arrays before this step, by name; they are not changed
    - step: the number of this step among start.steps, from 0, for the reports of progress

    The step is like a site's step, but without noise. Each record's gradient is multiplied by the
    preconditioner's matrix M (if the plan has one) and scaled to the length clipping.max_grad_norm
    (1 without [clipping]). The adapter moves by -start.learning_rate times M times the mean.

    Reference: Li et al. 2022, "Large language models can be strong differentially private
    learners", section 2 (public pre-training costs no ε)."""
    table = study.start
    assert table is not None
    frozen = data.network.preconditioner
    bound = study.clipping.max_grad_norm if study.clipping else 1.0
    change = {name: np.zeros(array.shape) for name, array in adapter.items()}
    with data.network.loaded(trainable=adapter):
        label = "training on public text"
        for gradients in _gradients(study, data, label, step, table.steps):
            rows = {
                n: multiply_by_m(g.double().cpu().numpy(), n, frozen) for n, g in gradients.items()
            }
            squares = sum((g.reshape(len(g), -1) ** 2).sum(axis=1) for g in rows.values())
            scale = bound / np.maximum(np.sqrt(squares), 1e-30) / len(data.dataset.examples)
            for name, g in rows.items():
                change[name] -= table.learning_rate * np.tensordot(scale, g, axes=1)
    stepped = move_adapter(adapter, change, frozen)
    return {name: np.clip(array, -LARGEST, LARGEST) for name, array in stepped.items()}


def _gradients(
    study: Study, data: CachedDataset, label: str, before: int = 0, passes: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield each public record's gradient of the loss, a block of records at a time: parameter's
    name -> (records in the block, *parameter's shape).

    - study: the plan, whose objective gives the loss
    - data: the public records, and the network with the loaded adapter
    - label: the text of the progress reports
    - before: how many passes over the records came before this one
    - passes: the number of passes in all, which the progress reports state

    Errors: ConfigError if an adapter is on a projector, whose input has several rows for one
    record; ModelError if a layer gives no gradient."""
    network, objective = data.network, study.objective.resolved
    named = network.parameters()
    if any(network.has_row_per_tile(parameter) for parameter in named.values()):
        raise ConfigError(
            "public records cannot train an adapter on the base's projector",
            "an adapter only on layers of the text model",
        )
    engine = engines.choose(study.training.engine, network.trained, list(named.values()))
    rows = max(1, _CHUNK_BYTES // (4 * sum(p.numel() for p in named.values())))
    everyone = range(len(data.dataset.examples))
    with engine.watching():
        blocks = data.compute_blocks(
            lambda batch: engine(objective.losses(network, batch)),
            everyone,
            rows,
            reporter(label, before, passes),
            may_share=lambda batch: engine.side_by_side and objective.may_run_beside(batch),
        )
        for batch, gradients in blocks:
            yield {
                name: _by_record(gradient, batch)
                for name, gradient in zip(named, gradients, strict=True)
            }


def _lengths(gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    squares = torch.stack([g.flatten(1).square().sum(dim=1) for g in gradients.values()])
    return squares.sum(dim=0).sqrt().clamp_min(1e-30)


def _by_record(gradient: torch.Tensor | None, batch: Batch) -> torch.Tensor:
    """Add up, for each record, the gradients of its passages in one layer. The empty records that
    fill up the block are left out.

    gradient: (rows, outputs, columns), with a row for each passage of each record, and of each
    empty record. Returns (batch.count, outputs, columns). Errors: ModelError if the layer gave no
    gradient (None)."""
    if gradient is None:
        raise ModelError("a trainable layer gave no per-record gradient")
    records = len(batch.index)
    passages = len(gradient) // records
    return gradient.view(records, passages, *gradient.shape[1:]).sum(dim=1)[: batch.count]


class _Curvature:
    """The second moment G = Σ g gᵀ (outputs, outputs) of one layer's gradients, added up record by
    record. If G would take more memory than the gradients themselves, the gradients are kept
    instead of G."""

    def __init__(self, outputs: int, columns: int, records: int) -> None:
        self._columns: list[torch.Tensor] = []
        wide = outputs > columns * records
        self._moment = None if wide else torch.zeros(outputs, outputs, dtype=torch.float64)

    def add(self, gradients: torch.Tensor) -> None:
        """Add the gradients of some records, (records, outputs, columns), to the second moment
        G."""
        columns = gradients.transpose(0, 1).flatten(1).double().cpu()
        if self._moment is None:
            self._columns.append(columns)
        else:
            self._moment += columns @ columns.T

    def factor(self, rank: int, damping: float) -> npt.NDArray[np.float32]:
        if self._moment is None:
            return factor_of_columns(torch.cat(self._columns, dim=1).numpy(), rank, damping)
        return factor_of(self._moment.numpy(), rank, damping)


@torch.no_grad()
def head_of_labels(study: Study, network: Network) -> Arrays:
    """Build a head from the base's vectors of the K classes' names or descriptions. Return the
    weight, (K, H), and the bias, (K,), by name in fp32. The rows of the weight are these vectors
    minus their mean, each scaled to length start.scale. The bias is zero.

    Errors: ConfigError if the objective trains no head.
    Reference: Snell et al. 2017, "Prototypical networks for few-shot learning", section 2.4."""
    table = study.start
    assert table is not None
    if network.head is None:
        raise ConfigError(
            f'start.head = "{table.head}": this objective trains no head', "objective classify"
        )
    rows = torch.from_numpy(vectors_of_labels(study, network))
    rows = rows - rows.mean(dim=0)
    rows = rows * (table.scale / rows.norm(dim=1, keepdim=True).clamp_min(1e-12))
    weight = rows.float().numpy()
    return {"head.weight": weight, "head.bias": np.zeros(len(weight), np.float32)}


@torch.no_grad()
def vectors_of_labels(study: Study, network: Network) -> npt.NDArray[np.float64]:
    """Compute the network's pooled vector of each class's name, or of its description in
    start.descriptions: (K, H)."""
    descriptions, vectors = study.start.descriptions if study.start else {}, []
    for label in study.objective.labels:
        ids = network.tokenizer(descriptions.get(label, label), return_tensors="pt")
        ids = ids["input_ids"][:, : study.objective.max_length]
        mask = torch.ones_like(ids, dtype=torch.bool)
        states = network.hidden(network.prefix(ids, mask), mask.to(network.device))
        vectors.append(network.pool(states, mask.to(network.device))[0].double().cpu().numpy())
    return np.stack(vectors)


@torch.no_grad()
def vectors_of(data: CachedDataset) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Compute the network's pooled vector of each record of `data`. Return the vectors, (n, H), and
    the records' labels, (n,)."""
    network = data.network
    vectors = []
    labels = []
    for batch in data.batches(range(len(data.dataset.examples))):
        hidden = network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)
        vectors.append(network.pool(hidden, batch.mask).double().cpu().numpy())
        labels.append(batch.label.cpu().numpy())
    return np.concatenate(vectors), np.concatenate(labels)


@torch.no_grad()
def head_fitted(data: CachedDataset, adapter: Arrays) -> Arrays:
    """Fit the head of `adapter` to all public records by multinomial logistic regression on the
    base's vectors, and return `adapter` with the new head, fp32.

    The fit minimises the mean loss in nats plus PENALTY / 2 times the squared distance, in weights
    and biases, from the head in `adapter`. The weights keep their values in a direction in which no
    record has a component. The regression runs in fp64 on vectors divided by their root mean square
    length. The head in `adapter` is taken as a head for such scaled vectors; the returned head is
    for the base's own vectors. The optimum is unique.

    Reference: Böhning 1992, "Multinomial logistic regression algorithm", section 2."""
    with data.network.loaded(trainable=adapter):
        x, labels = vectors_of(data)
    given = np.concatenate([adapter["head.weight"], adapter["head.bias"][:, None]], axis=1)
    length = math.sqrt((x**2).sum(axis=1).mean())
    x = np.concatenate([x / length, np.ones((len(x), 1))], axis=1)
    wanted = np.eye(len(given))[labels]

    def loss(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        moved_by = flat.reshape(given.shape) - given
        scores = x @ flat.reshape(given.shape).T
        normal = logsumexp(scores, axis=1, keepdims=True)
        value = float((normal[:, 0] - (scores * wanted).sum(axis=1)).mean())
        slope = (np.exp(scores - normal) - wanted).T @ x / len(x) + PENALTY * moved_by
        return value + PENALTY * float((moved_by**2).sum()) / 2, slope.ravel()

    found = minimize(loss, given.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    fitted = found.x.reshape(given.shape)
    head = {"head.weight": fitted[:, :-1] / length, "head.bias": fitted[:, -1]}
    return adapter | {
        name: np.clip(array, -LARGEST, LARGEST).astype(np.float32) for name, array in head.items()
    }
