"""The half of a site on the network writes on a disk of its own and counts no process but its own.

Each test has a twin: the same without a view of its own."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedtune.core import boot, isolation
from fedtune.core.config import load_site
from fedtune.core.processes import MOST_LOGGED, Child
from fedtune.courier import process
from fedtune.flower import certs
from fedtune.launch import site as launch_site
from fedtune.launch.site import Shown
from tests.isolation.test_halves import CONFINES, ROOT, a_site

NAMESPACES = pytest.mark.skipif(
    isolation.NO_VIEW in isolation.available()[1].missing,
    reason="this machine gives no namespaces of mounts and processes",
)
# abort(): a first process of a namespace takes no SIGABRT from itself, and ends by the next thing.
DIES = (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGILL)
LOOKS = """
import json, os, sys
from pathlib import Path
from fedtune.core import isolation
from fedtune.core.config import load_site
from fedtune.courier import process
path, parent, view = sys.argv[1:]
if view == "the machine's":
    isolation.own_view = lambda folders: isolation.Confinement()
site = load_site(Path(path))
kept = sorted(each.name for each in (site.site.state / "keys" / "renewed").iterdir())
means = process.confine(site)
state, seen = site.site.state, []
for folder in ("flower", "keys/renewed"):
    with open(state / folder / "filled", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2**20)
for name, look in {
    "a number": lambda: os.getpgid(int(parent)),
    "a signal": lambda: os.kill(int(parent), 0),
    "threads": lambda: os.stat(f"/proc/{parent}/task").st_nlink,
    "files": lambda: os.stat(f"/proc/{parent}/fd").st_size,
}.items():
    try:
        look()
        seen.append(name)
    except (ProcessLookupError, FileNotFoundError):
        pass
    except PermissionError:
        seen.append(name)
(child := os.fork()) or os._exit(0)
os.waitpid(child, 0)
lines = (state / "keys" / "renewed" / "tls.crt").read_text()
print(json.dumps({"seen": seen, "child": child, "lines": lines, "missing": means.missing}))
"""


def look(site: Path, view: str) -> dict[str, object]:
    """What a confined courier sees of this process, and what it could keep in its folders."""
    command = [sys.executable, "-c", LOOKS, str(site), str(os.getpid()), view]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@CONFINES
@NAMESPACES
@pytest.mark.parametrize("view", ["its own", "the machine's"])
def test_what_a_courier_writes_takes_no_space_and_nobody_elses_processes_are_seen(
    tmp_path: Path, view: str
) -> None:
    site = a_site(tmp_path)
    state = load_site(site).site.state
    (state / "keys" / "renewed" / "tls.crt").write_text("a certificate")
    found, own = look(site, view), view == "its own"
    assert found["lines"] == "a certificate"
    assert found["missing"] == []
    assert found["seen"] == [] if own else len(list(found["seen"])) >= 3  # type: ignore[call-overload]
    assert (found["child"] == 2) is own  # the first process of its own, and then this
    filled = sorted(path.parent.name for path in state.rglob("filled"))
    assert filled == ([] if own else ["flower", "renewed"])


STAYS = """
import os, signal, sys, time
from fedtune.core import isolation
isolation.own_view([])
signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
print(os.getpid(), flush=True)
if sys.argv[1] == "ends":
    os._exit(5)
if sys.argv[1] == "dies":
    os.abort()
time.sleep(60)
"""


@contextmanager
def staying(how: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has moved into a view of its own, and what it went on in."""
    command = [sys.executable, "-c", STAYS, how]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stdout.readline() == "1\n"
        yield child


@NAMESPACES
@pytest.mark.parametrize(("how", "status"), [("ends", (5,)), ("dies", DIES), ("stays", (7,))])
def test_it_ends_as_its_child_ends_and_passes_signals_on(how: str, status: tuple[int, ...]) -> None:
    with staying(how) as child:
        if how == "stays":
            child.terminate()
        assert child.wait(60) in status


@NAMESPACES
def test_what_it_went_on_in_is_killed_with_it() -> None:
    """Its output ends only when both have."""
    with staying("stays") as child:
        child.kill()
        began = time.monotonic()
        assert child.stdout and child.stdout.read() == ""
        assert time.monotonic() - began < 30


# ------------------------------------------------------------------------ what is kept for it


def test_a_couriers_log_has_its_space_from_the_beginning_and_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: another program's log grows as it likes."""
    says = "import sys\nfor _ in range(200): sys.stdout.write('x' * 8192)\n"
    monkeypatch.setattr(boot, "command", lambda *_: [sys.executable, "-c", says])
    lengths = {}
    for program in ("courier", "supernode"):
        log = tmp_path / program / "said.log"
        with Child(program, [], home=log.parent, log=log) as child:  # type: ignore[arg-type]
            child.wait()
        for _ in range(100):
            if log.stat().st_size in (MOST_LOGGED, 200 * 8192):
                break
            time.sleep(0.1)
        lengths[program] = log.stat().st_size
        if program == "courier":
            assert log.stat().st_blocks * 512 >= MOST_LOGGED
    assert lengths == {"courier": MOST_LOGGED, "supernode": 200 * 8192}


def test_a_renewed_certificate_is_kept_once_in_a_while_and_nothing_else_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    site = load_site(a_site(tmp_path))
    shown = Shown(site, lambda event, facts: None)
    kept = process.keys_folder(site) / "renewed" / "tls.crt"
    with caplog.at_level(logging.WARNING):
        shown.from_courier("renewed", {"certificate": "no certificate"})
    assert "cannot be kept" in caplog.text and not kept.exists()
    first, second = (certs.loopback(tmp_path / name)[0].read_text() for name in "ab")
    shown.from_courier("renewed", {"certificate": first})
    assert not kept.exists()  # so soon after the one before
    monkeypatch.setattr(launch_site, "RENEWALS", 0.0)
    for text in (first, second):
        shown.from_courier("renewed", {"certificate": text})
        assert kept.read_text() == text
