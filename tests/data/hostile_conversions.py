"""Conversions that couple units, or that do harm, for the tests: a module of another distribution.

`carry` hands something from one unit to the next, each by its own means, and returns what it found;
`harm` does to one unit (whose rows say so) what should concern that unit alone."""

from __future__ import annotations

import builtins
import ctypes
import datetime
import gc
import mmap
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedtune.core.data.converters import Converter, Row

MEMORY: list[int] = []
PAGE = mmap.mmap(-1, 4096)  # shared with what is forked later
SEGMENT = 0x5EED  # of System V's shared memory


def in_a_global(place: Path) -> object:
    MEMORY.append(1)
    return len(MEMORY)


def in_a_class(place: Path) -> object:
    Hostile.seen = getattr(Hostile, "seen", 0) + 1  # type: ignore[attr-defined]
    return Hostile.seen  # type: ignore[attr-defined]


def in_the_interpreter(place: Path) -> object:
    builtins.seen = getattr(builtins, "seen", 0) + 1  # type: ignore[attr-defined]
    return builtins.seen  # type: ignore[attr-defined]


def in_the_environment(place: Path) -> object:
    os.environ["SEEN"] = os.environ.get("SEEN", "") + "x"
    return os.environ["SEEN"]


def in_a_file(place: Path) -> object:
    seen = len(list(place.glob("seen-*")))
    (place / f"seen-{seen}").touch()
    return seen


def in_the_time_of_a_file(place: Path) -> object:
    found = os.stat(place).st_mtime_ns
    os.utime(place, ns=(found + 10**9, found + 10**9))
    return found


def in_a_lock_of_a_file(place: Path) -> object:
    return os.open(place, os.O_RDONLY)


def in_a_shared_page(place: Path) -> object:
    PAGE[0] = (PAGE[0] + 1) % 256
    return PAGE[0]


def in_system_v_memory(place: Path) -> object:
    libc = ctypes.CDLL(None)
    libc.shmat.restype = ctypes.c_void_p
    segment = libc.shmget(SEGMENT, 4096, 0o1600)  # made where it is not there
    address = libc.shmat(segment, None, 0) if segment >= 0 else None
    if address in (None, 2**64 - 1):
        raise OSError
    seen = ctypes.c_int.from_address(address)
    seen.value += 1
    return seen.value


def in_a_processs_number(place: Path) -> object:
    libc = ctypes.CDLL(None)
    return os.getpid(), libc.gettid(), threading.get_native_id(), os.getppid() and 0


def in_the_time(place: Path) -> object:
    return time.monotonic_ns()


def in_the_time_of_day(place: Path) -> object:
    return datetime.datetime.now().isoformat()


def in_a_librarys_time(place: Path) -> object:
    return ctypes.CDLL(None).time(None)


def in_the_pipe_that_it_is_given(place: Path) -> object:
    """Its own time and number, which Linux counts up for each pipe of the machine."""
    found: list[object] = []
    for descriptor in range(16):
        with suppress(OSError):
            status = os.fstat(descriptor)
            found.append((status.st_ino, status.st_ctime_ns))
    return found


def in_what_this_process_used(place: Path) -> object:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def in_the_classes_of_ctypes(place: Path) -> object:
    return len(ctypes._CFuncPtr.__subclasses__())


def in_the_counts_of_the_collector(place: Path) -> object:
    return gc.get_count(), len(gc.get_objects())


def in_the_blocks_of_the_allocator(place: Path) -> object:
    return sys.getallocatedblocks()


def in_the_place_of_an_object(place: Path) -> object:
    return id(object())


def in_the_places_of_handles(place: Path) -> object:
    return [id(each._handle) for each in gc.get_objects() if isinstance(each, ctypes.CDLL)]


def in_the_byte_code(place: Path) -> object:
    serve = sys.modules["fedtune.core.data.child_process"].serve
    return serve.__code__._co_code_adaptive  # type: ignore[attr-defined]


CARRY: dict[str, Callable[[Path], object]] = {
    function.__name__: function
    for function in (
        *(in_a_global, in_a_class, in_the_interpreter, in_the_environment, in_a_file),
        *(in_the_time_of_a_file, in_a_lock_of_a_file, in_a_shared_page, in_system_v_memory),
        *(in_a_processs_number, in_the_time, in_the_time_of_day, in_a_librarys_time),
        *(in_the_pipe_that_it_is_given, in_what_this_process_used),
    )
}
# What differs between two starts of the program that forks, and must not between its children.
CARRY_IN_ONE_START: dict[str, Callable[[Path], object]] = {
    function.__name__: function
    for function in (
        *(in_the_classes_of_ctypes, in_the_counts_of_the_collector),
        *(in_the_blocks_of_the_allocator, in_the_place_of_an_object),
        *(in_the_places_of_handles, in_the_byte_code),
    )
}


