import math
import random

import numpy as np
import pytest
import torch

from fedtune.dp.sampling import poisson


def test_batch_size_is_binomial_and_pairs_are_independent() -> None:
    """Shuffling and fixed-size batches have no variance in size and correlated pairs: both fail."""
    n, q, times = 200, 0.3, 3000
    member = np.zeros((times, n), dtype=bool)
    for t in range(times):
        member[t, poisson(n, q)] = True
    sizes = member.sum(axis=1)
    assert abs(sizes.mean() / (n * q) - 1) < 0.02
    assert abs(sizes.var() / (n * q * (1 - q)) - 1) < 0.15
    pairs = float(np.mean(member[:, 0::2] & member[:, 1::2]))
    assert abs(pairs - q * q) < 5 * math.sqrt(q * q / (times * n / 2))


def test_full_batch_is_everyone() -> None:
    assert poisson(5, 1.0) == [0, 1, 2, 3, 4]


def test_no_seed_replays_it() -> None:
    def draw() -> list[int]:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        return poisson(500, 0.5)

    assert draw() != draw()


def test_empty_batches_happen() -> None:
    assert any(not poisson(2, 0.05) for _ in range(200))


@pytest.mark.parametrize("q", [0.0, -0.1, 1.01, math.nan])
def test_rates_outside_the_unit_interval_are_refused(q: float) -> None:
    with pytest.raises(ValueError, match="sampling_rate"):
        poisson(10, q)
