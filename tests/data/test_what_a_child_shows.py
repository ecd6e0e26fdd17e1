"""What everybody on the machine can see of a process that works on one unit's rows or files, and
what such a process can learn: nothing of a record, and nothing of other processes."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.core import isolation, system_calls
from fedtune.core.data import child_process, children
from fedtune.core.data.children import ChildFailed, Children
from fedtune.core.errors import FedtuneError, InfrastructureError

pytestmark = pytest.mark.skipif(
    os.uname().machine not in system_calls.MACHINES, reason="another machine's system calls"
)
ASKED: Any = {"what": "the test", "otherwise": "", "cpu_seconds": 60}
PROGRAM = """
import ctypes, json, os, sys
from fedtune.core import isolation
from fedtune.core.data import child_process
libc = ctypes.CDLL(None, use_errno=True)
TWIN
def work(given):
    if not given:
        return b'{"kind": "ready"}'
    WORK
control, settings = child_process.begin()
child_process.serve(control, work, settings)
"""
UNFILTERED = "isolation.only_computing = lambda: isolation.Confinement(('seccomp',))"
NUMBER = 0 if os.uname().machine == "x86_64" else 1  # of a system call's two numbers


@contextmanager
def running(
    folder: Path, patch: pytest.MonkeyPatch, work: str, twin: str = "", **settings: object
) -> Iterator[Children]:
    """Children whose `work` has these lines. twin: what takes a part of the confinement away."""
    folder.mkdir(exist_ok=True)
    lines = work.strip().replace("\n", "\n    ")
    (folder / "shown.py").write_text(PROGRAM.replace("TWIN", twin).replace("WORK", lines))
    with patch.context() as patched:
        patched.syspath_prepend(folder)
        with Children("shown", settings, **ASKED) as started:
            yield started


def descend(pid: int) -> Iterator[int]:
    """Yield the numbers of the processes that descend from this one."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            yield int(path.name)
            yield from descend(int(path.name))


# --------------------------------------------------------------------------- what others can read

SHOWS = f"""
at = ctypes.c_void_p.in_dll(libc, "program_invocation_name").value
ctypes.memmove(at, given + bytes(1), len(given) + 1)
signals = ctypes.c_uint64(int.from_bytes(b"Meier") << 8)
libc.syscall(ctypes.c_long({(14, 135)[NUMBER]}), 2, ctypes.byref(signals), None, 8)
return b"shown"
"""


def seen(started: Children) -> tuple[str, int]:
    """The child's command line, and the signals that it blocks, as everybody can read them."""
    found = list[tuple[str, int]]()

    def look(answer: bytes) -> bytes:  # the child waits for its next input meanwhile
        assert started._process is not None
        for pid in descend(started._process.pid):
            folder = Path(f"/proc/{pid}")
            status = dict(
                line.split(":\t", 1)
                for line in (folder / "status").read_text().splitlines()
                if ":\t" in line
            )
            line = (folder / "cmdline").read_bytes().decode()
            found.append((line, int(status["SigBlk"], 16)))
        return answer

    started.run([b"Anna Meier, HIV positive", b"again"], 100, look)
    return max(found, key=lambda each: (each[1], each[0].startswith("Anna")))


def test_a_child_shows_nobody_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path, monkeypatch, SHOWS) as started:
        assert seen(started) == ("", 0)
    twin = "isolation.hide_command_line = lambda: False"
    with running(tmp_path / "a", monkeypatch, SHOWS, twin) as started:
        assert "Anna Meier" in seen(started)[0]
    with running(tmp_path / "b", monkeypatch, SHOWS, UNFILTERED) as started:
        assert seen(started)[1] >> 40 == ord("M")


