"""Which layers a smaller base leaves out, and what makes up for them.

A row of layers goes, and the MLP before the gap does their work besides its own: its last matrix is
fitted anew, by ridge regression on public text, to add what they added. Of all such gaps the one
stays after which the base says most nearly what it said before. Reads the base and public text
alone, so what comes of it is free of ε.
References: Gromov et al. 2024, "The unreasonable ineffectiveness of the deeper layers" (the gap);
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

from fedtune.bases.architecture import with_parts
from fedtune.config import LoraTable
from fedtune.models.split import cut
from fedtune.progress import report

POSITIONS = 8192  # of public text, to fit to
RIDGE = 0.1  # of the mean square of what is regressed on; less follows the public text too closely
HELD_OUT, MOST = 6, 64  # every so manieth text, at most so many, choose among the gaps


@dataclass(frozen=True, repr=False)
class Gap:
    """The layers `first` to `first + width - 1` are left out; weight: of the last matrix of the MLP
    before them, (H, inner); divergence: KL (nats) of what the base then says, after held-out texts,
    from what it said."""

    first: int
    width: int
    weight: torch.Tensor
    divergence: float


def fits(model: Any) -> bool:
    """Whether the layers of this model add their MLP's output to what they pass on, as it is."""
    body = getattr(model, "model", None)
    layers = getattr(body, "layers", None)
    if not hasattr(model, "lm_head") or not isinstance(layers, nn.ModuleList):
        return False
    if not all(isinstance(_last(layer), nn.Linear) for layer in layers):
        return False
    split = cut(body, LoraTable(rank=1, modules=("down_proj",), last_layers=1))
    return split is not None and split.positionwise


@torch.no_grad()
def best_gap(model: Any, width: int, texts: Sequence[np.ndarray]) -> Gap:
    """The gap to leave in a model that `fits`, by token ids of public texts (at least 2); neither
    the first layer nor the last is in it."""
    layers = model.model.layers
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    chosen = order[::HELD_OUT][:MOST]
    held = [texts[at] for at in chosen]
    seen = _seen(model, [texts[at] for at in order if at not in chosen])
    said, best = _said(model, held), None
    # At least half of those that stay lie before the gap: what public text of one kind does not
    # show is what the early ones do for other words.
    firsts = range(max(1, (len(layers) - width) // 2), len(layers) - width)
    for number, first in enumerate(firsts, 1):
        into, found = seen[first - 1]
        weight = _fitted(layers[first - 1], into, found, seen[first + width - 1][1])
        with _replaced(_last(layers[first - 1]), weight):
            now = _said(without(model, range(first, first + width)), held)
        divergence = float((said.exp() * (said - now)).sum(dim=1).mean())
        if best is None or divergence < best.divergence:
            best = Gap(first, width, weight, divergence)
        report("choosing the layers to leave out", number, len(firsts))
    assert best is not None
    return best


def without(model: Any, gap: range) -> Any:
    """`model` without some of its layers, sharing every weight with it."""
    layers = model.model.layers
    kept = [at for at in range(len(layers)) if at not in gap]
    shorter = nn.ModuleList([layers[at] for at in kept])
    body = with_parts(model.model, layers=shorter)
    twin = with_parts(model, model=body)
    twin.config = body.config = fewer(model.config, kept, len(layers))
    return twin


def fewer(config: Any, kept: Sequence[int], total: int) -> Any:
    """`config` with `kept` of its layers."""
    changed = copy.deepcopy(config)
    for key, value in list(vars(changed).items()):  # one entry for each layer
        if isinstance(value, list) and len(value) == total:
            setattr(changed, key, [value[at] for at in kept])
    changed.num_hidden_layers = len(kept)
    return changed


def _last(layer: Any) -> Any:
    """The matrix whose output the MLP gives."""
    return getattr(getattr(layer, "mlp", None), "down_proj", None)


def _seen(model: Any, texts: Sequence[np.ndarray]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer what goes into its MLP and what comes out of the layer, (positions, H) each."""
    layers = model.model.layers
    into: list[list[torch.Tensor]] = [[] for _ in layers]
    out: list[list[torch.Tensor]] = [[] for _ in layers]
    handles = []
    for layer, goes, comes in zip(layers, into, out, strict=True):
        handles += [
            layer.mlp.register_forward_pre_hook(lambda _, args, goes=goes: goes.append(args[0][0])),
            layer.register_forward_hook(
                lambda _, args, found, comes=comes: comes.append(
                    (found[0] if isinstance(found, tuple) else found)[0]
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
        (torch.cat(a)[:POSITIONS], torch.cat(b)[:POSITIONS]) for a, b in zip(into, out, strict=True)
    ]


def _said(model: Any, texts: Sequence[np.ndarray]) -> torch.Tensor:
    """Log-probabilities of what follows each text, (texts, V) fp32."""
    states = [
        model.model(input_ids=_row(text), use_cache=False).last_hidden_state[0, -1]
        for text in texts
    ]
    logits: torch.Tensor = model.lm_head(torch.stack(states))
    return torch.log_softmax(logits.float(), dim=1)


def _row(text: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(text, dtype=np.int64))[None]


def _fitted(
    layer: Any, into: torch.Tensor, found: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """The last matrix of the layer's MLP with which the layer gives `wanted` in place of `found`,
    as nearly as a matrix can. A position counts by how far off it is beside its own size, as the
    norms above see it: else a text's first one, which is a hundred times as large, would be all."""
    inner: list[torch.Tensor] = []
    handle = _last(layer).register_forward_pre_hook(lambda _, args: inner.append(args[0]))
    try:
        layer.mlp(into)
    finally:
        handle.remove()
    x, missing = inner[0].float(), wanted.float() - found.float()
    size = wanted.float().pow(2).mean(dim=1, keepdim=True)
    square, cross = x.T @ (x / size), x.T @ (missing / size)
    ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square))
    more = torch.linalg.solve((square + ridge).double(), cross.double())
    weight = _last(layer).weight
    fitted: torch.Tensor = (weight.double() + more.T).to(weight.dtype)
    return fitted


@contextmanager
def _replaced(linear: nn.Linear, weight: torch.Tensor) -> Iterator[None]:
    own = linear.weight
    linear.weight = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        linear.weight = own
