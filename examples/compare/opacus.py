"""Opacus' DP-SGD: what it protects, how it accounts, and where its noise comes from.

A linear model with one output is trained for a step or an epoch on rows of ten numbers; all calls
are Opacus' public ones. Three of the rows are one patient's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

C, SIGMA, DELTA, ROWS, BATCH = 1.0, 1.0, 1e-5, 100, 10
PATIENTS = 3  # rows of one patient


def private_step(rows: torch.Tensor, sigma: float) -> torch.Tensor:
    """Take one step on all rows; return the noised sum that Opacus makes of their gradients."""
    model = torch.nn.Linear(rows.shape[1], 1)
    model.requires_grad_(False)
    model.weight.requires_grad_(True)
    loader = DataLoader(TensorDataset(rows), batch_size=len(rows))
    engine = PrivacyEngine()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, _ = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=sigma,
        max_grad_norm=C, poisson_sampling=False, loss_reduction="sum",
    )  # fmt: skip
    model(rows).sum().backward()
    optimizer.step()
    (weight,) = (p for p in model.parameters() if p.requires_grad)
    return weight.grad


def epoch(poisson_sampling: bool = True) -> tuple[PrivacyEngine, set[int]]:
    """Train a run of one epoch; return its engine and the sizes of its batches."""
    model = torch.nn.Linear(10, 1)
    data = TensorDataset(torch.ones(ROWS, 10))
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=BATCH), noise_multiplier=SIGMA, max_grad_norm=C,
        poisson_sampling=poisson_sampling,
    )  # fmt: skip
    sizes = set()
    for (rows,) in loader:
        sizes.add(len(rows))
        optimizer.zero_grad()
        model(rows).sum().backward()
        optimizer.step()
    return engine, sizes


def differences() -> Iterator[str]:
    """Yield what Opacus' code does, a line each."""
    warnings.simplefilter("ignore")
    rows = torch.ones(ROWS, 10)
    moved = private_step(rows, 0.0) - private_step(rows[PATIENTS:], 0.0)
    yield f"a patient of {PATIENTS} rows moves the clipped sum by {moved.norm():.2f} C"
    (run, drawn), (other, fixed) = epoch(), epoch(poisson_sampling=False)
    yield f"by default: batches of one size: {len(drawn) == 1}; ε = {_epsilon(run)}"
    yield f"poisson_sampling=False: of one size: {len(fixed) == 1}; ε = {_epsilon(other)}"
    second, _ = epoch()
    yield f"a second run on the same rows: ε = {_epsilon(second)}"
    second.accountant.history += run.accountant.history
    yield f"both runs, composed by hand: ε = {_epsilon(second)}"
    torch.manual_seed(0)
    first = private_step(rows, SIGMA)
    torch.manual_seed(0)
    again = private_step(rows, SIGMA)
    yield f"after the same seed the noise is the same: {torch.equal(first, again)}"
    yield f"secure_mode=True: {_secure()}"


def _epsilon(engine: PrivacyEngine) -> str:
    return f"{engine.get_epsilon(DELTA):.2f}"


def _secure() -> str:
    try:
        PrivacyEngine(secure_mode=True)
    except ImportError as error:
        return f"{type(error).__name__}: {str(error).partition('!')[0]}"
    return "it is there"


if __name__ == "__main__":
    print(*differences(), sep="\n")
