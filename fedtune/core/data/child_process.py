"""The functions of a process that forks a child for each piece of work. core/data/children.py
starts that process as a program of its own, whose main function calls `begin` and `serve`.

The process has no network and reads no record. It ends a child when asked to, and tells the process
that started it how each child ended."""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import io
import itertools
import json
import logging
import operator
import os
import platform
import resource
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtune.core import isolation
from fedtune.core.data.children import DONE, ENDED, FAILED, LENGTH, NOT_CONFINED, read_line
from fedtune.core.errors import InfrastructureError
from fedtune.core.system_calls import CRASHES

CLONE = {"x86_64": 56, "aarch64": 220}  # the system call that forks
PR_SET_PDEATHSIG = 1
UNCONFINED = 3  # the exit status of a child that cannot be confined, and therefore did nothing
Work = Callable[[bytes], bytes]


def begin() -> tuple[socket.socket, dict[str, Any]]:
    """Give up this process's access to every network, and forget when it was started. Return the
    socket on which requests come, and the settings, a dict.

    `Children` passes the socket as standard input, and then sends the settings through it as a line
    of JSON. They are not on the command line, since every user of the machine can read that, and a
    setting may be a secret key."""
    control = socket.socket(fileno=0)
    logging._startTime = 0  # type: ignore[attr-defined]  # a child may not learn the time
    threading.main_thread()._native_id = 0  # type: ignore[attr-defined]  # nor a process's number
    with suppress(OSError):  # where memory runs out, Linux ends a child before it ends the vault
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    cpus = sorted(os.sched_getaffinity(0))
    with suppress(OSError):  # all children on one processor, as a child can read its number
        os.sched_setaffinity(0, {cpus[os.getppid() % len(cpus)]})
    isolation.no_network()
    return control, json.loads(read_line(control))


def say(control: socket.socket, kind: str, text: str = "") -> None:
    """Write to `control` how this process's start went.

    - control: the socket to the process that started this one
    - kind: "ready"; "settings" if the settings are refused; "machine" if no child can run here
    - text: the reason, if it is not ready"""
    control.sendall(json.dumps({"kind": kind, "text": text}).encode() + b"\n")


def serve(control: socket.socket, work: Work, settings: Mapping[str, Any]) -> None:
    """Fork a child for each request that comes on `control`, until the other side closes that
    socket. A request brings two descriptors: from one the child reads its inputs, one after the
    other, and to the other it writes `work`'s answer to each. Before each input and each answer
    stands its length.

    - control: the socket on which requests come; after each, how its child ended is written to it
    - work: a function of one input's bytes that returns the answer's bytes
    - settings: the limits of a child: "cpu_seconds" and "memory" (bytes)"""
    if platform.machine() not in CLONE:
        say(control, "machine", platform.machine())
        return
    try:
        isolation.keep_files_in_memory()
    except InfrastructureError as error:
        say(control, "machine", str(error))
        return
    say(control, "ready")
    clone = ctypes.PyDLL(None).syscall
    importlib.invalidate_caches()  # which hold when folders were changed
    isolation.hide_command_line()
    fork = functools.partial(clone, CLONE[platform.machine()], signal.SIGCHLD, 0, 0, 0, 0)
    # The loop runs in C, since Python's byte code counts how often it ran (_co_code_adaptive). It
    # holds no process's number: each is freed before the next is made, so that all turns find the
    # same free memory.
    waits = itertools.compress(itertools.repeat((-1, 0)), iter(fork, 0))
    statuses = map(operator.itemgetter(1), itertools.starmap(os.waitpid, waits))
    gc.collect()
    gc.freeze()
    gc.disable()
    with suppress(ChildProcessError):  # no process could be forked
        if not any(statuses):  # `fork` returned 0, so this is the process of a turn
            _take_turn(control, work, settings)


