"""How Linux confines a half of a site in its container: seen from outside, by its process."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedtune.core.isolation import NETWORKS
from fedtune.core.system_calls import Lines, filter_of_courier, filter_of_vault

SEIZE, INTERRUPT, GET_FILTER, DETACH = 0x4206, 0x4207, 0x420C, 17  # of ptrace
WALL = 0x40000000  # of waitpid: also a thread
PROGRAM = "fedtune.core.processes"


@dataclass(frozen=True)
class Seen:
    """root: the kind of file system that is its root; numbers: how many namespaces of processes
    number it, this machine's among them; network: its network namespace; calls: the program that
    judges its system calls, the newest of them; programs: how many there are."""

    root: str
    numbers: int
    network: str
    calls: bytes
    programs: int

    def walls(self, half: str, of_container: Seen) -> set[str]:
        """The words of isolation.py that hold of it beside its container's first process."""
        wanted = filter_of_vault([]) if half == "vault" else filter_of_courier(NETWORKS)
        found = {
            "namespace": self.network != of_container.network,
            "seccomp": self.calls == _packed(wanted),
            "own files": self.root == "tmpfs" != of_container.root,
            "own processes": self.numbers > of_container.numbers,
        }
        return {wall for wall, holds in found.items() if holds}


VIRTUAL = {"tmpfs", "proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2"}


def disks(pid: int) -> set[str]:
    """Where a process has a disk on which it may write, as its mounts say."""
    mounts = [line.split() for line in Path("/proc", str(pid), "mounts").read_text().splitlines()]
    return {place for _, place, kind, how, *_ in mounts if kind not in VIRTUAL and how[:2] == "rw"}


# What `Seen.walls` can see; a Landlock's rules are nowhere to be read.
SEEN = {"namespace", "seccomp", "own files", "own processes"}


def see(pid: int) -> Seen:
    """Look at a process. Errors: AssertionError where it cannot be looked at."""
    proc = Path("/proc", str(pid))
    mounts = [line.split(" - ") for line in (proc / "mountinfo").read_text().splitlines()]
    (root, *_) = [right.split()[0] for left, right in mounts if left.split()[4] == "/"][-1:]
    programs = list(_programs(pid))
    return Seen(
        root=root,
        numbers=len(_status(proc)["NSpid"].split()),
        network=os.readlink(proc / "ns/net"),
        calls=programs[-1] if programs else b"",
        programs=len(programs),
    )


def process_of(half: str, first: int) -> int:
    """Find the process of a half of a site below a container's first one: the innermost, since a
    courier with numbers of its own is the child of what was started."""
    found = [pid for pid in _below(first) if half in _words(pid) and PROGRAM in _words(pid)]
    assert found, f"no {half} below {first}"
    return max(found, key=lambda pid: len(_status(Path("/proc", str(pid)))["NSpid"].split()))


def _below(first: int) -> Iterator[int]:
    for task in Path("/proc", str(first), "task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from _below(child)


def _words(pid: int) -> list[str]:
    return Path("/proc", str(pid), "cmdline").read_text().split("\0")


def _status(proc: Path) -> dict[str, str]:
    lines = (proc / "status").read_text().splitlines()
    return {name: told.strip() for name, _, told in (line.partition(":") for line in lines)}


def _packed(program: Lines) -> bytes:
    return b"".join(struct.pack("HBBI", *line) for line in program)


def _programs(pid: int) -> Iterator[bytes]:
    """The programs that judge a process's system calls, the oldest first, as Linux holds them."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    with _stopped(libc, pid):
        number = 0
        while (lines := libc.ptrace(GET_FILTER, pid, number, None)) > 0:
            program = ctypes.create_string_buffer(8 * lines)
            assert libc.ptrace(GET_FILTER, pid, number, program) == lines
            yield program.raw
            number += 1


@contextmanager
def _stopped(libc: ctypes.CDLL, pid: int) -> Iterator[None]:
    """Hold a process still, as a debugger does."""
    assert libc.ptrace(SEIZE, pid, None, None) == 0, os.strerror(ctypes.get_errno())
    try:
        assert libc.ptrace(INTERRUPT, pid, None, None) == 0
        os.waitpid(pid, WALL)
        yield
    finally:
        libc.ptrace(DETACH, pid, None, None)
