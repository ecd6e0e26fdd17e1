"""Slice an adapter's ranks, for a site that trains fewer ranks than the plan's adapter has.

With A frozen and shared, an adapted layer changes by s·B A, and column j of B is multiplied only by
row j of A. In a round a site of rank k trains k columns of each B, at the plan's scale s, and sends
these; in the next round it trains the next k columns, so that it trains all of them in turn. The
columns that it did not train count as zero. The weighted mean of the sites' updates is then exactly
the mean of their changes s·ΔBᵢ A, since these are linear in B. If A is trained too, the mean of
products is not the product of means (docs/decisions/0024-ranks.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.core.config import LoraTable

Arrays = dict[str, npt.NDArray[np.float32]]
ALL = slice(None)


def rank_slice(lora: LoraTable | None, rank: int | None, round_: int) -> slice:
    """Return the columns of each B that a site of `rank` trains in round `round_` (from 1); all
    columns if rank or lora is None. Each round trains the next block of columns. The last block
    ends with the last column, and the round after it trains the first block again. The result
    depends only on the round's number and on two public figures, the ranks of site and adapter."""
    if lora is None or rank is None:
        return ALL
    blocks = -(-lora.rank // rank)
    start = min((round_ - 1) % blocks * rank, lora.rank - rank)
    return slice(start, start + rank)


def trained_slice(name: str, values: Any, columns: slice) -> Any:
    """Return the part of a tensor's values that a site trains, as a view: the given columns if the
    tensor is a B, else everything.

    - name: the tensor's name, which says whether it is a B
    - values: its values
    - columns: the columns of B that the site trains"""
    return values[:, columns] if ".lora_B." in name else values
