"""Compute tensor shapes from one record or from a constant, never from the other records of the
batch."""

from __future__ import annotations

from collections.abc import Iterator


def padded_length(length: int) -> int:
    """Return the length to which a passage of `length` positions is padded; it depends on `length`
    alone. Above 64 at most an eighth is padding. Finer steps would make micro-batches smaller, and
    cost as much as they save (benchmarks/padding.py)."""
    if length <= 8:
        return 1 << (length - 1).bit_length()
    step = max(8, (1 << length.bit_length()) // 16)
    return -(-length // step) * step


def head_positions(length: int, targets: int) -> int:
    """Return the number of positions at which the head runs. length: the padded length of a
    passage; targets: the most targets of a passage. If most positions have a target, the head runs
    at all positions, since selecting some would cost more than it saves."""
    selected = padded_length(max(1, targets))
    return selected if selected <= 0.75 * length else length


def split_evenly(total: int, limit: int) -> Iterator[tuple[slice, int]]:
    """Split the positions 0 to `total` into parts of one size, at most `limit`. Yield each part
    with the number of positions at its end that no earlier part had. All parts have one size, since
    a row's result in a matrix product depends on the number of rows; so the last part may overlap
    the one before."""
    size = -(-total // max(1, -(-total // limit)))
    for start in range(0, total, max(1, size)):
        stop = min(start + size, total)
        yield slice(stop - size, stop), stop - start
