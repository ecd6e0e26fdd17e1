"""The sampler is Poisson: batch sizes vary as they must, and no unit's inclusion tells another's.

Each test is also run on samplers that only look right (shuffled batches, batches of a fixed size,
units drawn in pairs, a rate that drifts), and must refuse them. The chance of a false alarm is
divided among the figures that a sampler gives; how many steps are drawn follows from the smallest
fault among them, in standard deviations of one step."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from fedtune.core.dp import sampling
from fedtune.core.dp.clip import Chunk
from fedtune.core.dp.sampling import poisson
from fedtune.core.training.selftest import MemoryLog
from tests import chance
from tests.dp.conftest import make_plan

N = 60
RATES = (0.1, 0.3)
PAIRS, LAGS, TENTHS = N * (N - 1) // 2, 3, 10
FIGURES = 1 + (PAIRS + 1) + (TENTHS * N + TENTHS) + LAGS
FAR = chance.deviations(FIGURES)
Sampler = Callable[[int, float], list[int]]


def spread_of_variance(q: float) -> float:
    """The standard deviation that one step adds to the sizes' variance, over that variance."""
    kurtosis = 3 + (1 - 6 * q * (1 - q)) / (N * q * (1 - q))
    return math.sqrt(kurtosis - 1)


# Halves that avoid each other: sizes vary by (1 - q / (1 - q)) times what they should. The other
# samplers below are further off, in standard deviations of one step.
LEAST = 0.3 / 0.7 / spread_of_variance(0.3)
TIMES = math.ceil(chance.draws_of_mean(LEAST, FIGURES) / TENTHS) * TENTHS


def inclusion(sampler: Sampler, q: float) -> np.ndarray:
    """(TIMES, N) bool: who was drawn when."""
    member = np.zeros((TIMES, N), dtype=bool)
    for t in range(TIMES):
        drawn = sampler(N, q)
        assert len(set(drawn)) == len(drawn)
        member[t, drawn] = True
    return member


def size_varies(member: np.ndarray, q: float) -> bool:
    """Batch sizes have a binomial's variance."""
    sizes, expected = member.sum(axis=1), N * q * (1 - q)
    off = sizes.var(ddof=1) / expected - 1
    return bool(abs(off) < FAR * spread_of_variance(q) / math.sqrt(TIMES))


def pairs_are_independent(member: np.ndarray, q: float) -> bool:
    """For every pair of units the share of batches with both is q²; so is their mean."""
    both = (member.T.astype(np.int64) @ member)[np.triu_indices(N, 1)]
    p, each = q * q, chance.count_of(TIMES, q * q, FIGURES)
    # Pairs share units, so the mean's deviation is mostly that of the batch size.
    mean = math.sqrt(4 * q**3 * (1 - q) / (N * TIMES) + p * (1 - p) / (TIMES * PAIRS))
    apart = each.low <= both.min() and both.max() <= each.high
    return bool(apart and abs(both.mean() / TIMES - p) < FAR * mean)


