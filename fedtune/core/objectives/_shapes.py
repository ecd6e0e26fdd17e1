"""Compute tensor shapes from one record or from a constant, never from the other records of the
batch."""

from __future__ import annotations

from collections.abc import Iterator

# In a block, layers and head compute a multiple of this number of rows, or the rows of one record
# alone. A machine is tried with these numbers of rows (models/places.py). This is also the smallest
# number of fp32 numbers that a processor computes at a time (64-bit ARM).
EIGHT = 8


def padded_length(length: int) -> int:
    """Return the length to which a passage of `length` positions is padded; it depends on `length`
    alone. Above 64, at most an eighth of the padded length is padding. Finer steps would make
    micro-batches smaller, and cost as much as they save (benchmarks/padding.py)."""
    if length <= 8:
        return 1 << (length - 1).bit_length()
    step = max(8, (1 << length.bit_length()) // 16)
    return -(-length // step) * step


def head_positions(length: int, targets: int) -> int:
    """Return at how many positions of each passage the head runs: at those with a target, up to a
    padded number of them; but at all positions if most have a target, since selecting would then
    cost more than it saves.

    - length: the padded length of the passages
    - targets: the most targets of a passage"""
    selected = padded_length(max(1, targets))
    return selected if selected <= 0.75 * length else length


def split_evenly(total: int, limit: int) -> Iterator[tuple[slice, int]]:
    """Split the positions 0 to `total` into parts of one size. Yield each part as a pair: its
    slice, and how many positions at its end are in no earlier part. All parts have one size, since
    a row's result in a matrix product depends on the number of rows; so the last part may overlap
    the one before.

    - total: the number of positions
    - limit: the largest size of a part. If there are several parts, their size is a multiple of
      EIGHT, and may exceed the limit by up to 7"""
    size = -(-total // max(1, -(-total // limit)))
    size = min(total, size + -size % EIGHT)
    for start in range(0, total, max(1, size)):
        stop = min(start + size, total)
        yield slice(stop - size, stop), stop - start
