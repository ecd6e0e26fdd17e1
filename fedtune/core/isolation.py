"""Confine this process by what Linux offers: so that it reaches no network, sees only some files,
or can do nothing but compute.

    vault       holds the records: a network of its own, and no socket but what it inherits
    courier     speaks to the network: reads and writes the files that it is given, and no other
    conversion  runs a plug-in on one unit's rows: computes, and can do nothing else

A process is confined before it starts a thread or imports other packages than fedtune; processes
that it starts inherit this. `Confinement` says what is in force. Vault and courier then *try*
whether what must fail does fail.

| function     | what it puts in force                                                             |
|--------------|-----------------------------------------------------------------------------------|
| no_network() | a network namespace, where one can be made; seccomp: no socket at all, or Unix    |
|              | sockets alone (for the processes of a team, or a database's own socket)           |
| only_files() | Landlock: files below these paths, no signals and no abstract sockets to others;  |
|              | seccomp: no Unix sockets, by which a user bus or a container's daemon would read  |
|              | what this process may not                                                         |
| own_view()   | a root in memory with nothing in it but what is listed, where it writes too;      |
|              | process numbers of its own, and a limit of its own on how many processes run      |
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
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
CLONE_NEWNS, CLONE_NEWPID = 0x00020000, 0x20000000
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_SET_MM, PR_SET_MM_MAP = 35, 14
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
# These system calls have the same numbers on every machine.
LANDLOCK_CREATE = 444
LANDLOCK_ADD = 445
LANDLOCK_RESTRICT = 446
LANDLOCK_VERSION, LANDLOCK_PATH_BENEATH = 1, 1
EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
READ = READ_FILE | READ_DIR
FILES_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
# Rights not given where a process may write: to run a program, to make a device, socket or queue.
NOT_WRITTEN = EXECUTE | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14 | 1 << 15  # and truncate, ioctl of a device
SCOPES = 0b11  # abstract Unix sockets, signals: from version 6 on
O_PATH = 0o10000000
NO_LANDLOCK = "no Landlock"
NO_VIEW = (
    "it can fill the disk of the ledger, count the machine's processes, and see how long files are "
    "and when they were changed"
)
SMALL = 65_536  # bytes; files in a process's own folders up to this length are copied into its view
ROOT = Path("/proc")  # where a private root is built: it always exists, and nothing inside needs it
PROCESSES = 1024  # most processes and threads in a private view
IN_MEMORY = MS_NOSUID | MS_NODEV | MS_NOEXEC
OWN_DISK = "size=1g,nr_inodes=65536,mode=700"  # a disk in memory, used up as it is written
NETWORKS = (socket.AF_INET, socket.AF_INET6)
# Matches every text that a Confinement's means and reasons can hold, and no other text.
WALL = re.compile(
    r"namespace|seccomp|landlock \d{1,3}|own files|own processes|records elsewhere|no Landlock"
    r"|no (network namespace|view of its own): (unshare|mount|pivot_root|a file): \w{1,20}"
)


MADV_POPULATE_READ = 22
PR_SET_TSC, PR_TSC_SIGSEGV = 26, 2
MAP_FIXED = 0x10
MAPS = Path("/proc/self/maps")
CLOCK_PAGES = "[vvar"  # where Linux writes the time into each process's memory
# Ways in which a process that only computes may still read the time.
CLOCK_IN_MEMORY = "the time can be read from memory"
COUNTER = "the processor's own counter can be read"


@dataclass(frozen=True)
class Confinement:
    """How a process is confined.

    - means: what confines it, such as "namespace", "seccomp" and "landlock 7"
    - missing: what the process can still do and should not, in words
    - reasons: which of Linux's means is not in force and why Linux refuses it, also where nothing
      stays open because of that"""

    means: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    def facts(self) -> dict[str, list[str]]:
        """Return means, missing and reasons as a dict of lists of texts, for an event in a log."""
        return {name: list(words) for name, words in vars(self).items()}

    def __and__(self, other: Confinement) -> Confinement:
        return Confinement(
            self.means + other.means, self.missing + other.missing, self.reasons + other.reasons
        )


def describe(walls: Sequence[str]) -> str:
    """Return how a half of a site is confined, as one text for people; "NOT CONFINED" if `walls` is
    empty. walls: what confines it (`Confinement.means`), possibly followed by the reasons why
    other means of confinement are not in force (`Confinement.reasons`)."""
    return ", ".join(walls) or "NOT CONFINED"


def no_network(sockets: Iterable[int] = ()) -> Confinement:
    """Cut this process off every network, and return what is in force. Raw sockets and the system
    calls in system_calls.NEVER (such as ptrace and io_uring) are refused too.

    sockets: the families of sockets that the process may still open, such as AF_UNIX. If AF_INET is
    one of them, for a database over TCP, the process stays on the network; `missing` of the result
    says so.
    Errors: InfrastructureError if threads already run, which would not be confined."""
    families = sorted({int(family) for family in sockets})
    _check_alone()
    if socket.AF_INET in families:
        spaces = Confinement(missing=("a database over TCP keeps it on the network",))
    else:
        spaces = _enter_own_network()
    _forbid_inspection()
    return spaces & _install(filter_of_vault, families)


@functools.cache
def try_confinement() -> tuple[Confinement, Confinement]:
    """Find out which confinement this machine supports, by confining two processes that are started
    for this. Return two results: that of a site's vault, and that of its courier."""
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
        found.append(Confinement(**{name: tuple(words) for name, words in told.items()}))
    return found[0], found[1]


