"""How much of what is computed of a real data set is padding."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest

from benchmarks.padding import (
    QUESTION,
    SETS,
    Padding,
    Way,
    arrange_blocks,
    padding,
    poisson,
    read,
    sizes_of,
)
from fedtune.core.config import Columns
from fedtune.core.models import cache
from tests.examples.test_real_data import DATA, data

MOST = 1.10  # padded over real positions of a record
MOST_OF_EPOCH = 1.12  # and with what fills the blocks of an epoch


def count_padding(name: str, columns: Columns, limit: int) -> list[Padding]:
    """Over an epoch, and over Poisson batches."""
    if name != "demo":
        data(name)
    sizes = sizes_of(read(DATA, name, columns, limit))
    draw = np.random.default_rng(0)
    drawn = [poisson(len(sizes), expected, draw) for expected in (32, 256) for _ in range(20)]
    return [padding(sizes, batches) for batches in ([range(len(sizes))], drawn)]


@pytest.mark.long
@pytest.mark.real
@pytest.mark.parametrize(("name", "columns", "limit"), SETS)
def test_padding_is_a_tenth_at_most(name: str, columns: Columns, limit: int) -> None:
    epoch, drawn = count_padding(name, columns, limit)
    assert max(epoch.records, drawn.records) <= MOST
    assert epoch.blocks <= MOST_OF_EPOCH


@pytest.mark.long
@pytest.mark.real
def test_coarser_buckets_are_caught() -> None:
    """The twin: buckets of a whole octave."""
    with patch.object(cache, "padded_length", lambda n: 1 << (n - 1).bit_length()):
        assert min(found.records for found in count_padding("medquad", QUESTION, 512)) > MOST


@pytest.mark.long
@pytest.mark.real
def test_blocks_apart_by_every_number_of_targets_have_more_padding() -> None:
    _, drawn = count_padding("medquad", QUESTION, 256)
    with arrange_blocks(Way(apart=True)):
        _, before = count_padding("medquad", QUESTION, 256)
    assert before.blocks > drawn.blocks + 0.02
