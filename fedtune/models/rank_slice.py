"""Which numbers of an adapter a site trains that has room for fewer ranks than the plan's.

With A frozen and shared, an adapted layer changes by s·B A, and column j of B meets row j of A
alone. A site of rank k trains k columns of each B in a round, at the plan's own scale s, and sends
these; the next round it trains the next k, so that in time it trains all. With zeros elsewhere the
weighted mean of the sites' updates is the mean of their own changes s·ΔBᵢ A: linear in B, so exact.
Where A is trained too, a mean of products is no product of means (docs/decisions/0024-ranks.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.config import LoraTable

Arrays = dict[str, npt.NDArray[np.float32]]
ALL = slice(None)


def rank_slice(lora: LoraTable | None, rank: int | None, round_: int) -> slice:
    """The columns of each B that a site of `rank` trains in round `round_` (from 1); None: all.

    Block after block, the last of which ends with the last column, then from the first again. It
    follows from the round's number and two public figures alone."""
    if lora is None or rank is None:
        return ALL
    blocks = -(-lora.rank // rank)
    start = min((round_ - 1) % blocks * rank, lora.rank - rank)
    return slice(start, start + rank)


def trained_slice(name: str, values: Any, columns: slice) -> Any:
    """The part of trainable tensor `name` that is trained, as a view: of a B these columns, of
    anything else all."""
    return values[:, columns] if ".lora_B." in name else values


def slice_update(arrays: Mapping[str, npt.NDArray[np.float32]], columns: slice) -> Arrays:
    """Slice the trained columns out of each array: the names and shapes of an update."""
    return {
        name: np.ascontiguousarray(trained_slice(name, a, columns)) for name, a in arrays.items()
    }


def pad_update(
    update: Arrays, like: Mapping[str, npt.NDArray[np.float32]], columns: slice
) -> Arrays:
    """`update` in the shapes of `like`: zeros where its site trained nothing."""
    found: Arrays = {}
    for name, array in update.items():
        found[name] = array
        if array.shape != like[name].shape:
            found[name] = np.zeros_like(like[name])
            found[name][:, columns] = array
    return found
