"""The table of traps, the seeded bugs and the page made of both say the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.mutants.catalogue import MUTANTS
from tests.mutants.pitfalls import PAGE, page
from tests.mutants.traps import TRAPS, Trap

SEEDED = {mutant.trap for mutant in MUTANTS if isinstance(mutant.trap, int)}


def test_every_number_of_a_mutant_is_in_the_table() -> None:
    assert [trap.number for trap in TRAPS] == list(range(1, len(TRAPS) + 1))
    assert set(range(1, len(TRAPS) + 1)) >= SEEDED


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: str(trap.number))
def test_every_trap_has_a_mutant_or_says_why_none(trap: Trap) -> None:
    assert (trap.number in SEEDED) != bool(trap.no_mutant)
    for text in (trap.wrong, trap.shows, trap.here):
        assert text.endswith(".")


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.mutants.pitfalls"


def test_the_page_names_every_numbered_mutant_and_the_tests_that_catch_it() -> None:
    text = page()
    for mutant in MUTANTS:
        if isinstance(mutant.trap, int):
            assert f"| {mutant.name} |" in text
            assert all(test.partition("[")[0] in text for test in mutant.tests)


def test_the_twin_that_leaves_a_mutant_out_is_another_page() -> None:
    numbered = next(mutant for mutant in MUTANTS if isinstance(mutant.trap, int))
    assert page(mutants=tuple(mutant for mutant in MUTANTS if mutant is not numbered)) != page()
    assert page((*TRAPS[:-1], replace(TRAPS[-1], title="Another"))) != page()
