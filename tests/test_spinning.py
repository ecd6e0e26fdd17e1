"""A thread that waits for others does not keep a processor from who has work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.core import boot


@pytest.fixture(scope="module")
def openmp() -> str:
    """A statement that loads PyTorch's GNU OpenMP, as importing PyTorch does within seconds."""
    import torch  # noqa: F401

    lines = Path("/proc/self/maps").read_text().splitlines() if sys.platform == "linux" else []
    found = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
    if not found:
        pytest.skip("PyTorch's threads are not GNU OpenMP's here")
    return f"import ctypes; ctypes.CDLL({found.pop()!r})"


def spins(first: str, second: str, **given: str) -> str:
    """What GNU OpenMP says of itself in a process that runs both statements, in that order."""
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    ran = subprocess.run(
        [sys.executable, "-c", f"{first}\n{second}"],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"} | given,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in ran.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not lines:
        pytest.skip("PyTorch's threads are not GNU OpenMP's here")
    return lines[0].split("'")[1]


def test_it_spins_for_a_moment_alone_unless_the_user_has_chosen(openmp: str) -> None:
    ours = "import fedtune"
    assert spins(ours, openmp) == boot.SPINS
    assert spins(ours, openmp, GOMP_SPINCOUNT="7") == "7"
    assert int(spins(ours, openmp, OMP_WAIT_POLICY="active")) > int(boot.SPINS)
    assert int(spins(openmp, ours)) > int(boot.SPINS)  # the twin: too late


def test_pytorch_loads_it_no_sooner_than_fedtune() -> None:
    assert spins("import fedtune", "import torch") == boot.SPINS
