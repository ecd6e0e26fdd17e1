"""Seed one privacy bug at a time into a copy of the shipped code and see that a test fails.

    python -m tests.mutants.run [--only NAME] [--jobs 2] [--resume] [--list]

The named tests first run on the untouched copy. Then, for each mutant:
| killed   | an assertion of a named test failed |
| broken   | tests failed, none by an assertion (an import, a type, an error of the code itself) |
| survived | every named test passed |
| stale    | the text to change is not in the file exactly once |
| unsound  | a named test fails on the untouched code |
Each result is kept in build/mutants.jsonl as it comes, and docs/mutants.md is written when a run
ends, whole or not; --resume tries what was not tried yet on the same code.
Exit code 0 only if every mutant that was chosen is killed."""

from __future__ import annotations

import argparse
import compileall
import hashlib
import json
import os
import py_compile
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from tests.mutants import page as pages
from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant, Stale, mutated

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("fedtune", "server", "client", "tests", "examples", "benchmarks", "pyproject.toml")
KEPT = ROOT / "build" / "mutants.jsonl"
OPTIONS = (
    *("-q", "--tb=short", "-p", "no:cacheprovider", "-p", "tests.mutants.outcome"),
    # A library has imported anyio before pytest could rewrite its plug-in's assertions.
    *("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"),
)
IMPORTED_FROM_HERE = """\
from pathlib import Path
import client, fedtune, server

def test_the_copy_is_what_is_tested():
    for package in (client, fedtune, server):
        assert Path(package.__file__).resolve().parent.parent == Path.cwd().resolve()
"""


@dataclass(frozen=True)
class Result:
    """status: as above; by: the test that failed, or why there is none."""

    name: str
    status: str
    by: str
    seconds: float


def copy_to(folder: Path) -> Path:
    """Copy the shipped code and its tests, apart from the working tree.

    Compiled files know their source by its digest: by its date, a file that is changed twice within
    the resolution of a time stamp would run stale."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    (folder / "test_where.py").write_text(IMPORTED_FROM_HERE)
    by_digest = py_compile.PycInvalidationMode.CHECKED_HASH
    for package in ("fedtune", "server", "client"):
        compileall.compile_dir(folder / package, quiet=1, invalidation_mode=by_digest)
    return folder


class Bench:
    """A copy of the code, and the process whose forks test it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._forks = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forked.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            text=True,
            cwd=folder,
        )

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._forks.stdin and self._forks.stdout
        self._forks.stdin.close()
        self._forks.wait()
        self._forks.stdout.close()

    def run(
        self, tests: Iterable[str], through: bool = False
    ) -> tuple[int, list[dict[str, str]], str]:
        """Run tests, until an assertion fails or `through` to the end; return pytest's exit code,
        what failed, and the output's end."""
        assert self._forks.stdin and self._forks.stdout
        found = self.folder / "outcome.json"
        found.unlink(missing_ok=True)
        variables = {"FEDTUNE_OUTCOME": str(found), "FEDTUNE_OUTCOME_ALL": "1" if through else ""}
        request = {
            "folder": str(self.folder),
            "arguments": [*OPTIONS, *tests],
            "variables": variables,
        }
        self._forks.stdin.write(json.dumps(request) + "\n")
        self._forks.stdin.flush()
        answer = json.loads(self._forks.stdout.readline())
        failures = json.loads(found.read_text()) if found.exists() else []
        if answer["code"] is None:
            return 1, [], answer["output"] + "\nno end: it was stopped"
        return answer["code"], failures, answer["output"]

    def try_mutant(self, mutant: Mutant) -> Result:
        """Seed, test, and put the file back."""
        began, path = time.monotonic(), self.folder / mutant.file
        original = path.read_text(encoding="utf-8")

        def result(status: str, by: str) -> Result:
            return Result(mutant.name, status, by, round(time.monotonic() - began, 1))

        try:
            path.write_text(mutated(mutant, original), encoding="utf-8")
            code, failures, output = self.run(mutant.tests)
        except Stale as error:
            return result("stale", str(error))
        finally:
            path.write_text(original, encoding="utf-8")
        if killers := [f for f in failures if f["kind"] == "assertion"]:
            return result("killed", killers[0]["test"])
        if code == 0:
            return result("survived", "")
        last = (output.strip().splitlines() or ["no output"])[-1]
        return result("broken", failures[0]["words"] if failures else last)


class Unsound(Exception):
    """Tests that cannot be run on the untouched code."""


def untouched(bench: Bench, tests: Sequence[str]) -> list[str]:
    """Run tests on a copy without a bug; return those that fail. Errors: Unsound."""
    code, failures, output = bench.run(["test_where.py", *tests], through=True)
    failed = [failure["test"] for failure in failures]
    if code > 1 or (code and not failed) or any(name.startswith("test_where") for name in failed):
        raise Unsound(output)
    return [test for test in tests if any(is_of(name, test) for name in failed)]


