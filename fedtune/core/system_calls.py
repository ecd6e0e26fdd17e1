"""List Linux's system calls by name, and which of them each kind of process may make.

    vault       every call except those in NEVER; sockets only of the address families given
    courier     OF_COURIER, and no other: a call that is not listed is refused, also calls that a
                newer Linux has
    conversion  COMPUTING, and no other

A filter is a program for Linux's seccomp. It reads a call's number and the lower half of its
arguments (linux/seccomp.h), never the memory behind a pointer. Its lines (`Lines`) have the form of
linux/filter.h: (code, jump if true, jump if false, constant).

Numbers: Linux, arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import errno
import platform
import socket
from collections.abc import Collection, Sequence

Lines = list[tuple[int, int, int, int]]
Numbers = tuple[int | None, int | None]  # on x86-64 and on 64-bit ARM, which lacks some

LOAD = 0x20
MASK = 0x54
IF_EQUAL = 0x15
IF_AT_LEAST = 0x35
GIVE = 0x06
ALLOW = 0x7FFF0000
REFUSE = 0x00050000 | errno.EPERM
UNKNOWN = 0x00050000 | errno.ENOSYS  # a library then tries an older call
ZERO = 0x00050000  # "no error": the call is not made, and gives 0
CALL, MACHINE = 0, 4  # where a call's number and its machine's are read
# Offsets of the arguments of a system call.
FIRST = 16
SECOND = 24
THIRD = 32
FOURTH = 40
X32 = 0x40000000  # system calls of x86-64's other kind have this bit
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # Linux's numbers of the two

# Calls that are allowed or refused by one of their arguments.
SOCKET: Numbers = (41, 198)
SOCKETPAIR: Numbers = (53, 199)
PRLIMIT: Numbers = (302, 261)
WAIT: Numbers = (61, 260)  # wait4
# Refused to the vault, with the reason.
NEVER: dict[str, Numbers] = {
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
# The calls that a process on the network needs, and that neither tell it about other processes nor
# change anything of theirs. Left out, among others, are calls about: how full disks and memory are
# (statfs, ustat, sysinfo, quotas); watching files (inotify, fanotify); which files are in memory
# (fadvise64, mincore, cachestat, and preadv2, for which glibc calls preadv if there are no flags);
# owners and permissions of files (chmod, chown, link, utime, attributes); pages that had to be read
# (getrusage); mounts; shares of the machine (affinity, scheduling, priorities, accounting);
# keyrings. It cannot set its own limits either: some of them, such as that on a user's processes,
# count all processes of the user.
OF_COURIER: dict[str, Numbers] = {
    # files, which Landlock bounds
    **{"read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None)},
    **{"fstat": (5, 80), "lstat": (6, None), "lseek": (8, 62), "pread64": (17, 67)},
    **{"pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "access": (21, None)},
    **{"pipe": (22, None), "dup": (32, 23), "dup2": (33, None), "sendfile": (40, 71)},
    **{"flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "truncate": (76, 45)},
    **{"ftruncate": (77, 46), "getdents": (78, None), "getcwd": (79, 17), "chdir": (80, 49)},
    **{"fchdir": (81, 50), "rename": (82, None), "mkdir": (83, None), "rmdir": (84, None)},
    **{"creat": (85, None), "unlink": (87, None), "readlink": (89, None), "umask": (95, 166)},
    **{"getdents64": (217, 61), "openat": (257, 56)},
    **{"mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35)},
    **{"renameat": (264, 38), "readlinkat": (267, 78), "faccessat": (269, 48)},
    **{"fallocate": (285, 47), "dup3": (292, 24), "pipe2": (293, 59), "preadv": (295, 69)},
    **{"pwritev": (296, 70), "renameat2": (316, 276), "copy_file_range": (326, 285)},
    **{"statx": (332, 291), "close_range": (436, 436)},
    **{"faccessat2": (439, 439)},
    # waiting
    **{"poll": (7, None), "select": (23, None), "pselect6": (270, 72), "ppoll": (271, 73)},
    **{"epoll_create": (213, None), "epoll_wait": (232, None), "epoll_ctl": (233, 21)},
    **{"epoll_pwait": (281, 22), "epoll_create1": (291, 20), "epoll_pwait2": (441, 441)},
    **{"eventfd": (284, None), "eventfd2": (290, 19), "signalfd4": (289, 74)},
    **{"timerfd_create": (283, 85), "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87)},
    **{"nanosleep": (35, 101), "pause": (34, None), "futex": (202, 98)},
    **{"getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103)},
    # memory
    **{"mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214)},
    **{"mremap": (25, 216), "msync": (26, 227), "membarrier": (324, 283)},
    # itself, its threads and what it starts; Landlock bounds signals
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139)},
    **{"rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133)},
    **{"sigaltstack": (131, 132), "restart_syscall": (219, 128)},
    **{"clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435)},
    **{"execve": (59, 221), "exit": (60, 93), "exit_group": (231, 94)},
    **{"waitid": (247, 95), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)},
    **{"getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173), "getpgrp": (111, None)},
    **{"setpgid": (109, 154), "getpgid": (121, 155), "setsid": (112, 157), "getsid": (124, 156)},
    **{"getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177)},
    **{"getgroups": (115, 158), "getresuid": (118, 148), "getresgid": (120, 150)},
    **{"capget": (125, 90), "set_tid_address": (218, 96), "set_robust_list": (273, 99)},
    **{"rseq": (334, 293), "arch_prctl": (158, None), "uname": (63, 160)},
    **{"getrlimit": (97, 163)},
    **{"times": (100, 153), "sched_yield": (24, 124), "getcpu": (309, 168)},
    **{"getrandom": (318, 278), "gettimeofday": (96, 169), "time": (201, None)},
    **{"landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445)},
    **{"landlock_restrict_self": (446, 446), "seccomp": (317, 277)},
    # sockets, once one is there
    **{"connect": (42, 203), "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206)},
    **{"recvfrom": (45, 207), "sendmsg": (46, 211), "recvmsg": (47, 212), "shutdown": (48, 210)},
    **{"sendmmsg": (307, 269), "recvmmsg": (299, 243), "bind": (49, 200), "listen": (50, 201)},
    **{"getsockname": (51, 204), "getpeername": (52, 205)},
    **{"setsockopt": (54, 208), "getsockopt": (55, 209)},
}
# These calls are permitted only if one argument has one of the values: (numbers, argument, values).
ADVICE = (0, 1, 2, 3, 4, 8, 14, 15)  # madvise: of memory's use; none that marks it as broken
TERMINALS = (0x5401, 0x802C542A, 0x5413)  # ioctl: TCGETS, TCGETS2, TIOCGWINSZ
DESCRIPTORS = (0x5421, 0x541B, 0x5450, 0x5451)  # FIONBIO, FIONREAD, FIONCLEX, FIOCLEX
OWN_CLOCKS = range(16)  # the clocks of other processes have numbers below 0
OF_COURIER_IF: dict[str, tuple[Numbers, int, Collection[int]]] = {
    "ioctl": ((16, 29), SECOND, (*TERMINALS, *DESCRIPTORS)),
    # F_DUPFD to F_SETLKW, F_OFD_GETLK to F_OFD_SETLKW, F_DUPFD_CLOEXEC
    "fcntl": ((72, 25), SECOND, (*range(8), *range(36, 39), 1030)),
    "madvise": ((28, 233), THIRD, ADVICE),
    # PR_SET_PDEATHSIG and its twin, PR_GET_DUMPABLE, PR_SET_NAME and its twin, PR_GET_SECCOMP and
    # PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS and its twin, PR_SET_VMA (a name of memory)
    "prctl": ((157, 167), FIRST, (1, 2, 3, 15, 16, 21, 22, 38, 39, 0x53564D41)),
    "clock_gettime": ((228, 113), FIRST, OWN_CLOCKS),
    "clock_getres": ((229, 114), FIRST, OWN_CLOCKS),
    "clock_nanosleep": ((230, 115), FIRST, OWN_CLOCKS),
    # Of this process alone: 0 is itself.
    "sched_getaffinity": ((204, 123), FIRST, (0,)),
    "sched_getparam": ((143, 121), FIRST, (0,)),
    "sched_getscheduler": ((145, 120), FIRST, (0,)),
}
# The calls of a process that only computes. fstat is left out: it would tell a pipe's time and
# number.
COMPUTING: dict[str, Numbers] = {
    **{"read": (0, 63), "write": (1, 64), "close": (3, 57), "lseek": (8, 62)},
    **{"mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214)},
    **{"mremap": (25, 216), "restart_syscall": (219, 128)},
}
CRASHES = (4, 5, 6, 7, 8, 11)  # SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV
COMPUTING_IF: dict[str, tuple[Numbers, int, Collection[int]]] = {
    "madvise": ((28, 233), THIRD, ADVICE),
    # Linux tells the status to everybody. Only 0, or the signal of a crash, which has a handler so
    # that nothing is written into the kernel's log. The C library answers a refusal with a crash.
    "exit": ((60, 93), FIRST, (0, *CRASHES)),
    "exit_group": ((231, 94), FIRST, (0, *CRASHES)),
    # Not GRND_RANDOM: before Linux 5.6 it tells how much others took from a pool.
    "getrandom": ((318, 278), THIRD, (0, 1)),
}
# Answered with 0. A process's number says how many there were before it. The signals that a process
# blocks are shown to everybody (SigBlk in /proc/PID/status).
ANSWERED: dict[str, Numbers] = {
    **{"getpid": (39, 172), "gettid": (186, 178), "getppid": (110, 173)},
    "rt_sigprocmask": (14, 135),
}
# FUTEX_WAKE is answered with 0 too: a process with one thread has nobody to wake, but a word in a
# library's file is the same word in every process that has the file in memory, whatever else keeps
# the two apart. Other operations are refused: a wait until a time would tell whether it has come.
WAKE: Numbers = (202, 98)
WAKES = (1, 129)
KIND = 0xF  # mask of a socket's kind, without the flags beside it


def is_known() -> bool:
    """Return whether this module knows the system calls of this machine's kind of processor."""
    return platform.machine() in MACHINES


