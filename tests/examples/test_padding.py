"""How much of a real data set's micro-batches is padding."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest

from benchmarks.padding import QUESTION, SETS, padding, poisson, read
from fedtune.core.config import Columns
from fedtune.core.models import cache
from tests.examples.test_real_data import DATA, data

MOST = 1.10  # padded over real positions


def ratios(name: str, columns: Columns, limit: int) -> list[float]:
    """Over an epoch, and over Poisson batches."""
    if name != "demo":
        data(name)
    lengths = [len(e.input_ids) for e in read(DATA, name, columns, limit).examples]
    draw = np.random.default_rng(0)
    drawn = [poisson(len(lengths), expected, draw) for expected in (32, 256) for _ in range(20)]
    return [padding(lengths, batches)[0] for batches in ([range(len(lengths))], drawn)]


@pytest.mark.real
@pytest.mark.parametrize(("name", "columns", "limit"), SETS)
def test_padding_is_a_tenth_at_most(name: str, columns: Columns, limit: int) -> None:
    assert max(ratios(name, columns, limit)) <= MOST


@pytest.mark.real
def test_coarser_buckets_are_caught() -> None:
    """The twin: buckets of a whole octave."""
    with patch.object(cache, "padded_length", lambda n: 1 << (n - 1).bit_length()):
        assert min(ratios("medquad", QUESTION, 512)) > MOST
