"""The catalogue fits the code, and the runner tells a killed mutant from a survivor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants import run as runner
from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant, Stale, mutated
from tests.mutants.outcome import is_assertion
from tests.mutants.page import UNTRIED, page, recorded, whole
from tests.mutants.places import SAMPLING, T_SAMPLING
from tests.mutants.run import ROOT, Kept, Result, try_all
from tests.slow import slow_tests

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
        assert node not in slow_tests()  # it would be deselected, and catch nothing


def test_names_are_unique() -> None:
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


def test_a_mutant_that_no_longer_applies_is_an_error() -> None:
    with pytest.raises(Stale, match="0 times"):
        mutated(NOTHING, "def other(): ...")
    with pytest.raises(Stale, match="2 times"):
        mutated(NOTHING, "def poisson(): ...\n" * 2)


LAID_OUT = """
def total(charges, ahead):
    if charges:
        for charge in charges:
            check(
                charge.study,
                ahead + 1,
            )
            log.info("checked")
"""


@pytest.mark.parametrize(
    ("old", "new", "there"),
    [
        ("check(charge.study, ahead + 1)", "pass", '            pass\n            log.info("'),
        (
            "    check(charge.study, ahead + 1)\n",
            "    if ahead:\n        check(charge)\n",
            "            if ahead:\n                check(charge)\n            log.info",
        ),
        (
            " " * 16 + "check(charge.study, ahead + 1)\n" + " " * 16 + 'log.info("checked")\n',
            " " * 16 + "pass\n",
            "in charges:\n            pass\n",
        ),
    ],
)
def test_a_mutant_finds_its_place_however_it_is_laid_out(old: str, new: str, there: str) -> None:
    mutant = replace(NOTHING, edits=((old, new),))
    changed = mutated(mutant, LAID_OUT)
    assert there in changed
    compile(changed, "laid out", "exec")
    other = LAID_OUT.replace("ahead + 1", "ahead - 1")
    with pytest.raises(Stale, match="0 times"):
        mutated(mutant, other)


def test_a_row_is_what_was_tried_last() -> None:
    """Another run adds to the page; a bug that is no longer in the catalogue leaves it."""
    others = [replace(NOTHING, name=name) for name in ("first", "second", "third")]
    old = page(others[:2], {"first": "killed", "second": "broken"}, said=whole("2026-01-02", 3))
    new = page(others[1:], {"third": "killed"}, old)
    assert recorded(new) == {"second": "broken", "third": "killed"}
    assert "**1 of 2 caught**" in new and "2026-01-02, in 3 minutes" in new
    assert "All of them were last tried on 2026-01-02" in new
    again = page(others, {}, new)
    assert recorded(again)["first"] == UNTRIED
    assert "1 bug has not been tried yet." in again and "last tried on 2026-01-02" in again
    assert "The whole catalogue has not been tried yet." in page(others, {})


def test_what_was_tried_is_kept_and_tried_again_on_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted run has its rows, and goes on with the rest."""
    tried: list[tuple[list[str], set[str]]] = []

    def interrupted(mutants: Sequence[Mutant], kept: Kept, jobs: int) -> None:
        tried.append(([mutant.name for mutant in mutants], set(kept.passed)))
        kept.add_passed(mutants[0].tests)
        kept.add(Result(mutants[0].name, "killed", "", 1.0))
        kept.add(Result(mutants[1].name, "broken", "", 1.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "KEPT", tmp_path / "build" / "kept.jsonl")
    monkeypatch.setattr(runner.pages, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(runner, "MUTANTS", MUTANTS[:5])
    monkeypatch.setattr(runner, "try_all", interrupted)
    names = [mutant.name for mutant in MUTANTS[:5]]
    for code, words in (("one", []), ("one", ["--resume"]), ("another", ["--resume"])):
        monkeypatch.setattr(runner, "digest", lambda code=code: code)
        with pytest.raises(KeyboardInterrupt):
            runner.main(words)
    assert tried == [(names, set()), (names[2:], set(MUTANTS[0].tests)), (names, set())]
    ended = recorded((tmp_path / "page.md").read_text())
    assert [ended[name] for name in names] == ["killed", "broken", "killed", "broken", UNTRIED]
    assert runner.main(["--resume", "--only", names[1]]) == 1
    assert f"NOT KILLED: {names[1]}" in capsys.readouterr().out
    assert runner.main(["--resume", "--only", names[0]]) == 0


def raised(test: Callable[[], None]) -> BaseException:
    try:
        test()
    except BaseException as error:
        return error
    raise RuntimeError("nothing was raised")


def fails() -> None:
    assert not ROOT


def test_a_propertys_counterexamples_are_assertions_and_errors_among_them_are_not() -> None:
    """Hypothesis raises the ones that it found as a group."""
    one, other = raised(fails), raised(lambda: fails())
    assert is_assertion(one) and is_assertion(BaseExceptionGroup("two", [one, other]))
    assert not is_assertion(BaseExceptionGroup("two", [one, NameError("name")]))
    assert not is_assertion(raised(lambda: mutated(NOTHING, "")))


@pytest.mark.long
def test_the_runner_tells_killed_from_survived_and_broken(tmp_path: Path) -> None:
    quick = [m for m in MUTANTS if m.name in ("sampler-follows-a-seed", "sigma-times-0.99")]
    unsound = replace(NOTHING, name="unsound", tests=("tests/mutants/never_right.py",))
    kept = Kept(tmp_path / "kept.jsonl", "", resume=False)
    results = try_all([*quick, NOTHING, CRASHES, unsound], kept, jobs=2)
    expected = ["killed", "killed", "survived", "broken", "unsound"]
    assert [result.status for result in results] == expected