def filter_of_vault(families: Sequence[int]) -> Lines:
    """Build the filter of a vault. It permits all calls, with three exceptions: the calls in NEVER,
    sockets of other address families than those in `families`, and prlimit for another process are
    refused."""
    lines = _start()
    for numbers in NEVER.values():
        lines += _of_call(numbers, [(GIVE, 0, 0, REFUSE)])
    lines += _of_call(PRLIMIT, _if_argument(FIRST, (0,)))
    return [*lines, *_of_sockets(families), (GIVE, 0, 0, ALLOW)]


def filter_of_courier(families: Sequence[int]) -> Lines:
    """Build the filter of a courier. It permits the calls of OF_COURIER; those of OF_COURIER_IF
    with the arguments listed there; and sockets of the address families in `families`. It also
    permits prlimit to read this process's own limits, and wait4 to learn that a child ended, but
    not what the child used. A call that is not listed gets ENOSYS."""
    # prlimit only reads its own limits; wait4 tells that a child ended, not what the child used.
    further = _of_call(PRLIMIT, _if_zero(FIRST, THIRD, THIRD + 4))
    further += _of_call(WAIT, _if_zero(FOURTH, FOURTH + 4)) + _of_sockets(families)
    return _write_filter(OF_COURIER, OF_COURIER_IF, further, UNKNOWN)


