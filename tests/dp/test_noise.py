import inspect
import math

import numpy as np
import pytest
import torch

from fedtune.dp import noise

N = 1_000_000


def test_zero_signal_variance_is_within_0_3_percent() -> None:
    grid = 2.0**-20
    drawn = noise.gaussian_on_grid(N, 1.5, grid).double() * grid
    ratio = float(drawn.std()) / 1.5
    assert abs(ratio - 1) < 0.003
    assert abs(ratio / 0.99 - 1) > 0.003  # σ·0.99 and σ·1.01 are told apart
    assert abs(ratio / 1.01 - 1) > 0.003
    assert abs(float(drawn.mean())) < 5 * 1.5 / math.sqrt(N)


def test_shape_is_gaussian() -> None:
    grid = 2.0**-20
    z = noise.gaussian_on_grid(N, 1.0, grid).double().numpy() * grid
    for at, mass in ((1, 0.3173105), (2, 0.0455003), (3, 0.0026998), (4, 6.334e-5)):
        seen = float(np.mean(np.abs(z) > at))
        assert abs(seen - mass) < 5 * math.sqrt(mass / N)


def test_neighbouring_coordinates_are_uncorrelated() -> None:
    """The two halves of Box–Muller share a radius: neither they nor neighbours may correlate."""
    z = noise.gaussian_on_grid(N, 2.0**20, 1.0).double().numpy()
    z /= z.std()
    for lag in (1, N // 2):
        assert abs(float(np.mean(z[:-lag] * z[lag:]))) < 6 / math.sqrt(N - lag)


def test_no_seed_replays_it() -> None:
    def draw() -> torch.Tensor:
        torch.manual_seed(0)
        np.random.seed(0)
        return noise.gaussian_on_grid(64, 1.0, 2.0**-20)

    assert not torch.equal(draw(), draw())
    assert "seed" not in "".join(inspect.signature(noise.gaussian_on_grid).parameters)


@pytest.mark.parametrize(("std", "grid"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0)])
def test_there_is_no_noiseless_call(std: float, grid: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        noise.gaussian_on_grid(8, std, grid)


def test_odd_sizes() -> None:
    assert len(noise.gaussian_on_grid(7, 1.0, 2.0**-20)) == 7
