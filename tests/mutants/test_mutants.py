"""The catalogue fits the code, and the runner tells a killed mutant from a survivor."""

from __future__ import annotations

import pytest

from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant
from tests.mutants.places import SAMPLING, T_SAMPLING
from tests.mutants.run import ROOT, Stale, mutated, try_all

REFUSED = (T_SAMPLING + "test_full_batch_is_everyone",)
NOTHING = Mutant(
    "twin", "only-a-comment", SAMPLING, (("def poisson(", "# nothing\ndef poisson("),), REFUSED, ""
)
CRASHES = Mutant(
    "twin", "a-type-error", SAMPLING, (("list(range(n_units))", "list(n_units)"),), REFUSED, ""
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_and_its_tests_exist(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    changed = mutated(mutant, text)
    assert changed != text
    compile(changed, mutant.file, "exec")
    assert mutant.tests
    for node in mutant.tests:
        file, _, name = node.partition("::")
        code = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {name.split('[')[0]}(" in code or not name


def test_names_are_unique() -> None:
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


def test_a_mutant_that_no_longer_applies_is_an_error() -> None:
    with pytest.raises(Stale, match="0 times"):
        mutated(NOTHING, "def other(): ...")
    with pytest.raises(Stale, match="2 times"):
        mutated(NOTHING, "def poisson(): ...\n" * 2)


@pytest.mark.long
def test_the_runner_tells_killed_from_survived_and_broken() -> None:
    quick = [m for m in MUTANTS if m.name in ("sampler-follows-a-seed", "sigma-times-0.99")]
    results = try_all([*quick, NOTHING, CRASHES], jobs=2, show=False)
    assert results is not None
    assert [r.status for r in results] == ["killed", "killed", "survived", "broken"]