def filter_of_computing() -> Lines:
    """Build the filter of a process that only computes. It permits the calls of COMPUTING, and
    those of COMPUTING_IF with the arguments listed there. Those of ANSWERED, and a call that would
    wake a thread, are answered with 0 and not made. Any other call gets EPERM."""
    answered = _of_call(WAKE, _if_argument(SECOND, WAKES, given=ZERO))
    for numbers in ANSWERED.values():
        answered += _of_call(numbers, [(GIVE, 0, 0, ZERO)])
    return _write_filter(COMPUTING, COMPUTING_IF, answered, REFUSE)


def _write_filter(
    calls: dict[str, Numbers],
    some: dict[str, tuple[Numbers, int, Collection[int]]],
    further: Lines,
    given: int,
) -> Lines:
    """Build a filter that permits the listed calls.

    - calls: the calls that are always permitted: name -> numbers
    - some: the calls that are permitted only if one argument has one of some values: name -> (the
      call's numbers, the argument, the values)
    - further: the filter's lines for other calls
    - given: what the filter decides for a call that none of these lines decides"""
    lines = _start()
    for numbers in calls.values():
        lines += _of_call(numbers, [(GIVE, 0, 0, ALLOW)])
    for numbers, argument, values in some.values():
        lines += _of_call(numbers, _if_argument(argument, values))
    return [*lines, *further, (GIVE, 0, 0, given)]


