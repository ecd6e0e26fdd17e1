"""Coins and noise of one site in two worlds, coupled: see property_world."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.core.dp import noise, sampling
from fedtune.core.dp.plan import DpPlan
from fedtune.core.training.selftest import MemoryLog


@dataclass(frozen=True, repr=False, eq=False)
class Sum:
    """What one step added up before its noise, in multiples of `grid`."""

    plan: DpPlan
    round: int
    total: torch.Tensor
    std: float  # of the noise, in gradient units


class Coupling:
    """Stands in for coins and noise of the site's own steps, never of the self-test's."""

    def __init__(self) -> None:
        self.sums: list[Sum] = []
        self.noised: list[np.ndarray] = []  # with shared noise, what a site's words may open to
        self._names: list[bytes] | None = None
        self._summed: tuple[DpPlan, int, torch.Tensor] | None = None

    def of(self, plan: DpPlan, round_: int, name: bytes) -> np.random.Generator:
        """The same for one name in both worlds, and for others another."""
        key = f"{plan.study} {round_} {len(self.sums)} ".encode() + name
        return np.random.default_rng(list(hashlib.sha256(key).digest()))

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        honest_noised = DpPlan._add_noise_to
        honest_coins, honest_noise = sampling.poisson, noise.gaussian_on_grid

        def entered(honest: Callable[..., Any]) -> Callable[..., Any]:
            def step(
                plan: DpPlan, n: int, d: int, rows: Any, log: Any, round_: int, *t: Any
            ) -> Any:
                if not isinstance(log, MemoryLog):
                    self._names, self._plan = names(plan, rows, n), (plan, round_)
                try:
                    return honest(plan, n, d, rows, log, round_, *t)
                finally:
                    self._names = None

            return step

        def poisson(n: int, q: float) -> list[int]:
            if self._names is None or q == 1.0:
                return honest_coins(n, q)
            coins = (self.of(*self._plan, name).random() for name in self._names)
            return [row for row, coin in enumerate(coins) if coin < q]

        def noised(plan: DpPlan, total: torch.Tensor, log: Any, round_: int) -> torch.Tensor:
            if not isinstance(log, MemoryLog):
                self._summed = plan, round_, total.clone()
            return honest_noised(plan, total, log, round_)

        def gaussian(d: int, std: float, grid: float) -> torch.Tensor:
            if self._summed is None:
                return honest_noise(d, std, grid)
            (plan, round_, total), self._summed = self._summed, None
            draw = self.of(plan, round_, b"noise").normal(size=d) * (std / grid)
            self.sums.append(Sum(plan, round_, total, std))
            drawn = torch.from_numpy(np.rint(draw).astype(np.int64))
            if plan.sites == 1:
                return drawn - total
            self.noised.append(np.sort((total + drawn).numpy()))  # tensors go in another order
            return drawn

        with pytest.MonkeyPatch.context() as patch:
            for name in ("step", "noised_sum"):
                patch.setattr(DpPlan, name, entered(getattr(DpPlan, name)))
            patch.setattr(DpPlan, "_add_noise_to", noised)
            patch.setattr(sampling, "poisson", poisson)
            patch.setattr(noise, "gaussian_on_grid", gaussian)
            yield


def names(plan: DpPlan, engine: Any, n: int) -> list[bytes]:
    """Each row by its unit's key and, where it is a record, what the record says; of equal ones
    the first, the second and so on."""
    if not hasattr(engine, "data"):  # a query, in which all take part
        return [b"" for _ in range(n)]
    dataset, found = engine.data.dataset, []
    several: Counter[bytes] = Counter()
    for members in engine._members:
        examples = [dataset.examples[i] for i in members]
        parts = [dataset.keys[examples[0].unit]] if plan.unit == "patient" else []
        if plan.unit == "record" or plan.records > 1:
            for e in examples:
                ids = [p.input_ids.tobytes() + p.target_ids.tobytes() for p in e.passages]
                parts += [*ids, str(e.label).encode(), e.media.digest if e.media else b""]
        name = hashlib.sha256(b"\0".join(parts)).digest()
        several[name] += 1
        found.append(name + str(several[name]).encode())
    return found
