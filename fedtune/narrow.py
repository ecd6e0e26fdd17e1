"""Which numbers of an adapter a site trains that has room for fewer ranks than the plan's.

With A frozen and shared, an adapted layer changes by s·B A, and column j of B meets row j of A
alone. A site of rank k trains the first k columns of each B, at the plan's own scale s, and sends
these. With zeros behind them, the weighted mean of the sites' updates is the mean of their changes
s·ΔBᵢ A[:kᵢ]: linear in B, so exact. Where A is trained too, a mean of products is no product of
means (docs/decisions/0024-ranks.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[np.float32]]


def own(name: str, values: Any, rank: int | None) -> Any:
    """The part of trainable tensor `name` that a site of `rank` trains, as a view: the first
    columns of a B, all of anything else. None: all of everything."""
    return values[:, :rank] if rank is not None and ".lora_B." in name else values


def narrowed(arrays: Mapping[str, npt.NDArray[np.float32]], rank: int | None) -> Arrays:
    """Of each array what a site of `rank` trains: the names and shapes of its updates."""
    return {name: np.ascontiguousarray(own(name, a, rank)) for name, a in arrays.items()}


def widened(update: Arrays, like: Mapping[str, npt.NDArray[np.float32]]) -> Arrays:
    """`update` in the shapes of `like`: zeros where its site trains nothing."""
    found: Arrays = {}
    for name, array in update.items():
        found[name] = array
        if array.shape != like[name].shape:
            found[name] = np.zeros_like(like[name])
            found[name][:, : array.shape[1]] = array
    return found
