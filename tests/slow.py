"""The tests that `make test` leaves to the long suites because they are slow.

    python -m tests.slow choose JUNIT.xml [--seconds 1]     choose anew, write tests/slow.txt

A test of tests/slow.txt counts as marked `long` (tests/conftest.py). Choosing reads how long each
test took in a whole run (`pytest --junitxml JUNIT.xml -o junit_duration_report=call`). A test is
chosen if it took at least so many seconds, unless a seeded bug names it, so that `make test` still
finds every one of these bugs, or KEPT has it. What is slow already was not in that run, and stays
slow. A line that names no test any more does nothing; take it out by hand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from tests.quick import file_of, read_list, read_seconds, write_list

LIST = Path(__file__).with_name("slow.txt")
# What a change must pass, though it takes seconds and no seeded bug names it: the guarantee's own
# tests, each objective's contract, and a whole run in one process, in several and by commands.
KEPT = (
    "tests/dp/test_golden.py::test_within",
    "tests/dp/test_ledger_chaos.py",
    "tests/dp/test_sensitivity.py",
    "tests/flower/test_tls.py::test_processes_equal_one_process",
    "tests/guarantee/",
    "tests/isolation/",
    "tests/objectives/test_contract.py::test_the_four_oracles_pass",
    "tests/secagg/test_model.py",
    "tests/test_cli_runs.py",
    "tests/test_end_to_end.py",
    "tests/test_startup.py",
    "tests/traps/",
    "tests/wire/",
)


def choose(took: Mapping[str, float], named: Iterable[str], seconds: float) -> list[str]:
    """Choose the tests that took at least so many seconds, but those that KEPT or a seeded bug
    names: by their node id, their function or their file."""
    named = set(named)
    return sorted(
        node
        for node, time in took.items()
        if time >= seconds
        and not named & {node, node.partition("[")[0], file_of(node)}
        and not node.startswith(KEPT)
    )


@cache
def slow_tests() -> frozenset[str]:
    """Return the node ids in tests/slow.txt."""
    return frozenset(read_list(LIST))


def named_by_bugs() -> set[str]:
    """Return the tests, functions and files that seeded bugs name."""
    from tests.mutants.catalogue import MUTANTS

    return {test for bug in MUTANTS for test in bug.tests}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.slow", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("choose", choices=["choose"])
    parser.add_argument("junit", type=Path, help="of a run of all tests but the long ones")
    parser.add_argument("--seconds", type=float, default=1.0, help="from which a test is slow")
    options = parser.parse_args(arguments)
    took = read_seconds(options.junit)
    took |= dict.fromkeys(slow_tests() - took.keys(), float("inf"))
    nodes = choose(took, named_by_bugs(), options.seconds)
    text = f"{len(nodes)} tests of {options.seconds:g} s and more"
    write_list(LIST, "tests.slow", text, nodes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
