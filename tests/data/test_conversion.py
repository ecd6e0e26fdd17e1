"""What a plug-in's conversion does to one unit changes nothing of another."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from fedtune.core import system_calls
from fedtune.core.config import Columns, Site, SiteData, load_site
from fedtune.core.config.site import ConvertTable
from fedtune.core.data import children, conversion
from fedtune.core.data.children import Children
from fedtune.core.data.conversion import Conversion, Unconverted
from fedtune.core.data.per_unit import per_unit
from fedtune.core.data.records import Read, content_of, count_otherwise_alone, read_file
from fedtune.core.data.sources import Row
from fedtune.core.data.typed_rows import (
    BYTES,
    given_bytes,
    given_rows,
    returned_bytes,
    returned_rows,
)
from fedtune.core.errors import ConfigError, DataError, InfrastructureError
from fedtune.core.vault import studies
from fedtune.officer.before_joining import check_before_joining
from tests.data import hostile_conversions as hostile
from tests.depth import long_but
from tests.expected import raises_nothing
from tests.plugins import install

MODULE = "somebodys_conversion"
POINTS = {"fedtune.converters": {"hostile": f"{MODULE}:Hostile", "plain": f"{MODULE}:Plain"}}
PLAIN = '''

@dataclass(frozen=True)
class Plain(Converter):
    """Capital letters, and a row for each sentence."""

    times: int = 1
    mark: str = "."
    image: str = ""

    def __post_init__(self):
        if self.times < 1:
            raise ConfigError("data.convert.options.times", "at least 1")

    def convert(self, rows):
        parts = [part for row in rows for part in row["t"].split(self.mark) if part.strip()]
        image = self.image or rows[0].get("other")
        return [{"t": part.upper() * self.times, "image": image} for part in parts]
'''
ROWS: list[Row] = [
    {"who": "z", "t": "the others must not hear of this", "hostile": True},
    {"who": "a", "t": "cough. fever"},
    {"who": "b", "t": "rash"},
    {"who": "z", "t": "nor of this", "hostile": True},
    {"who": "a", "t": "better"},
    {"who": "c", "t": "pain"},
]
pytestmark = pytest.mark.skipif(
    os.uname().machine not in system_calls.MACHINES, reason="another machine's system calls"
)


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(hostile.__file__).read_text(encoding="utf-8")
    text = text.replace(
        "from fedtune.core.data.converters import",
        "from fedtune.core.errors import ConfigError\nfrom fedtune.core.data.converters import",
    )
    install(tmp_path / "installed", monkeypatch, MODULE, text + PLAIN, POINTS)
    monkeypatch.setattr(conversion, "CPU_SECONDS", 2)


def read(
    folder: Path,
    rows: Sequence[Row],
    name: str = "hostile",
    unit: str = "patient",
    columns: Columns | None = None,
    **options: Any,
) -> Read:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = SiteData(
        path=path,
        columns=columns or Columns(text="t", patient="who" if unit == "patient" else None),
        convert=ConvertTable(name=name, options=options),
    )
    return read_file(data, unit=unit, strict=False)  # type: ignore[arg-type]


def of_others(found: Read) -> dict[str, list[bytes]]:
    """Map each unit but z to what its records say."""
    said: dict[str, list[bytes]] = {}
    for record in found.records:
        if record.unit != "z":
            said.setdefault(record.unit, []).append(content_of(record))
    return said


def without_z(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["who"] != "z"]


class InThisProcess:
    """The twin: the same conversion, in the process that reads the records, unit after unit."""

    def __init__(self, table: ConvertTable, declared_size: int = 0) -> None:
        self._convert = hostile.Hostile(**table.options).convert  # type: ignore[arg-type]

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, rows: Sequence[Row]) -> list[Row]:
        return returned_rows(returned_bytes(self._convert(given_rows(given_bytes(rows)))))


# ------------------------------------------------------------------------- what is carried along


KEPT = (  # one of each means: memory, a file, a process, a clock, a pipe
    *("in_a_global", "in_a_file", "in_a_shared_page", "in_a_processs_number", "in_the_time"),
    "in_the_pipe_that_it_is_given",
)


@pytest.mark.parametrize("how", long_but(KEPT, hostile.CARRY))
def test_nothing_is_carried_from_one_unit_to_another(tmp_path: Path, how: str) -> None:
    given = {"how": how, "place": str(tmp_path)}
    with_it = read(tmp_path, ROWS, **given)
    without = read(tmp_path, without_z(ROWS), **given)
    last = read(tmp_path, [*without_z(ROWS), *ROWS[:1]], **given)
    assert of_others(with_it) == of_others(without) == of_others(last)
    assert of_others(with_it).keys() == {"a", "b", "c"} and not with_it.failed


OF_ONE_PROCESS = {
    "in_a_processs_number": "one process has one number",
    "in_the_pipe_that_it_is_given": "one process is given none",
    "in_a_librarys_time": "whole seconds, of which both may see the same",
    "in_what_this_process_used": "no page more",
    "in_a_lock_of_a_file": "a descriptor that is not closed is the next one's number",
}


@pytest.mark.parametrize("how", sorted(set(hostile.CARRY) - set(OF_ONE_PROCESS)))
def test_in_one_process_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The twin."""
    monkeypatch.setattr("fedtune.core.data.records.Conversion", InThisProcess)
    given = {"how": how, "place": str(tmp_path)}
    with forgotten():
        with_it = read(tmp_path, ROWS, **given)
        assert of_others(with_it) != of_others(read(tmp_path, without_z(ROWS), **given))


