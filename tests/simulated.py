"""A study from its files, simulated as the command line does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.config import load_site, load_study
from fedtune.launch import simulate as launch


def simulate(study: Path, sites: Sequence[Path], out: Path, **options: Any) -> dict[str, Any]:
    """The body of the run's report."""
    loaded = [load_site(path) for path in sites]
    return launch.simulate(load_study(study), loaded, out, **options).report