def rates_are_equal(member: np.ndarray, q: float) -> bool:
    """Each unit, and all of them together, are drawn with q in every tenth of the steps."""
    counts = member.reshape(TENTHS, TIMES // TENTHS, N).sum(axis=1)
    each = chance.count_of(TIMES // TENTHS, q, FIGURES)
    together = chance.count_of(TIMES // TENTHS * N, q, FIGURES)
    equal = each.low <= counts.min() and counts.max() <= each.high
    return bool(equal and all(together.holds(count) for count in counts.sum(axis=1)))


def steps_are_independent(member: np.ndarray, q: float) -> bool:
    """Drawn in this step says nothing about the next one, or the one after."""
    spread = q * (1 - q)
    centred = member - q
    return all(
        abs(float((centred[:-lag] * centred[lag:]).mean())) < FAR * spread / math.sqrt(TIMES * N)
        for lag in (1, 2, round(1 / q))
    )


CHECKS = (size_varies, pairs_are_independent, rates_are_equal, steps_are_independent)

# ------------------------------------------------------------------ samplers that only look right


def shuffled() -> Sampler:
    """Trap 9: an epoch's permutation cut into batches."""
    source, queue = random.Random(0), list[int]()

    def draw(n: int, q: float) -> list[int]:
        size = round(n * q)
        if len(queue) < size:
            queue[:] = source.sample(range(n), n)
        return [queue.pop() for _ in range(size)]

    return draw


def fixed_size() -> Sampler:
    """Without replacement in a step, afresh each step: right rate, no variance."""
    source = random.Random(0)
    return lambda n, q: source.sample(range(n), round(n * q))


def in_pairs() -> Sampler:
    """Units 2i and 2i+1 come together (one uniform for two)."""
    source = np.random.default_rng(0)
    return lambda n, q: np.flatnonzero(np.repeat(source.random(n // 2) < q, 2)).tolist()


def one_pair() -> Sampler:
    """Everybody is independent but for two units that share their fate."""
    source = np.random.default_rng(0)

    def draw(n: int, q: float) -> list[int]:
        member = source.random(n) < q
        member[n - 1] = member[0]
        return np.flatnonzero(member).tolist()

    return draw


def antithetic() -> Sampler:
    """u and 1-u: the first half avoids the second. Sizes vary too little."""
    source = np.random.default_rng(0)

    def draw(n: int, q: float) -> list[int]:
        u = source.random(n // 2)
        return np.flatnonzero(np.concatenate([u, 1 - u]) < q).tolist()

    return draw


def drifting() -> Sampler:
    """The rate falls while the steps go on; right on average."""
    source, step = np.random.default_rng(0), iter(range(10**9))

    def draw(n: int, q: float) -> list[int]:
        rate = q * (1.5 - next(step) / TIMES)
        return np.flatnonzero(source.random(n) < rate).tolist()

    return draw


def repeated() -> Sampler:
    """Every other step takes the same units again."""
    source = np.random.default_rng(0)

    def steps() -> Iterator[np.ndarray]:
        while True:
            drawn = source.random(N)
            yield drawn
            yield drawn

    stream = steps()
    return lambda n, q: np.flatnonzero(next(stream) < q).tolist()


TWINS: dict[str, tuple[Callable[[], Sampler], set[Callable[[np.ndarray, float], bool]]]] = {
    "shuffled": (shuffled, {size_varies}),
    "fixed size": (fixed_size, {size_varies}),
    "in pairs": (in_pairs, {size_varies, pairs_are_independent}),
    "one pair": (one_pair, {pairs_are_independent}),
    "antithetic": (antithetic, {size_varies, pairs_are_independent}),
    "drifting": (drifting, {rates_are_equal}),
    "repeated": (repeated, {steps_are_independent}),
}


@pytest.mark.parametrize("q", RATES)
def test_the_sampler_is_poisson(q: float) -> None:
    member = inclusion(poisson, q)
    for check in CHECKS:
        assert check(member, q), check.__name__


@pytest.mark.parametrize("name", TWINS)
def test_a_sampler_that_only_looks_right_is_refused(name: str) -> None:
    make, by = TWINS[name]
    q = 0.3
    member = inclusion(make(), q)
    assert abs(member.mean() / q - 1) < 0.05  # the rate alone would not tell
    assert by <= {check for check in CHECKS if not check(member, q)}


def test_the_shipped_step_draws_like_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through DpPlan.step, whose gradients are asked for the sampled rows and no others; and a
    shuffling sampler put in its place is refused."""
    plan = make_plan(sampling_rate=0.3)

    def through_the_step(n: int, q: float) -> list[int]:
        asked: list[int] = []

        def gradients(rows: list[int]) -> Iterator[Chunk]:
            asked.extend(rows)
            yield Chunk(rows, [torch.zeros(len(rows), 2)])

        plan.step(n, 2, gradients, MemoryLog(), 1)
        return asked

    member = inclusion(through_the_step, 0.3)
    assert all(check(member, 0.3) for check in CHECKS)
    monkeypatch.setattr(sampling, "poisson", shuffled())
    assert not size_varies(inclusion(through_the_step, 0.3), 0.3)


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
    assert any(not poisson(2, 0.05) for _ in range(chance.tries(0.95**2)))


def test_tiny_and_nearly_full_rates_keep_their_rate() -> None:
    """q·2⁵³ is compared as an integer: no rounding to 0 or 1."""
    for q, others in ((1e-4, (0.0, 3e-4)), (1 - 1e-4, (1.0, 1 - 3e-4))):
        test = chance.count_for(q, *others, figures=2)
        assert test.holds(len(poisson(test.trials, q)))


@pytest.mark.parametrize("q", [0.0, -0.1, 1.01, math.nan])
def test_rates_outside_the_unit_interval_are_refused(q: float) -> None:
    with pytest.raises(ValueError, match="sampling_rate"):
        poisson(10, q)