@pytest.mark.parametrize(
    "how",
    [
        *("in_a_file", "in_the_time_of_a_file", "in_system_v_memory", "in_the_time"),
        *("in_a_processs_number", "in_the_time_of_day", "in_the_pipe_that_it_is_given"),
    ],
)
def test_a_fork_alone_does_not_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The twin: a child for each unit, without the filter of system calls."""
    (tmp_path / "unconfined.py").write_text(
        "from fedtune.core import isolation\n"
        "from fedtune.core.data import conversion_process\n"
        "isolation.only_computing = lambda: isolation.Confinement(('seccomp',))\n"
        "conversion_process.main()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(conversion, "PROGRAM", "unconfined")
    given = {"how": how, "place": str(tmp_path)}
    with forgotten():
        with_it = read(tmp_path, ROWS, **given)
        assert of_others(with_it) != of_others(read(tmp_path, without_z(ROWS), **given))


def answers(how: str) -> list[str]:
    """What twelve children after one another answer."""
    with Conversion(ConvertTable(name="hostile", options={"how": how})) as convert:
        return [convert([{"t": "x"}])[0]["t"] for _ in range(12)]


@pytest.mark.parametrize("how", hostile.CARRY_IN_ONE_START)
def test_no_child_counts_those_before_it(how: str) -> None:
    assert len(set(answers(how))) == 1


@pytest.mark.parametrize("how", hostile.CARRY_IN_ONE_START)
def test_what_a_process_that_goes_on_leaves_behind_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The twin: one process takes all requests."""
    (tmp_path / "lasting.py").write_text(
        "import socket\n"
        "from fedtune.core.data import child_process, conversion_process\n"
        "def serve(control, work, settings):\n"
        "    child_process.say(control, 'ready')\n"
        "    while True:\n"
        "        asked, pipes, _, _ = socket.recv_fds(control, 1, 2)\n"
        "        if not asked:\n"
        "            return\n"
        "        ended = child_process._fork_and_wait(control, work, *pipes, settings)\n"
        "        control.sendall(ended)\n"
        "child_process.serve = serve\n"
        "conversion_process.main()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(conversion, "PROGRAM", "lasting")
    assert len(set(answers(how))) > 1


WHOLE_MEMORY = """
import ctypes, hashlib, sys
from fedtune.core import isolation
from fedtune.core.data import child_process

PAGE, places, confine = 4096, [], isolation.only_computing

def note_places_and_confine():
    with open("/proc/self/maps") as maps:
        for line in maps.read().splitlines():
            if " rw" in line and "[vvar" not in line:
                places.append([int(end, 16) for end in line.split()[0].split("-")])
    return confine()

def work(given):
    if not given:
        return b'{"kind": "ready"}'
    pages = (at for first, end in places for at in range(first, end, PAGE))
    return b"".join(hashlib.sha256(ctypes.string_at(at, PAGE)).digest()[:8] for at in pages)

isolation.only_computing = note_places_and_confine
control, settings = child_process.begin()
LOOP
child_process.serve(control, work, settings)
"""
LASTING = """
import socket
def serve(control, work, settings):
    child_process.say(control, "ready")
    while True:
        asked, pipes, _, _ = socket.recv_fds(control, 1, 2)
        if not asked:
            return
        control.sendall(child_process._fork_and_wait(control, work, *pipes, settings))
child_process.serve = serve
"""
IN_PARTS = """
def read_parts(reading):
    with open(reading, "rb", closefd=False) as pipe:
        if not (header := pipe.read(8)):  # which may come in two parts, too
            return None
        content = bytearray(int.from_bytes(header, "big"))
        pipe.readinto(content)
    return bytes(content)
child_process._read = read_parts
"""


def count_memories(
    folder: Path, monkeypatch: pytest.MonkeyPatch, program: str, given: bytes = b"x"
) -> int:
    """Count how many different memories ten children after one another have, each of which is given
    the same."""
    folder.mkdir()
    (folder / "whole_memory.py").write_text(program)
    monkeypatch.syspath_prepend(folder)
    asked = {"what": "the comparison", "otherwise": "", "cpu_seconds": 60, "seconds": 20.0}
    with children.Children("whole_memory", {}, **asked) as forked:  # type: ignore[arg-type]
        try:
            return len({forked.run([given], 2**24, bytes)[0] for _ in range(10)})
        except children.ChildFailed:
            pytest.fail("a child did not receive its whole input")


def test_every_child_finds_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last byte of what it can write. Twin: one process takes all requests."""
    program = WHOLE_MEMORY.replace("LOOP", "")
    assert count_memories(tmp_path / "a", monkeypatch, program) == 1
    program = WHOLE_MEMORY.replace("LOOP", LASTING)
    assert count_memories(tmp_path / "b", monkeypatch, program) > 1


def test_a_child_does_not_find_in_which_parts_its_input_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These say how busy the machine was. Twin: a child that reads whatever is there."""
    write, parts = os.write, itertools.cycle((20_011, 55_001, 7, 41_999))

    def write_a_part(descriptor: int, content: memoryview) -> int:
        time.sleep(0.001)  # so that the child takes one part before the next one comes
        return write(descriptor, content[: next(parts)])

    def open_pipes() -> tuple[children._Channel, children._Channel]:
        return children._Channel(*os.pipe()), children._Channel(*os.pipe())

    monkeypatch.setattr(os, "write", write_a_part)
    given = bytes(10**6)
    program = WHOLE_MEMORY.replace("LOOP", "")
    assert count_memories(tmp_path / "a", monkeypatch, program, given) == 1
    monkeypatch.setattr(children, "_open_channels", open_pipes)
    program = WHOLE_MEMORY.replace("LOOP", IN_PARTS)
    assert count_memories(tmp_path / "b", monkeypatch, program, given) > 1


WAITS = """
import ctypes, errno, json, struct, sys, time
from fedtune.core import isolation
libc = ctypes.CDLL(None, use_errno=True)
FUTEX, MADVISE = (202, 28) if sys.argv[1] == "x86_64" else (98, 233)
word, soon = ctypes.c_uint32(0), ctypes.create_string_buffer(struct.pack("qq", 0, 10_000_000))
page = ctypes.c_long(-4096)
if sys.argv[2] == "confined":
    isolation.only_computing()
def errno_of(number, *arguments):
    ctypes.set_errno(0)
    libc.syscall(ctypes.c_long(number), *arguments)
    return errno.errorcode.get(ctypes.get_errno(), "")
wait, wait_until, wake = 0 | 128, 9 | 128 | 256, 1 | 128
print(json.dumps([
    errno_of(FUTEX, ctypes.byref(word), wait, 0, soon, 0, 0),
    errno_of(FUTEX, ctypes.byref(word), wait_until, 0, soon, 0, ctypes.c_uint32(2**32 - 1)),
    errno_of(FUTEX, ctypes.byref(word), wake, 1, 0, 0, 0),
    errno_of(MADVISE, page, ctypes.c_long(4096), 102),
]))
"""


def test_a_child_waits_for_no_time_and_marks_no_memory_as_broken() -> None:
    """A child that waits until a time that was chosen beforehand ends before its deadline or not:
    what it makes of its unit's rows would follow from how long the earlier units took. Advice above
    100 is of pages that others share. Twin: unconfined."""
    found = {}
    for how in ("confined", "open"):
        command = [sys.executable, "-c", WAITS, os.uname().machine, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[how] = json.loads(done.stdout)
    assert found["confined"] == ["EPERM", "EPERM", "", "EPERM"]
    assert found["open"][:3] == ["ETIMEDOUT", "ETIMEDOUT", ""] and found["open"][3] != "EPERM"


@contextmanager
def forgotten() -> Iterator[None]:
    """Take away what a twin leaves behind on this machine."""
    try:
        yield
    finally:
        libc = ctypes.CDLL(None)
        libc.shmctl(libc.shmget(hostile.SEGMENT, 4096, 0o600), 0, None)


# ------------------------------------------------------------------------------ what does harm

WAITING = ("wait_for_ever", "read_every_descriptor")  # ended by the clock, below
WITHOUT_Z: dict[str, list[bytes]] = {}  # no row asks for harm: the same whatever it would be


@pytest.mark.parametrize("how", sorted(set(hostile.HARM) - set(WAITING)))
def test_harm_is_the_units_own(tmp_path: Path, how: str) -> None:
    if not WITHOUT_Z:
        WITHOUT_Z.update(of_others(read(tmp_path, without_z(ROWS), how=how)))
    with_it = read(tmp_path, ROWS, how=how)
    assert of_others(with_it) == WITHOUT_Z
    assert of_others(with_it).keys() == {"a", "b", "c"}
    kept_its_own = {
        "patch_the_process_that_forks",
        "replace_what_writes_its_result",
        "close_every_descriptor",
        "kill_its_parents",
    }
    if how not in kept_its_own:
        assert [failed.reason for failed in with_it.failed] == ["cannot be converted"] * 2
        assert [failed.row for failed in with_it.failed] == [1, 4]


def test_in_one_process_harm_is_everybodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: what ends a process, or replaces one of its functions, is not its unit's alone."""
    monkeypatch.setattr("fedtune.core.data.records.Conversion", InThisProcess)
    with pytest.raises(SystemExit):
        read(tmp_path, ROWS, how="exit_from_python")
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path, ROWS, how="raise_what_is_no_exception")


@pytest.mark.parametrize("how", WAITING)
def test_a_conversion_that_waits_is_ended(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    with Conversion(ConvertTable(name="hostile", options={"how": how})) as convert:
        monkeypatch.setattr(children, "SECONDS", 2.0)  # of the process that reads
        with pytest.raises(Unconverted):
            convert(ROWS[:1])
        monkeypatch.setattr(children, "SECONDS", 60.0)
        assert convert(ROWS[1:2]) == [{"t": "cough. fever"}]


def test_what_is_done_with_an_answer_takes_no_time_of_the_childs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hours of a process that writes PNG files end no child. Twin: its own hours do."""
    now = [0.0]
    monkeypatch.setattr(children, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def take_hours(told: bytes) -> bytes:
        now[0] += 10_000
        return told

    given = [given_bytes([{"t": "a"}])] * 3
    with Conversion(ConvertTable(name="plain")) as convert:
        with raises_nothing():
            assert len(convert.run(given, BYTES, take_hours)) == 3
        ask = children._ask
        monkeypatch.setattr(children, "_ask", lambda *how: take_hours(ask(*how)))
        with pytest.raises(children.ChildFailed):
            convert.run(given, BYTES, bytes)


def test_all_children_run_on_one_processor() -> None:
    """Each can read its number, by which somebody beside could speak to it."""
    with Conversion(ConvertTable(name="plain")) as convert:
        assert convert._process is not None
        assert len(os.sched_getaffinity(convert._process.pid)) == 1


def test_memory_is_bounded(tmp_path: Path) -> None:
    """What it fills is let go again by the child itself, so that nothing else ends it."""
    with Conversion(ConvertTable(name="hostile", options={"how": "fill_two_gigabytes"})) as convert:
        with pytest.raises(Unconverted):
            convert(ROWS[:1])
        assert convert(ROWS[1:2]) == [{"t": "cough. fever"}]


def test_what_a_child_wrote_before_it_failed_is_not_read(tmp_path: Path) -> None:
    table = ConvertTable(name="hostile", options={"how": "write_and_fail"})
    with Conversion(table) as convert, pytest.raises(Unconverted):
        convert(ROWS[:1])


def test_the_process_that_forks_is_started_again(tmp_path: Path) -> None:
    with Conversion(ConvertTable(name="plain")) as convert:
        assert convert([{"t": "a. b"}]) == [{"t": "A", "image": None}, {"t": " B", "image": None}]
        assert convert._process is not None
        convert._process.kill()
        convert._process.wait()
        with raises_nothing():
            assert convert([{"t": "b"}]) == [{"t": "B", "image": None}]
            assert convert([{"t": "c"}]) == [{"t": "C", "image": None}]
        forking = convert._process
    assert forking.poll() is not None


# ------------------------------------------------------------------- how many children there are


def count_forked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, declared_size: int, rows: Sequence[Row]
) -> int:
    """Count the children of a reading at a site, each of which is told of by one message."""
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {"path": str(folder / "data.jsonl"), "columns": {"text": "t", "patient": "who"}}
    site = Site.model_validate(
        {
            "site": {"name": "a", "declared_size": declared_size, "state": str(folder)},
            "data": {**table, "convert": {"name": "plain"}},
        },
        strict=False,
    )
    told: list[object] = []
    with monkeypatch.context() as patched:
        send = socket.send_fds
        patched.setattr(
            children.socket, "send_fds", lambda *given: told.append(given) or send(*given)
        )
        read_file(site.data, unit="patient", strict=False)
    return len(told)


TOO_LONG: Row = {"who": "d", "t": "x" * (BYTES + 1)}


@pytest.mark.parametrize("rows", [[], ROWS[1:2], ROWS, [*ROWS, TOO_LONG], [*ROWS, *ROWS]])
def test_how_many_children_there_are_is_a_public_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Row]
) -> None:
    """Each takes a number of the machine's, by which every account of it can count them. One more
    has the plug-in take its options."""
    assert count_forked(tmp_path, monkeypatch, 4, rows) == 1 + 5


def test_without_making_up_they_are_as_many_as_the_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin."""
    monkeypatch.setattr(Children, "_run_idle_children", lambda self: None)
    assert count_forked(tmp_path, monkeypatch, 4, ROWS[1:2]) == 1 + 1
    assert count_forked(tmp_path, monkeypatch, 4, ROWS) == 1 + 4


def test_who_declares_too_few_units_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert count_forked(tmp_path, monkeypatch, 2, ROWS[:3]) == 1 + 4
    assert "declare a larger round figure" in caplog.text


def test_a_sample_is_of_as_many_processes_whoever_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    start = Children._start
    monkeypatch.setattr(Children, "_start", lambda self: started.append(self) or start(self))
    for rows in (ROWS[1:2], ROWS):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        columns, table = Columns(text="t", patient="who"), ConvertTable(name="plain")
        data = SiteData(path=tmp_path / "data.jsonl", columns=columns, convert=table)
        started.clear()
        assert count_otherwise_alone(data, 4) == 0
        assert len(started) == 1 + 4


# -------------------------------------------------------------------------------- what it is for


def test_rows_are_converted_a_unit_at_a_time(tmp_path: Path) -> None:
    found = read(tmp_path, without_z(ROWS), name="plain", times=2)
    said = [(record.unit, record.completion) for record in found.records]
    assert said == [
        ("a", "COUGHCOUGH"),
        ("a", " FEVER FEVER"),
        ("a", "BETTERBETTER"),
        ("b", "RASHRASH"),
        ("c", "PAINPAIN"),
    ]
    assert MODULE not in sys.modules  # nothing of it is imported where records are held


def test_of_a_single_record_comes_at_most_one(tmp_path: Path) -> None:
    found = read(tmp_path, without_z(ROWS), name="plain", unit="record")
    assert sorted(record.completion for record in found.records) == ["BETTER", "PAIN", "RASH"]
    assert [failed.reason for failed in found.failed] == ["cannot be converted"]


def test_a_conversion_names_no_file_of_others(tmp_path: Path) -> None:
    columns = Columns(text="t", image="image", patient="who")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    given: list[Row] = [{"who": "a", "t": "x", "other": "a.png"}]
    of_its_own = read(tmp_path, given, name="plain", columns=columns)
    assert [bool(record.media) for record in of_its_own.records] == [True]
    guessed = read(tmp_path, given, name="plain", columns=columns, image="./a.png")
    assert [failed.reason for failed in guessed.failed] == ["missing media file"]
    none = read(tmp_path, [{"who": "a", "t": "x", "other": 7}], name="plain", columns=columns)
    assert [failed.reason for failed in none.failed] == ["wrong type"]


def test_what_is_not_installed_or_wrongly_set_is_said_before_a_row_is_read(tmp_path: Path) -> None:
    for name, options, said in (
        ("absent", {}, "data.convert.name = 'absent' is not known; expected one of hostile, plain"),
        ("plain", {"time": 1}, "data.convert.options.time is not known; expected one of times"),
        ("plain", {"times": 0}, "data.convert.options.times; expected at least 1"),
        ("plain", {"times": "x"}, "options.times = 'x'; expected the type of its default, 1"),
    ):
        with pytest.raises(ConfigError) as caught:
            read(tmp_path, [], name=name, **options)
        assert said in str(caught.value)


def test_without_a_filter_nothing_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unfiltered.py").write_text(
        "from fedtune.core import isolation\n"
        "from fedtune.core.data import conversion_process\n"
        "isolation.only_computing = lambda: isolation.Confinement()\n"
        "conversion_process.main()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(conversion, "PROGRAM", "unfiltered")
    with pytest.raises(InfrastructureError, match="cannot be confined here"):
        read(tmp_path, ROWS, name="plain")


def test_columns_that_the_files_have_are_asked_of_them_alone(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"who": "a", "t": "x"}\n' * 2)
    data = SiteData(
        path=tmp_path / "data.jsonl",
        columns=Columns(text="made", patient="patient"),
        convert=ConvertTable(name="plain"),
    )
    with pytest.raises(DataError, match=r"no column 'patient', which data\.columns\.patient"):
        read_file(data, unit="patient")


# -------------------------------------------------------------------------- rows as bounded bytes


def test_rows_go_and_come_as_plain_types() -> None:
    rows: list[Row] = [{"t": "é\ud800", "n": 1.5, "b": b"\x00\xff", "l": [{"x": None}, True]}]
    assert given_rows(given_bytes(rows)) == rows
    assert returned_rows(returned_bytes([{"t": "é", "n": [1, 2.5, None]}]))
    for wrong in (None, "x", [1], [{"t": b"x"}], [{"t": {1, 2}}], [{"t": float("nan")}]):
        with pytest.raises((TypeError, ValueError)):
            returned_bytes(wrong)
    for content in (
        *(b"", b"{}", b"[1]", b'[{"t": NaN}]', b'[{"t": Infinity}]', b'[{"t": 1e999}]'),
        *(b"[" * 100_000, b'[{"t":"' + b"x" * BYTES + b'"}]', b"[" + b"{}," * 2**20 + b"{}]"),
        *(b"\xff", b"\x80\x04K\x01.", b'[{"t": ' + b"9" * 10_000 + b"}]"),
    ):
        with pytest.raises(ValueError):
            returned_rows(content)


def test_whatever_goes_wrong_in_our_own_is_the_units_own() -> None:
    class Panic(BaseException): ...

    Panic.__module__ = "pyo3_runtime"

    def made(error: BaseException | None, found: object = None) -> Callable[[list[int]], Any]:
        def convert(rows: list[int]) -> Any:
            if error is not None:
                raise error
            return found

        return convert

    for wrong in (made(ValueError()), made(Panic()), made(None, (1,)), made(None, ["x", 1])):
        found: object = "raised"
        with suppress(Exception, Panic):
            found = per_unit(wrong, str)([1])
        assert found is None
    assert per_unit(made(None, ["x"]), str)([1]) == ["x"]
    for raised in (MemoryError(), ConfigError("an extra"), KeyboardInterrupt()):
        with pytest.raises(type(raised)):
            per_unit(made(raised), str)([1])


def test_a_vault_converts_without_a_network(tmp_path: Path) -> None:
    """What a vault is confined by is inherited, and leaves a conversion what it needs."""
    program = (
        "import json, sys\n"
        "from fedtune.core import isolation\n"
        "isolation.no_network()\n"
        "from fedtune.core.config.site import ConvertTable\n"
        "from fedtune.core.data.conversion import Conversion\n"
        "with Conversion(ConvertTable(name='plain')) as convert:\n"
        "    print(json.dumps(convert([{'t': 'a. b'}])))\n"
    )
    paths = os.pathsep.join(filter(None, (*sys.path, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [row["t"] for row in json.loads(done.stdout)] == ["A", " B"]


def test_a_sample_of_units_is_converted_again_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its twin: a conversion that remembers, in the process that reads."""
    site = tmp_path / "site.toml"
    rows = [{"who": who, "t": "x"} for who in ("a", "b", "c")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    site.write_text(
        '[site]\nname = "s"\ndeclared_size = 10\n[data]\npath = "data.jsonl"\n'
        'columns = { text = "t", patient = "who" }\n'
        'convert = { name = "hostile", options = { how = "in_a_class" } }\n'
    )
    loaded = load_site(site)
    check_before_joining(loaded)
    monkeypatch.setattr("fedtune.core.data.records.Conversion", InThisProcess)
    with pytest.raises(DataError, match="3 of at most 8 units that were tried are converted"):
        check_before_joining(loaded)
    monkeypatch.setattr(studies, "under_way", lambda _: {"plan": "a study"})
    check_before_joining(loaded)  # in mid-study a person is told, and nobody else
