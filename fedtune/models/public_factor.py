"""LoRA's frozen factor built from the activations of public text.

A random A sees a random slice of each layer's input; under DP there is no budget to make up for
that. Here A's rows are the directions in which public text of the same kind really varies at the
positions where the loss is computed. Free of ε: neither text nor base saw the private data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from fedtune.data.dataset import Dataset
from fedtune.errors import ConfigError
from fedtune.models.cache import CachedDataset
from fedtune.models.lora import Arrays
from fedtune.models.network import Network
from fedtune.objectives._interface import Batch

_MAX_POSITIONS = 8192  # per layer; enough for principal components of a few thousand dimensions


def public_factor(network: Network, dataset: Dataset, rank: int) -> Arrays:
    """A (rank, inputs) by name: one row along the mean input (activation 0.5 on it), the others
    whitened principal components orthogonal to it (activation of unit variance).

    Positions: those with a target; of a record without one, its last token.
    Errors: ConfigError when the public text has too few positions for this rank."""
    with network.base_only():
        inputs = _inputs(network, dataset)
    return {name: _rows(inputs[name], rank) for name in network.frozen_factor()}


def moments(network: Network, dataset: Dataset) -> dict[str, torch.Tensor]:
    """By name of A: E[x xᵀ] (inputs, inputs) fp64 of what reaches its layer from public text, at
    the positions as above, with the network's adapter as it is loaded."""
    found = {name: x.double() for name, x in _inputs(network, dataset).items()}
    return {name: x.T @ x / len(x) for name, x in found.items()}


@torch.no_grad()
def _inputs(network: Network, dataset: Dataset) -> dict[str, torch.Tensor]:
    """By name of A: what reaches its layer, (positions, inputs) fp32."""
    data, inputs = CachedDataset(network, dataset), dict[str, list[torch.Tensor]]()
    with _recording(network, inputs) as position:
        for batch in data.batches(range(len(dataset.examples))):
            position.batch = batch
            network.hidden(batch.prefix, batch.mask, seen=batch.seen)
    return {name: torch.cat(parts)[:_MAX_POSITIONS].cpu() for name, parts in inputs.items()}


class _Position:
    batch: Batch


@contextmanager
def _recording(network: Network, inputs: dict[str, list[torch.Tensor]]) -> Iterator[_Position]:
    position = _Position()
    handles = []
    for name, module in network.model.named_modules():
        if isinstance(module, LoraLayer):
            into = inputs.setdefault(f"{name}.lora_A.default.weight", [])

            def record(
                _: nn.Module, args: tuple[torch.Tensor, ...], into: list[torch.Tensor] = into
            ) -> None:
                where = _where(position.batch)
                if args[0].shape[:2] != where.shape:  # a projector: every patch of every tile
                    where = torch.ones(args[0].shape[:2], dtype=torch.bool, device=where.device)
                into.append(args[0][where].float())

            handles.append(module.register_forward_pre_hook(record))
    try:
        yield position
    finally:
        for handle in handles:
            handle.remove()


def _where(batch: Batch) -> torch.Tensor:
    """Boolean (B, L)."""
    targets = batch.target_ids != -100
    last = torch.zeros_like(targets)
    last[range(len(last)), batch.mask.sum(dim=1) - 1] = True
    return torch.where(targets.any(dim=1, keepdim=True), targets, last)


def _rows(seen: torch.Tensor, rank: int) -> np.ndarray:
    """(rank, inputs) fp32 from inputs (n, inputs)."""
    if len(seen) <= rank:
        raise ConfigError(
            f"public: {len(seen)} positions for lora.rank = {rank}", f"more than {rank} records"
        )
    x = seen.double()
    mean = x.mean(dim=0)
    direction = mean / mean.norm()
    centred = x - mean
    centred = centred - (centred @ direction)[:, None] * direction
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    scale = singular[: rank - 1] / (len(x) - 1) ** 0.5
    whitened = components[: rank - 1] / scale.clamp_min(1e-6)[:, None]
    rows = torch.cat([(0.5 * direction / mean.norm())[None], whitened])
    return rows.float().cpu().numpy()
