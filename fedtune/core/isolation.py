"""Confine this process by what Linux gives: no network, or no files but some.

    vault       holds the records: a network of its own, and no socket but what it inherits
    courier     speaks to the network: reads and writes the files that it is given, and no other
    conversion  runs a plug-in on one unit's rows: computes, and can do nothing else

They are confined before they start a thread or import what is not fedtune's own; what they start
inherits it. `Confinement` says what is in force; each half then *tries* what must not work.

| no_network() | a network namespace, where one can be made; seccomp: no socket at all, or Unix    |
|              | sockets alone (for the processes of a team, or a database's own socket)           |
| only_files() | Landlock: files below these paths, no signals and no abstract sockets to others;  |
|              | seccomp: no Unix sockets, by which a user bus or a container's daemon would read  |
|              | what this process may not                                                         |
| only_computing() | seccomp: memory, the descriptors that are open already, and its own end; no   |
|              | file, process or clock, and not its own number                                    |
| all          | no new privileges, no core dump, no ptrace, process_vm_readv or pidfd_getfd, no   |
|              | io_uring, whose operations pass by a filter, no system call of another machine    |

Source: Linux, Documentation/userspace-api/landlock.rst and seccomp_filter.rst."""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedtune.core import boot
from fedtune.core.errors import InfrastructureError
from fedtune.core.system_calls import (
    Lines,
    filter_of_computing,
    filter_of_courier,
    filter_of_vault,
    is_known,
)

# ------------------------------------------------------------------------------- Linux's numbers

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
SECCOMP_MODE_FILTER = 2
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # on every machine
LANDLOCK_VERSION, LANDLOCK_PATH_BENEATH = 1, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
READ = READ_FILE | READ_DIR
FILES_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
# No program is run from what may be written, and no device, socket or queue is made there.
NOT_WRITTEN = EXECUTE | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14 | 1 << 15  # and truncate, ioctl of a device
SCOPES = 0b11  # abstract Unix sockets, signals: from version 6 on
O_PATH = 0o10000000
NO_LANDLOCK = "no Landlock"
NETWORKS = (socket.AF_INET, socket.AF_INET6)


PR_SET_TSC, PR_TSC_SIGSEGV = 26, 2
MAP_FIXED = 0x10
CLOCK_PAGES = "[vvar"  # where Linux writes the time into each process's memory


@dataclass(frozen=True)
class Confinement:
    """What is in force in this process. means: "namespace", "seccomp", "landlock 7"; missing: what
    this machine does not give, in words."""

    means: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def facts(self) -> dict[str, list[str]]:
        """Return it as an event's facts."""
        return {"means": list(self.means), "missing": list(self.missing)}

    def __and__(self, other: Confinement) -> Confinement:
        return Confinement(self.means + other.means, self.missing + other.missing)


def no_network(sockets: Iterable[int] = ()) -> Confinement:
    """Cut this process off every network. sockets: families of which it may still open sockets;
    with AF_INET among them (a database over TCP) it stays on the network, and this says so.

    Errors: InfrastructureError where threads run already, which would stay as they are."""
    families = sorted({int(family) for family in sockets})
    _check_alone()
    if socket.AF_INET in families:
        _close_itself()
        return Confinement(missing=("a database over TCP keeps it on the network",))
    spaces = _own_network()
    _close_itself()
    return spaces & _install(filter_of_vault, families)


@functools.cache
def available() -> tuple[Confinement, Confinement]:
    """Try what this machine gives a vault and a courier, each in a process of its own."""
    found = []
    for half in ("vault", "courier"):
        command = boot.command("fedtune.core.isolation", half)
        done = subprocess.run(
            command, capture_output=True, text=True, env=boot.environment(), check=False
        )
        try:
            told = json.loads(done.stdout)
        except ValueError:
            told = {"means": [], "missing": ["nothing of it could be tried"]}
        found.append(Confinement(tuple(told["means"]), tuple(told["missing"])))
    return found[0], found[1]


def only_files(
    read: Iterable[Path], write: Iterable[Path], names: Iterable[Path] = ()
) -> Confinement:
    """Leave this process the files below these paths, and sockets of the network alone.

    names: folders of which it may read the names of files, and no file.
    Errors: InfrastructureError as of `no_network`."""
    _check_alone()
    _close_itself()
    of_files = _restrict_files(list(read), list(write), list(names))
    return of_files & _install(filter_of_courier, NETWORKS)


def only_computing() -> Confinement:
    """Leave this process its memory, the descriptors that it has open, and its own end.

    It opens no file or socket, starts no process or thread, signals nobody, and learns neither its
    own number nor the time: what it computes follows from its memory and what it reads. A thread
    that runs already is not confined. "seccomp" is among the means if it holds."""
    stopped = _stop_clocks()
    _close_itself()
    return stopped & _install(filter_of_computing)


