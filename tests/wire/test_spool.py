"""A spool's folder: what a hostile courier leaves there, and what a crash or a full disk does."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.core.errors import ConfigError, InfrastructureError
from fedtune.core.wire import spool as module
from fedtune.core.wire.arrays import pack_arrays
from fedtune.core.wire.requests import Answer, Request, RequestError
from fedtune.core.wire.spool import MOST, MOST_FILE, Spool, decode_request
from tests.disks import disk

ANSWER = Answer("site", {"status": "trained", "reason": ""}, "update", {})


def request(number: int = 1) -> Request:
    arrays = pack_arrays({"a": np.arange(5, dtype=np.float32)})
    return Request("train", {"order": {"round": number, "plan": "sha256:0"}}, arrays)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.at(tmp_path / "spool")


def named(spool: Spool, content: bytes) -> Path:
    """The path that a request of this content would have."""
    return spool.requests / hashlib.sha256(content).hexdigest()


def whole(spool: Spool) -> bytes:
    """The bytes of a request that nobody has tampered with; it is there no more."""
    name = spool.ask(request())
    content = (spool.requests / name).read_bytes()
    spool.withdraw(name)
    return content


# ------------------------------------------------------------------------------ one request


def test_a_request_and_its_answer_arrive_as_they_were(spool: Spool) -> None:
    name = spool.ask(request())
    assert spool.waiting() == [name]
    content = spool.take(name)
    assert content is not None
    asked = decode_request(content)
    assert (asked.kind, asked.tables) == ("train", request().tables)
    assert asked.arrays["a"].data == request().arrays["a"].data
    assert spool.answer_to(name) is None
    sent = Answer("site", ANSWER.fields, "update", request().arrays)
    spool.put(name, sent)
    got = spool.answer_to(name)
    assert got is not None and got.fields == sent.fields
    assert got.arrays["a"].data == sent.arrays["a"].data
    assert spool.waiting() == []
    spool.remove_answered()
    assert spool.answer_to(name) is not None  # its request is still there
    spool.withdraw(name)
    spool.remove_answered()
    assert {*spool.path.rglob("*")} == {spool.answers, spool.requests}


def test_the_same_request_again_has_another_name(spool: Spool) -> None:
    """So that an answer that was left is not taken for one to it."""
    assert spool.ask(request()) != spool.ask(request())


def test_an_answer_to_another_request_is_not_taken(spool: Spool) -> None:
    first, second = spool.ask(request(1)), spool.ask(request(2))
    spool.put(first, ANSWER)
    (spool.answers / first).rename(spool.answers / second)
    with pytest.raises(RequestError, match="another request"):
        spool.answer_to(second)


def test_an_answers_file_says_nothing_beside_its_content(spool: Spool) -> None:
    names = [spool.ask(request(1)), spool.ask(request(2))]
    for name in names:
        spool.put(name, ANSWER)
        time.sleep(0.01)
    seen = {
        (status.st_mode, status.st_mtime_ns, status.st_size, status.st_nlink)
        for status in ((spool.answers / name).stat() for name in names)
    }
    assert len(seen) == 1
    mode, written, _, links = seen.pop()
    assert (stat.S_IMODE(mode), written, links) == (0o600, 0, 1)


def test_the_oldest_request_is_answered_first(spool: Spool) -> None:
    names = [spool.ask(request(number)) for number in range(5)]
    for age, name in enumerate(names):
        os.utime(spool.requests / name, (1000 - age, 1000 - age))
    assert spool.waiting() == names[::-1]


def test_a_request_of_another_release_is_refused(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "__version__", "0.0.1")
    content = whole(spool)
    monkeypatch.undo()
    with pytest.raises(RequestError, match="another release"):
        decode_request(content)


# ------------------------------------------------------------------------------ hostile files


def a_link(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def a_hard_link(path: Path, secret: Path) -> None:
    path.hardlink_to(secret)


def a_pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path, _: Path) -> None:
    path.mkdir()


def a_socket(path: Path, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        made.bind(path.name)
        os.chdir(here)


def a_device(path: Path, _: Path) -> None:
    if os.geteuid():
        pytest.skip("only root makes a device")
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # zeros without an end


def another_users(path: Path, secret: Path) -> None:
    if os.geteuid():
        pytest.skip("only root gives a file away")
    path.write_bytes(secret.read_bytes())
    os.chown(path, 65534, 65534)


def too_long(path: Path, _: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MOST_FILE + 1)


HOSTILE = [a_link, a_hard_link, a_pipe, a_folder, a_socket, a_device, another_users, too_long]


@pytest.mark.parametrize("make", HOSTILE)
def test_what_is_no_file_of_the_couriers_is_not_read(
    make: Callable[[Path, Path], None], spool: Spool, tmp_path: Path
) -> None:
    """Its content has the right digest, so that nothing but what it is refuses it; nobody waits."""
    content = whole(spool)
    secret = tmp_path / "secret"
    secret.write_bytes(content)
    path = named(spool, content)
    make(path, secret)
    good = spool.ask(request())
    began = time.monotonic()
    assert spool.take(path.name) is None
    assert spool.waiting() == [good] and spool.take(good)
    assert time.monotonic() - began < 2
    spool.withdraw_all()
    assert secret.read_bytes() == content
    assert not [p for p in spool.requests.iterdir() if not p.is_dir()]


def test_a_file_that_is_not_what_its_name_says_is_read_once(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    content = whole(spool)
    path = named(spool, content)
    path.write_bytes(content[:-1])  # as one that is still being written
    caplog.set_level(logging.WARNING, "fedtune")
    assert spool.waiting() == [path.name]
    assert spool.take(path.name) is None
    assert spool.waiting() == [] and len(caplog.records) == 1
    path.write_bytes(content)  # now it is
    assert spool.waiting() == [path.name] and spool.take(path.name) == content


def test_a_file_that_is_rewritten_while_it_is_read_is_judged_by_what_was_read(
    spool: Spool,
) -> None:
    content = os.urandom(1 << 20)
    path, stop = named(spool, content), threading.Event()
    path.write_bytes(content)
    other = bytes(reversed(content))

    def rewrite() -> None:
        with path.open("r+b") as file:
            while not stop.is_set():
                for each in (other, content):
                    file.seek(0)
                    file.write(each)
                    file.flush()

    writing = threading.Thread(target=rewrite)
    writing.start()
    try:
        taken = [spool.take(path.name) for _ in range(200)]
    finally:
        stop.set()
        writing.join()
    assert {*taken} <= {None, content} and None in taken


def test_a_file_that_grows_or_shrinks_while_it_is_read_is_not_taken(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = whole(spool)
    path, plain = named(spool, content), os.fstat

    for size in (1, len(content) + 1):
        path.write_bytes(content)

        def then_changed(number: int, size: int = size) -> os.stat_result:
            found = plain(number)
            if stat.S_ISREG(found.st_mode):
                os.truncate(path, size)
            return found

        monkeypatch.setattr(module.os, "fstat", then_changed)
        assert spool.take(path.name) is None
        monkeypatch.undo()


def test_a_flood_of_files_is_refused_and_passes(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    name = spool.ask(request())
    for number in range(10_000):
        (spool.requests / f"{number:064x}").touch()
    caplog.set_level(logging.WARNING, "fedtune")
    began = time.monotonic()
    for _ in range(100):
        assert spool.waiting() == []
    spool.remove_answered()
    assert time.monotonic() - began < 2
    assert [r.getMessage() for r in caplog.records] == [
        f"more than {MOST} files in {spool.requests}: none is answered"
    ]
    for number in range(10_000):
        (spool.requests / f"{number:064x}").unlink()
    assert spool.waiting() == [name]


def test_a_folder_that_became_a_link_is_not_used(spool: Spool, tmp_path: Path) -> None:
    """Neither to read requests by, nor to write answers, nor to remove any."""
    name = spool.ask(request())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    kept = elsewhere / ("0" * 64)
    kept.touch()
    for folder in (spool.requests, spool.answers):
        folder.rename(aside := folder.with_suffix(".aside"))
        folder.symlink_to(elsewhere)
        with pytest.raises(InfrastructureError):
            spool.waiting()
        with pytest.raises(InfrastructureError):
            spool.remove_answered()
        folder.unlink()
        aside.rename(folder)
    spool.answers.rmdir()
    spool.answers.symlink_to(elsewhere)
    with pytest.raises(InfrastructureError):
        spool.put(name, ANSWER)
    assert [*elsewhere.iterdir()] == [kept]


def test_a_spool_is_a_folder_of_this_users_that_nobody_else_writes(tmp_path: Path) -> None:
    open_ = tmp_path / "open"
    open_.mkdir()
    open_.chmod(0o777)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (open_, tmp_path / "file", tmp_path / "link", tmp_path / "none" / "spool"):
        with pytest.raises(ConfigError, match="--spool"):
            Spool.at(path)
    made = Spool.at(tmp_path / "spool")
    assert {stat.S_IMODE(p.stat().st_mode) for p in (made.path, made.requests)} == {0o700}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 400))
def test_whatever_a_file_holds_is_a_request_or_an_error_of_its_form(
    noise: bytes, cut: int, at: int
) -> None:
    content = module._encode(request(), {"number": "0" * 32})
    for changed in (noise, content[:cut], content[:at] + noise + content[at:], noise + content):
        with suppress(RequestError):
            decode_request(changed)


# --------------------------------------------------------------------- full disks and crashes


def test_on_a_full_disk_there_is_no_answer_and_later_a_whole_one(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", megabytes=8) as small:
        spool = Spool.at(small.path / "spool")
        name = spool.ask(request())
        long = pack_arrays({"a": np.zeros(2**18, dtype=np.float32)})
        answer = Answer("site", ANSWER.fields, "update", long)
        with small.with_room_for(2**16), pytest.raises(InfrastructureError, match="No space"):
            spool.put(name, answer)
        assert [*spool.answers.iterdir()] == [] and spool.answer_to(name) is None
        assert spool.waiting() == [name]
        spool.put(name, answer)
        got = spool.answer_to(name)
        assert got is not None and got.arrays["a"].data == long["a"].data
        with small.read_only(), pytest.raises(InfrastructureError):
            spool.withdraw(name)


KILLED = """
import os, signal, sys
from pathlib import Path
from fedtune.core.wire import spool
from tests.wire.test_spool import ANSWER, request
def killed(*given, **named):
    os.kill(os.getpid(), signal.SIGKILL)