def is_of(node: str, test: str) -> bool:
    """Return whether a test that ran is one that is named: itself, a case of it, or in its file.

    >>> is_of("a.py::test_b[1]", "a.py::test_b"), is_of("a.py::test_bc", "a.py::test_b")
    (True, False)
    """
    return node == test or node.startswith((f"{test}[", f"{test}::"))


def try_all(mutants: Sequence[Mutant], kept: Kept, jobs: int = 1) -> list[Result]:
    """Try mutants in `jobs` copies at a time; return the results in order. Errors: Unsound."""
    named = dict.fromkeys(test for mutant in mutants for test in mutant.tests)
    asked = [test for test in named if test not in kept.passed]
    with tempfile.TemporaryDirectory(prefix="mutants-") as home, ExitStack() as stack:
        first = copy_to(Path(home, "0"))
        copies = [first, *(Path(home, str(number)) for number in range(1, jobs))]
        for copied in copies[1:]:
            shutil.copytree(first, copied)
        benches = [stack.enter_context(Bench(copied)) for copied in copies]
        pool = ThreadPoolExecutor(jobs)
        stack.callback(pool.shutdown, cancel_futures=True)
        shares = [asked[at::jobs] for at in range(jobs)]
        failed = [test for some in pool.map(untouched, benches, shares) for test in some]
        kept.add_passed([test for test in asked if test not in failed])
        idle: SimpleQueue[Bench] = SimpleQueue()
        for bench in benches:
            idle.put(bench)

        def one(mutant: Mutant) -> Result:
            if wrong := [test for test in mutant.tests if test in failed]:
                result = Result(mutant.name, "unsound", f"untouched: {wrong[0]}", 0.0)
            else:
                bench = idle.get()
                try:
                    result = bench.try_mutant(mutant)
                finally:
                    idle.put(bench)
            kept.add(result)
            return result

        return list(pool.map(one, mutants))


class Kept:
    """What was tried on one state of the code, in a file that a run adds to as it goes."""

    def __init__(self, path: Path, code: str, resume: bool) -> None:
        """resume: begin with what the file has of this code."""
        self._path, self._code = path, code
        self.results, self.passed = dict[str, Result](), set[str]()
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            entry = json.loads(text)
            if not resume or entry.pop("code") != code:
                continue
            if "passed" in entry:
                self.passed.update(entry["passed"])
            else:
                self.results[entry["name"]] = Result(**entry)

    def add(self, result: Result) -> None:
        """Add and show a result."""
        self.results[result.name] = result
        self._write(asdict(result))
        print(line(result), flush=True)

    def add_passed(self, tests: Sequence[str]) -> None:
        """Add tests that the untouched code passes."""
        self.passed.update(tests)
        self._write({"passed": list(tests)})

    def _write(self, entry: dict[str, Any]) -> None:
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"code": self._code, **entry}) + "\n")


def line(result: Result) -> str:
    by = result.by.removeprefix("tests/")
    return f"{result.name:<46} {result.status:<8} {result.seconds:5.1f} s  {by}"


def digest() -> str:
    """Hash all that a result follows from: the code, its tests and the bugs."""
    made = hashlib.sha256()
    for name in COPIED:
        paths = sorted((ROOT / name).rglob("*")) if (ROOT / name).is_dir() else [ROOT / name]
        for path in paths:
            if path.is_file() and path.suffix != ".pyc":
                made.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode())
                made.update(path.read_bytes())
    return made.hexdigest()


def processor_minutes() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="this mutant (repeatable)")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--resume", action="store_true", help="keep what this code was tried with")
    parser.add_argument("--list", action="store_true", help="what there is, without running it")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.only or m.name in options.only]
    if unknown := set(options.only or ()) - {m.name for m in chosen}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    if options.list:
        for mutant in chosen:
            print(f"{mutant.trap!s:>6}  {mutant.name:<38} {mutant.file:<32} {mutant.note}")
        return 0
    kept = Kept(KEPT, digest(), options.resume)
    waiting = [mutant for mutant in chosen if mutant.name not in kept.results]
    try:
        if waiting:
            try_all(waiting, kept, max(1, options.jobs))
    except Unsound as error:
        print(error, "the untouched code cannot be tested: no mutant was tried", sep="\n\n")
    finally:
        write_page(kept.results)
    results = [kept.results[mutant.name] for mutant in chosen if mutant.name in kept.results]
    missed = [result for result in results if result.status != "killed"]
    print(f"\n{len(results) - len(missed)} of {len(chosen)} mutants killed; wrote {pages.PAGE}")
    for result in missed:
        print(f"NOT KILLED: {line(result)}")
    return 0 if len(results) == len(chosen) and not missed else 1


def write_page(results: Mapping[str, Result]) -> None:
    """Write the page with these results; where they are all there are, it says when."""
    minutes = processor_minutes()
    everything = all(mutant.name in results for mutant in MUTANTS)
    said = pages.whole(time.strftime("%Y-%m-%d"), minutes) if everything else ""
    old = pages.PAGE.read_text(encoding="utf-8") if pages.PAGE.exists() else ""
    tried = {name: result.status for name, result in results.items()}
    pages.PAGE.write_text(pages.page(MUTANTS, tried, old, said), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
