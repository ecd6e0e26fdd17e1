"""The half of a site on the network writes on a disk of its own and counts no process but its own.

Each test has a twin: the same without a view of its own."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from fedtune.core import boot, isolation, processes
from fedtune.core.config import load_site
from fedtune.core.processes import FULL, MOST_LOGGED, Child
from fedtune.courier import process
from fedtune.flower import certs
from fedtune.launch import site as launch_site
from fedtune.launch.site import Shown
from tests.isolation.test_halves import CONFINES, ROOT, a_site

NAMESPACES = pytest.mark.skipif(
    isolation.NO_VIEW in isolation.try_confinement()[1].missing,
    reason="this machine gives no namespaces of mounts and processes",
)
# abort(): a first process of a namespace takes no SIGABRT from itself, and ends by the next thing.
DIES = (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGILL)
LOOKS = """
import json, os, sys
from contextlib import nullcontext
from pathlib import Path
from fedtune.core import isolation
from fedtune.core.config import load_site
from fedtune.courier import process
path, parent, view = sys.argv[1:]
if view == "the machine's":
    isolation.own_view = lambda *_: isolation.Confinement()
site = load_site(Path(path))
means = process.confine(site)
state, seen = site.site.state, []
with open(state / "flower" / "filled", "wb") as file:
    os.posix_fallocate(file.fileno(), 0, 2**20)
try:
    (state / "keys" / "renewed" / "filled").touch()
except PermissionError:
    pass
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
    assert filled == ([] if own else ["flower"])


SEES = """
import json, os, sys
from contextlib import nullcontext
from pathlib import Path
from fedtune.core import isolation
from fedtune.core.config import load_site
from fedtune.courier import process
path, view, *others = sys.argv[1:]
if view == "the machine's":
    isolation.own_view = lambda *_: isolation.Confinement()
os.chdir(Path(path).parent)
process.confine(load_site(Path(path)))
seen = {}
for other in [*others, ".", *("/.." + other for other in others)]:
    try:
        found = os.stat(other)
        seen[other] = [found.st_ino, found.st_size, found.st_mtime_ns]
    except OSError:
        seen[other] = None
print(json.dumps(seen))
"""


