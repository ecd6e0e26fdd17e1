"""What a long step reports of its work follows the products that it computes, so that the time
left follows from the time taken, whatever the lengths of the records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from fedtune.cli.pace import SOONEST, StepPace
from fedtune.core import progress
from fedtune.core.data.dataset import Dataset, Example
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.network import Network
from fedtune.core.objectives.causal_lm import CausalLM
from fedtune.core.training.unit_gradients import UnitGradientEngine

FIRST, FACTOR = 0.1, 1.5  # from which share of a step on, and by how much, an estimate may err
SECONDS = 600.0  # of each step, on a clock that goes by products
Heard = list[tuple[progress.Step, int]]  # what was reported, and the products until then


def texts(units: int) -> Dataset:
    """Records of 8 to 500 tokens, the short ones more often, a few of them of one unit."""
    draw, examples = np.random.default_rng(0), []
    for number in range(60):
        length = int(8 * 62.5 ** draw.uniform() ** 2)
        ids = draw.integers(3, 280, size=length + 1, dtype=np.int32)
        targets = ids[1:].copy()
        targets[: int(draw.integers(0, length))] = -100
        examples.append(Example(ids[:-1].copy(), targets, -100, number % units))
    return Dataset(examples, units, Counter())


def heard(work: Callable[[], object]) -> Heard:
    found: Heard = []
    with FlopCounterMode(display=False) as counter:

        def hear(step: progress.Step) -> None:
            found.append((step, counter.get_total_flops()))

        with progress.listening(hear):
            work()
    return found


def off(found: Heard) -> float:
    """The most that an estimate of the time left errs by after the first tenth, as a factor."""
    pace, worst = StepPace(), 1.0
    (_, begins), (_, ends) = found[0], found[-1]
    for step, products in found:
        now = SECONDS * (products - begins) / (ends - begins)
        left = pace.estimate_remaining(step, SOONEST + now)
        if left is not None and FIRST * SECONDS < now < SECONDS:
            worst = max(worst, left / (SECONDS - now), (SECONDS - now) / left)
    return worst


def reading(network: Network) -> Heard:
    data = CachedDataset(network, texts(60))
    network.states.clear()
    return heard(data.warm)


def passing(network: Network) -> Heard:
    """Forward alone, as evaluation does."""
    data = CachedDataset(network, texts(60))
    data.warm()

    def work() -> None:
        progress.report("measuring", 0, 1000)
        for batch in data.batches(range(60), 512, progress.reporter("measuring")):
            CausalLM().losses(network, batch)

    return heard(work)


def training(units: int) -> Callable[[Network], Heard]:
    def run(network: Network) -> Heard:
        data = CachedDataset(network, texts(units))
        data.warm()
        engine = UnitGradientEngine(data, CausalLM())

        def work() -> None:
            progress.report("training", 0, 1000)
            for chunk in engine(list(range(units)), progress.reporter("training")):
                chunk.wipe()

        return heard(work)

    return run


STEPS = {"reading": reading, "passing": passing, "training": training(60), "units": training(40)}


@pytest.mark.parametrize("name", STEPS)
def test_the_time_left_of_a_step_is_right_after_its_first_tenth(
    name: str, network: Network
) -> None:
    found = STEPS[name](network)
    assert len(found) > 10 and found[-1][0].share == 1
    assert off(found) < FACTOR


@pytest.mark.parametrize("name", ["passing", "training"])
def test_twin_records_counted_as_if_each_took_equally_long_are_caught(
    name: str, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CachedDataset, "_work", lambda self, bucket, records: records)
    assert off(STEPS[name](network)) > FACTOR