def only_files(
    read: Iterable[Path], write: Iterable[Path], names: Iterable[Path] = ()
) -> Confinement:
    """Restrict this process to the files below some paths, and to sockets of the internet families.
    Return what is in force.

    - read: files and folders that it may read and run
    - write: files and folders that it may read and write
    - names: folders in which it may list the names of files, but read no file

    Errors: InfrastructureError if threads already run, which would not be confined."""
    _check_alone()
    _forbid_inspection()
    of_files = _restrict_files(list(read), list(write), list(names))
    return of_files & _install(filter_of_courier, NETWORKS)


def own_view(shown: Iterable[Path], own: Sequence[Path]) -> Confinement:
    """Give this process a private view of the machine, and return what is in force. The process
    sees only the files and folders `shown` and the folders `own`. The folders `own` are in memory:
    no other process sees what this one writes there, and these files are lost when it ends.
    Processes have other numbers than outside, and this one sees only itself and those that it
    starts. If Linux refuses, `missing` says what stays open.

    The length of a file and the time of its last change, the free space of a disk and the numbers
    of processes depend on what else the machine does: at a site, on records. A process that can
    write on the ledger's disk could also fill that disk while a request is answered.

    The work continues in a child process, at "/"; this process waits for the child, passes signals
    on, and ends with its status. Small files of the folders `own` are copied into the view. Call
    this before `only_files`. Errors: InfrastructureError if threads already run."""
    _check_alone()
    kept = {folder: _files_in(folder) for folder in own}
    if refused := _unshare(CLONE_NEWNS | CLONE_NEWPID):
        return Confinement(missing=(NO_VIEW,), reasons=(f"no view of its own: {refused}",))
    try:
        _go_to_own_root(shown, kept)
    except OSError as error:
        _libc().umount2(bytes(ROOT), MNT_DETACH)
        call = error.strerror if error.strerror in ("mount", "pivot_root") else "a file"
        why = f"no view of its own: {call}: {_name_of(error.errno)}"
        return Confinement(missing=(NO_VIEW,), reasons=(why,))
    finally:
        _go_on_in_a_child()
    _bound_processes()
    return Confinement(("own files", "own processes"))


def only_computing() -> Confinement:
    """Restrict this process to its memory, to the descriptors that it has open, and to ending
    itself. Return what is in force; if the restriction holds, "seccomp" is among the means.

    It can open no file or socket, start no process or thread, signal no process, and learn neither
    its own number nor the time. So its results depend only on its memory and on what it reads from
    open descriptors. A thread that runs already is not confined. The restriction is not made if the
    process could still read the time from memory or from the processor's counter. Only on 64-bit
    ARM is it made although the counter can be read, since Linux cannot prevent this before 6.12."""
    stopped = _stop_clocks()
    readable = {CLOCK_IN_MEMORY} | ({COUNTER} if platform.machine() == "x86_64" else set[str]())
    if not readable.isdisjoint(stopped.missing):
        return stopped
    _forbid_inspection()
    return stopped & _install(filter_of_computing)


