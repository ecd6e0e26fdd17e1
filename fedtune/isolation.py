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
import errno
import functools
import json
import mmap
import os
import platform
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedtune import boot
from fedtune.errors import InfrastructureError

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
# A line of a filter (linux/filter.h, linux/seccomp.h): what it does, and what it gives.
LOAD, MASK, IF_EQUAL, IF_AT_LEAST, GIVE = 0x20, 0x54, 0x15, 0x35, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
ZERO = 0x00050000  # "no error": the call is not made, and gives 0
CALL, MACHINE, FIRST, SECOND = 0, 4, 16, 24  # where a call's number and first arguments are read
NO_LANDLOCK = "no Landlock"
NETWORKS = (socket.AF_INET, socket.AF_INET6)


@dataclass(frozen=True)
class _Machine:
    """audit: Linux's number of the machine's system calls; calls: their numbers by name."""

    audit: int
    calls: dict[str, int]


# By name: the call's number on x86-64 and on 64-bit ARM, and why it is refused to both halves.
NEVER = {
    "ptrace": (101, 117),  # another process's memory, and its descriptors
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "io_uring_setup": (425, 425),  # its operations pass by this filter
    "setns": (308, 268),  # back into the network that was left
    "unshare": (272, 97),
    "mount": (165, 40),  # other files under a path that is allowed
    "bpf": (321, 280),  # code in the kernel
    "perf_event_open": (298, 241),
    "init_module": (175, 105),
    "finit_module": (313, 273),
}
# And to the half that speaks to the network; 64-bit ARM has not all of them. How full disks and
# memory are follows from what the other half holds. (It may read nothing of /proc and /sys.)
OF_FULLNESS = {
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "sysinfo": (99, 179),
    "quotactl": (179, 60),
}
# Landlock does not rule who may read a file, whose it is and what else stands beside its content:
# the user's own files would be opened to every account of the machine.
OF_OTHERS_FILES = {
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54)},
    **{"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7)},
    **{"removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16)},
    **{"utime": (132, None), "utimes": (235, None), "futimesat": (261, None)},
    **{"utimensat": (280, 88), "link": (86, None), "linkat": (265, 37)},
    **{"open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430)},
    **{"fsconfig": (431, 431), "fsmount": (432, 432), "mount_setattr": (442, 442)},
}
# The other half's share of the machine, and what else is asked about a process by its number.
OF_PROCESSES = {
    **{"sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119)},
    **{"sched_setparam": (142, 118), "sched_setattr": (314, 274), "setpriority": (141, 140)},
    **{"ioprio_set": (251, 30), "process_madvise": (440, 440), "kcmp": (312, 272)},
    **{"pidfd_open": (434, 434), "move_pages": (279, 239), "migrate_pages": (256, 238)},
    **{"userfaultfd": (323, 282), "kexec_load": (246, 104), "reboot": (169, 142)},
}
OF_COURIER = (*NEVER, *OF_FULLNESS, *OF_OTHERS_FILES, *OF_PROCESSES)
ASKED = {"socket": (41, 198), "socketpair": (53, 199), "prlimit64": (302, 261)}
MACHINES = {
    machine: _Machine(
        audit, {name: call for name, of in calls.items() if (call := of[which]) is not None}
    )
    for which, machine, audit in ((0, "x86_64", 0xC000003E), (1, "aarch64", 0xC00000B7))
    for calls in (
        dict[str, tuple[int | None, int | None]](
            {**NEVER, **OF_FULLNESS, **OF_OTHERS_FILES, **OF_PROCESSES, **ASKED}
        ),
    )
}
X32 = 0x40000000  # system calls of x86-64's other kind have this bit
# What a process that only computes may ask of Linux, by name: on x86-64 and on 64-bit ARM.
COMPUTING = {
    **{"read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62)},
    **{"mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214)},
    **{"mremap": (25, 216), "madvise": (28, 233), "futex": (202, 98), "getrandom": (318, 278)},
    **{"rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132)},
    **{"exit": (60, 93), "exit_group": (231, 94), "restart_syscall": (219, 128)},
}
# Answered with 0: a process's number says how many there were before it.
NAMELESS = {"getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173)}
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
    return spaces & _filter_calls(families)


@functools.cache
def available() -> tuple[Confinement, Confinement]:
    """Try what this machine gives a vault and a courier, each in a process of its own."""
    found = []
    for half in ("vault", "courier"):
        command = boot.command("fedtune.isolation", half)
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
    return of_files & _filter_calls(NETWORKS, OF_COURIER)


def only_computing() -> Confinement:
    """Leave this process its memory, the descriptors that it has open, and its own end.

    It opens no file or socket, starts no process or thread, signals nobody, and learns neither its
    own number nor the time: what it computes follows from its memory and what it reads. A thread
    that runs already is not confined. "seccomp" is among the means if it holds."""
    stopped = _stop_clocks()
    _close_itself()
    machine = MACHINES.get(platform.machine())
    if machine is None:
        return Confinement(missing=("no seccomp filter",))
    which = list(MACHINES).index(platform.machine())
    calls = {numbers[which]: ALLOW for numbers in COMPUTING.values()}
    calls |= {numbers[which]: ZERO for numbers in NAMELESS.values()}
    checks = _checks_of_the_machine(machine)
    for number, given in calls.items():
        checks += [(IF_EQUAL, 0, 1, number), (GIVE, 0, 0, given)]
    return stopped & _install([*checks, (GIVE, 0, 0, REFUSE)])


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


def _filter_calls(families: Sequence[int], refused: Sequence[str] = tuple(NEVER)) -> Confinement:
    """Have Linux refuse sockets of other families than these, and the calls `refused`."""
    machine = MACHINES.get(platform.machine())
    if machine is None:
        return Confinement(missing=("no seccomp filter",))
    return _install(_program(machine, families, refused))


def _install(checks: Sequence[tuple[int, int, int, int]]) -> Confinement:
    """Install a filter of system calls: (code, jump if true, jump if false, constant) a line."""
    if _prctl(PR_SET_NO_NEW_PRIVS, 1) != 0:
        return Confinement(missing=("no seccomp filter",))
    program = b"".join(struct.pack("HBBI", *line) for line in checks)
    lines = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a number of 16 bits, then (aligned) a pointer
    fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(lines))
    if _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(fprog)) != 0:
        return Confinement(missing=("no seccomp filter",))
    return Confinement(("seccomp",))


def _checks_of_the_machine(machine: _Machine) -> list[tuple[int, int, int, int]]:
    """Write a filter's first lines: calls of another machine are refused, and the call's number is
    loaded."""
    return [
        (LOAD, 0, 0, MACHINE),
        (IF_EQUAL, 1, 0, machine.audit),
        (GIVE, 0, 0, KILL),
        (LOAD, 0, 0, CALL),
        (IF_AT_LEAST, 0, 1, X32),
        (GIVE, 0, 0, REFUSE),
    ]


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


def _program(
    machine: _Machine, families: Sequence[int], refused: Sequence[str]
) -> list[tuple[int, int, int, int]]:
    """Write the filter of a vault or a courier.

    A pair of datagram sockets can still send to a path, so pairs are of streams."""
    checks = _checks_of_the_machine(machine)
    for name in refused:
        if name in machine.calls:
            checks += [(IF_EQUAL, 0, 1, machine.calls[name]), (GIVE, 0, 0, REFUSE)]
    # Limits of this process alone: 0 is itself.
    checks += [(IF_EQUAL, 0, 4, machine.calls["prlimit64"]), (LOAD, 0, 0, FIRST)]
    checks += [(IF_EQUAL, 0, 1, 0), (GIVE, 0, 0, ALLOW), (GIVE, 0, 0, REFUSE)]
    checks += [
        (IF_EQUAL, 0, 5, machine.calls["socketpair"]),
        (LOAD, 0, 0, SECOND),
        (MASK, 0, 0, 0xF),  # the kind, without the flags beside it
        (IF_EQUAL, 0, 1, socket.SOCK_STREAM),
        (GIVE, 0, 0, ALLOW),
        (GIVE, 0, 0, REFUSE),
        (IF_EQUAL, 0, 2 * len(families) + 2, machine.calls["socket"]),
        (LOAD, 0, 0, FIRST),
    ]
    for family in families:
        checks += [(IF_EQUAL, 0, 1, family), (GIVE, 0, 0, ALLOW)]
    return [*checks, (GIVE, 0, 0, REFUSE), (GIVE, 0, 0, ALLOW)]


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