def _start() -> Lines:
    """Build a filter's first lines. They refuse calls that are made in the way of another kind of
    machine, and those of the x32 interface, and load the call's number for the lines that follow.
    (If they ended the process instead, Linux would write the call's number into its log.)"""
    return [
        (LOAD, 0, 0, MACHINE),
        (IF_EQUAL, 1, 0, MACHINES[platform.machine()]),
        (GIVE, 0, 0, REFUSE),
        (LOAD, 0, 0, CALL),
        (IF_AT_LEAST, 0, 1, X32),
        (GIVE, 0, 0, REFUSE),
    ]


def _of_call(numbers: Numbers, lines: Lines) -> Lines:
    """Build lines of a filter that apply `lines` to one system call only; [] if this machine does
    not have the call.

    - numbers: the call's number on each kind of machine; None where there is no such call
    - lines: what is decided for this call; the last line must decide"""
    number = numbers[list(MACHINES).index(platform.machine())]
    return [] if number is None else [(IF_EQUAL, 0, len(lines), number), *lines]


def _if_argument(
    argument: int, values: Collection[int], mask: int = 0, given: int = ALLOW
) -> Lines:
    """Build lines of a filter that decide a system call by one of its arguments. If the argument is
    one of `values`, the decision is `given`; otherwise the call is refused.

    - argument: where the argument stands in the call's data (FIRST, SECOND, …)
    - values: the values with which the argument is compared
    - mask: which bits of the argument are compared; 0: all
    - given: the decision if the argument is one of `values`"""
    lines: Lines = [(LOAD, 0, 0, argument)]
    if mask:
        lines.append((MASK, 0, 0, mask))
    for value in values:
        lines += [(IF_EQUAL, 0, 1, value), (GIVE, 0, 0, given)]
    return [*lines, (GIVE, 0, 0, REFUSE)]


def _if_zero(*words: int) -> Lines:
    """Build lines of a filter that allow a call if certain words of 32 bits in its arguments are
    all 0, and else refuse it. words: the position of each word in the call's data; a pointer has
    two words."""
    lines: Lines = []
    for word in words:
        lines += [(LOAD, 0, 0, word), (IF_EQUAL, 1, 0, 0), (GIVE, 0, 0, REFUSE)]
    return [*lines, (GIVE, 0, 0, ALLOW)]


def _of_sockets(families: Sequence[int]) -> Lines:
    """Build lines of a filter that allow stream and datagram sockets of the address families in
    `families`, and no other sockets. A raw socket is refused: it would give root every packet of
    the machine. Of socket pairs only streams are allowed, since each of two paired datagram sockets
    can still send to a path."""
    pairs = _if_argument(SECOND, (socket.SOCK_STREAM,), KIND)
    kinds: Lines = [
        (LOAD, 0, 0, SECOND),
        (MASK, 0, 0, KIND),
        (IF_EQUAL, 2, 0, socket.SOCK_STREAM),
        (IF_EQUAL, 1, 0, socket.SOCK_DGRAM),
        (GIVE, 0, 0, REFUSE),
    ]
    singles = [*kinds, *_if_argument(FIRST, families)]
    return _of_call(SOCKETPAIR, pairs) + _of_call(SOCKET, singles)