before, half, name = sys.argv[2:]
made = spool.Spool.at(Path(sys.argv[1]))
setattr(spool if before == "write_all" else os, before, killed)
made.ask(request()) if half == "courier" else made.put(name, ANSWER)
"""


@pytest.mark.parametrize("half", ["vault", "courier"])
@pytest.mark.parametrize("before", ["write_all", "close", "rename", "fsync"])
def test_what_a_killed_half_left_is_no_request_and_no_answer(
    spool: Spool, before: str, half: str
) -> None:
    """`fsync`: of the file before it is renamed, so that it is never there without its content."""
    name = spool.ask(request())
    command = [sys.executable, "-c", KILLED, str(spool.path), before, half, name]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert spool.waiting() == [name] and spool.answer_to(name) is None
    assert len([*spool.path.glob("*/*.new")]) == 1
    if half == "vault":
        spool.remove_drafts()
        spool.put(name, ANSWER)
        assert spool.answer_to(name) is not None
    else:
        spool.withdraw_all()
    spool.withdraw_all()
    spool.remove_answered()
    assert [*spool.path.glob("*/*")] == []


def test_another_error_of_the_disk_is_said(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    name = spool.ask(request())
    monkeypatch.setattr(module.os, "fsync", broken)
    with pytest.raises(InfrastructureError, match="Input/output error"):
        spool.put(name, ANSWER)
