"""Every example in a docstring of fedtune runs, in an empty folder, and prints what it says."""

from __future__ import annotations

import doctest
import importlib
from contextlib import chdir
from pathlib import Path
from types import ModuleType

import pytest

import fedtune

ROOT = Path(fedtune.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


def failures(module: ModuleType, folder: Path) -> list[str]:
    """Run the examples of a module, each docstring's in an empty folder; return what those that
    fail print, and what they should."""
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    told: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__):
        own = folder / test.name
        own.mkdir()
        with chdir(own):
            runner.run(test, out=told.append)
    return told


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Path) -> None:
    assert failures(importlib.import_module(name), tmp_path) == []


def test_twin_an_example_of_a_function_that_has_another_name_is_found(tmp_path: Path) -> None:
    module = ModuleType("example")
    module.__doc__ = ">>> guessed(1)\n1\n"
    assert "NameError" in "".join(failures(module, tmp_path))
