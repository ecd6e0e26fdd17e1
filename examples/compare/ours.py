"""fedtune, asked what the other modules here ask: its noise, and what a site's ledger remembers."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from fedtune.core.dp.accountant import Steps, epsilon
from fedtune.core.dp.noise import gaussian_on_grid
from fedtune.core.errors import FedtuneError
from fedtune.core.ledger.entries import Charge
from fedtune.core.ledger.files import DATABASE
from fedtune.core.ledger.ledger import Ledger

C, SIGMA, DELTA = 1.0, 1.0, 1e-5
DATASET = "notes"


def differences() -> Iterator[str]:
    """Yield what fedtune's code does, a line each."""
    yield f"after the same seeds the noise is the same: {torch.equal(_seeded(), _seeded())}"
    with tempfile.TemporaryDirectory() as home:
        state = Path(home, "state")
        Ledger(state).declare(DATASET, [])
        run(state, "one")
        yield f"after a study of three rounds: ε = {spent(state):.2f}"
        run(state, "two")
        yield f"after another one: ε = {spent(state):.2f}"
        with closing(sqlite3.connect(state / DATABASE)) as database, database:
            database.execute("DELETE FROM entries WHERE seq = (SELECT max(seq) FROM entries)")
        yield f"after the newest entry was deleted: {_spent_or_refused(state)}"


def run(state: Path, study: str) -> None:
    """Charge a study's three rounds to the ledger in a folder, which is opened anew. (A site also
    asks its policy here: `permit`.)"""
    for round_ in (1, 2, 3):
        charge = Charge(study, study, round_, SIGMA, 1.0, 1, 1, C, "patient", "first")
        Ledger(state).reserve(DATASET, charge, "adapter", permit=lambda charges: None)


def spent(state: Path) -> float:
    """Compose all charges of the ledger in a folder, which is opened anew."""
    charges = Ledger(state).charges(DATASET)
    steps = [Steps(each.noise_multiplier, each.sampling_rate, each.steps) for each in charges]
    return epsilon(steps, DELTA)


def _seeded() -> torch.Tensor:
    """Draw fedtune's noise after all generators that have a seed were given one."""
    np.random.seed(0)
    torch.manual_seed(0)
    return gaussian_on_grid(1_000, SIGMA * C, 2.0**-20)


def _spent_or_refused(state: Path) -> str:
    try:
        return f"ε = {spent(state):.2f}"
    except FedtuneError as error:
        return f"{type(error).__name__}: {error.happened.replace(str(state), 'STATE')}"


if __name__ == "__main__":
    print(*differences(), sep="\n")