def landlock_version() -> int:
    """Return the version of Landlock that this machine gives; 0 for none."""
    version = int(_libc().syscall(LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION))
    return max(version, 0)


# ---------------------------------------------------------------------------------------- parts


def _check_alone() -> None:
    """Check that this process has one thread. Errors: InfrastructureError."""
    with suppress(FileNotFoundError):  # no /proc: the calls themselves refuse what they can
        if len(os.listdir("/proc/self/task")) > 1:
            raise InfrastructureError(
                "this process has threads, which would not be confined", "one thread, at its start"
            )


def _close_itself() -> None:
    """Keep other processes of this user out of this one's memory, and its memory out of files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(PR_SET_DUMPABLE, 0)


def _own_network() -> Confinement:
    """Move into a network namespace without a device that is up."""
    user, group = os.getuid(), os.getgid()
    libc = _libc()
    if user == 0 and libc.unshare(CLONE_NEWNET) == 0:
        return Confinement(("namespace",))
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return Confinement()  # where containers forbid it; the filter alone suffices
    with suppress(OSError):  # who it is in its own eyes; rights on files do not follow from it
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return Confinement(("namespace",))


def _install(filter_of: Callable[..., Lines], *arguments: object) -> Confinement:
    """Install a filter of system calls."""
    if not is_known() or _prctl(PR_SET_NO_NEW_PRIVS, 1) != 0:
        return Confinement(missing=("no seccomp filter",))
    program = b"".join(struct.pack("HBBI", *line) for line in filter_of(*arguments))
    lines = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a number of 16 bits, then (aligned) a pointer
    fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(lines))
    if _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(fprog)) != 0:
        return Confinement(missing=("no seccomp filter",))
    return Confinement(("seccomp",))


def _stop_clocks() -> Confinement:
    """Take the time out of this process's memory, so that it has to be asked for by a system call;
    and have the processor refuse to count its cycles."""
    memory = ctypes.CDLL(None, use_errno=True).mmap
    memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    memory.restype = ctypes.c_void_p
    zeros = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    missing = []
    with suppress(OSError), open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        pages = [line.split()[0] for line in maps if CLOCK_PAGES in line]
        for first, last in (page.split("-") for page in pages):
            start, length = int(first, 16), int(last, 16) - int(first, 16)
            if memory(start, length, mmap.PROT_READ, zeros, -1, 0) != start:
                missing.append("the time can be read from memory")
    if _prctl(PR_SET_TSC, PR_TSC_SIGSEGV) != 0:
        missing.append("the processor's own counter can be read")
    return Confinement(missing=tuple(missing))


def _restrict_files(
    read: Sequence[Path], write: Sequence[Path], names: Sequence[Path]
) -> Confinement:
    """Have Linux refuse every file that is not below one of these paths."""
    version = landlock_version()
    if not version:
        return Confinement(missing=(NO_LANDLOCK,))
    handled = FILES_BY_VERSION[max(least for least in FILES_BY_VERSION if least <= version)]
    scoped = SCOPES if version >= 6 else 0
    fields = 1 + (version >= 4) + (version >= 6)  # files, ports, scopes: what this Linux knows
    rules = struct.pack("QQQ", handled, 0, scoped)[: 8 * fields]
    libc = _libc()
    ruleset = libc.syscall(
        LANDLOCK_CREATE, ctypes.create_string_buffer(rules, len(rules)), len(rules), 0
    )
    if ruleset < 0:
        return Confinement(missing=(NO_LANDLOCK,))
    try:
        for path in read:
            _allow(ruleset, path, (READ | EXECUTE) & handled)
        for path in write:
            _allow(ruleset, path, handled & ~NOT_WRITTEN)
        for path in names:
            _allow(ruleset, path, READ_DIR)
        if _prctl(PR_SET_NO_NEW_PRIVS, 1) or libc.syscall(LANDLOCK_RESTRICT, ruleset, 0):
            return Confinement(missing=(NO_LANDLOCK,))
    finally:
        os.close(ruleset)
    few = () if scoped else ("a Landlock before version 6 does not bound signals",)
    return Confinement((f"landlock {version}",), few)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    """Add a path to a ruleset; one that is not there is left out."""
    try:
        opened = os.open(path, O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rights &= ~0 if path.is_dir() else OF_A_FILE
        rule = struct.pack("=Qi", rights, opened)
        _libc().syscall(
            LANDLOCK_ADD, ruleset, LANDLOCK_PATH_BENEATH, ctypes.create_string_buffer(rule, 12), 0
        )
    finally:
        os.close(opened)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int, pointer: object = 0) -> int:
    result: int = _libc().prctl(option, value, pointer, 0, 0)
    return result


if __name__ == "__main__":
    tried = no_network() if sys.argv[1] == "vault" else only_files([Path("/")], [])
    print(json.dumps(tried.facts()))
