"""Depth pruning: drop a block of consecutive layers of a base, and refit the layer before it.

The last matrix of the MLP before the dropped block is refitted by ridge regression on public text,
so that it also adds the block's contribution. Blocks of the given width are compared by the KL
divergence of the pruned base's next-token distribution from the original's; the block with the
smallest divergence is dropped. Only the base and public text are read, so this costs no ε.
References: Gromov et al. 2024, "The unreasonable ineffectiveness of the deeper layers" (the block);
Shopkhoev et al. 2025, "ReplaceMe" (a linear map in its place)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.core.bases.architecture import with_parts
from fedtune.core.config import LoraTable
from fedtune.core.models.split import cut
from fedtune.core.progress import report

POSITIONS = 8192  # positions of public text on which the matrix is fitted
RIDGE = 0.1  # ridge penalty over the inputs' mean square; a smaller one overfits the public text
HELD_OUT, MOST = 6, 64  # every 6th text, at most 64 of them, chooses among the blocks


@dataclass(frozen=True, repr=False)
class PrunedLayers:
    """A choice of layers to drop: `first` to `first + width - 1`.

    - weight: (H, inner), the refitted last matrix of the MLP in the layer before them
    - divergence: KL divergence in nats of the pruned base's next-token distribution from the
      original's, as a mean over held-out texts"""

    first: int
    width: int
    weight: torch.Tensor
    divergence: float


def supports_refit(model: Any) -> bool:
    """Return whether this model's layers add their MLP's output to the residual stream unchanged.
    Only then can a refitted matrix of an MLP stand in for the layers that are dropped after it."""
    backbone = getattr(model, "model", None)
    layers = getattr(backbone, "layers", None)
    if not hasattr(model, "lm_head") or not isinstance(layers, nn.ModuleList):
        return False
    if not all(isinstance(_get_output_matrix(layer), nn.Linear) for layer in layers):
        return False
    split = cut(backbone, LoraTable(rank=1, modules=("down_proj",), last_layers=1))
    return split is not None and split.positionwise


