"""What the ledger's tests share."""

from __future__ import annotations

import math
import os
from pathlib import Path

from fedtune.core.dp.steplog import Step, StepLog
from fedtune.core.ledger.entries import Charge
from fedtune.core.ledger.ledger import Ledger

STUDY = "sha256:" + "5d" * 32
CHAOS = Path(__file__).with_name("chaos.py")


def charge(round_: int = 1, sigma: float = 1.0, study: str = STUDY, steps: int = 4) -> Charge:
    return Charge(study, "s", round_, sigma, 0.1, steps, 1, 1.0, "record", "first", 8.0)


def yes(charges: list[Charge]) -> None:
    """A permit that allows everything."""


def run_round(
    ledger: Ledger, round_: int, dataset: str = "notes", done: Charge | None = None
) -> bytes:
    """Reserve, write the step log as training does, release."""
    done = done or charge(round_)
    number = ledger.reserve(dataset, done, f"adapter {round_}", yes)
    log = StepLog(ledger.folder / "steps.jsonl")
    log.begin_round(ledger.hash_of(number), ledger.order_of(number))
    for _ in range(done.steps):
        log.append(
            Step(
                done.study,
                done.round,
                done.noise_multiplier,
                done.sampling_rate,
                done.max_grad_norm,
                done.unit,
                done.records,
            ),
            done.steps,
        )
    body = os.urandom(64)
    ledger.release(number, body)
    return body


def total(ledger: Ledger, dataset: str = "notes") -> dict[float, float]:
    """Steps by σ; infinite once a charge without noise is among them."""
    spent: dict[float, float] = {}
    for one in ledger.charges(dataset):
        if one.noise_multiplier == 0:
            return {0.0: math.inf}
        spent[one.noise_multiplier] = spent.get(one.noise_multiplier, 0) + one.steps
    return spent


def covers(restored: dict[float, float], truth: dict[float, float]) -> bool:
    """Whether at every σ at least as many steps with that σ or less are charged."""
    if math.inf in restored.values():
        return True

    def up_to(spent: dict[float, float], sigma: float) -> float:
        return sum(steps for s, steps in spent.items() if s <= sigma)

    return all(up_to(restored, sigma) >= up_to(truth, sigma) for sigma in truth)
