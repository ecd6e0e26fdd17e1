"""Build LoRA's frozen factor from the activations of public text.

A random A projects each layer's input onto random directions, and under DP's noise B cannot make up
for a bad choice. Here A's rows are the directions in which activations of similar public text vary
most at the positions where the loss is computed. This uses no private data, so it costs no ε."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from fedtune.core.data.dataset import Dataset
from fedtune.core.errors import ConfigError
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import LARGEST, Arrays
from fedtune.core.models.network import Network
from fedtune.core.objectives._interface import Batch
from fedtune.core.progress import report, reporter

_MAX_POSITIONS = 8192  # per layer; enough for principal components of a few thousand dimensions


def public_factor(network: Network, dataset: Dataset, rank: int) -> Arrays:
    """Compute LoRA's factor A, fp32 (rank, inputs), of each adapted layer from public text. Return
    name of A -> array. dataset: the public text. rank: the number of A's rows.

    One row of A lies along the layer's mean input and gives it the activation 0.5. The other rows
    are principal components orthogonal to the mean, scaled so that each gives activations of unit
    variance (less where the text hardly varies).

    Inputs are taken at the positions with a target, or at the last token of a record without one.
    Errors: ConfigError if the public text has too few positions for this rank."""
    with network.base_only():
        inputs = _inputs(network, dataset)
    factor, names = Arrays(), list(network.frozen_factor())
    for number, name in enumerate(names):
        report("computing the adapter's frozen factor", number, len(names))
        factor[name] = _rows(inputs[name], rank)
    return factor


def moments(network: Network, dataset: Dataset) -> dict[str, torch.Tensor]:
    """Compute the second moment E[x xᵀ] (inputs, inputs), fp64, of each adapted layer's input x on
    public text. The dictionary's keys are the names of the layers' A.

    Inputs are taken at the positions with a target, or at the last token of a record without one,
    while the base reads the text with the adapter that is loaded in `network`."""
    inputs = {name: x.double() for name, x in _inputs(network, dataset).items()}
    return {name: x.T @ x / len(x) for name, x in inputs.items()}


@torch.no_grad()
def _inputs(network: Network, dataset: Dataset) -> dict[str, torch.Tensor]:
    """Collect the inputs of each adapted layer while the base reads public text. Return the name of
    the layer's A -> the inputs, fp32 (positions, width of the input). They are taken at the
    positions that `_select_positions` selects, at most _MAX_POSITIONS for each layer."""
    data, inputs = CachedDataset(network, dataset), dict[str, list[torch.Tensor]]()
    with _recording(network, inputs) as position:
        everyone = range(len(dataset.examples))
        for batch in data.batches(everyone, on_work=reporter("reading public text")):
            position.batch = batch
            network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)
    return {name: torch.cat(parts)[:_MAX_POSITIONS].cpu() for name, parts in inputs.items()}


class _Position:
    batch: Batch


@contextmanager
def _recording(network: Network, inputs: dict[str, list[torch.Tensor]]) -> Iterator[_Position]:
    position = _Position()
    handles = []
    for name, module in network.model.named_modules():
        if isinstance(module, LoraLayer):
            collected = inputs.setdefault(f"{name}.lora_A.default.weight", [])

            def record(
                _: nn.Module,
                args: tuple[torch.Tensor, ...],
                collected: list[torch.Tensor] = collected,
            ) -> None:
                selected = _select_positions(position.batch)
                if args[0].shape[:2] != selected.shape:  # a projector's input: take every row
                    selected = torch.ones(
                        args[0].shape[:2], dtype=torch.bool, device=selected.device
                    )
                collected.append(args[0][selected].float())

            handles.append(module.register_forward_pre_hook(record))
    try:
        yield position
    finally:
        for handle in handles:
            handle.remove()


def _select_positions(batch: Batch) -> torch.Tensor:
    """Select the positions of a batch at which inputs are taken: those with a target or, in a
    record without one, its last token. Return a mask (B, L) of booleans."""
    targets = batch.target_ids != -100
    last = torch.zeros_like(targets)
    last[range(len(last)), batch.mask.sum(dim=1) - 1] = True
    return torch.where(targets.any(dim=1, keepdim=True), targets, last)


def _rows(inputs: torch.Tensor, rank: int) -> np.ndarray:
    """Compute the A of one layer, fp32 (rank, width), from n inputs of this layer, (n, width). What
    the rows are is described at `public_factor`. Errors: ConfigError if n is at most `rank`."""
    if len(inputs) <= rank:
        raise ConfigError(
            f"[public] has {len(inputs)} tokens to learn from, and lora.rank = {rank}",
            f"more than {rank} such tokens; each record has at least one",
            "add public records, or lower lora.rank",
        )
    x = inputs.double()
    mean = x.mean(dim=0)
    direction = mean / mean.norm()
    centred = x - mean
    centred = centred - (centred @ direction)[:, None] * direction
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    scale = singular[: rank - 1] / (len(x) - 1) ** 0.5
    whitened = components[: rank - 1] / scale.clamp_min(1e-6)[:, None]
    # Whitening would blow up a direction in which the text hardly varies; sites admit no entry
    # larger than LARGEST.
    whitened *= (0.99 * LARGEST / whitened.abs().amax(dim=1, keepdim=True)).clamp_max(1.0)
    rows = torch.cat([(0.5 * direction / mean.norm())[None], whitened])
    return rows.float().cpu().numpy()
