"""What an attacker who reads the wire finds out about one unit, through the site's own worker.

The unit is as visible as it can be: longer than C, everybody else and the adapter known. Bytes are
decoded as a coordinator would, and projected on where the unit pulls; thresholds are from theory,
fixed before a round is run.

    python -m tests.guarantee.wire_audits [MODE …] [--rounds 2000]"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from scipy.stats import norm

from fedtune.audit.bounds import gaussian_epsilon, gaussian_mu, rate_upper
from fedtune.core.dp import accountant, clip
from fedtune.core.dp.plan import DpPlan
from fedtune.core.registry import process_cache
from fedtune.core.registry.arrays import CLASS_SUMS
from fedtune.core.vault.budget import Budget
from fedtune.core.wire.arrays import unpack_arrays
from fedtune.core.wire.codec import decode
from tests import chance
from tests.guarantee.property_coupling import Sum
from tests.guarantee.property_files import made_bases
from tests.guarantee.property_plans import (
    COLUMNS,
    DIRECTIONS,
    Case,
    Crafted,
    Ids,
    Place,
    Plan,
    Row,
)
from tests.guarantee.property_world import SHM, World

EPSILON, DELTA, CLIP = 8.0, 1e-4, 1e-3
ROUNDS = 2400  # a side: where ε is nearly EPSILON, 80 % of it are found but for one audit in 10⁵
EACH = 100  # rounds with one ledger: what it holds is read for every round


@dataclass(frozen=True)
class Mode:
    plan: Plan
    place: Place
    records: int = 1  # of the unit
    ask: str = "train"
    every: int = 1  # rounds between those that train the same columns


HEAD: dict[str, Any] = {"objective": "classify", "base": "bert", "lora": "none"}
TEXT, CLASSES = Place(), Place(columns=COLUMNS["classify"])
MODES: dict[str, Mode] = {
    "record": Mode(Plan(unit="record"), replace(TEXT, patient=False)),
    "patient, cap 3 of 5": Mode(Plan(cap=3), TEXT, 5),
    "records drawn, k = 3": Mode(Plan(drawn="record", cap=3), TEXT, 5),
    "from public text": Mode(Plan(public=True), TEXT),
    "dpo": Mode(Plan(objective="dpo"), Place(columns=COLUMNS["dpo"])),
    "kto": Mode(Plan(objective="kto"), Place(columns=COLUMNS["kto"])),
    "orpo": Mode(Plan(objective="orpo"), Place(columns=COLUMNS["orpo"])),
    "reward": Mode(Plan(objective="reward"), Place(columns=COLUMNS["reward"])),
    "classify, head": Mode(Plan(**HEAD), CLASSES),
    "class statistics": Mode(
        Plan(**HEAD | {"objective": "prototypes"}), Place(columns=COLUMNS["prototypes"])
    ),
    "1 of 2 ranks": Mode(Plan(lora="narrow"), replace(TEXT, rank=1), every=2),
    "continuous": Mode(Plan(life=1e6), TEXT),
    "held-out query": Mode(
        Plan(**HEAD, queries=True), replace(CLASSES, held_out="held"), ask="query"
    ),
    "held-out, by class and group": Mode(
        Plan(**HEAD, queries=True, apart=True), replace(CLASSES, held_out="held"), ask="query"
    ),
    "Poisson, q = 0.5": Mode(Plan(**HEAD, q=0.5), CLASSES),
}


@dataclass(frozen=True)
class Found:
    """exact: how far the un-noised sum moves, in C (of one row); noise: of the wire, over what the
    plan says; claimed: ε of one round; audited, bound, surely: what was found, at 95 %, at 99.9 %,
    and at what fails a test of a right one at most `chance.FALSE_ALARM` often."""

    mode: str
    rounds: int
    exact: float
    allowed: float
    noise: float
    resolution: float  # of `noise`, one standard deviation
    claimed: float
    audited: float
    bound: float
    surely: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.mode:<28} {self.rounds:>6} {self.exact:.5f} of {self.allowed:.5f} C  "
            f"noise {self.noise:.4f} ± {self.resolution:.4f}  claimed {self.claimed:.2f}  "
            f"found {self.audited:.2f} (95 %) {self.bound:.2f} (99.9 %)  {self.seconds:.0f} s"
        )


def audit(name: str, bases: Ids, rounds: int) -> Found:
    began, mode = time.monotonic(), MODES[name]
    case, sigma = case_of(mode)
    with_it, without = (exact(case, mode, bases, who) for who in (None, case.unit))
    plan = with_it.plan
    grid, c = plan.grid, plan.max_grad_norm
    move = (with_it.total - without.total).double().numpy() * grid
    length = float(np.linalg.norm(move))
    toward = move / length
    threshold = threshold_of(plan, length, rounds)
    middle = float(without.total.double().numpy() * grid @ toward) + threshold
    present, spread_a = wire(case, mode, bases, None, rounds, with_it, toward)
    absent, spread_b = wire(case, mode, bases, case.unit, rounds, without, toward)
    errors = int((absent > middle).sum()), int((present <= middle).sum())
    deviation = sigma * clip.sensitivity(c, len(move), grid)
    everybody = plan.sampling_rate == 1.0
    measured = math.sqrt((spread_a + spread_b) / 2 if everybody else spread_b) / deviation

    def lower(confidence: float) -> float:
        if everybody:
            return gaussian_epsilon(gaussian_mu(*errors, rounds, confidence), DELTA)
        return plain_epsilon(*errors, rounds, confidence)

    return Found(
        mode=name,
        rounds=rounds,
        exact=length / c,
        allowed=plan.records * (1 + math.sqrt(len(move)) * grid / 2 / c),
        noise=measured,
        resolution=1 / math.sqrt(2 * rounds * (2 if everybody else 1) * len(move)),
        claimed=accountant.epsilon(plan.events(1), DELTA),
        audited=lower(0.95),
        bound=lower(0.999),
        surely=lower(1 - chance.FALSE_ALARM / 2),
        seconds=time.monotonic() - began,
    )


def plain_epsilon(false_alarms: int, misses: int, rounds: int, confidence: float) -> float:
    """Without any assumption on the mechanism: 1 - β ≤ e^ε α + δ, and the other way round."""
    half = 1 - (1 - confidence) / 2
    a, b = (rate_upper(n, rounds, half) for n in (false_alarms, misses))
    odds = [(1 - b - DELTA) / a, (1 - a - DELTA) / b]
    return max(0.0, math.log(max(*odds, 1.0)))


def threshold_of(plan: DpPlan, length: float, rounds: int) -> float:
    """Where to tell the two apart: half of the move, or where few are drawn the best by theory."""
    if plan.sampling_rate == 1.0:
        return length / 2
    std, q = plan.noise_multiplier * plan.max_grad_norm, plan.sampling_rate

    def expected(at: float) -> float:
        alarm = float(norm.sf(at / std))
        hit = (1 - q) * alarm + q * float(norm.sf((at - length) / std))
        return plain_epsilon(round(alarm * rounds), round((1 - hit) * rounds), rounds, 0.95)

    return float(max(np.linspace(-3 * std, 6 * std, 91), key=expected))


# ------------------------------------------------------------------------------ the two worlds


def sigma_for(plan: DpPlan) -> float:
    """The σ (in hundredths) at which one round costs about EPSILON."""
    few, many = 1, 5000
    while few < many:
        middle = (few + many) // 2
        event = replace(plan, noise_multiplier=middle / 100).events(1)
        few, many = (
            (few, middle) if accountant.epsilon(event, DELTA) <= EPSILON else (middle + 1, many)
        )
    return few / 100


def case_of(mode: Mode) -> tuple[Case, float]:
    """Three others, and the unit."""
    from tests.dp.conftest import make_plan

    records = mode.plan.cap if mode.plan.drawn == "record" else 1
    shape = make_plan(records=records, sampling_rate=mode.plan.q, delta=DELTA)
    sigma = sigma_for(shape)
    changes: dict[str, Any] = {"sigma": sigma, "asked": sigma, "clip": CLIP, "rate": 100.0}
    plan = replace(mode.plan, rounds=EACH * mode.every, **changes)
    body = {"q": "fever and a cough", "a": "y", "b": "n", "l": 1}
    others = tuple(
        Row(o, {"who": o, **body, "q": f"home, day {o}", "a": "n", "b": "y"}) for o in "bcd"
    )
    mine = tuple(Row("a", {"who": "a", **body}) for _ in range(mode.records))
    files = {"records": (*others, *mine)}
    if mode.place.held_out:
        files = {"records": others, "held": (*others, *mine)}
    return Case((plan,), files, (), "a", (mode.place,)), sigma


def adapter(mode: Mode, world: World) -> int | Crafted:
    """A head is sure of "n", so that the others pull nowhere and the unit with all its might; where
    it is asked, of "y"."""
    if mode.plan.lora != "none":
        return 1
    arrays = {name: np.zeros_like(array) for name, array in world.begun[0].adapter.items()}
    arrays["head.bias"] = np.array([-40.0, 40.0] if mode.ask == "train" else [40.0, -40.0])
    return Crafted(arrays)


def exact(case: Case, mode: Mode, bases: Ids, without: str | None) -> Sum:
    """What one round adds up, before its noise."""
    with living(case, bases, without) as world, world.coupling.at_work():
        world.coupling.sums = []
        if case.plans[0].q < 1:  # the unit drawn, nobody else matters
            world.coupling.of = lambda *_: Everybody()  # type: ignore[method-assign]
        world.ask(mode.ask, 0, 1, adapter(mode, world))
        (found,) = world.coupling.sums
        return found


class Everybody:
    """Coins that all fall on one side."""

    def random(self) -> float:
        return 0.0

    def normal(self, size: int) -> np.ndarray:
        return np.zeros(size)


@contextmanager
def living(case: Case, bases: Ids, without: str | None) -> Iterator[World]:
    with tempfile.TemporaryDirectory(dir=SHM, prefix="fedtune-audit-") as folder:
        world = World(Path(folder), case, bases, without)
        reply, _ = world.ask("prepare", 0)
        said = reply.content["admission"]
        assert said["status"] == "admitted", said["reason"]
        yield world


def wire(
    case: Case,
    mode: Mode,
    bases: Ids,
    without: str | None,
    rounds: int,
    known: Sum,
    toward: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Each round's sum as the wire has it, projected on `toward`; and how far it lies, in mean
    square of a coordinate, from what is `known` to have been added up."""
    centre = known.total.double().numpy() * known.plan.grid
    seen, squares = np.empty(rounds), 0.0
    for start in range(0, rounds, EACH):
        with living(case, bases, without) as world:
            given = adapter(mode, world)
            for at in range(start, min(start + EACH, rounds)):
                reply, _ = world.ask(mode.ask, 0, 1 + mode.every * (at - start), given)
                found = decoded(reply, world, case.plans[0], known.plan)
                seen[at] = found @ toward
                squares += float(np.square(found - centre).mean())
    return seen, squares / rounds