@torch.no_grad()
def choose_pruned_layers(model: Any, width: int, texts: Sequence[np.ndarray]) -> PrunedLayers:
    """Choose which `width` consecutive layers to drop from a model that `supports_refit`. For each
    choice the layer before them is refitted; the best choice is the one that then changes the
    next-token distribution on held-out texts least. The last layer is never dropped. At least one
    layer, and at least half (rounded down) of the layers that remain, come before the dropped ones.

    texts: token ids of at least 2 public texts; some are held out to compare the choices, the
    others serve the refit"""
    layers = model.model.layers
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    chosen = order[::HELD_OUT][:MOST]
    held_out = [texts[at] for at in chosen]
    activations = _layer_activations(model, [texts[at] for at in order if at not in chosen])
    original, best = _next_token_log_probs(model, held_out), None
    # At least half of the remaining layers come before the dropped ones: public text of one kind
    # does not show how other text depends on early layers.
    firsts = range(max(1, (len(layers) - width) // 2), len(layers) - width)
    for number, first in enumerate(firsts, 1):
        mlp_input, output = activations[first - 1]
        weight = _refit(layers[first - 1], mlp_input, output, activations[first + width - 1][1])
        with _temporary_weight(_get_output_matrix(layers[first - 1]), weight):
            shorter = drop_layers(model, range(first, first + width))
            pruned = _next_token_log_probs(shorter, held_out)
        divergence = float((original.exp() * (original - pruned)).sum(dim=1).mean())
        if best is None or divergence < best.divergence:
            best = PrunedLayers(first, width, weight, divergence)
        report("choosing the layers to leave out", number, len(firsts))
    assert best is not None
    return best


def drop_layers(model: Any, dropped: range) -> Any:
    """Return a copy of `model` without the layers `dropped` (indices). The copy shares every weight
    with the model."""
    layers = model.model.layers
    kept_layers = [at for at in range(len(layers)) if at not in dropped]
    shorter = nn.ModuleList([layers[at] for at in kept_layers])
    backbone = with_parts(model.model, layers=shorter)
    twin = with_parts(model, model=backbone)
    twin.config = backbone.config = pruned_config(model.config, kept_layers, len(layers))
    return twin


def pruned_config(config: Any, kept_layers: Sequence[int], total: int) -> Any:
    """Return a copy of `config` for a model of which only some layers stay. kept_layers: their
    indices; total: how many layers the model had."""
    changed = copy.deepcopy(config)
    for key, value in list(vars(changed).items()):  # one entry for each layer
        if isinstance(value, list) and len(value) == total:
            setattr(changed, key, [value[at] for at in kept_layers])
    changed.num_hidden_layers = len(kept_layers)
    return changed


def _get_output_matrix(layer: Any) -> Any:
    """Return the last matrix of a layer's MLP, the module `mlp.down_proj`; None if the layer has no
    module of this name."""
    return getattr(getattr(layer, "mlp", None), "down_proj", None)


def _layer_activations(
    model: Any, texts: Sequence[np.ndarray]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Run the model on the texts, and record at the first POSITIONS positions what each layer's MLP
    reads and what the layer puts out. Return for each layer a pair of tensors, (positions, H) each:
    the MLP's inputs, and the layer's outputs."""
    layers = model.model.layers
    mlp_inputs: list[list[torch.Tensor]] = [[] for _ in layers]
    layer_outputs: list[list[torch.Tensor]] = [[] for _ in layers]
    handles = []
    for layer, goes, comes in zip(layers, mlp_inputs, layer_outputs, strict=True):
        handles += [
            layer.mlp.register_forward_pre_hook(lambda _, args, goes=goes: goes.append(args[0][0])),
            layer.register_forward_hook(
                lambda _, args, output, comes=comes: comes.append(
                    (output[0] if isinstance(output, tuple) else output)[0]
                )
            ),
        ]
    try:
        positions = 0
        for text in texts:
            model.model(input_ids=_row(text), use_cache=False)
            positions += len(text)
            report("reading public text", min(positions, POSITIONS), POSITIONS)
            if positions >= POSITIONS:
                break
    finally:
        for handle in handles:
            handle.remove()
    return [
        (torch.cat(a)[:POSITIONS], torch.cat(b)[:POSITIONS])
        for a, b in zip(mlp_inputs, layer_outputs, strict=True)
    ]


def _next_token_log_probs(model: Any, texts: Sequence[np.ndarray]) -> torch.Tensor:
    """Return log-probabilities of the token after each text, (texts, V) fp32."""
    states = [
        model.model(input_ids=_row(text), use_cache=False).last_hidden_state[0, -1]
        for text in texts
    ]
    logits: torch.Tensor = model.lm_head(torch.stack(states))
    return torch.log_softmax(logits.float(), dim=1)


def _row(text: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(text, dtype=np.int64))[None]


def _refit(
    layer: Any, mlp_input: torch.Tensor, output: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """Fit the last matrix (H, inner) of the layer's MLP anew, so that the layer's outputs are as
    near as possible to `target`. Return the fitted matrix in the layer's own dtype.

    - layer: the layer before the dropped block
    - mlp_input: (positions, H), the inputs of its MLP on public text
    - output: (positions, H), the outputs of the layer there, with the present matrix
    - target: (positions, H), the outputs of the block's last layer there

    Each position's error counts relative to the size of its states, since the norms of later layers
    divide by this size, too. Otherwise a text's first position, whose states are a hundred times as
    large as others, would determine the fit alone."""
    inner: list[torch.Tensor] = []
    handle = _get_output_matrix(layer).register_forward_pre_hook(
        lambda _, args: inner.append(args[0])
    )
    try:
        layer.mlp(mlp_input)
    finally:
        handle.remove()
    x, missing = inner[0].float(), target.float() - output.float()
    size = target.float().pow(2).mean(dim=1, keepdim=True)
    square, cross = x.T @ (x / size), x.T @ (missing / size)
    ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square))
    correction = torch.linalg.solve((square + ridge).double(), cross.double())
    weight = _get_output_matrix(layer).weight
    fitted: torch.Tensor = (weight.double() + correction.T).to(weight.dtype)
    return fitted


@contextmanager
def _temporary_weight(linear: nn.Linear, weight: torch.Tensor) -> Iterator[None]:
    original = linear.weight
    linear.weight = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        linear.weight = original