def hide_command_line() -> bool:
    """Empty the command line and the environment that Linux shows of this process and of those that
    it forks. Return whether it worked; it does not if Linux is built without
    CONFIG_CHECKPOINT_RESTORE.

    Everybody may read /proc/PID/cmdline, and Linux reads it from the process's own memory, which
    the process can overwrite."""
    libc = _libc()
    libc.sbrk.restype = ctypes.c_void_p
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    # Numbers of the fields in proc_pid_stat(5); the third is the first after the name.
    code, code_end, stack, data, data_end, heap, arguments = (
        int(fields[number - 3]) for number in (26, 27, 28, 45, 46, 47, 48)
    )
    memory = struct.pack(  # struct prctl_mm_map, linux/prctl.h; 2³² - 1: the same program's file
        "11QQII",
        *(code, code_end, data, data_end, heap, libc.sbrk(0), stack),
        *(arguments, arguments, arguments, arguments),
        *(0, 0, 2**32 - 1),
    )
    # The last argument but one is a length, which _prctl does not have.
    return not libc.prctl(PR_SET_MM, PR_SET_MM_MAP, memory, len(memory), 0)


def keep_files_in_memory() -> None:
    """Read every page of the files that are mapped into this process's memory, such as libraries,
    and keep these pages mapped. As long as they are mapped, another process cannot have Linux drop
    them from memory. Otherwise it could see which of them are read in again, and so which of them a
    forked process uses. Before Linux 5.14 nothing is done. If memory is short, Linux may still drop
    such pages.

    Errors: InfrastructureError if there is too little memory to read them."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        # address, permissions, offset, device, inode, path: proc_pid_maps(5)
        span, permissions, _, _, inode, *_ = line.split(maxsplit=5)
        if permissions.startswith("r") and inode != "0":
            first, last = (int(end, 16) for end in span.split("-"))
            failed = madvise(first, last - first, MADV_POPULATE_READ)
            # What lies behind a file's end cannot be read, and fails with another error.
            if failed and ctypes.get_errno() == errno.ENOMEM:
                raise InfrastructureError(
                    "too little memory to keep in it the libraries that decode files",
                    "memory for all of their pages",
                    "free memory on this machine",
                )


def landlock_version() -> int:
    """Return the version of Landlock that this machine supports; 0 for none."""
    version = int(_libc().syscall(LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION))
    return max(version, 0)


# ---------------------------------------------------------------------------------------- parts


def _check_alone() -> None:
    """Check that this process has a single thread, since others would not be confined. Errors:
    InfrastructureError."""
    with suppress(FileNotFoundError):  # no /proc: the calls themselves refuse what they can
        if len(os.listdir("/proc/self/task")) > 1:
            raise InfrastructureError(
                "this process has several threads, of which only one would be confined",
                "a process with one thread",
            )


def _forbid_inspection() -> None:
    """Keep other processes of this user from reading this one's memory, and forbid core dumps."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(PR_SET_DUMPABLE, 0)


def _enter_own_network() -> Confinement:
    """Move this process into a network namespace of its own, in which no network device is up.
    Return the namespace as what confines it or, if Linux refuses, the reason."""
    # Where containers forbid it, the filter alone suffices.
    if refused := _unshare(CLONE_NEWNET):
        return Confinement(reasons=(f"no network namespace: {refused}",))
    return Confinement(("namespace",))


def _unshare(spaces: int) -> str:
    """Move this process into new namespaces. If its user is not root, or root is refused this, it
    also moves into a user namespace. Return "" or, if Linux refuses, the reason. spaces: which
    namespaces, as flags CLONE_… combined by |."""
    user, group = os.getuid(), os.getgid()
    libc = _libc()
    if user == 0 and libc.unshare(spaces) == 0:
        return ""
    if libc.unshare(CLONE_NEWUSER | spaces) != 0:
        return f"unshare: {_name_of(ctypes.get_errno())}"
    with suppress(OSError):  # who it is in its own eyes; rights on files do not follow from it
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return ""


def _bound_processes() -> None:
    """Limit how many processes this process and its children may start. Without a limit of its own
    a process could count how many it can still start, and so find out how many other processes run
    on the machine.

    There is a limit from Linux 5.14 on, where Linux counts the processes of a user namespace by
    themselves. Root has none."""
    release = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
    if os.getuid() != 0 and release >= (5, 14):
        most = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        most = PROCESSES if most == resource.RLIM_INFINITY else min(most, PROCESSES)
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))


