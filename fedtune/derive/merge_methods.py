"""Merge adapters of one base layer by layer, with PEFT's methods where it has them."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from fedtune.core.errors import ConfigError
from fedtune.core.models.lora import Arrays

Method = Literal["linear", "svd", "ties", "dare", "slerp", "regmean"]
# Method -> PEFT's name. PEFT's "linear" adds up the As and the Bs separately, which is not the sum
# of the updates B A; its "cat" is.
_PEFT = {"linear": "cat", "svd": "svd", "ties": "ties_svd", "dare": "dare_linear_svd"}
RIDGE = 0.01  # this share of the mean second moment is added to each input's second moment
Moments = Mapping[str, torch.Tensor]  # layer -> E[x xᵀ] of its inputs x, fp64
_NAME = re.compile(r"(.+)\.lora_([AB])\.default\.weight")
_LAYER = re.compile(r"(.*\.layers?\.)(\d+)\.(.+)")


class Factors(NamedTuple):
    """The two factors of one adapted layer: a (r, inputs) and b (outputs, r). The layer's update,
    i.e. the change of its weight, is scaling · B A."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True, repr=False)
class Adapter:
    """An adapter to merge.

    - arrays: A and B of each layer by parameter name, as core.models.adapter_files.load_adapter
      returns them
    - scaling: the factor of each B A (alpha / rank)"""

    arrays: Arrays
    scaling: float

    def layers(self) -> dict[str, Factors]:
        """Return the factors of each adapted layer, by the name of its module. Errors: ConfigError
        if the adapter has arrays other than LoRA's."""
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, array in self.arrays.items():
            match = _NAME.fullmatch(name)
            if not match:
                raise ConfigError(
                    f"an adapter holds {name.removesuffix('.weight')}, which cannot be merged",
                    "adapters with LoRA layers only",
                    "heads of two studies name different classes: keep the runs apart",
                )
            parts.setdefault(match[1], {})[match[2]] = torch.from_numpy(np.array(array))
        return {name: Factors(ab["A"], ab["B"], self.scaling) for name, ab in parts.items()}


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: Method,
    *,
    density: float | Sequence[float] = 0.5,
    rank: int | None = None,
    seed: int = 0,
    moments: Sequence[Moments] = (),
) -> tuple[Arrays, int]:
    """Merge adapters into one adapter, in fp32, with scaling 1 and the same rank in every layer.
    Return its arrays, by parameter name, and its rank. The update of a layer is the change of its
    weight, scaling · B A; rᵢ is the rank of adapter i.

    | method  | the merged update of a layer                                                   |
    | linear  | Σ wᵢ · updateᵢ, exactly; its rank is Σ rᵢ                                      |
    | svd     | this sum, reduced to `rank` (default: the largest rᵢ) by singular values       |
    | ties    | of each update only the largest entries stay, a share `density` of all; they   |
    |         | are added up where signs agree; then reduced to `rank` (default: Σ rᵢ)         |
    | dare    | of each update only random entries stay, a share `density` of all, and are     |
    |         | scaled up; the sum of these, reduced to `rank` (default: Σ rᵢ)                 |
    | slerp   | two updates, interpolated along the arc between them by the second's weight    |
    | regmean | the least squares fit to each update on its adapter's own inputs (`moments`,   |
    |         | one dict for each), weighted by wᵢ; its rank is Σ rᵢ                           |

    - adapters: two or more, of one base
    - weights: wᵢ, one for each adapter; for slerp at least 0 and not all 0, for regmean above 0
    - method: the row of the table above
    - density: one number for all adapters, or one for each; above 0 and at most 1
    - rank: the merged rank of svd, ties and dare; None: the default above. A layer whose matrix has
      fewer rows or columns than this is merged at that smaller number; its factors are then filled
      up with zeros to the rank of the other layers
    - seed: decides dare's random entries
    - moments: for regmean, one dict for each adapter, layer -> (inputs, inputs); else ()

    An adapter that lacks a layer counts there as an update of zero.
    Errors: ConfigError. References: Ilharco et al. 2023 (task arithmetic); Yadav et al. 2023 (TIES,
    section 4); Yu et al. 2024 (DARE, section 3); Shoemake 1985 (slerp); Jin et al. 2023 (RegMean,
    equation 2)."""
    densities = densities_of(density, len(adapters))
    _check(adapters, weights, method)
    layers = [adapter.layers() for adapter in adapters]
    ranks = [len(next(iter(layer_map.values())).a) for layer_map in layers]
    target_rank = rank or (max(ranks) if method == "svd" else sum(ranks))
    merged: dict[str, Factors] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in sorted(set().union(*layers)):
            like = next(layer_map[name] for layer_map in layers if name in layer_map)
            parts = [layer_map.get(name) or _zero_update(like) for layer_map in layers]
            if method == "regmean":
                parts = _regmean_factors(
                    parts, weights, [layer_map.get(name) for layer_map in moments]
                )
            merged[name] = _layer(parts, weights, method, densities, target_rank)
    return _arrays(_fill_missing_layers(merged))