def test_settings_are_in_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter's option may be the key by which it makes pseudonyms."""
    started = list[tuple[list[str], dict[str, str]]]()
    popen = subprocess.Popen

    def noting(command: list[str], **how: Any) -> Any:
        started.append((command, how["env"]))
        return popen(command, **how)

    monkeypatch.setattr("fedtune.core.data.children.subprocess.Popen", noting)
    work = "return settings['options']['key'].encode()"
    with running(tmp_path, monkeypatch, work, options={"key": "7e57"}) as forked:
        assert forked.run([b"x"], 100, bytes) == [b"7e57"]
    ((command, environment),) = started
    assert "7e57" not in " ".join(command) + " ".join(environment.values())
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"


WRITES = """
told = []
for descriptor in (1, 2):
    try:
        told.append(os.write(descriptor, b"x") and 0)
    except OSError as error:
        told.append(error.errno)
return json.dumps(told).encode()
"""
KEEPS_THREE = """
close = os.closerange
os.closerange = lambda first, end: close(max(first, 3), end)
"""


def test_a_child_cannot_write_to_dev_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody can watch it: a library's warning about one odd image would be seen."""
    with running(tmp_path, monkeypatch, WRITES) as started:
        assert started.run([b"x"], 100, bytes) == [f"[{errno.EBADF}, {errno.EBADF}]".encode()]
    with running(tmp_path / "twin", monkeypatch, WRITES, KEEPS_THREE) as started:
        assert started.run([b"x"], 100, bytes) == [b"[0, 0]"]


def forked(run: Callable[[int, int], None]) -> tuple[int, bytes]:
    """Run a function in a fork, with the ends of its pipes. Return the status with which it ended
    and what it wrote."""
    reading, given = os.pipe()
    told, writing = os.pipe()
    os.write(given, (1).to_bytes(children.LENGTH, "big") + b"x")
    os.close(given)
    pid = os.fork()
    if pid == 0:
        run(reading, writing)
        os._exit(77)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    try:
        return status, os.read(told, 100)
    finally:
        os.close(told)
        os.close(reading)


LIMITS = {"memory": 2**30, "cpu_seconds": 60}


def test_how_a_child_ends_tells_nothing() -> None:
    """Linux tells every account with which status a process ended; and a crash's address, which the
    process can choose, is written into the kernel's log if no handler takes the signal."""

    def fail(given: bytes) -> bytes:
        raise ValueError(given)

    def work(of: Callable[[bytes], bytes]) -> Callable[[int, int], None]:
        return lambda reading, writing: child_process._child(of, reading, writing, LIMITS)

    answer = (1).to_bytes(children.LENGTH, "big") + b"X"
    assert forked(work(bytes.upper)) == (0, answer + children.ENDED)
    assert forked(work(fail)) == (0, b"")

    def crash(given: bytes) -> bytes:
        return ctypes.string_at(int.from_bytes(b"Meier"))

    def end(given: bytes) -> bytes:
        os._exit(77)

    for ends in (crash, end):  # a status of its own choice is refused, which is a crash
        status, written = forked(work(ends))
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == signal.SIGSEGV and not written

    def crash_unlimited(reading: int, writing: int) -> None:
        faulthandler.disable()  # pytest's
        crash(b"")

    twin, _ = forked(crash_unlimited)
    assert os.WIFSIGNALED(twin) and os.WTERMSIG(twin) == signal.SIGSEGV


ANSWERS_AND_FAILS = f"""
if given == b"2":
    raise ValueError
if given in (b"3", b"4"):
    written = (1).to_bytes({children.LENGTH}, "big") + given
    for descriptor in range(64):
        try:
            os.write(descriptor, written + ({children.ENDED} if given == b"3" else b""))
        except OSError:
            pass
    os._exit(0) if given == b"4" else ctypes.string_at(1)
return given
"""