def decoded(reply: Message, world: World, plan: Plan, private: DpPlan) -> np.ndarray:
    """The noised sum that a reply gives away."""
    made = world.begun[0]
    if "answer" in reply.content:
        record, factor = "answer", 1.0
        forms = {"sums": (2 * len(made.study.query_cells),)}
    else:
        record, factor = "update", -private.divisor / plan.rate
        rank = world.case.places[0].rank
        sent = made.adapter
        if plan.objective == "prototypes":
            sent = {CLASS_SUMS: np.zeros((2, DIRECTIONS + 1), np.float32)}
        forms = {
            n: (a.shape[0], rank) if rank and ".lora_B." in n else a.shape for n, a in sent.items()
        }
    said = reply.content["site"]
    assert record in reply.content and said["reason"] == "", f"{said['status']} {said['reason']}"
    arrays = decode(unpack_arrays(reply.content[record]), forms)
    return factor * np.concatenate([arrays[name].ravel() for name in forms]).astype(np.float64)


@contextmanager
def unhurried() -> Iterator[None]:
    """Without the sums of what a budget is left: no rule of the policy is under test, and with
    every round there is more to add up."""
    nothing = lambda *_, **__: None  # noqa: E731
    logging.disable(logging.ERROR)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Budget, "check", nothing)
            yield
    finally:
        logging.disable(logging.NOTSET)
        process_cache.clear("workers")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.guarantee.wire_audits")
    parser.add_argument("modes", nargs="*", default=list(MODES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, unhurried():
        bases = made_bases(Path(folder))
        for name in options.modes:
            print(audit(name, bases, options.rounds), flush=True)


if __name__ == "__main__":
    main()