@CONFINES
@NAMESPACES
@pytest.mark.parametrize("view", ["its own", "the machine's"])
def test_a_courier_sees_neither_how_long_a_file_is_nor_when_it_was_changed(
    tmp_path: Path, view: str
) -> None:
    """Of records, of the state folder and what is in it, of any folder that holds them; also by a
    path from where it was started, or out of the root that it has now."""
    site = a_site(tmp_path)
    state = tmp_path / "state"
    for name in ("ledger.db", "audit.jsonl", "vault.log"):
        (state / name).write_text("something")
    hidden = [tmp_path / "data.jsonl", tmp_path, tmp_path.parent, state, *state.iterdir()]
    hidden = [path for path in hidden if path != state / "keys"]
    command = [sys.executable, "-c", SEES, str(site), view, *map(str, hidden)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found, own = json.loads(done.stdout), view == "its own"
    names = [*map(str, hidden), ".", *(f"/..{path}" for path in hidden)]
    for name in names:
        is_so = os.stat(tmp_path / name)
        told = [is_so.st_ino, is_so.st_size, is_so.st_mtime_ns]
        assert (found[name] == told) is not own, name
    there = {Path(path).name for path, seen in found.items() if seen}
    assert not own or there & {"data.jsonl", "ledger.db", "audit.jsonl", "vault.log"} == set()


LINKS = """
import os, sys
from contextlib import nullcontext
from pathlib import Path
from fedtune.core import isolation
folder = Path(sys.argv[1])
assert isolation.own_view([folder / name for name in ("a/b/file", "c/file", "lost", "d")], []).means
print(*sorted(os.listdir(folder)), *os.listdir(folder / "d"), (folder / "a/b/file").read_text())
for name in ("c/file", "d/in"):
    print((folder / name).read_text())
"""


@NAMESPACES
def test_what_is_shown_is_there_by_every_link_that_leads_to_it(tmp_path: Path) -> None:
    """Such as a Python that a virtual environment leads to; what is beside it is not."""
    for name in ("real/deep", "d"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a").symlink_to("real/other/..")
    (tmp_path / "real" / "other").symlink_to("deep/../deep")
    (tmp_path / "real" / "b").symlink_to(tmp_path / "real" / "deep")
    (tmp_path / "c").symlink_to(tmp_path / "a" / "b")
    (tmp_path / "lost").symlink_to("nowhere")
    for name in ("real/deep/file", "real/deep/beside", "d/in", "beside"):
        (tmp_path / name).write_text(name)
    command = [sys.executable, "-c", LINKS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = "a c d lost real in real/deep/file\nreal/deep/file\nd/in\n"
    assert done.stdout == said


REFUSING = """
import ctypes, errno
class Refusing:
    def __init__(self, libc, call):
        self.libc, self.call = libc, call
    def __getattr__(self, name):
        if name != self.call:
            return getattr(self.libc, name)
        return lambda *_: ctypes.set_errno(errno.EPERM) and 0 or -1
"""


@NAMESPACES
def test_what_cannot_be_built_is_said_and_nothing_is_half_there() -> None:
    look = "import os; from pathlib import Path; from fedtune.core import isolation\n"
    look += "isolation._libc = lambda libc=isolation._libc(): {libc}\n"
    look += "found = isolation.own_view([Path('/usr')], [Path('{own}')])\n"
    look += "print(found.missing == (isolation.NO_VIEW,), os.path.exists('/proc/stat'))\n"
    look += "print(*found.reasons)"
    for libc, own, why in (
        ("libc", "/nowhere", "a file: ENOENT"),
        ("Refusing(libc, 'pivot_root')", "/tmp", "pivot_root: EPERM"),
        ("Refusing(libc, 'unshare')", "/tmp", "unshare: EPERM"),
    ):
        command = [sys.executable, "-c", REFUSING + look.format(libc=libc, own=own)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        said = f"no view of its own: {why}"
        assert done.stdout == f"True True\n{said}\n", done.stderr
        assert isolation.WALL.fullmatch(said)


NO_ROOT = """
import os
from contextlib import nullcontext
from pathlib import Path
from fedtune.core import isolation
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(54_321)
    os.setuid(54_321)
    isolation._prctl(isolation.PR_SET_DUMPABLE, 1)
missing = isolation.own_view([Path("/root/in/it"), Path("/usr")], []).missing
print(missing, os.listdir("/"), os.path.isdir("/usr/bin"))
"""


@NAMESPACES
def test_a_user_without_rights_has_a_view_without_what_it_may_not_reach() -> None:
    command = [sys.executable, "-c", NO_ROOT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "() ['usr'] True\n", done.stderr


COUNTS = """
import os, resource, subprocess, sys
others, view = int(sys.argv[1]), sys.argv[2]
from fedtune.core import isolation
if view == "the machine's":
    isolation.own_view = lambda *_: resource.setrlimit(resource.RLIMIT_NPROC, (150, 150))
isolation.PROCESSES = 150
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(54_321)
    os.setuid(54_321)  # of whom there is nobody else
    isolation._prctl(isolation.PR_SET_DUMPABLE, 1)  # its own files in /proc are its own again
os.chdir("/")
asleep = [subprocess.Popen(["/bin/sleep", "60"]) for _ in range(others)]
gate = os.pipe()
if not (child := os.fork()):
    isolation.own_view([], [])
    isolation.only_files([], [])
    started = 0
    try:
        while started < 500:
            if not os.fork():
                os.read(gate[0], 1)
                os._exit(0)
            started += 1
    except OSError:
        pass
    os.write(gate[1], bytes(started))
    for _ in range(started):
        os.wait()
    print(started, flush=True)
    os._exit(0)
os.waitpid(child, 0)
for each in asleep:
    each.kill()
    each.wait()
"""


def count(others: int, view: str) -> int:
    """How many processes a confined one can start beside so many others of its user, who is not
    root."""
    command = [sys.executable, "-c", COUNTS, str(others), view]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@CONFINES
@NAMESPACES
def test_how_many_processes_a_courier_can_start_says_nothing_of_others() -> None:
    """Twin: a limit of its own without numbers of its own counts all processes of its user."""
    assert count(0, "its own") == count(40, "its own") == 148
    assert count(0, "the machine's") >= count(40, "the machine's") + 30


STAYS = """
import os, signal, sys, time
from fedtune.core import isolation
if sys.argv[1] == "ignored":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
isolation.own_view([], [])
if sys.argv[1] != "no handler":
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
print(os.getpid(), flush=True)
if sys.argv[1] in ("ends", "ignored"):
    os._exit(5)
if sys.argv[1] == "dies":
    os.abort()
while True:
    time.sleep(0.01)
"""


@contextmanager
def staying(how: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has moved into a view of its own, and what it went on in."""
    command = [sys.executable, "-c", STAYS, how]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stdout.readline() == "1\n"
        try:
            yield child
        finally:
            child.kill()


def status_of(child: subprocess.Popen[str]) -> int | None:
    """What it ended with; None if it has not ended after 20 seconds."""
    try:
        return child.wait(20)
    except subprocess.TimeoutExpired:
        return None


@NAMESPACES
@pytest.mark.parametrize(
    ("how", "status"),
    [
        *(("ends", (5,)), ("ignored", (5,)), ("dies", DIES), ("killed", (-signal.SIGKILL,))),
        *(("stays", (7,)), ("no handler", (128 + signal.SIGTERM,))),
    ],
)
def test_it_ends_as_its_child_ends_and_passes_signals_on(how: str, status: tuple[int, ...]) -> None:
    """At once, too: the signal may come before the parent waits. Also where whoever started it
    ignores that children end, and where the child is killed, as for lack of memory."""
    with staying(how) as child:
        if how in ("stays", "no handler"):
            child.terminate()
        if how == "killed":
            (inner,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
            os.kill(int(inner), signal.SIGKILL)
        assert status_of(child) in status


@NAMESPACES
def test_what_it_went_on_in_is_killed_with_it() -> None:
    """Its output ends only when both have."""
    with staying("stays") as child:
        child.kill()
        began = time.monotonic()
        assert child.stdout and child.stdout.read() == ""
        assert time.monotonic() - began < 30


# ------------------------------------------------------------------------ what is kept for it


def test_a_log_for_which_there_is_no_space_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Twin: where there is, what the half says is in it."""
    says = "print('x' * 8192)"
    monkeypatch.setattr(boot, "command", lambda *_: [sys.executable, "-c", says])
    lengths = []
    for number, has in enumerate((True, False)):
        monkeypatch.setattr(processes, "reserve", lambda *_, has=has: has)
        log = tmp_path / str(number) / "courier.log"
        before = set(threading.enumerate())
        with Child("courier", [], home=log.parent, log=log) as child:
            writes = set(threading.enumerate()) - before
            child.wait()
        for thread in writes:
            thread.join(60)
        lengths.append(log.stat().st_size if log.exists() else 0)
    assert lengths == [8193, 0]
    assert "is not kept" in caplog.text


def test_a_couriers_log_has_its_space_from_the_beginning_and_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a vault's, of which a courier, and records, decide how much it says. Twin: another
    program's log grows as it likes."""
    says = "import sys\nfor _ in range(200): sys.stdout.write('x' * 8192)\n"
    monkeypatch.setattr(boot, "command", lambda *_: [sys.executable, "-c", says])
    lengths, whole = {}, MOST_LOGGED + len(FULL)
    for program in ("courier", "vault", "supernode"):
        log = tmp_path / program / "said.log"
        with Child(program, [], home=log.parent, log=log) as child:  # type: ignore[arg-type]
            child.wait()
        for _ in range(100):
            if log.stat().st_size in (whole, 200 * 8192):
                break
            time.sleep(0.1)
        lengths[program] = log.stat().st_size
        if program != "supernode":
            assert log.stat().st_blocks * 512 >= whole and log.read_bytes().endswith(FULL)
    assert lengths == {"courier": whole, "vault": whole, "supernode": 200 * 8192}


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


def test_a_certificate_is_kept_where_no_ledger_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a courier in a container of its own, of whose site's state there are the keys alone:
    no order is asked for there. Twin: beside a ledger one that is answered is waited for."""
    site = load_site(a_site(tmp_path))
    kept = process.keys_folder(site) / "renewed" / "tls.crt"
    certificate = certs.loopback(tmp_path / "a")[0].read_text()
    monkeypatch.setattr(launch_site, "between_orders", lambda _: nullcontext(False))
    for may_write in (True, False):
        monkeypatch.setattr(os, "access", lambda *_, may_write=may_write: may_write)
        Shown(site, lambda *_: None).from_courier("renewed", {"certificate": certificate})
        assert kept.exists() is not may_write
