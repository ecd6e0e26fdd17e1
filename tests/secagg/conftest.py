from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.secagg.model import MEMORY, World
from tests.secagg.unit_sites import NAMES


@pytest.fixture
def fresh() -> Iterator[World]:
    """Nobody knows the plan."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield World(Path(folder))


@pytest.fixture
def world(fresh: World) -> World:
    """Every site knows the plan, and has drawn nothing yet."""
    for name in NAMES:
        fresh.prepare(name)
    return fresh