def _go_to_own_root(shown: Iterable[Path], own: Mapping[Path, Mapping[str, bytes]]) -> None:
    """Build a new root of the file system in memory, make it this process's root, and detach the
    old one.

    - shown: files and folders of the old root that stay visible
    - own: the new folders in memory -> the files in each, by name

    Errors: OSError."""
    _mount(None, Path("/"), None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", ROOT, "tmpfs", IN_MEMORY, OWN_DISK)  # which hides what is not needed any more
    there: list[Path] = []
    for path in shown:
        target = None
        with suppress(PermissionError):  # in a folder that this user may not pass
            target = _place(path, there) if path not in own else None
        if target:
            _mount(str(there[-1]), target, None, MS_BIND | MS_REC)
    for folder, files in own.items():
        if not (inside := _place(folder, [])):
            why = "a path for a folder in memory leads to nothing, or to what is mounted already"
            raise FileNotFoundError(errno.ENOENT, why, str(folder))
        _mount("tmpfs", inside, "tmpfs", IN_MEMORY, OWN_DISK)
        for name, content in files.items():
            (inside / name).write_bytes(content)
    os.chdir(ROOT)
    if _libc().pivot_root(b".", b".") or _libc().umount2(b".", MNT_DETACH):
        raise OSError(ctypes.get_errno(), "pivot_root")


def _place(path: Path, there: list[Path]) -> Path | None:
    """Make, below ROOT, an empty file or folder at which `path` can be mounted, and every link that
    leads to it; return its path. Return None if `path` leads to nothing, or is or lies below a path
    that is mounted already. there: the paths that are mounted already; the path to which `path`
    leads is added.
    Errors: OSError."""
    found, left = Path("/"), list(path.absolute().parts[1:])
    while left:
        here = Path(os.path.normpath(found / left.pop(0)))
        if not here.is_symlink():
            found = here
            continue
        leads = Path(os.readlink(here))
        if not any(map(here.is_relative_to, there)):
            link = ROOT / here.relative_to("/")
            link.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                link.symlink_to(leads)
        left = [*leads.parts[leads.is_absolute() :], *left]
        found = Path("/") if leads.is_absolute() else found
    if not found.exists() or any(map(found.is_relative_to, there)):
        return None
    target = ROOT / found.relative_to("/")
    if found.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    there.append(found)
    return target


def _mount(source: str | None, target: Path, kind: str | None, flags: int, data: str = "") -> None:
    """Mount a file system in this process's own namespace, by mount(2).

    - source: the path to mount, or a name for a file system that has no source; None where mount(2)
      ignores it
    - target: the folder or file at which it is mounted
    - kind: the file system's type, such as "tmpfs"; None where mount(2) ignores it, as with MS_BIND
    - flags: constants MS_… of this module, combined by |
    - data: options of the file system, separated by commas; "" for none

    Errors: OSError, whose text is "mount"."""
    words = [word.encode() if word else None for word in (source, str(target), kind)]
    if _libc().mount(*words, ctypes.c_ulong(flags), data.encode() or None):
        raise OSError(ctypes.get_errno(), "mount", str(target))


def _files_in(folder: Path) -> dict[str, bytes]:
    """Return the small files in a folder, such as certificates, as a dict: name -> content. Longer
    files, such as logs, are left out. So are links, which may lead to files that are to be hidden.
    """
    with suppress(OSError):
        files = (path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
        return {path.name: path.read_bytes() for path in files if path.stat().st_size <= SMALL}
    return {}


def _go_on_in_a_child() -> None:
    """Fork, and return only in the child, which is the first process of a new namespace. The parent
    waits for the child, passes signals on, and ends with its status. If the parent is killed, so is
    the child.

    The parent blocks signals and takes them by sigwait, one after another. If it called a plain
    wait instead, a Python handler of a signal that came just before the wait would run only when
    the wait is over. The kernel drops a signal for which a namespace's first process has no
    handler. So the child has one for each of these signals from the start: if it inherited none,
    one that ends the child."""
    passed_on = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as it may be inherited, it never comes
    before = signal.pthread_sigmask(signal.SIG_BLOCK, passed_on | {signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in passed_on:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, lambda number, _: os._exit(128 + number))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # what the child inherits ends with the child
    ended, status = 0, 0
    while not ended:  # SIGCHLD comes when the child is stopped, too
        arrived = signal.sigwait(passed_on | {signal.SIGCHLD})
        if arrived == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
        else:
            os.kill(child, arrived)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code != signal.SIGKILL:  # which has no handler to reset
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
    os._exit(abs(code))


def _install(filter_of: Callable[..., Lines], *arguments: object) -> Confinement:
    """Install a filter of system calls in this process. Return what is in force: "seccomp" among
    the means, or that it is missing. filter_of: the function that makes the filter's program from
    `arguments`."""
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
    """Make the time unreadable without a system call: remove the pages of memory in which Linux
    writes it, and make the processor refuse to read its cycle counter. Return what could not be
    done (`missing`)."""
    memory = ctypes.CDLL(None, use_errno=True).mmap
    memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    memory.restype = ctypes.c_void_p
    zeros = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    missing = []
    try:
        maps = MAPS.read_text(encoding="ascii", errors="replace").splitlines()
        pages = [line.split()[0] for line in maps if CLOCK_PAGES in line]
        for first, last in (page.split("-") for page in pages):
            start, length = int(first, 16), int(last, 16) - int(first, 16)
            if memory(start, length, mmap.PROT_READ, zeros, -1, 0) != start:
                missing.append(CLOCK_IN_MEMORY)
    except OSError:  # nobody can say where these pages are
        missing.append(CLOCK_IN_MEMORY)
    if _prctl(PR_SET_TSC, PR_TSC_SIGSEGV) != 0:
        missing.append(COUNTER)
    return Confinement(missing=tuple(missing))


def _restrict_files(
    read: Sequence[Path], write: Sequence[Path], names: Sequence[Path]
) -> Confinement:
    """Make Linux (Landlock) refuse this process every file except those below some paths. Return
    what is in force.

    - read: files and folders that it may read and run
    - write: files and folders that it may read and write
    - names: folders in which it may list the names of files"""
    version = landlock_version()
    if not version:
        return Confinement(missing=(NO_LANDLOCK,), reasons=(NO_LANDLOCK,))
    handled = FILES_BY_VERSION[max(least for least in FILES_BY_VERSION if least <= version)]
    scoped = SCOPES if version >= 6 else 0
    fields = 1 + (version >= 4) + (version >= 6)  # files, ports, scopes: what this Linux knows
    rules = struct.pack("QQQ", handled, 0, scoped)[: 8 * fields]
    libc = _libc()
    ruleset = libc.syscall(
        LANDLOCK_CREATE, ctypes.create_string_buffer(rules, len(rules)), len(rules), 0
    )
    if ruleset < 0:
        return Confinement(missing=(NO_LANDLOCK,), reasons=(NO_LANDLOCK,))
    try:
        for path in read:
            _allow(ruleset, path, (READ | EXECUTE) & handled)
        for path in write:
            _allow(ruleset, path, handled & ~NOT_WRITTEN)
        for path in names:
            _allow(ruleset, path, READ_DIR)
        if _prctl(PR_SET_NO_NEW_PRIVS, 1) or libc.syscall(LANDLOCK_RESTRICT, ruleset, 0):
            return Confinement(missing=(NO_LANDLOCK,), reasons=(NO_LANDLOCK,))
    finally:
        os.close(ruleset)
    few = () if scoped else ("a Landlock before version 6 does not bound signals",)
    return Confinement((f"landlock {version}",), few)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    """Add to a ruleset of Landlock that files below `path` may be used; nothing is added if the
    path does not exist.

    - ruleset: the ruleset's descriptor
    - rights: what is allowed below the path, as Landlock's flags"""
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


def _name_of(error: int | None) -> str:
    """Return the name of one of Linux's error numbers, such as "EPERM"; "unknown" for None and for
    any number without a name."""
    return errno.errorcode.get(error or 0, "unknown")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int, pointer: object = 0) -> int:
    result: int = _libc().prctl(option, value, pointer, 0, 0)
    return result


if __name__ == "__main__":
    vault = sys.argv[1] == "vault"
    tried = no_network() if vault else own_view([], []) & only_files([Path("/")], [])
    print(json.dumps(tried.facts()))