def densities_of(density: float | Sequence[float], adapters: int) -> list[float]:
    """Return one density for each of `adapters` adapters. density: one number for all of them, or
    one for each. Errors: ConfigError.

    >>> densities_of(0.5, 2), densities_of([0.5, 0.8], 2)
    ([0.5, 0.5], [0.5, 0.8])
    """
    given = [density] if isinstance(density, int | float) else list(density)
    if len(given) not in (1, adapters):
        raise ConfigError(
            f"{len(given)} densities for {adapters} adapters",
            "one density, or one for each adapter in order",
        )
    for share in given:
        if not 0 < share <= 1:
            raise ConfigError(f"density = {share}", "a share above 0 and at most 1")
    return given * (adapters if len(given) == 1 else 1)


def _check(adapters: Sequence[Adapter], weights: Sequence[float], method: Method) -> None:
    if len(adapters) < 2 or len(weights) != len(adapters):
        raise ConfigError(
            f"{len(adapters)} adapters and {len(weights)} weights",
            "two or more adapters, and one weight for each",
        )
    if not all(math.isfinite(w) for w in weights):
        raise ConfigError("weights: not finite", "a number for each adapter")
    if method == "slerp" and (len(adapters) != 2 or min(weights) < 0 or sum(weights) <= 0):
        raise ConfigError(
            "slerp merges exactly two adapters",
            "two adapters with weights of at least 0",
            "use linear",
        )
    if method == "regmean" and min(weights) <= 0:
        raise ConfigError(
            "regmean: a weight is 0 or less",
            "weights above 0: each is how much an adapter counts",
        )


def _zero_update(like: Factors) -> Factors:
    """Return factors of an update of zero, with the shapes of those in `like`."""
    return Factors(torch.zeros_like(like.a), torch.zeros_like(like.b), 1.0)


def _regmean_factors(
    parts: Sequence[Factors], weights: Sequence[float], moments: Sequence[torch.Tensor | None]
) -> list[Factors]:
    """Return new factors of one layer for each adapter, such that their updates add up to the least
    squares fit to all updates, each on its own adapter's inputs x. With Gᵢ = wᵢ E[x xᵀ] the fit is
    Σ Bᵢ Aᵢ Gᵢ (Σ Gⱼ)⁻¹. So each B is unchanged, and its A is multiplied by Gᵢ (Σ Gⱼ)⁻¹.

    - parts: the layer's factors in each adapter
    - weights: wᵢ, one for each adapter
    - moments: E[x xᵀ] of this layer for each adapter; None for an adapter without this layer, whose
      Gᵢ is zero"""
    size = parts[0].a.shape[1]
    weighted = [
        torch.zeros(size, size, dtype=torch.float64) if moment is None else weight * moment
        for weight, moment in zip(weights, moments, strict=True)
    ]
    total = torch.stack(weighted).sum(dim=0)
    total += RIDGE * total.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    return [
        Factors(torch.linalg.solve(total, moment @ part.a.double().T).T.float(), part.b, s)
        for part, moment, s in zip(parts, weighted, (part.scaling for part in parts), strict=True)
    ]


def _prune_factors(part: Factors, density: float, method: Method) -> Factors:
    """Keep only the share `density` of an update's entries: the largest for ties; random ones,
    scaled up, for dare. Return factors of the result, whose rank is the smaller side of the layer's
    matrix."""
    from peft.utils.merge_utils import prune

    update = part.scaling * (part.b.float() @ part.a.float())
    ties = method == "ties"
    kept = prune(update, density, "magnitude" if ties else "random", rescale=not ties)
    if len(kept) < kept.shape[1]:
        return Factors(kept, torch.eye(len(kept)), 1.0)
    return Factors(torch.eye(kept.shape[1]), kept, 1.0)


