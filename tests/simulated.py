"""A study from its files, simulated as the command line does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.core.config import load_site, load_study
from fedtune.core.dp import noise
from fedtune.launch import simulate as launch


def simulate(study: Path, sites: Sequence[Path], out: Path, **options: Any) -> dict[str, Any]:
    """The body of the run's report."""
    loaded = [load_site(path) for path in sites]
    return launch.simulate(load_study(study), loaded, out, **options).report


@contextmanager
def noise_from(seed: int) -> Iterator[None]:
    """Draw all noise from a seed, so that a run in this process is the same each time."""
    draw = torch.Generator().manual_seed(seed)

    def drawn(dimension: int, std: float, grid: float) -> torch.Tensor:
        normal = torch.randn(dimension, generator=draw, dtype=torch.float64)
        return (normal * (std / grid)).round().long()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "gaussian_on_grid", drawn)
        yield
