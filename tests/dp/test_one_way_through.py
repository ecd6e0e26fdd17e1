"""No way leads from a unit's gradient to what is sent but by `clipped_sum`, then `noised_sum`.

Every use of what holds a gradient that was not clipped, or a sum that was not noised, stands in a
few files of what must be right; a use in another one fails here."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

import pytest

from tests.docs import boundary

# A name, and the modules of the boundary that use it.
CLIPPED = {
    # Gradients of rows, as an engine yields them: nobody else makes or holds one.
    "Chunk": {"clip", "mechanism", "query", "selftest", "unit_gradients"},
    "UnitGradientEngine": {"unit_gradients", "local_round", "rank_process", "selftest"},
    # All rows as one matrix: of generated records, for checks before a real one is read.
    "matrix": {"unit_gradients", "local_round", "rank_process", "selftest"},
    "add_clipped": {"clip", "mechanism"},
}
NOISED = {
    "clipped_sum": {"mechanism", "plan", "non_private", "rank_process", "data_parallel"},
    "gaussian_on_grid": {"noise", "mechanism"},
}


def used(text: str) -> set[str]:
    """Return the names and attributes that a module's code uses or defines."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
    return found


def modules() -> dict[str, str]:
    """Map each module of what must be right to its text."""
    paths = {
        module.name: boundary.ROOT.joinpath(*module.name.split(".")).with_suffix(".py")
        for module in boundary.modules()
    }
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.exists()}


def users(name: str, texts: Mapping[str, str]) -> set[str]:
    return {module.rpartition(".")[2] for module, text in texts.items() if name in used(text)}


def others(texts: Mapping[str, str], names: Iterable[str]) -> dict[str, set[str]]:
    """Map each name to the modules that use it and are not of its list."""
    allowed = CLIPPED | NOISED
    found = {name: users(name, texts) - allowed[name] for name in names}
    return {name: extra for name, extra in found.items() if extra}


def test_gradients_and_sums_are_touched_where_it_is_said() -> None:
    texts = modules()
    for name, allowed in (CLIPPED | NOISED).items():
        assert users(name, texts) == allowed, name


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("def leak(engine): return [chunk.parts for chunk in engine.matrix([0])]", "matrix"),
        ("from fedtune.core.dp.clip import Chunk", "Chunk"),
        ("def answer(plan, rows): return plan.clipped_sum(rows, 2, None)", "clipped_sum"),
        (
            "from fedtune.core.dp import noise\nnoise.gaussian_on_grid(1, 1.0, 1.0)",
            "gaussian_on_grid",
        ),
    ],
)
def test_a_way_around_is_found(code: str, name: str) -> None:
    """The twin: a module that takes a gradient or a sum by itself."""
    texts = modules() | {"fedtune.core.vault.secure_round": code}
    assert others(texts, [name]) == {name: {"secure_round"}}