def _layer(
    parts: Sequence[Factors],
    weights: Sequence[float],
    method: Method,
    densities: Sequence[float],
    rank: int,
) -> Factors:
    """Merge the updates of one layer by PEFT; return factors of the result, with scaling 1.

    - parts: the layer's factors in each adapter; of regmean, as `_regmean_factors` returns them
    - weights, densities: one for each adapter
    - method: one of those in the table of `merge`
    - rank: the rank of the result of svd, ties and dare; less if the layer's matrix has fewer rows
      or columns"""
    if method == "slerp":
        weights, method = _slerp_weights(parts[0], parts[1], weights[1] / sum(weights)), "linear"
    if method == "regmean":
        weights, method = [1.0] * len(parts), "linear"
    density = densities[0]
    if method in ("ties", "dare") and len(set(densities)) > 1:  # PEFT takes one density for all
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The density .* no pruning will be performed")
            parts = [_prune_factors(p, d, method) for p, d in zip(parts, densities, strict=True)]
        method, density = "ties" if method == "ties" else "svd", 1.0
    model = _peft(parts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density .* no pruning will be performed")
        model.base_model.add_weighted_adapter(
            [str(number) for number in range(len(parts))],
            list(weights),
            "merged",
            _PEFT[method],
            svd_rank=min(rank, parts[0].a.shape[1], len(parts[0].b)),
            svd_full_matrices=False,
            density=density,
        )
    layer = model.base_model.model.layer
    a, b = layer.lora_A["merged"].weight, layer.lora_B["merged"].weight
    return Factors(a.detach(), b.detach(), 1.0)


def _peft(parts: Sequence[Factors]) -> Any:
    """Build a PEFT model of one linear layer that has `parts` as its adapters "0", "1", …; the
    layer's own weight is never read."""
    holder, skip_init = nn.Module(), cast(Any, nn.utils.skip_init)
    holder.layer = skip_init(nn.Linear, parts[0].a.shape[1], len(parts[0].b), bias=False)
    model: Any = None
    for number, part in enumerate(parts):
        name, rank = str(number), len(part.a)
        alpha: Any = part.scaling * rank  # PEFT says int and computes with a float
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["layer"])
        if model is None:
            model = PeftModel(holder, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        layer = model.base_model.model.layer
        layer.lora_A[name].weight.data = part.a.float()
        layer.lora_B[name].weight.data = part.b.float()
    return model


def _slerp_weights(first: Factors, second: Factors, t: float) -> tuple[float, float]:
    """Return the weights of two updates in their spherical interpolation (slerp): sin((1-t)θ)/sin θ
    and sin(tθ)/sin θ, where θ is the angle between them. t: how far the result lies on the arc from
    `first` (0) to `second` (1). For parallel updates the weights are 1-t and t, as in linear
    interpolation.

    ⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ), so no update is ever formed."""

    def compute_inner_product(p: Factors, q: Factors) -> float:
        product = (p.b.double().T @ q.b.double()) * (p.a.double() @ q.a.double().T)
        return p.scaling * q.scaling * float(product.sum())

    length = math.sqrt(compute_inner_product(first, first) * compute_inner_product(second, second))
    cosine = compute_inner_product(first, second) / length if length else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-4:
        return 1 - t, t
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _fill_missing_layers(merged: dict[str, Factors]) -> dict[str, Factors]:
    """Return `merged` with an update of zero for each layer that is missing in a block. A block is
    a numbered layer of the model, and each block that occurs in `merged` gets every kind of adapted
    layer (such as self_attn.q_proj) that any block in `merged` has. This is needed since a LoRA
    table lists modules, and how many of the last blocks have them: it cannot leave out a module in
    one block alone. merged: factors by the layer's name."""
    places = {name: match for name in merged if (match := _LAYER.fullmatch(name))}
    kinds = {match[3]: merged[name] for name, match in places.items()}
    blocks = {(match[1], match[2]) for match in places.values()}
    product = {
        f"{stem}{number}.{kind}": _zero_update(like)
        for stem, number in blocks
        for kind, like in kinds.items()
    }
    return product | merged


def _arrays(merged: dict[str, Factors]) -> tuple[Arrays, int]:
    """Return the merged adapter's arrays by parameter name, and their rank. Every layer's factors
    are padded with zero rows and columns to the largest rank, which changes no update."""
    rank = max(len(factors.a) for factors in merged.values())
    arrays: Arrays = {}
    for name, (a, b, _) in merged.items():
        rows, columns = np.zeros((rank, a.shape[1])), np.zeros((len(b), rank))
        rows[: len(a)], columns[:, : len(a)] = a.numpy(), b.numpy()
        arrays[f"{name}.lora_A.default.weight"] = rows.astype(np.float32)
        arrays[f"{name}.lora_B.default.weight"] = columns.astype(np.float32)
    return arrays, rank