def _take_turn(control: socket.socket, work: Work, settings: Mapping[str, Any]) -> None:
    """Wait for one request, fork its child, report how the child ended, and end this process, which
    was forked for this turn; never return.

    The process ends because receiving descriptors and waiting leave objects and free memory behind.
    If one process served several requests, a later child could count by these traces how many
    children there were before it."""
    code = 1
    try:
        gc.enable()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        asked, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if asked:
            if len(descriptors) == 2:
                reading, writing = descriptors
                ended = _fork_and_wait(control, work, reading, writing, settings)
            else:  # this process may open no more files
                control.recv(1)
                ended = FAILED
            control.sendall(ended)
            code = 0
    finally:
        os._exit(code)


def _fork_and_wait(
    control: socket.socket, work: Work, reading: int, writing: int, settings: Mapping[str, Any]
) -> bytes:
    """Fork one child, wait until it ends, and return FAILED, DONE or NOT_CONFINED. A child that
    still runs is killed when a byte comes on `control` or its other side is closed. Arguments as
    for `serve`; the two descriptors `reading` and `writing`, the child's, are closed here.

    The system call is made directly, since the C library's fork keeps the child's number in memory,
    where the child could read it."""
    clone = ctypes.PyDLL(None).syscall
    pid = clone(CLONE[platform.machine()], signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        _child(work, reading, writing, settings)
    os.close(reading)
    os.close(writing)
    if pid < 0:
        control.recv(1)
        return FAILED
    child = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(child, select.POLLIN)
        poll.register(control, select.POLLIN)
        if child not in dict(poll.poll()):
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(child)
    _, status = os.waitpid(pid, 0)
    control.recv(1)  # the process that asks has closed its ends
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == UNCONFINED:
        return NOT_CONFINED
    return DONE if status == 0 else FAILED


def _child(work: Work, reading: int, writing: int, settings: Mapping[str, Any]) -> None:
    """Confine this new child, answer each input from `reading` with `work`, write ENDED to
    `writing`, and end the process; never return. The exit status is UNCONFINED if the child could
    not be confined. Else it is 0, also if `work` failed, since every user of the machine can see
    it."""
    code = 0
    try:
        _limit(reading, writing, settings)
        if "seccomp" not in isolation.only_computing().means:
            code = UNCONFINED
        else:
            while (given := _read(reading)) is not None:
                answer = work(given)
                del given
                for part in (len(answer).to_bytes(LENGTH, "big"), answer):
                    rest = memoryview(part)
                    while rest:
                        rest = rest[os.write(writing, rest) :]
            os.write(writing, ENDED)
    finally:
        os._exit(code)


def _limit(reading: int, writing: int, settings: Mapping[str, Any]) -> None:
    """Limit the child in which this runs: close every file descriptor except these two, bound
    memory and processor time by `settings`, forbid to write to files, and let the child end without
    a word if it crashes.

    Descriptors 0 to 2 are closed too, although they lead nowhere, since every user of the machine
    can watch how often something is written to /dev/null. What the child prints is lost. A crash
    must be silent, since Linux would write addresses in the child's memory to its log."""
    sys.stdout = sys.stderr = _Discarding()
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    for number in CRASHES:
        libc.signal(number, ctypes.cast(libc._exit, ctypes.c_void_p))
    first, second = sorted((reading, writing))
    os.closerange(0, first)
    os.closerange(first + 1, second)
    os.closerange(second + 1, max(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
    with open("/proc/self/statm", encoding="ascii") as pages:
        used = int(pages.read().split()[0]) * resource.getpagesize()
    for what, most in (
        (resource.RLIMIT_AS, used + settings["memory"]),
        (resource.RLIMIT_CPU, settings["cpu_seconds"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


class _Discarding(io.TextIOBase):
    def write(self, text: str, /) -> int:
        return len(text)


def _read(reading: int) -> bytes | None:
    """Read the child's next input from `reading`; return None when there is no further one."""
    header = os.read(reading, LENGTH)
    if not header:
        return None
    # One read returns all of it (`children._open_channels`). Neither a loop nor a buffered file
    # would do: Python's byte code counts how often it ran, and what a buffer last held stays in
    # memory.
    return os.read(reading, int.from_bytes(header, "big"))
