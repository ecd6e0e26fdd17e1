"""The code's own shape: files and functions that fit in a head, docstrings that stand alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("fedtune", "client", "server", "tests", "examples", "benchmarks")
FILES = [path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))]
LINES, BODY, LOOSE = 400, 60, 6
LEANS_ON_ANOTHER = ("The same", "As ", "Of ", "Those ")


def long_functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > BODY:
                yield node.name, lines


def leaning_docstrings(tree: ast.AST) -> Iterator[str]:
    """Public functions and classes whose first sentence says nothing without another one."""
    for node in ast.walk(tree):
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public and (ast.get_docstring(node) or "").startswith(LEANS_ON_ANOTHER):
            yield node.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short_and_so_are_its_functions(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    assert list(long_functions(ast.parse(text))) == []


def test_public_docstrings_stand_alone() -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for path in FILES
        if path.is_relative_to(ROOT / "fedtune")
        and (names := list(leaning_docstrings(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert found == {}


def test_few_files_lie_loose() -> None:
    assert len(list((ROOT / "fedtune").glob("*.py"))) <= LOOSE


def test_entries_are_thin() -> None:
    for role in ("client", "server"):
        code = [path for path in (ROOT / role).rglob("*.py")]
        assert sum(len(path.read_text().splitlines()) for path in code) < 100


def test_twins() -> None:
    long = ast.parse("def f():\n" + "    x = 1\n" * BODY)
    assert list(long_functions(long)) == [("f", BODY + 1)]
    leans = ast.parse('def g():\n    """The same with h."""\n')
    assert list(leaning_docstrings(leans)) == ["g"]
