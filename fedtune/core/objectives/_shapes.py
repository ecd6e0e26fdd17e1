"""Compute tensor shapes from one record or from a constant, never from the records beside it."""

from __future__ import annotations

from collections.abc import Iterator


def padded_length(length: int) -> int:
    """Return the length to which this many positions are padded: a function of their number
    alone. Above 64 at most an eighth is padding; finer steps cost in small micro-batches what
    they save (benchmarks/padding.py)."""
    if length <= 8:
        return 1 << (length - 1).bit_length()
    step = max(8, (1 << length.bit_length()) // 16)
    return -(-length // step) * step


def head_positions(length: int, targets: int) -> int:
    """Return the number of positions at which the head runs, of a passage of this padded length
    with so many targets at most: all of them if most have a target, since selecting would cost more
    than it saves."""
    selected = padded_length(max(1, targets))
    return selected if selected <= 0.75 * length else length


def split_evenly(total: int, limit: int) -> Iterator[tuple[slice, int]]:
    """Split 0 to `total` into parts of one size, at most `limit`: a row's result in a matrix
    product depends on the number of rows. The last part overlaps the one before; each part comes
    with the number of its last places that are new."""
    size = -(-total // max(1, -(-total // limit)))
    for start in range(0, total, max(1, size)):
        stop = min(start + size, total)
        yield slice(stop - size, stop), stop - start
