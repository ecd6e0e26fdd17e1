"""docs/comparison.md shows what other projects' code prints today."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.depth import long_but
from tests.docs.pages import read

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
MODULES = sorted(path.stem for path in (ROOT / "examples" / "compare").glob("[a-z]*.py"))


def shown(page: str) -> dict[str, list[str]]:
    """Read what the page says that each module of examples.compare prints, by module."""
    module, found = "", {}
    for block in read(page).blocks:
        if named := re.search(r"^python -m examples\.compare\.(\w+)", block.text, re.MULTILINE):
            module = named[1]
        elif block.language == "text":
            found[module] = block.text.splitlines()
    return found


@cache
def printed(module: str) -> list[str]:
    """Run a module as a reader does, and return its lines."""
    if module != "ours":
        pytest.importorskip(module.replace("flower", "flwr"), reason=f"{module} is not installed")
    command = [sys.executable, "-m", f"examples.compare.{module}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_page_shows_every_module() -> None:
    assert sorted(shown(PAGE)) == MODULES


@pytest.mark.parametrize("module", long_but(["ours"], MODULES))
def test_the_page_shows_what_it_prints(module: str) -> None:
    assert printed(module) == shown(PAGE)[module]


def test_twin_a_figure_that_is_not_printed_is_found() -> None:
    wrong = PAGE.replace("ε = 12.87", "ε = 8.39")
    assert wrong != PAGE
    assert printed("ours") != shown(wrong)["ours"]