def test_of_a_child_that_fails_no_answer_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path, monkeypatch, ANSWERS_AND_FAILS) as started:
        assert started.run([b"1"], 100, bytes) == [b"1"]
        for what in (b"2", b"3", b"4"):
            with pytest.raises(ChildFailed):
                started.run([b"1", what], 100, bytes)
        for what in (b"3", b"4"):
            with pytest.raises(ChildFailed):
                started.run([what], 100, bytes)
        assert started.run([b"5"], 100, bytes) == [b"5"]


# --------------------------------------------------------------------------- what a child can learn

WAKES = f"""
word = ctypes.cast(libc.getppid, ctypes.c_void_p).value & ~3
FUTEX = ctypes.c_long({system_calls.WAKE[NUMBER]})
return str(libc.syscall(FUTEX, ctypes.c_void_p(word), 1, 1000, None, None, 0)).encode()
"""
LISTENS = f"""
import ctypes
libc = ctypes.CDLL(None)
word = ctypes.cast(libc.getppid, ctypes.c_void_p).value & ~3
value = ctypes.c_uint32.from_address(word).value
print("waits", flush=True)
FUTEX = ctypes.c_long({system_calls.WAKE[NUMBER]})
while libc.syscall(FUTEX, ctypes.c_void_p(word), 0, value, None, None, 0):
    pass
"""