def raise_one(rows: list[Row]) -> object:
    raise RuntimeError(rows[0])


def raise_what_is_no_exception(rows: list[Row]) -> object:
    raise KeyboardInterrupt


def end_well_without_a_result(rows: list[Row]) -> object:
    os._exit(0)


def exit_from_python(rows: list[Row]) -> object:
    sys.exit(0)


def hang(rows: list[Row]) -> object:
    while True:
        pass


def wait_for_ever(rows: list[Row]) -> object:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
    return rows


def not_a_number(rows: list[Row]) -> object:
    return [{"t": "x", "value": float("nan")}]


def beyond_all_numbers(rows: list[Row]) -> object:
    return [{"t": "x", "value": float("inf")}]


def no_rows_at_all(rows: list[Row]) -> object:
    return None


def rows_by_a_generator(rows: list[Row]) -> object:
    return (row for row in rows)


def a_foreign_type(rows: list[Row]) -> object:
    return [{"t": object()}]


def allocate_without_end(rows: list[Row]) -> object:
    kept = []
    while True:
        kept.append(bytearray(2**24))


def fill_two_gigabytes(rows: list[Row]) -> object:
    return [{"t": str(len(bytearray(2**31)))}]


def write_and_fail(rows: list[Row]) -> object:
    answer = b'[{"t": "half"}]'
    for descriptor in range(3, 1024):
        try:
            os.write(descriptor, len(answer).to_bytes(8, "big") + answer)
        except OSError:
            continue
    raise RuntimeError


def return_gigabytes(rows: list[Row]) -> object:
    return [{"t": "x" * 2**20}] * 4096


def return_millions_of_rows(rows: list[Row]) -> object:
    return [{}] * 5_000_000


def return_a_deep_row(rows: list[Row]) -> object:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    return [{"t": deep}]


def overflow_the_stack(rows: list[Row]) -> object:
    return overflow_the_stack(rows) if rows else None


def touch_no_memory(rows: list[Row]) -> object:
    return ctypes.string_at(0)


def write_to_every_descriptor(rows: list[Row]) -> object:
    for descriptor in range(1024):
        try:
            os.write(descriptor, b"[]")
        except OSError:
            continue
    return rows


def close_every_descriptor(rows: list[Row]) -> object:
    os.closerange(0, 1024)
    return rows


def read_every_descriptor(rows: list[Row]) -> object:
    for descriptor in range(1, 1024):
        try:
            os.read(descriptor, 100)
        except OSError:
            continue
    raise RuntimeError


def kill_its_parents(rows: list[Row]) -> object:
    for process in (0, os.getppid(), -1):
        os.kill(process, 9)
    return rows


def kill_the_process_that_forks(rows: list[Row]) -> object:
    libc = ctypes.CDLL(None)
    libc.kill(libc.getppid(), 9)
    raise RuntimeError


def fork_without_end(rows: list[Row]) -> object:
    while True:
        os.fork()


def replace_what_writes_its_result(rows: list[Row]) -> object:
    import json

    json.dumps = lambda *_, **__: '[{"t": NaN}]'  # type: ignore[assignment]
    return rows


def patch_the_process_that_forks(rows: list[Row]) -> object:
    for module in list(sys.modules.values()):
        for name in ("returned_bytes", "given_rows", "_child", "_read"):
            if hasattr(module, name):
                setattr(module, name, None)
    return rows


HARM: dict[str, Callable[[list[Row]], object]] = {
    function.__name__: function
    for function in (
        *(raise_one, raise_what_is_no_exception, end_well_without_a_result, exit_from_python),
        *(hang, wait_for_ever, not_a_number, beyond_all_numbers, no_rows_at_all),
        *(rows_by_a_generator, a_foreign_type, allocate_without_end, return_gigabytes),
        *(fill_two_gigabytes, write_and_fail),
        *(return_millions_of_rows, return_a_deep_row, overflow_the_stack, touch_no_memory),
        *(write_to_every_descriptor, close_every_descriptor, read_every_descriptor),
        *(kill_its_parents, kill_the_process_that_forks, fork_without_end),
        *(replace_what_writes_its_result, patch_the_process_that_forks),
    )
}


@dataclass(frozen=True)
class Hostile(Converter):
    """how: a name of CARRY, CARRY_IN_ONE_START or HARM; place: a folder that everybody may
    write."""

    how: str = ""
    place: str = ""

    def convert(self, rows: list[Row]) -> list[Row]:
        if harm := HARM.get(self.how):
            if any(row.get("hostile") for row in rows):
                return harm(rows)  # type: ignore[return-value]
            return [{"t": row["t"]} for row in rows]
        try:
            found = str((CARRY | CARRY_IN_ONE_START)[self.how](Path(self.place)))
        except Exception:
            found = "nothing"
        return [{"t": f"{row['t']} {found}"} for row in rows]
