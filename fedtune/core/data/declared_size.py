"""Compare the size that a site declares with the number of its units."""

from __future__ import annotations

from collections.abc import Iterable

FAR = 0.1  # a difference of more than this share of the declared size is reported


def describe_wrong_size(units: int, declared: int, unit: str) -> Iterable[str]:
    """Yield one line of text if the declared size differs from the true number of units by more
    than the share FAR; else yield nothing. The line begins with WARNING if they differ by a factor
    of two or more. unit: "patient" or "record", for the text."""
    if abs(declared - units) > FAR * declared:
        twice = units >= 2 * declared or 2 * units <= declared
        yield (
            f"{'WARNING: ' if twice else ''}site.declared_size = {declared:,} and there are "
            f"{units:,} {unit}s: sampling rate, noise and weight follow the declared size; a "
            "person may declare another round figure, which is public"
        )
