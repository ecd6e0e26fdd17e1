"""Run a plug-in's conversion on one unit's rows at a time, each in a process that ends
afterwards.

    this process ── two pipes for each unit ──> conversion_process ── forks ──> a child for the unit

The process that forks is started as a new program, without this process's memory. It reads no row
and runs no code of the plug-in. A child imports the plug-in, reads its unit's rows, writes the
converted rows, and ends. It is confined before the plug-in is imported (isolation.only_computing).

Guarantee: the conversion of a unit's rows depends only on those rows and public settings.
Neither memory nor a file, a process, a clock or a count passes from the conversion of one unit
to that of another. If anything goes wrong in a child, its unit has no records, and no other unit
changes (docs/guarantee.md says what is not covered). The number of children follows from the site's
declared size, unless there are over a quarter more units than that (`count_children`)."""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType

from fedtune.core import boot
from fedtune.core.config.site import ConvertTable
from fedtune.core.data.sources._interface import Row
from fedtune.core.data.typed_rows import BYTES, given_bytes, returned_rows
from fedtune.core.errors import (
    ConfigError,
    FedtuneError,
    InfrastructureError,
    describe,
    escape_controls,
)

log = logging.getLogger("fedtune.data")
PROGRAM = "fedtune.core.data.conversion_process"
CPU_SECONDS = 20  # of processor time of one child; other processes' time does not count
SECONDS = 120.0  # from a child's start to its end, for a child that waits in vain
START_SECONDS = 600.0  # until the process that forks is ready
SAID = 300  # characters shown of a plug-in's error about its options, before a record is read
MACHINE = "Linux on x86-64 or 64-bit ARM, where a seccomp filter can be installed"


class Unconverted(Exception):
    """The conversion of one unit failed; the error says nothing about the rows."""


class Conversion:
    """Converts units' rows with one plug-in, in a `with` block in which a site's rows are read.

    declared_size: the site's declared size, if its whole dataset is read, else 0. When the block
    ends, children without rows run until as many have run as `count_children` returns.
    Errors, before a row is passed: ConfigError if the plug-in is not installed or does not accept
    its options; InfrastructureError if this machine cannot confine it."""

    def __init__(self, table: ConvertTable, declared_size: int = 0) -> None:
        self._table, self._declared_size = table, declared_size
        self._units = 0  # for which a child was forked
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Conversion:
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._make_up()
        self._stop()

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        """Convert one unit's rows.

        Errors: Unconverted if the plug-in raises, hangs, exits or needs too much memory, or if its
        result is no list of rows of plain finite values or is too long (typed_rows)."""
        try:
            return returned_rows(self._convert(given_bytes(rows)))
        except (ValueError, RecursionError):  # too long, or not of these types
            raise Unconverted from None

    def _make_up(self) -> None:
        """Run children without rows until as many have run as `count_children` returns."""
        if self._units > count_children(0, self._declared_size) > 0:
            log.warning(
                "the records hold more units than site.declared_size allows for, so that how many "
                "processes convert them tells of it; to do: declare a larger round figure"
            )
        for _ in range(count_children(self._units, self._declared_size) - self._units):
            with suppress(Unconverted):
                self._convert(b"")

    def _convert(self, given: bytes) -> bytes:
        """Return the bytes that a new child made of `given`. Errors: Unconverted if it failed."""
        if self._control is None:  # the process that forks was killed, for want of memory
            try:
                self._start()
            except FedtuneError as error:
                log.error("%s", describe(error))
                raise Unconverted from None
        assert self._control is not None
        rows, results = _Pipe(), _Pipe()
        self._control.settimeout(SECONDS)
        self._units += bool(given)
        try:
            socket.send_fds(self._control, [b"?"], [rows.reading, results.writing])
            rows.close_reading()
            results.close_writing()
            content = _exchange(rows.writing, results.reading, given)
            rows.close()
            results.close()
            self._control.sendall(b".")  # ends a child that still runs
            ended = self._control.recv(1)
            if not ended:
                raise OSError
        except OSError:
            log.warning("the process that converts records ended; it is started again")
            self._stop()
            raise Unconverted from None
        finally:
            rows.close()
            results.close()
        if content is None or ended != b"0":
            raise Unconverted
        return content

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        limits = {"seconds": SECONDS, "cpu_seconds": CPU_SECONDS}
        table = json.dumps({**self._table.model_dump(mode="json"), **limits})
        with theirs:
            self._process = subprocess.Popen(
                boot.command(PROGRAM, str(theirs.fileno()), table),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                pass_fds=[theirs.fileno()],
            )
        self._control = ours
        ours.settimeout(START_SECONDS)
        try:
            told = json.loads(_line(ours))
        except (OSError, ValueError):
            told = {"kind": "machine", "text": "it did not start"}
        if told["kind"] == "ready":
            told = self._try()
        if told["kind"] == "ready":
            return
        self._stop()
        text = escape_controls(str(told["text"]))[:SAID]
        if told["kind"] == "machine":
            raise InfrastructureError(
                f"data.convert.name = {self._table.name!r} cannot be confined here ({text})",
                MACHINE,
                "convert the files by hand, and leave data.convert out",
            )
        raise ConfigError(text)

    def _try(self) -> dict[str, str]:
        """Have a child import the plug-in and check its options, before a row is read. Return the
        kind of the result (ready, plug-in or machine) and its text."""
        try:
            (found,) = returned_rows(self._convert(b""))
            return {"kind": str(found["kind"]), "text": str(found.get("text", ""))}
        except (Unconverted, ValueError, KeyError):
            name = self._table.name
            return {"kind": "plug-in", "text": f"data.convert.name = {name!r} cannot be imported"}

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


