"""Slice an adapter's ranks, for a site that trains fewer ranks than the plan's adapter has.

With A frozen and shared, an adapted layer changes by s·B A, and column j of B meets row j of A
alone. A site of rank k trains k columns of each B in a round, at the plan's scale s, and sends
these; the next round it trains the next k, and so all of them over the rounds. With zeros
elsewhere the weighted mean of the sites' updates is that of their changes s·ΔBᵢ A: linear in B,
so exact. If A is trained too, the mean of products is not the product of means
(docs/decisions/0024-ranks.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.core.config import LoraTable

Arrays = dict[str, npt.NDArray[np.float32]]
ALL = slice(None)


def rank_slice(lora: LoraTable | None, rank: int | None, round_: int) -> slice:
    """Return the columns of each B that a site of `rank` trains in round `round_` (from 1).

    rank None: all columns. Rounds take one block of columns after another; the last block ends
    with the last column, and then the first follows again. The result depends only on the
    round's number and two public figures."""
    if lora is None or rank is None:
        return ALL
    blocks = -(-lora.rank // rank)
    start = min((round_ - 1) % blocks * rank, lora.rank - rank)
    return slice(start, start + rank)


def trained_slice(name: str, values: Any, columns: slice) -> Any:
    """Select the trained part of tensor `name`, as a view: `columns` of a B, all of anything
    else."""
    return values[:, columns] if ".lora_B." in name else values
