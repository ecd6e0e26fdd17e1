import inspect
import math
import os
import random

import numpy as np
import pytest
import torch

from fedtune.dp import noise

N = 1_000_000


def test_zero_signal_variance_is_within_0_3_percent() -> None:
    grid = 2.0**-20
    drawn = noise.gaussian_on_grid(6 * N, 1.5, grid).double() * grid  # 0.003: 10 standard errors
    ratio = float(drawn.std()) / 1.5
    assert abs(ratio - 1) < 0.003
    assert abs(ratio / 0.99 - 1) > 0.003  # σ·0.99 and σ·1.01 are told apart
    assert abs(ratio / 1.01 - 1) > 0.003
    assert abs(float(drawn.mean())) < 6 * 1.5 / math.sqrt(6 * N)


def test_shape_is_gaussian() -> None:
    grid = 2.0**-20
    z = noise.gaussian_on_grid(N, 1.0, grid).double().numpy() * grid
    for at, mass in ((1, 0.3173105), (2, 0.0455003), (3, 0.0026998), (4, 6.334e-5)):
        seen = float(np.mean(np.abs(z) > at))
        assert abs(seen - mass) < 6 * math.sqrt(mass / N)


def test_neighbouring_coordinates_are_uncorrelated() -> None:
    """The two halves of Box–Muller share a radius: neither they nor neighbours may correlate."""
    z = noise.gaussian_on_grid(N, 2.0**20, 1.0).double().numpy()
    z /= z.std()
    pair = z[: 2 * noise._BLOCK].reshape(2, -1) ** 2 - 1
    assert abs(float(np.mean(pair[0] * pair[1]))) < 2 * 6 / math.sqrt(noise._BLOCK)
    for lag in (1, noise._BLOCK, 2 * noise._BLOCK, N // 2):
        assert abs(float(np.mean(z[:-lag] * z[lag:]))) < 6 / math.sqrt(N - lag)


def _seed_everything() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def test_no_seed_replays_it() -> None:
    def draw() -> torch.Tensor:
        _seed_everything()
        return noise.gaussian_on_grid(64, 1.0, 2.0**-20)

    assert not torch.equal(draw(), draw())


def test_no_parameter_or_global_could_carry_a_seed() -> None:
    """What is public takes sizes alone, keeps no state, and no generator is in the module."""
    parameters = inspect.signature(noise.gaussian_on_grid).parameters
    assert list(parameters) == ["dimension", "std", "grid"]
    assert all(p.default is inspect.Parameter.empty for p in parameters.values())
    public = {
        name
        for name, value in vars(noise).items()
        if callable(value) and getattr(value, "__module__", "") == noise.__name__
    }
    assert public == {"gaussian_on_grid", "_keystream"}
    source = inspect.getsource(noise)
    for word in ("np.random", "import random", "torch.rand", "Generator(", "environ"):
        assert word not in source


def test_the_key_is_the_system_s_and_new_in_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: with the system's generator replaced (and by nothing less) the noise repeats."""
    asked: list[int] = []

    def counted(n: int) -> bytes:
        asked.append(n)
        return bytes(n)

    monkeypatch.setattr(os, "urandom", counted)
    first, second = (noise.gaussian_on_grid(64, 1.0, 2.0**-20) for _ in range(2))
    assert asked == [32, 16] * 2
    assert torch.equal(first, second)


def test_blocks_continue_one_keystream() -> None:
    """No block repeats another (a counter that restarts would be a two-time pad)."""
    drawn = noise.gaussian_on_grid(8 * noise._BLOCK, 1.0, 2.0**-40)
    assert len(np.unique(drawn.numpy())) > 0.999 * len(drawn)


@pytest.mark.parametrize(
    ("std", "grid"),
    [
        (0.0, 1.0),
        (-1.0, 1.0),
        (1.0, 0.0),
        (math.nan, 1.0),
        (math.inf, 1.0),
        (1.0, math.inf),
        (1.0, -1.0),
        (1e-300, 1e300),
        (1.0, 2.0**-60),
    ],
)
def test_there_is_no_noiseless_call(std: float, grid: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        noise.gaussian_on_grid(8, std, grid)


@pytest.mark.parametrize("size", [0, 1, 7, 2**15 - 1, 2**15, 2**15 + 1])
def test_every_coordinate_of_every_size_is_noised(size: int) -> None:
    drawn = noise.gaussian_on_grid(size, 1.0, 2.0**-40)
    assert drawn.shape == (size,) and drawn.dtype == torch.int64
    assert int((drawn == 0).sum()) == 0  # a zero has probability 2⁻⁴⁰·0.4 each
