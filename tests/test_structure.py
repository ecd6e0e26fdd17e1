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


def opened_ledgers(tree: ast.AST) -> Iterator[int]:
    """Yield the line of each call that opens or begins a ledger by its class."""
    names = {"Ledger"} | {
        each.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for each in node.names
        if each.name == "Ledger" and each.asname
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in names:
                yield node.lineno


def test_ledgers_are_opened_in_one_place() -> None:
    """Outside the vault, which runs only after `check_home`, every ledger is opened by a function
    that first looks whether the home has lost the ledger which is known to have been there."""
    found = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / "fedtune").rglob("*.py"))
        if not path.is_relative_to(ROOT / "fedtune" / "core")
        if (lines := [*opened_ledgers(ast.parse(path.read_text(encoding="utf-8")))])
    }
    assert {*found} == {"fedtune/homes/opening.py"}, found


def test_a_ledger_that_is_opened_elsewhere_is_found() -> None:
    """The twin."""
    opens = ast.parse(
        "from a import Ledger as Book\n\nLedger(home)\nledger.Ledger(home)\nBook(home)\n"
    )
    assert list(opened_ledgers(opens)) == [3, 4, 5]
    assert not [*opened_ledgers(ast.parse("open_ledger(home)\nLedger.restore(home)\n"))]


def test_entries_are_thin() -> None:
    for role in ("client", "server"):
        code = [path for path in (ROOT / role).rglob("*.py")]
        assert sum(len(path.read_text().splitlines()) for path in code) < 100
