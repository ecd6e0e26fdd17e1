"""A dashboard that serves, and a browser where one is installed."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedtune.evidence.dossier.release import release
from tests.browser import browser
from tests.test_cli import run as command

__all__ = ["browser"]
Serve = Callable[..., str]


@pytest.fixture(scope="session")
def released(signed: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "dossier"
    release(signed[0], folder)
    return folder


@pytest.fixture(scope="session")
def tried(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder of two hospitals' study that was simulated with the command: sites have ledgers,
    audit logs and counts; the run is runs/cli."""
    from tests.cli_kit import write_study

    folder = tmp_path_factory.mktemp("tried")
    study, out = write_study(folder, tiny_base), folder / "runs" / "tried"
    done = command("simulate", study, "--sites", folder, "--out", out)
    assert done.exit_code == 0, done.output
    return folder


@contextmanager
def dashboards() -> Iterator[Serve]:
    """Start `fedtune dashboard` as a person does; returns the address that it prints."""
    running: list[subprocess.Popen[str]] = []
    root = str(Path(__file__).parents[2])

    def start(path: Path, *more: str) -> str:
        words = ("-c", "from fedtune.cli.main import main; main()", "dashboard", str(path), *more)
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": root},
        )
        running.append(process)
        assert process.stdout
        for line in process.stdout:
            if line.startswith("http://"):
                return line.strip()
        raise AssertionError("it printed no address")

    try:
        yield start
    finally:
        for process in running:
            process.terminate()
            process.wait(20)
            assert process.stdout
            process.stdout.close()


@pytest.fixture
def serve() -> Iterator[Serve]:
    with dashboards() as start:
        yield start


@pytest.fixture(scope="module")
def served() -> Iterator[Serve]:
    """One dashboard for each place that does not change: it starts, and verifies, once."""
    with dashboards() as start:
        yield functools.cache(start)
