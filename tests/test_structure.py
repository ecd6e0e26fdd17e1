"""The code's own shape: docstrings that stand alone, entries that are thin."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEANS_ON_ANOTHER = ("The same", "As ", "Of ", "Those ")


def leaning_docstrings(tree: ast.AST) -> Iterator[str]:
    """Yield public functions and classes whose first sentence says nothing without another one."""
    for node in ast.walk(tree):
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public and (ast.get_docstring(node) or "").startswith(LEANS_ON_ANOTHER):
            yield node.name


def test_public_docstrings_stand_alone() -> None:
    found = {
        str(path.relative_to(ROOT)): names
        for path in sorted((ROOT / "fedtune").rglob("*.py"))
        if (names := list(leaning_docstrings(ast.parse(path.read_text(encoding="utf-8")))))
    }
    assert found == {}


def test_a_docstring_that_leans_on_another_is_found() -> None:
    leans = ast.parse('def g():\n    """The same with h."""\n')
    assert list(leaning_docstrings(leans)) == ["g"]


def test_entries_are_thin() -> None:
    for role in ("client", "server"):
        code = [path for path in (ROOT / role).rglob("*.py")]
        assert sum(len(path.read_text().splitlines()) for path in code) < 100
