"""A thread that waits for others does not keep a processor from who has work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fedtune.core import boot


def spins(first: str, second: str, **given: str) -> str:
    """What GNU OpenMP says of itself in a process that imports both, in that order."""
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    ran = subprocess.run(
        [sys.executable, "-c", f"import {first}, {second}"],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"} | given,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in ran.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not lines:
        pytest.skip("PyTorch's threads are not GNU OpenMP's here")
    return lines[0].split("'")[1]


def test_it_spins_for_a_moment_alone_unless_the_user_has_chosen() -> None:
    assert spins("fedtune", "torch") == boot.SPINS
    assert spins("fedtune", "torch", GOMP_SPINCOUNT="7") == "7"
    assert int(spins("fedtune", "torch", OMP_WAIT_POLICY="active")) > int(boot.SPINS)
    assert int(spins("torch", "fedtune")) > int(boot.SPINS)  # the twin: too late
