"""NVFlare's privacy filters for what a client sends: SVTPrivacy and PercentilePrivacy."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import Filter
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.filters import PercentilePrivacy, SVTPrivacy


def differences() -> Iterator[str]:
    """Yield what NVFlare's code does, a line each."""
    logging.disable()
    percentile = PercentilePrivacy(percentile=50)
    first, second = (_filtered(percentile) for _ in range(2))
    same = np.array_equal(first, second)
    yield f"PercentilePrivacy: what leaves is the same twice: {same}"
    yield f"PercentilePrivacy: numbers that leave: {np.count_nonzero(first)} of {len(first)}"
    for size in (1_000, 1_000_000):
        private = SVTPrivacy()
        _filtered(private, size)
        spent = private.get_privacy_spent()
        yield f"SVTPrivacy, defaults, a round of {size:,} numbers: ε = {spent:,.1f}"
    private = SVTPrivacy()
    for _ in range(3):
        _filtered(private)
    yield f"SVTPrivacy, after three rounds of 1,000 numbers: ε = {private.get_privacy_spent():.1f}"
    private.handle_event(EventType.START_RUN, FLContext())
    yield f"SVTPrivacy, when the next run starts: ε = {private.get_privacy_spent():.1f}"


def _filtered(filter_: Filter, size: int = 1_000) -> np.ndarray:
    """Pass one update through a filter; return what leaves."""
    update = np.random.default_rng(0).normal(0.0, 1e-5, size)
    sent = filter_.process_dxo(
        DXO(DataKind.WEIGHT_DIFF, data={"w": update}), Shareable(), FLContext()
    )
    return sent.data["w"]


if __name__ == "__main__":
    print(*differences(), sep="\n")
