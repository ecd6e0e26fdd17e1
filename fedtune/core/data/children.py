"""Do pieces of work, each in a child process that can only compute and that ends afterwards.

    this process ── a socket and a pipe ──> a program that forks ──> a child for each piece of work

The program that forks is started anew, without this process's memory, and reads no record. A child
is confined before its work starts (isolation.only_computing), and its memory and time are limited.

Guarantee: what a child answers depends only on what it was given and on public settings. Neither
memory nor a file, a process, a clock or a count passes from one child to another. If anything goes
wrong in a child, only its own piece of work fails (docs/guarantee.md says what is not covered). How
many children run follows from the site's declared size, unless there are more pieces of work than
the declared size plus a quarter of it (`count_children`)."""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from fedtune.core import boot
from fedtune.core.errors import (
    ConfigError,
    FedtuneError,
    InfrastructureError,
    describe,
    escape_controls,
)

log = logging.getLogger("fedtune.data")
SECONDS = 120.0  # longest life of a child, which may wait in vain
MEMORY = 2**30  # bytes of address space that a child may add
START_SECONDS = 600.0  # time for the program that forks to become ready
SAID = 300  # characters shown of an error about settings, before a record is read
MACHINE = (
    "Linux on x86-64 or 64-bit ARM, where a seccomp filter can be installed and a process can be "
    "kept from reading the time"
)
LENGTH = 8  # bytes, big-endian, before each thing that passes through a pipe
ENDED = b"."  # what a child writes once it has answered everything
FAILED, DONE, NOT_CONFINED = b"1", b"0", b"m"  # what the program that forks says of a child's end
T = TypeVar("T")


class ChildFailed(Exception):
    """A child's work failed; the error says nothing about what the child was given."""


class NotConfined(ChildFailed):
    """The child did nothing, since this machine cannot confine it."""


class _ProgramEnded(Exception):
    """The program that forks ended before the child had answered anything."""


