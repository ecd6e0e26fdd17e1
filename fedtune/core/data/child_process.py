"""Fork a child for each piece of work; `core/data/children.py` starts a program that calls `serve`.

This process has no network and reads no record. It ends a child on request or when the child's time
is over, and reports whether the child succeeded."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtune.core import isolation
from fedtune.core.data.children import DONE, FAILED, LENGTH, NOT_CONFINED

CLONE = {"x86_64": 56, "aarch64": 220}  # the system call that forks
PR_SET_PDEATHSIG = 1
OPEN = 3  # the exit status of a child that cannot be confined, and therefore did nothing
Work = Callable[[bytes], bytes]


def begin() -> tuple[socket.socket, dict[str, Any]]:
    """Leave every network, and return the socket on which this process is asked and its settings,
    as Children passed them in sys.argv."""
    control = socket.socket(fileno=int(sys.argv[1]))
    with suppress(OSError):  # where memory runs out, Linux ends a child before it ends the vault
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    isolation.no_network()
    return control, json.loads(sys.argv[2])


def say(control: socket.socket, kind: str, text: str = "") -> None:
    """Tell the process that asks whether this one is "ready", or that its "settings" or the
    "machine" prevent that, and why."""
    control.sendall(json.dumps({"kind": kind, "text": text}).encode() + b"\n")


def serve(control: socket.socket, work: Work, settings: Mapping[str, Any]) -> None:
    """Fork a child for each request, until the process that asks closes its end. A child reads one
    thing after another, each with its length before it, and answers each with `work`."""
    if platform.machine() not in CLONE:
        say(control, "machine", platform.machine())
        return
    say(control, "ready")
    while True:
        asked, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if not asked:
            return
        if len(descriptors) == 2:
            ended = _fork_and_wait(control, work, descriptors[0], descriptors[1], settings)
            control.sendall(ended)


def _fork_and_wait(
    control: socket.socket, work: Work, reading: int, writing: int, settings: Mapping[str, Any]
) -> bytes:
    """Run a child on these pipes to its end, and return how it ended.

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
        deadline, told = time.monotonic() + settings["seconds"], False
        while not told and (left := deadline - time.monotonic()) > 0:
            ready = dict(poll.poll(1000 * left))
            if child in ready:
                break
            told = control.fileno() in ready
        else:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(child)
    _, status = os.waitpid(pid, 0)
    control.recv(1)  # the process that asks has closed its ends
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == OPEN:
        return NOT_CONFINED
    return DONE if status == 0 else FAILED


def _child(work: Work, reading: int, writing: int, settings: Mapping[str, Any]) -> None:
    """Do one piece of work as the child, and end the process; never return."""
    code = 1
    try:
        _limit(reading, writing, settings)
        if "seccomp" not in isolation.only_computing().means:
            code = OPEN
        else:
            while (given := _read(reading)) is not None:
                answer = work(given)
                del given
                for part in (len(answer).to_bytes(LENGTH, "big"), answer):
                    rest = memoryview(part)
                    while rest:
                        rest = rest[os.write(writing, rest) :]
            code = 0
    finally:
        os._exit(code)


def _limit(reading: int, writing: int, settings: Mapping[str, Any]) -> None:
    """Close every descriptor but the two pipes and 0 to 2, and limit this process's memory, time
    and files."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    first, second = sorted((reading, writing))
    os.closerange(3, first)
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


def _read(reading: int) -> bytes | None:
    """Read what the child is given next; None if there is nothing more."""
    length = _read_bytes(reading, LENGTH)
    return _read_bytes(reading, int.from_bytes(length, "big")) if length else None


def _read_bytes(reading: int, length: int) -> bytes:
    content = bytearray()
    while len(content) < length and (part := os.read(reading, min(length - len(content), 2**20))):
        content += part
    return bytes(content)
