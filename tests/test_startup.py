"""Commands that only read import nothing that trains: they answer in a second, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import startup

TRAINS = {"torch", "transformers", "peft", "opacus", "flwr", "datasets", "matplotlib"}
COMPUTES = {"numpy", "scipy", "dp_accounting", "pydantic", "pyarrow", "cryptography"}
READ_LEDGER = ("ledger", "site-north.toml")
# All in one process, in this order: what one of them imports is there for the next.
READ = """
import json, sys
from contextlib import redirect_stdout, suppress
from io import StringIO
from fedtune.cli.main import app
for command in json.loads(sys.argv[1]):
    with suppress(SystemExit), redirect_stdout(StringIO()) as said:
        code = app(command, prog_name="fedtune", standalone_mode=False)
    assert said.getvalue() and not code, (command, code)
    print(json.dumps([command, sorted(sys.modules)]))
"""


def test_what_only_reads_imports_nothing_that_trains(tmp_path: Path) -> None:
    here = startup.world(tmp_path / "world")
    commands = [*startup.COMMANDS]
    commands.remove(startup.RESOLVES)
    words = [sys.executable, "-c", READ, json.dumps(commands)]
    done = subprocess.run(words, cwd=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [tuple(command) for command, _ in found] == commands
    for command, modules in found:
        assert not TRAINS & set(modules), command
    first = set(found[0][1])
    assert found[0][0] == ["--help"] and not COMPUTES & first


def test_what_shows_a_run_computes_no_epsilon(tmp_path: Path) -> None:
    """It is what people call most often; the accountant's imports take a second."""
    here = startup.world(tmp_path / "world")
    shown = (("status", "triage", "--once"), ("versions", "daily"))
    for command, computes in (*((each, False) for each in shown), (READ_LEDGER, True)):
        words = [sys.executable, "-c", READ, json.dumps([command])]
        done = subprocess.run(words, cwd=here, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        (found,) = map(json.loads, done.stdout.splitlines())
        assert {"dp_accounting", "scipy"}.isdisjoint(found[1]) is not computes


def test_what_stays_as_long_as_a_site_imports_nothing_that_computes() -> None:
    """The process that starts a site's halves is there for months: it keeps what it imports."""
    look = "import sys, fedtune.cli.main, fedtune.launch.site; print(*sys.modules)"
    words = [sys.executable, "-c", look]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    heavy = TRAINS | {"numpy", "scipy", "dp_accounting", "pyarrow", "httpx", "asyncio"}
    assert not heavy & set(done.stdout.split())
