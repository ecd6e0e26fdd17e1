import inspect
import math
import os
import random

import numpy as np
import pytest
import torch
from scipy.stats import norm

from fedtune.core.dp import noise
from tests import chance

PERCENT = chance.spread_within(0.003, 0.99, 1.01, figures=2)


def size_is_right(z: np.ndarray) -> bool:
    """Whether draws have deviation 1, and mean 0: two figures."""
    mean = float(z.mean()) * math.sqrt(len(z))
    return PERCENT.holds(math.sqrt(np.mean(z**2))) and abs(mean) < chance.deviations(2)


@pytest.mark.parametrize("factor", [1.0, 0.99, 1.01])
def test_zero_signal_variance_is_within_0_3_percent(factor: float) -> None:
    """And its twins: one percent less or more is refused."""
    drawn = (
        noise.gaussian_on_grid(PERCENT.draws, 1.5 * factor, 2.0**-20).double().numpy() * 2.0**-20
    )
    assert size_is_right(drawn / 1.5) == (factor == 1.0)


# How much lies beyond 1, 2, 3 and 4 standard deviations; of a sum of 12 uniforms, which has the
# same variance and lighter tails (Irwin–Hall, to four digits).
BEYOND, OF_UNIFORMS = 2 * norm.sf([1, 2, 3, 4]), (0.3215, 0.04455, 0.002014, 1.705e-5)
SHAPE = chance.count_for(BEYOND[2], OF_UNIFORMS[2], figures=4)


def shape_is_right(z: np.ndarray) -> bool:
    counts = [int(np.sum(np.abs(z) > at)) for at in (1, 2, 3, 4)]
    tests = [chance.count_of(SHAPE.trials, rate, figures=4) for rate in BEYOND]
    return all(test.holds(count) for test, count in zip(tests, counts, strict=True))


def test_shape_is_gaussian() -> None:
    z = noise.gaussian_on_grid(SHAPE.trials, 1.0, 2.0**-20).double().numpy() * 2.0**-20
    assert shape_is_right(z)
    twin = np.random.default_rng(0).random((12, SHAPE.trials)).sum(axis=0) - 6
    assert not shape_is_right(twin)


LAGS = (1, noise._BLOCK, 2 * noise._BLOCK)
TOGETHER = 0.01  # a correlation that is refused
LONG = chance.draws_of_mean(TOGETHER, figures=len(LAGS) + 1) + max(LAGS)


def neighbours_are_apart(z: np.ndarray) -> bool:
    """Whether neither draws nor their squares correlate, at distances at which a block repeats, or
    the two halves of Box–Muller, which share a radius."""
    most, found = chance.deviations(len(LAGS) + 1), []
    for lag in LAGS:
        found.append(float(np.mean(z[:-lag] * z[lag:])) * math.sqrt(len(z) - lag))
    squares = z[: len(z) // (2 * noise._BLOCK) * 2 * noise._BLOCK].reshape(-1, 2, noise._BLOCK) ** 2
    both = ((squares[:, 0] - 1) * (squares[:, 1] - 1) / 2).ravel()
    found.append(float(both.mean()) * math.sqrt(len(both)))
    return max(map(abs, found)) < most


@pytest.mark.parametrize("lag", [None, *LAGS])
def test_neighbouring_coordinates_are_uncorrelated(lag: int | None) -> None:
    """And its twins, in which each draw leans on an earlier one."""
    z = noise.gaussian_on_grid(LONG, 2.0**20, 1.0).double().numpy() / 2.0**20
    if lag is not None:
        z[lag:] = math.sqrt(1 - TOGETHER**2) * z[lag:] + TOGETHER * z[:-lag]
    assert neighbours_are_apart(z) == (lag is None)


FEW = 2**10  # uniforms at the far end of the tail, whose radii are up to a million steps apart


def lie_on_circles(z: np.ndarray, scale: float) -> float:
    """Which share of the pairs of a block is within a step of one of the circles that Box–Muller
    can reach there; on so few, hardly any does by chance."""
    pairs = z.reshape(-1, 2, noise._BLOCK).astype(np.float64)
    radius = np.hypot(pairs[:, 0], pairs[:, 1]).ravel()
    circles = np.sort(scale * np.sqrt(-2.0 * np.log(np.arange(1, FEW + 1) * 2.0**-53)))
    at = np.clip(np.searchsorted(circles, radius), 1, FEW - 1)
    apart = np.minimum(abs(circles[at] - radius), abs(radius - circles[at - 1]))
    return float(np.mean(apart < 1.0))


@pytest.mark.parametrize("summed", [True, False])
def test_no_pair_of_the_tail_says_that_it_is_noise(
    summed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The far tail of one radius, on the generator's own stream: two numbers of it lie on one of a
    thousand circles. Not so in a sum with another; the twin draws one alone."""
    stream, scale = noise._keystream, 2.0**20

    def far_out(sizes):
        for bits in stream(sizes):
            quarter, bits = len(bits) // 4, bits.copy()
            bits[:quarter] %= np.uint64(FEW << 11)  # the first radius of each pair
            yield bits

    monkeypatch.setattr(noise, "_keystream", far_out)
    if summed:
        drawn = noise.gaussian_on_grid(2 * noise._BLOCK, scale, 1.0).numpy()
        assert max(lie_on_circles(drawn, size) for size in (scale, scale / math.sqrt(2))) < 0.01
    else:
        bits = next(far_out(iter([4 * noise._BLOCK])))
        alone = np.rint(noise._pairs(bits[: 2 * noise._BLOCK], scale))
        assert lie_on_circles(alone, scale) == 1.0


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
    assert public == {"gaussian_on_grid", "_keystream", "_pairs"}
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
    """No block repeats another (a counter that restarts would be a two-time pad); that two of these
    draws are equal by chance happens once in 150 runs, that a thousandth are never."""
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