def count_woken(started: Children) -> int:
    """How many processes that wait at a word of the C library a child says it woke, of one."""
    with subprocess.Popen([sys.executable, "-c", LISTENS], stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == b"waits\n"
        folder = Path(f"/proc/{listener.pid}/wchan")
        while "futex" not in folder.read_text() and folder.read_text() != "0":
            time.sleep(0.01)
        woken = 0
        for _ in range(20):  # it may not wait yet, where Linux does not say so
            woken += sum(started.run([b"x"], 100, int))
        listener.kill()
    return woken


def test_a_child_wakes_no_process_at_a_word_of_a_librarys_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in memory is the same memory in every process, also in a courier, which is kept apart
    in all other ways: by such words a converter passed a row to it in 26 ms."""
    with running(tmp_path, monkeypatch, WAKES) as started:
        assert count_woken(started) == 0
    with running(tmp_path / "twin", monkeypatch, WAKES, UNFILTERED) as started:
        assert count_woken(started) == 1


KNOWS_THE_TIME = """
import gc, sys
gc.unfreeze()
now = float(given)
found = []
for owner in gc.get_objects():
    held = owner if type(owner) is dict else getattr(owner, "__dict__", None)
    for name, value in list(held.items()) if type(held) is dict else ():
        if type(value) in (int, float):
            found += [str(name) for unit in (1, 1e3, 1e6, 1e9) if 0 <= now - value / unit < 7200]
import threading
return " ".join([*sorted(set(found)), str(threading.main_thread().native_id)]).encode()
"""


def test_a_child_does_not_find_when_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = str(time.time() + 60).encode()
    with running(tmp_path, monkeypatch, KNOWS_THE_TIME) as started:
        assert started.run([given], 2**16, bytes) == [b"0"]
    twin = (
        "import logging, threading\n"
        "was, begin = (logging._startTime, threading.get_native_id()), child_process.begin\n"
        "def begin_and_remember():\n"
        "    begun = begin()\n"
        "    logging._startTime, threading.main_thread()._native_id = was\n"
        "    return begun\n"
        "child_process.begin = begin_and_remember"
    )
    with running(tmp_path / "twin", monkeypatch, KNOWS_THE_TIME, twin) as started:
        (told,) = started.run([given], 2**16, bytes)
        assert b"_startTime" in told and not told.endswith(b" 0")


def missing_pages(pid: int) -> list[str]:
    """The files of which a part that this process has mapped is not mapped in memory."""
    found, lines = list[str](), Path(f"/proc/{pid}/smaps").read_text().splitlines()
    page = os.sysconf("SC_PAGE_SIZE")
    for number, line in enumerate(lines):
        span, *rest = line.split(maxsplit=5)
        if "-" not in span or span.endswith(":") or len(rest) < 5 or rest[3] == "0":
            continue
        permissions, offset, _, _, path = rest
        first, last = (int(end, 16) for end in span.split("-"))
        if not permissions.startswith("r") or not Path(path).is_file():
            continue
        there = min(last - first, Path(path).stat().st_size - int(offset, 16))
        inside = next(each for each in lines[number:] if each.startswith("Rss:"))
        if int(inside.split()[1]) * 1024 < -(-there // page) * page:
            found.append(path)
    return found


def test_what_a_child_uses_of_a_library_is_in_memory_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which pages of a library come back into memory would tell everybody which format a patient's
    file has, and a converter could write a row with them. Twin: as the libraries were loaded."""
    if tuple(map(int, platform.release().split(".")[:2])) < (5, 14):
        pytest.skip("Linux before 5.14 has no MADV_POPULATE_READ")
    twin = "isolation.keep_files_in_memory = lambda: None"
    for folder, broken in (("whole", ""), ("twin", twin)):
        with running(tmp_path / folder, monkeypatch, "return given", broken) as started:
            assert started.run([b"a"], 1, bytes) == [b"a"]
            assert started._process is not None
            assert bool(missing_pages(started._process.pid)) == bool(broken)


def test_libraries_for_which_memory_is_short_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: what lies behind a file's end fails by another error, and is no page of it."""

    def madvise(*_: object) -> int:
        ctypes.set_errno(failed)
        return -1

    libc = SimpleNamespace(madvise=madvise)
    monkeypatch.setattr(isolation.ctypes, "CDLL", lambda *_, **__: libc)
    failed = errno.EFAULT
    isolation.keep_files_in_memory()
    failed = errno.ENOMEM
    with pytest.raises(InfrastructureError, match="too little memory to keep in it the libraries"):
        isolation.keep_files_in_memory()


def test_a_child_that_can_read_the_time_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an order in which it could tell how many came before it. Twin: one that cannot."""
    clocks = "isolation._stop_clocks = lambda: isolation.Confinement(missing=(isolation.{},))"
    unseen = (
        "isolation._own_stop = isolation._stop_clocks\n"
        "isolation._stop_clocks = lambda: setattr(isolation, 'MAPS', isolation.Path('/none'))"
        " or isolation._own_stop()"
    )
    for number, missing in enumerate(("CLOCK_IN_MEMORY", "COUNTER", "")):
        if missing == "COUNTER" and NUMBER:
            continue  # 64-bit ARM, which cannot before Linux 6.12
        broken = clocks.format(missing) if missing else unseen
        with (
            pytest.raises(FedtuneError, match="kept from reading the time"),
            running(tmp_path / str(number), monkeypatch, "return given", broken),
        ):
            pass
    with running(tmp_path / "twin", monkeypatch, "return given") as started:
        assert started.run([b"a"], 1, bytes) == [b"a"]


# ---------------------------------------------------------------------------- where little is left


def test_a_program_that_dies_at_its_first_child_is_not_started_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = list[object]()
    popen = subprocess.Popen

    def counting(*command: Any, **how: Any) -> Any:
        starts.append(command)
        return popen(*command, **how)

    monkeypatch.setattr("fedtune.core.data.children.subprocess.Popen", counting)
    dies = "child_process._fork_and_wait = lambda *_: os.kill(os.getppid(), 9) or os._exit(1)"
    said = ""
    try:
        with running(tmp_path, monkeypatch, "", dies):
            pass
    except FedtuneError as error:
        said = str(error)
    assert len(starts) == 1
    assert "cannot be confined here (the process that forks children ended)" in said


def test_the_command_line_can_be_hidden_here() -> None:
    """Linux may be built without; docs/guarantee.md says what that costs."""
    script = (
        "from fedtune.core import isolation\n"
        "print(isolation.hide_command_line(), open('/proc/self/cmdline').read() == '')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    hidden, empty = done.stdout.split()
    assert hidden == empty
