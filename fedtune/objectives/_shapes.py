"""Shapes that follow from one record or from a constant, never from the records beside it."""

from __future__ import annotations

from collections.abc import Iterator


def padded_length(length: int) -> int:
    """What so many positions are padded to: a function of their number alone. An eighth is padding
    at most, above 64; finer steps cost in small micro-batches what they save
    (benchmarks/padding.py)."""
    if length <= 8:
        return 1 << (length - 1).bit_length()
    step = max(8, (1 << length.bit_length()) // 16)
    return -(-length // step) * step


def even(total: int, limit: int) -> Iterator[tuple[slice, int]]:
    """0 to `total` in parts of one size, at most `most`: what a product of matrices makes of a row
    follows from how many there are. The last part reaches back; with each comes how many of its
    last places are new."""
    size = -(-total // max(1, -(-total // limit)))
    for start in range(0, total, max(1, size)):
        stop = min(start + size, total)
        yield slice(stop - size, stop), stop - start
