"""What the coordinator computes of public text with answers. Free of ε: neither text nor base saw
private data."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fedtune.config import PreconditionerTable, Study
from fedtune.errors import ConfigError, ModelError
from fedtune.models.cache import CachedDataset
from fedtune.models.lora import LARGEST, Arrays
from fedtune.models.network import Network
from fedtune.models.preconditioner import factor_of, factor_of_columns, name_for
from fedtune.objectives import resolve
from fedtune.objectives._interface import Batch
from fedtune.progress import report
from fedtune.training import engines

_CHUNK_BYTES = 128 * 2**20  # fp32 gradients held at once


def output_factors(study: Study, data: CachedDataset, table: PreconditionerTable) -> Arrays:
    """Compute the preconditioner's W (outputs, rank) of each B, by the name that it is sent under.

    G = Σ g gᵀ over the columns g of each public record's gradient of that B, with the gradient of
    all B's scaled to length 1, at the network's present adapter (B = 0 before the first round).
    Errors: ModelError where the public records give no gradient, or of a layer that is not watched;
    ConfigError where B sits on a projector, of whose input a record has several rows."""
    network, objective = data.network, resolve(study.objective)
    named = network.parameters()
    if any(network.has_row_per_tile(parameter) for parameter in named.values()):
        raise ConfigError("lora.preconditioner", "an adapter on the text's layers alone")
    engine = engines.choose(study.training.engine, network.trained, list(named.values()))
    total = len(data.dataset.examples)
    curvatures = {
        name: _Curvature(len(b), b.shape[1], total)
        for name, b in named.items()
        if ".lora_B." in name
    }
    rows, done = max(1, _CHUNK_BYTES // (4 * sum(p.numel() for p in named.values()))), 0
    with engine.watching():
        for batch in data.blocks(range(total), rows):
            gradients = engine(objective.losses(network, batch))
            layers = {
                name: _by_record(gradient, batch)
                for name, gradient in zip(named, gradients, strict=True)
                if name in curvatures
            }
            squares = torch.stack([g.flatten(1).square().sum(dim=1) for g in layers.values()])
            lengths = squares.sum(dim=0).sqrt().clamp_min(1e-30)
            for name, gradient in layers.items():
                curvatures[name].add(gradient / lengths[:, None, None])
            done += batch.count
            report("measuring gradients of public text", done, total)
    return {
        name_for(name): curvature.factor(table.rank, table.damping)
        for name, curvature in curvatures.items()
    }


class _Curvature:
    """G of one layer; where it would be larger than the gradients that it is made of, those."""

    def __init__(self, outputs: int, columns: int, records: int) -> None:
        self._columns: list[torch.Tensor] = []
        wide = outputs > columns * records
        self._moment = None if wide else torch.zeros(outputs, outputs, dtype=torch.float64)

    def add(self, gradients: torch.Tensor) -> None:
        """gradients: (records, outputs, columns)."""
        columns = gradients.transpose(0, 1).flatten(1).double().cpu()
        if self._moment is None:
            self._columns.append(columns)
        else:
            self._moment += columns @ columns.T

    def factor(self, rank: int, damping: float) -> npt.NDArray[np.float32]:
        if self._moment is None:
            return factor_of_columns(torch.cat(self._columns, dim=1).numpy(), rank, damping)
        return factor_of(self._moment.numpy(), rank, damping)


def _by_record(gradient: torch.Tensor | None, batch: Batch) -> torch.Tensor:
    """(count, outputs, columns): a record's passages added up, what fills the block left out."""
    if gradient is None:
        raise ModelError("a trainable layer gave no per-record gradient")
    records = len(batch.index)
    passages = len(gradient) // records
    return gradient.view(records, passages, *gradient.shape[1:]).sum(dim=1)[: batch.count]


def trained_on(study: Study, data: CachedDataset, adapter: Arrays) -> Arrays:
    """`adapter` after start.steps steps of AdamW on the mean loss of all public records.

    Reference: Li et al. 2022, "Large language models can be strong differentially private
    learners", section 2 (public pre-training costs no ε)."""
    table = study.start
    assert table is not None
    network, objective = data.network, resolve(study.objective)
    everything, parameters = range(len(data.dataset.examples)), network.parameters()
    with network.loaded(trainable=adapter):
        optimizer = torch.optim.AdamW(parameters.values(), lr=table.learning_rate, weight_decay=0.0)
        for step in range(table.steps):
            for batch in data.batches(everything):
                loss = objective.losses(network, batch).sum() / len(everything)
                torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            report("training on public text", step + 1, table.steps)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.clamp_(-LARGEST, LARGEST)
        return network.trainable()


@torch.no_grad()
def head_of_labels(study: Study, network: Network) -> Arrays:
    """A head whose rows are the base's vectors of the classes' names, or of their descriptions:
    less their mean, each scaled to start.scale. Its bias is zero.

    Reference: Snell et al. 2017, "Prototypical networks for few-shot learning", section 2.4."""
    table = study.start
    assert table is not None and network.head is not None  # labels: the objective has a head
    vectors = []
    for label in study.objective.labels:
        ids = network.tokenizer(table.descriptions.get(label, label), return_tensors="pt")
        ids = ids["input_ids"][:, : study.objective.max_length]
        mask = torch.ones_like(ids, dtype=torch.bool)
        states = network.hidden(network.prefix(ids, mask), mask.to(network.device))
        vectors.append(network.pool(states, mask.to(network.device))[0].double().cpu())
    rows = torch.stack(vectors)
    rows = rows - rows.mean(dim=0)
    rows = rows * (table.scale / rows.norm(dim=1, keepdim=True).clamp_min(1e-12))
    weight = rows.float().numpy()
    return {"head.weight": weight, "head.bias": np.zeros(len(weight), np.float32)}