def count_children(units: int, declared_size: int) -> int:
    """Return how many processes convert `units` units: the declared size plus a quarter, doubled
    until there is a process for each unit. If there are no more units than the declared size plus
    a quarter, the result tells nothing of their number.

    >>> count_children(0, 200), count_children(250, 200), count_children(251, 200)
    (250, 250, 500)

    With declared_size 0 (the rows are not all of a site's) it is one for each unit."""
    children = declared_size + declared_size // 4
    while 0 < children < units:
        children *= 2
    return children or units


class _Pipe:
    """A pipe, each end of which is closed only once."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

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


def _exchange(writing: int, reading: int, given: bytes) -> bytes | None:
    """Write the rows and return the result; None if it is too long or comes too late. `writing` is
    left open, so the length of the rows is written first."""
    os.set_blocking(writing, False)
    rest = memoryview(len(given).to_bytes(8, "big") + given)
    content, deadline = bytearray(), time.monotonic() + SECONDS
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    poll.register(writing, select.POLLOUT)
    while (left := deadline - time.monotonic()) > 0:
        for descriptor, event in poll.poll(1000 * left):
            if descriptor == writing:
                with suppress(BlockingIOError, BrokenPipeError):
                    rest = rest[os.write(writing, rest[:65536]) :]
                if not rest or event & (select.POLLERR | select.POLLHUP):
                    poll.unregister(writing)
                continue
            part = os.read(reading, 65536)
            if not part:
                return bytes(content)
            content += part
            if len(content) > BYTES:
                return None
    return None


def _line(control: socket.socket) -> bytes:
    """Read one line byte by byte, since the bytes after it belong to the next message."""
    line = bytearray()
    while not line.endswith(b"\n") and (byte := control.recv(1)):
        line += byte
    return bytes(line)


def _environment() -> Mapping[str, str]:
    """Return the environment of the process that forks: the same on every machine, except for
    the location of Python's packages. PYTHONHASHSEED makes the order of sets the same in each
    process, so that a unit is converted alike each time."""
    paths = dict.fromkeys(path for path in sys.path if os.path.isabs(path))
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        "PYTHONHASHSEED": "0",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