class Children:
    """Runs child processes, one after another, which work on a site's records. It is used in a
    `with` block: at the start a program is started that forks the children, and at the end it is
    stopped.

    - program: the module of the program that forks; it calls child_process.serve
    - settings: what the program needs to know; they are passed to it as JSON,
      on a socket that no other account can read
    - what: for error messages, the setting or the kind of file that the children work for
    - otherwise: for error messages, what a person can do if this machine cannot confine a child
    - cpu_seconds: the most processor time of one child
    - seconds: the most time from a child's start to its end, so that a child that waits in vain is
      ended; None: SECONDS. The time that `take` needs to read the answers (see `run`) does not
      count
    - declared_size: the site's declared size if its whole dataset is read, else 0. At the end of
      the block, children without work are run until as many have run as `count_children` returns

    Errors, before anything is given to a child: ConfigError if the program refuses its settings;
    InfrastructureError if this machine cannot confine a child."""

    def __init__(
        self,
        program: str,
        settings: Mapping[str, object],
        *,
        what: str,
        otherwise: str,
        cpu_seconds: int,
        seconds: float | None = None,
        declared_size: int = 0,
    ) -> None:
        self._program, self._settings = program, dict(settings)
        self._what, self._otherwise = what, otherwise
        self._cpu_seconds, self._declared_size = cpu_seconds, declared_size
        self._seconds = seconds
        self._forked = 0  # children that were given work
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._run_idle_children()
        self._stop()

    def run(
        self, given: Sequence[bytes], most: int, take: Callable[[bytes], T], *, counts: bool = True
    ) -> list[T]:
        """Fork a child, give it the inputs `given` one after another, and return a list of what
        `take` makes of each answer, once the child has ended well.

        - given: the child's inputs; each is fetched only after `take` has read the answer before it
        - most: the most bytes that an answer may have
        - take: a function that reads an answer's bytes, which are not trusted
        - counts: whether this child had work, and so counts towards `count_children`

        If the program that forks was killed before the child answered, for want of memory or while
        it waited for work, it is started again, and the work is tried once more. Errors:
        ChildFailed if the child fails, is too slow, or gives too long an answer; also whatever
        `take` raises, after the child has ended."""
        self._forked += counts
        try:
            return self._run_once(given, most, take)
        except _ProgramEnded:
            pass
        try:
            return self._run_once(given, most, take)
        except _ProgramEnded:
            raise ChildFailed from None

    def _run_once(self, given: Sequence[bytes], most: int, take: Callable[[bytes], T]) -> list[T]:
        """Do what `run` does, once. Errors: also _ProgramEnded."""
        if self._control is None:  # the program that forks was killed, for want of memory
            try:
                self._start()
            except FedtuneError as error:
                log.error("%s", describe(error))
                raise ChildFailed from None
        assert self._control is not None
        there, back = _open_channels()
        left = self._seconds or SECONDS
        self._control.settimeout(left)
        taken: list[T] = []
        try:
            socket.send_fds(self._control, [b"?"], [there.reading, back.writing])
            there.close_reading()
            back.close_writing()
            try:
                for content in given:
                    asked = time.monotonic()
                    answer = _ask(there.writing, back.reading, content, most, asked + left)
                    left -= time.monotonic() - asked
                    taken.append(take(answer))
                there.close()  # so that the child ends
                is_whole = _read(back.reading, 2, time.monotonic() + left) == ENDED
            except ChildFailed:
                is_whole = False
            finally:
                there.close()
                back.close()
                self._control.sendall(b".")  # ends a child that still runs
                ended = self._control.recv(1)
            if not ended:
                raise OSError
        except OSError:
            log.warning("the process that forks children ended; it is started again")
            self._stop()
            raise (ChildFailed if taken else _ProgramEnded) from None
        finally:
            there.close()
            back.close()
        if ended == NOT_CONFINED:
            raise NotConfined
        if not is_whole or ended != DONE:
            raise ChildFailed
        return taken

    def _run_idle_children(self) -> None:
        """Run children without work until as many have run as `count_children` returns, so that
        their number does not tell how many units there are."""
        if self._forked > count_children(0, self._declared_size) > 0:
            log.warning(
                "there are more units than site.declared_size allows for, so that the number of "
                "processes that work on them reveals this; to do: declare a larger round figure"
            )
        for _ in range(count_children(self._forked, self._declared_size) - self._forked):
            with suppress(ChildFailed, OSError):
                self.run([b""], SAID, bytes, counts=False)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        limits = {"cpu_seconds": self._cpu_seconds, "memory": MEMORY}
        with theirs:
            self._process = subprocess.Popen(
                boot.command(self._program),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
            )
        self._control = ours
        ours.settimeout(START_SECONDS)
        try:
            ours.sendall(json.dumps({**self._settings, **limits}).encode() + b"\n")
            told = json.loads(read_line(ours))
        except (OSError, ValueError):
            told = {"kind": "machine", "text": "the process that forks children did not start"}
        if told["kind"] == "ready":
            told = self._try()
        if told["kind"] == "ready":
            return
        self._stop()
        text = escape_controls(str(told["text"]))[:SAID]
        if told["kind"] == "machine":
            raise InfrastructureError(
                f"{self._what} cannot be confined here ({text})", MACHINE, self._otherwise
            )
        raise ConfigError(text)

    def _try(self) -> dict[str, str]:
        """Fork a child with an empty input, before anything private is read, to see whether it
        works. Return {"kind": ..., "text": ...}: kind is "ready", "settings" (these are refused) or
        "machine" (it cannot confine a child), and text is the reason."""
        try:
            (told,) = self._run_once([b""], 2**16, json.loads)
            return {"kind": str(told["kind"]), "text": str(told.get("text", ""))}
        except NotConfined:
            return {"kind": "machine", "text": "no seccomp filter"}
        except _ProgramEnded:
            return {"kind": "machine", "text": "the process that forks children ended"}
        except (ChildFailed, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {"kind": "settings", "text": f"{self._what} cannot be imported"}

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._control, self._process = None, None


def count_children(pieces: int, declared_size: int) -> int:
    """Return how many children to run if there are `pieces` units to work on: the declared size
    plus a quarter of it, doubled until it is at least `pieces`. So up to the declared size plus a
    quarter, the number of children does not tell how many units there are.

    >>> count_children(0, 200), count_children(250, 200), count_children(251, 200)
    (250, 250, 500)

    If declared_size is 0, since not all of a site's records are read, the result is `pieces`."""
    children = declared_size + declared_size // 4
    while 0 < children < pieces:
        children *= 2
    return children or pieces


class _Channel:
    """A channel for bytes from one process to another, as the descriptors of its two ends. Closing
    an end that is closed already does nothing."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing

    def close_reading(self) -> None:
        if self.reading >= 0:
            os.close(self.reading)
            self.reading = -1

    def close_writing(self) -> None:
        if self.writing >= 0:
            os.close(self.writing)
            self.writing = -1

    def close(self) -> None:
        self.close_reading()
        self.close_writing()


def _open_channels() -> tuple[_Channel, _Channel]:
    """Open a channel to a child, and one back from it. Errors: OSError if this process may not open
    so many files; then none is left open.

    The first channel is a socket, since a pipe's reader gets whatever is there: in which parts its
    input came would tell the child how busy the machine was. A read from this socket returns only
    when all bytes that it asks for are there, or the other end is closed (socket(7),
    SO_RCVLOWAT)."""
    reading, writing = socket.socketpair()
    with reading, writing:
        reading.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2**31 - 1)
        reading.shutdown(socket.SHUT_WR)
        back = _Channel(*os.pipe())
        return _Channel(reading.detach(), writing.detach()), back


def _ask(writing: int, reading: int, given: bytes, most: int, deadline: float) -> bytes:
    """Write one input to a child, and return the child's answer to it.

    - writing, reading: this process's ends of the channels to the child and back from it
    - most: the most bytes that the answer may have
    - deadline: when the answer must be there, in seconds of time.monotonic

    Errors: ChildFailed if the answer is too long, comes too late or is not whole."""
    os.set_blocking(writing, False)
    poll = select.poll()
    poll.register(writing, select.POLLOUT)
    for part in (len(given).to_bytes(LENGTH, "big"), given):
        rest = memoryview(part)
        while rest:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                raise ChildFailed
            try:
                rest = rest[os.write(writing, rest[:65536]) :]
            except BlockingIOError:
                continue
            except ConnectionError:  # the child answers, or fails, without having read all of it
                break
    header = _read(reading, LENGTH, deadline)
    length = int.from_bytes(header, "big")
    if len(header) != LENGTH or length > most:
        raise ChildFailed
    answer = _read(reading, length, deadline)
    if len(answer) != length:
        raise ChildFailed
    return answer


def _read(reading: int, length: int, deadline: float) -> bytes:
    """Read `length` bytes from the pipe `reading`; return fewer if its other end is closed before.
    deadline: in seconds of time.monotonic. Errors: ChildFailed if the bytes are not there by then.
    """
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    content = bytearray()
    while len(content) < length:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            raise ChildFailed
        part = os.read(reading, min(length - len(content), 2**20))
        if not part:
            break
        content += part
    return bytes(content)


def read_line(control: socket.socket) -> bytes:
    """Read one line, with its line end, byte by byte, since the bytes after it belong to the next
    message. If the other side closes the socket, return what came before."""
    line = bytearray()
    while not line.endswith(b"\n") and (byte := control.recv(1)):
        line += byte
    return bytes(line)


def _environment() -> Mapping[str, str]:
    """Return the environment variables of the program that forks: the same on every machine, except
    for the location of Python's packages. PYTHONHASHSEED fixes the order of sets in every process,
    so that the same input always gives the same answer."""
    paths = dict.fromkeys(path for path in sys.path if os.path.isabs(path))
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
