"""The tests that catch as many seeded bugs as a minute allows: `make quick`.

    python -m tests.quick                                   run those of tests/quick.txt
    python -m tests.quick choose JUNIT.xml [--seconds 60]   choose them anew, and write that file

Choosing reads how long each test took (`pytest --junitxml JUNIT.xml`) and which test caught each
seeded bug (build/mutants.jsonl, as `make mutants` leaves it); of a bug that was not tried, its
named tests count. Bug after bug, what is cheapest to catch beside what is already chosen is added,
until the seconds of all processes together are used up. The list is a choice, and nothing is
asserted of it: a line that names no test any more is said and left out."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("quick.txt")
RESULTS = ROOT / "build" / "mutants.jsonl"
OF_A_FILE = 0.1  # seconds, to import it


# ------------------------------------------------------------------------------- choosing


def read_seconds(junit: Path) -> dict[str, float]:
    """Read how long each test took that passed, by its node id."""
    took: dict[str, float] = {}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        words = case.get("classname", "").split(".")
        file = next((at for at, word in enumerate(words) if word.startswith("test_")), None)
        if file is None or len(case):  # it failed or was skipped
            continue
        rest = [*words[file + 1 :], case.get("name", "")]
        took["::".join(["/".join(words[: file + 1]) + ".py", *rest])] = float(case.get("time", 0))
    return took


def read_catches(results: Path) -> dict[str, tuple[str, ...]]:
    """Read which tests catch each seeded bug: the one that did, or those that are named."""
    from tests.mutants.catalogue import MUTANTS

    catches = {mutant.name: mutant.tests for mutant in MUTANTS}
    for line in results.read_text(encoding="utf-8").splitlines() if results.exists() else ():
        entry = json.loads(line)
        if entry.get("status") == "killed" and entry["name"] in catches:
            catches[entry["name"]] = (entry["by"],)
    return catches


def choose(
    took: Mapping[str, float], catches: Mapping[str, tuple[str, ...]], seconds: float
) -> tuple[list[str], list[str]]:
    """Choose tests of so many seconds in all; return them, and the bugs that they catch. A file
    costs what its first test took beside, which is charged with the fixtures of all."""
    by_prefix: dict[str, set[str]] = defaultdict(set)
    opening: dict[str, float] = {}
    for node in took:
        opening.setdefault(file_of(node), OF_A_FILE + took[node])
        for prefix in (node, node.partition("[")[0], file_of(node)):
            by_prefix[prefix].add(node)
    needed: dict[str, set[str]] = {}
    for bug, tests in catches.items():
        found = [by_prefix.get(test) for test in tests]
        if all(found):
            needed[bug] = {node for each in found if each for node in each}
    chosen, opened = set[str](), set[str]()
    caught: list[str] = []
    while needed:
        cost = {
            bug: sum(took[node] for node in nodes - chosen)
            + sum(opening[file] for file in {*map(file_of, nodes)} - opened)
            for bug, nodes in needed.items()
        }
        # A file that is opened for one bug is open for its others.
        beside = Counter(file for nodes in needed.values() for file in {*map(file_of, nodes)})
        shared = {
            bug: cost[bug] / min(beside[file_of(node)] for node in nodes)
            for bug, nodes in needed.items()
        }
        bug = min(shared, key=lambda name: (shared[name], name))
        nodes = needed.pop(bug)
        if cost[bug] > seconds:
            continue
        seconds -= cost[bug]
        chosen |= nodes
        opened |= {*map(file_of, nodes)}
        caught.append(bug)
    return sorted(chosen), caught


def file_of(node: str) -> str:
    return node.partition("::")[0]


def write_list(file: Path, module: str, text: str, nodes: Iterable[str]) -> None:
    """Write the node ids of tests that `python -m MODULE choose` chose, and say what they are."""
    written = f"# Written by python -m {module} choose: {text}.\n"
    file.write_text(written + "".join(f"{node}\n" for node in nodes), encoding="utf-8")
    print(text)


# -------------------------------------------------------------------------------- running


def read_list(file: Path = LIST) -> list[str]:
    """Read the node ids of a file that `write_list` wrote."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = set(read_list())
    missing = sorted(wanted - {item.nodeid for item in items})
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
    items[:] = [item for item in items if item.nodeid in wanted]
    told: dict[str, Any] | None = getattr(config, "workeroutput", None)
    if told is None:
        MISSING.update(missing)
    else:
        told["quick_missing"] = missing


MISSING: set[str] = set()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    MISSING.update(getattr(node, "workeroutput", {}).get("quick_missing", ()))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for node in sorted(MISSING):
        terminalreporter.write_line(f"tests/quick.txt names no test any more: {node}")


def files_of(nodes: Iterable[str]) -> list[str]:
    """Return the files of tests, as they stand in the list, that are there."""
    files = dict.fromkeys(file_of(node) for node in nodes)
    MISSING.update(file for file in files if not (ROOT / file).is_file())
    return [file for file in files if (ROOT / file).is_file()]


def run(arguments: list[str]) -> int:
    files = files_of(read_list())
    for file in sorted(MISSING):
        print(f"tests/quick.txt names no file any more: {file}")
    command = [sys.executable, "-m", "pytest", "-p", "tests.quick", *arguments, *files]
    return subprocess.run(command, cwd=ROOT).returncode


def main(arguments: list[str]) -> int:
    if arguments[:1] != ["choose"]:
        return run(arguments)
    parser = argparse.ArgumentParser(prog="python -m tests.quick choose", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("junit", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS, help="of the seeded bugs")
    parser.add_argument("--seconds", type=float, default=60.0, help="of all processes together")
    options = parser.parse_args(arguments[1:])
    took = read_seconds(options.junit)
    catches = read_catches(options.results)
    nodes, caught = choose(took, catches, options.seconds)
    by_file: dict[str, float] = defaultdict(float)
    for node in nodes:
        by_file[file_of(node)] += took[node]
    nodes.sort(key=lambda node: (-by_file[file_of(node)], node))
    total = sum(took[node] for node in nodes)
    text = f"{len(caught)} of {len(catches)} seeded bugs in {len(nodes)} tests of {total:.0f} s"
    write_list(LIST, "tests.quick", text, nodes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
