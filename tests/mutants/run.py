"""Seed one privacy bug at a time into a copy of the shipped code and see that a test fails.

    python -m tests.mutants.run [--only NAME] [--jobs 2] [--list]

The named tests first run on the untouched copy and must pass. Then, for each mutant:
| killed   | an assertion of a named test failed |
| broken   | tests failed, none by an assertion (an import, a type, an error of the code itself) |
| survived | every named test passed |
| stale    | the text to change is not in the file exactly once |
Exit code 0 only if every mutant is killed."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.catalogue import MUTANTS
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("fedtune", "server", "client", "tests", "examples", "benchmarks", "pyproject.toml")
PAGE = ROOT / "docs" / "mutants.md"
PER_MUTANT = 300.0  # seconds: an endless loop is not a kill
UNTOUCHED = 3600.0  # for all named tests on the untouched copy
IMPORTED_FROM_HERE = """\
from pathlib import Path
import client, fedtune, server

def test_the_copy_is_what_is_tested():
    for package in (client, fedtune, server):
        assert Path(package.__file__).resolve().parent.parent == Path.cwd().resolve()
"""


class Stale(Exception):
    """A mutant that no longer applies: an error, not a pass."""


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    status: str  # killed, broken, survived or stale
    by: str  # the test that failed, or why there is none
    seconds: float


def mutated(mutant: Mutant, text: str) -> str:
    """The file's text with the bug in it. Errors: Stale."""
    for old, new in mutant.edits:
        if (count := text.count(old)) != 1:
            raise Stale(f"{mutant.file} has {count} times, not once: {old.strip()!r}")
        text = text.replace(old, new)
    return text


def copy_to(folder: Path) -> Path:
    """The shipped code and its tests, apart from the working tree."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    (folder / "test_where.py").write_text(IMPORTED_FROM_HERE)
    return folder


def run_tests(
    folder: Path, tests: Sequence[str], limit: float = PER_MUTANT
) -> tuple[int, list[dict[str, str]], str]:
    """pytest's exit code in a process of its own, what failed there, and the output's end."""
    found = folder / "outcome.json"
    found.unlink(missing_ok=True)
    # No byte code: a file changed twice within its time stamp's resolution would run stale.
    settings = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-q", "-p", "no:cacheprovider", "-p", "tests.mutants.outcome", "--tb=short"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=folder,
            env=os.environ | settings | {"FEDTUNE_OUTCOME": str(found)},
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return 1, [], f"no end within {limit:.0f} s"
    failures = json.loads(found.read_text()) if found.exists() else []
    return done.returncode, failures, (done.stdout + done.stderr)[-3000:]


def try_mutant(mutant: Mutant, folder: Path) -> Result:
    """Seed, test, and put the file back."""
    began, path = time.monotonic(), folder / mutant.file
    original = path.read_text(encoding="utf-8")

    def result(status: str, by: str) -> Result:
        return Result(mutant, status, by, time.monotonic() - began)

    try:
        path.write_text(mutated(mutant, original), encoding="utf-8")
        code, failures, output = run_tests(folder, mutant.tests)
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


def try_all(mutants: Sequence[Mutant], jobs: int = 1, show: bool = True) -> list[Result] | None:
    """The results in order; None where the untouched code does not pass."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as home:
        folders: SimpleQueue[Path] = SimpleQueue()
        first = copy_to(Path(home, "0"))
        copies = [first, *(Path(home, str(number)) for number in range(1, jobs))]
        for copied in copies[1:]:
            shutil.copytree(first, copied)
        named = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        with ThreadPoolExecutor(jobs) as pool:
            shares = [["test_where.py", *named[at::jobs]] for at in range(jobs)]
            untouched = list(pool.map(partial(run_tests, limit=UNTOUCHED), copies, shares))
        if any(code for code, _, _ in untouched):
            for code, failures, output in untouched:
                if code:
                    print(output, *(f"{f['test']}: {f['words']}" for f in failures), sep="\n")
            print("the untouched code does not pass: no mutant was tried")
            return None
        for copied in copies:
            folders.put(copied)

        def one(mutant: Mutant) -> Result:
            folder = folders.get()
            try:
                result = try_mutant(mutant, folder)
            finally:
                folders.put(folder)
            if show:
                print(line(result), flush=True)
            return result

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, mutants))


def line(result: Result) -> str:
    m = result.mutant
    by = result.by.removeprefix("tests/")
    return f"{m.trap!s:>6}  {m.name:<38} {result.status:<8} {result.seconds:5.1f} s  {by}"


def page(results: Sequence[Result], seconds: float) -> str:
    """What a run over the whole catalogue found, as docs/mutants.md keeps it."""
    killed = sum(result.status == "killed" for result in results)
    traps = {result.mutant.trap for result in results if isinstance(result.mutant.trap, int)}
    rows = [
        f"| {r.mutant.name} | {r.mutant.trap} | `{r.mutant.file}` | {r.mutant.note} | {r.status} |"
        for r in sorted(results, key=lambda r: (str(r.mutant.trap).rjust(2), r.mutant.name))
    ]
    head = (
        "# Seeded bugs\n\nWritten by `make mutants`; not edited by hand. Each bug is put into a "
        "copy of the shipped code, alone, and named tests must fail for it by an assertion.\n\n"
        f"**{killed} of {len(results)} caught** on {time.strftime('%Y-%m-%d')}, in "
        f"{seconds / 60:.0f} minutes; {len(traps)} numbered ways in which DP breaks silently, and "
        "more. The untouched code passes the same tests.\n\n"
        "| bug | way | file | what it does | |\n|---|---|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="this mutant (repeatable)")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--list", action="store_true", help="what there is, without running it")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if not options.only or m.name in options.only]
    if unknown := set(options.only or ()) - {m.name for m in chosen}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    if options.list:
        for mutant in chosen:
            print(f"{mutant.trap!s:>6}  {mutant.name:<38} {mutant.file:<32} {mutant.note}")
        return 0
    began = time.monotonic()
    results = try_all(chosen, max(1, options.jobs))
    if results is None:
        return 1
    killed = sum(result.status == "killed" for result in results)
    traps = {result.mutant.trap for result in results if isinstance(result.mutant.trap, int)}
    print(
        f"\n{killed} of {len(results)} mutants killed, {len(traps)} traps covered, "
        f"{time.monotonic() - began:.0f} s; the untouched code passes"
    )
    for result in results:
        if result.status != "killed":
            print(line(result))
    if not options.only:
        PAGE.write_text(page(results, time.monotonic() - began), encoding="utf-8")
        print(f"wrote {PAGE}")
    return 0 if killed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
