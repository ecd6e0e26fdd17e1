"""Audit the sum that a coordinator opens, as somebody sees it who holds some of the sites too.

    python -m tests.secagg.collusion --out docs/collusion.png [--trials 20000]

Draws the ε that such an attack shows against how many of five sites it holds, beside what the
ledger says: under the assumption, up to `colluding`, and the fallback, whoever colludes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fedtune.audit.bounds import gaussian_epsilon, gaussian_mu
from fedtune.audit.gaussian import CEILING, CONFIDENCE
from fedtune.core.dp import accountant
from fedtune.core.dp.clip import Chunk
from fedtune.core.dp.plan import DpPlan
from fedtune.core.secagg import masks
from fedtune.core.secagg.statement import Draw, Ready
from fedtune.core.training.selftest import HUGE, MemoryLog
from fedtune.core.wire.keys import SigningKey
from fedtune.server.masked_sum import MaskedSum
from tests.dp.conftest import make_plan

DIMENSION, TRIALS = 8, 10_000
DIGEST = "sha256:" + "0" * 64


@dataclass(frozen=True)
class Audit:
    """claimed, fallback: ε of one step as charged; audited, ceiling: its lower bound at 95 % and
    99.9 %, for who holds the coordinator and `held` sites."""

    held: int
    claimed: float
    fallback: float
    audited: float
    ceiling: float


def audits(
    plan: DpPlan, held: Sequence[int], trials: int = TRIALS, opens: bool = True
) -> list[Audit]:
    """Find out for `trials` canaries at the first site that are in a sum, and for as many that are
    not, whether they are; for each number of sites that the coordinator holds, from the same sums.

    A canary is one unit, longer than C, that the attacker knows but for whether it is there. A sum
    holds up to DIMENSION of them, each along another axis, as fair coins fall: none moves what
    another is told by. The attacker knows the sums of the sites that it holds, and takes them off
    what was opened. opens: False: it has the masked messages of the first site alone. Sums, noise
    and masks are the shipped ones; the threshold is half of C, fixed before a trial is run."""
    plan = replace(plan, sampling_rate=1.0, divisor=1.0)
    rounds = -(-2 * trials // DIMENSION)
    coins = np.random.default_rng(0).permutation(np.arange(rounds * DIMENSION) < trials)
    there = coins.reshape(rounds, DIMENSION)
    nobody = np.zeros_like(there)
    totals = [_sums(plan, nobody if site else there) for site in range(plan.sites)]
    opened = _masked(totals).open() if opens else _first_message(totals)

    found = []
    for number in held:
        left = opened - sum(totals[plan.sites - number :], np.zeros_like(opened))
        above = left * plan.grid_at(DIMENSION) > plan.max_grad_norm / 2
        wrong = int(above[~coins][:trials].sum()), int((~above[coins]).sum())
        bound = [
            gaussian_epsilon(gaussian_mu(*wrong, trials, confidence), plan.delta)
            for confidence in (CONFIDENCE, CEILING)
        ]
        claimed = accountant.epsilon(plan.events(1), plan.delta)
        fallback = accountant.epsilon(plan.fallback_events(1), plan.delta)
        found.append(Audit(number, claimed, fallback, *bound))
    return found


def _sums(plan: DpPlan, there: np.ndarray) -> np.ndarray:
    """One site's noised sums, end to end, int64 (rounds · DIMENSION,). there: for each round, the
    axes along which a unit of the site pulls (rounds, DIMENSION)."""
    units, log = HUGE * plan.max_grad_norm * torch.eye(DIMENSION), MemoryLog()

    def total(axes: np.ndarray) -> np.ndarray:
        rows = units[torch.from_numpy(axes)]

        def gradients(drawn: list[int]) -> Iterator[Chunk]:
            yield Chunk(drawn, [rows[drawn]])  # a copy, which is wiped

        return plan.noised_sum(len(rows), DIMENSION, gradients, log, 1).numpy()

    return np.concatenate([total(axes) for axes in there])


def _parties(count: int) -> tuple[list, list[Ready]]:
    keys, said = [masks.new_key() for _ in range(count)], []
    for number, key in enumerate(keys):
        signing, public = SigningKey(), masks.public_of(key)
        ready = Ready(Draw(DIGEST, 1, 1, DIGEST), f"s{number}", 9, signing.public, public)
        said.append(ready.signed(signing))
    return keys, said


def _masked(totals: list[np.ndarray]) -> MaskedSum:
    keys, said = _parties(len(totals))
    words = MaskedSum(said, len(totals[0]), 32)
    for total, key, mine in zip(totals, keys, said, strict=True):
        words.add(mine.site, masks.mask(total, key, mine, said, 32))
    return words


def _first_message(totals: list[np.ndarray]) -> np.ndarray:
    keys, said = _parties(len(totals))
    return masks.centre_words(masks.mask(totals[0], keys[0], said[0], said, 32))


def draw(out: Path, found: list[Audit]) -> None:
    from matplotlib.figure import Figure

    from fedtune.report.plot import COST, FAINT, GOOD, INK

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-0.3, 2.5, color=GOOD, alpha=0.07, linewidth=0)
    axes.axhline(found[0].claimed, color=GOOD, linestyle="--", linewidth=1)
    axes.axhline(found[0].fallback, color=COST, linestyle="--", linewidth=1)
    for text, level, color in (
        ("charged, if at most two sites collude", found[0].claimed, GOOD),
        ("charged as the fallback, whoever colludes", found[0].fallback, COST),
    ):
        axes.annotate(text, (-0.25, level), (0, 4), textcoords="offset points", color=color)
    axes.plot([a.held for a in found], [a.audited for a in found], "o-", color=INK)
    axes.set(xlabel="sites that the coordinator holds, of five", xlim=(-0.3, 4.3), ylim=(0, 7.5))
    axes.set_ylabel("ε that the attack shows (95 %)")
    axes.set_xticks(range(5))
    axes.grid(color=FAINT, linewidth=0.5, alpha=0.5)
    figure.savefig(out, dpi=130, metadata={"Software": None})


def plan_of(sites: int, colluding: int, sigma: float = 1.2) -> DpPlan:
    return make_plan(noise_multiplier=sigma, sites=sites, colluding=colluding)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=20_000)
    given = parser.parse_args()
    measured = audits(plan_of(5, 2), range(5), given.trials)
    draw(given.out, measured)
    print(*measured, sep="\n")
