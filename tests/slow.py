"""The tests that `make test` leaves to the long suites because they are slow.

    python -m tests.slow choose JUNIT.xml [--seconds 2]   choose them anew, and write tests/slow.txt

A test of tests/slow.txt counts as marked `long` (tests/conftest.py). Choosing reads how long each
test took in a whole run (`pytest --junitxml JUNIT.xml -o junit_duration_report=call`). A test is
chosen if it took at least so many seconds, unless a seeded bug names it, so that `make test` still
finds every one of these bugs, or KEPT has it. A line that names no test any more does nothing, and
the next choice leaves it out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from tests.quick import file_of, read_seconds

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
def read_list() -> frozenset[str]:
    """Read the node ids of tests/slow.txt."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def main(arguments: list[str]) -> int:
    from tests.mutants.catalogue import MUTANTS

    parser = argparse.ArgumentParser(prog="python -m tests.slow", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("choose", choices=["choose"])
    parser.add_argument("junit", type=Path, help="of a run of all tests but the long ones")
    parser.add_argument("--seconds", type=float, default=2.0, help="from which a test is slow")
    options = parser.parse_args(arguments)
    took = read_seconds(options.junit)
    # What is slow already was not run, and stays slow.
    took |= dict.fromkeys(read_list() - took.keys(), float("inf"))
    nodes = choose(took, (test for bug in MUTANTS for test in bug.tests), options.seconds)
    text = f"{len(nodes)} tests of {options.seconds:g} s and more"
    written = f"# Written by python -m tests.slow choose: {text}.\n"
    LIST.write_text(written + "".join(f"{node}\n" for node in nodes), encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
