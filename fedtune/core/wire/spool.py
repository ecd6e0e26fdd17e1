"""Pass requests and answers as files, for a vault and a courier that share only a folder.

    DIR/requests/NAME   the courier writes and removes them; the vault reads them
    DIR/answers/NAME    the vault writes and removes them; the courier reads them

NAME is the sha256 of the request's file. A request's file holds a random number, so that no two
requests have the same name. An answer names its request, so that an answer which an earlier courier
did not fetch is never taken for the answer to another request. A file is written under another
name, synced to disk and renamed, so that under its own name it is complete or does not exist.

Guarantee: no file in DIR/requests can do more than delay an answer.

| a file in DIR/requests                                    | what the vault does with it         |
| a link, a pipe, a folder, a device, a file with two names | not opened, or closed again unread  |
| another user's file; one longer than a request can be     | closed again unread                 |
| a file that does not hash to its name: written while it   | read once, and not answered; the    |
| is read, cut off, copied                                  | hash is of the bytes that were read |
| more than MOST files                                      | none is answered until there are    |
|                                                           | fewer                               |
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from fedtune import __version__
from fedtune.core.errors import ConfigError, InfrastructureError
from fedtune.core.files.writing import remove_drafts, write_all
from fedtune.core.wire.requests import (
    MOST_ARRAYS,
    MOST_BYTES,
    MOST_WORDS,
    Answer,
    Request,
    RequestError,
    receive_answer,
    receive_request,
    send,
)

log = logging.getLogger("fedtune.spool")
NAME = re.compile(r"[0-9a-f]{64}\Z")
MOST = 16  # files of requests at once; a courier has one, and a draft of it
MOST_NAMES = 1024  # most names that are read of a folder at once
LENGTH = 8  # bytes in which the length of what follows is written
MOST_HEAD = 1024  # bytes of a file's first part
MOST_FILE = MOST_HEAD + MOST_WORDS + MOST_BYTES + LENGTH * (MOST_ARRAYS + 2)
Seen = tuple[int, int, int]  # a file's inode number, its length, and when it was written


@dataclass(frozen=True)
class Spool:
    """A folder through which a courier and a vault pass requests and answers as files. path: this
    folder, in which requests/ and answers/ lie. Each method raises InfrastructureError if the disk
    or the folder refuses."""

    path: Path
    _refused: dict[str, Seen] = field(default_factory=dict)  # files that were judged already
    _warned: set[str] = field(default_factory=set)

    @property
    def requests(self) -> Path:
        return self.path / "requests"

    @property
    def answers(self) -> Path:
        return self.path / "answers"

    @classmethod
    def at(cls, path: Path) -> Spool:
        """Return the spool at `path`: a folder through which vault and courier pass files. Make it,
        and its folders requests/ and answers/, if they do not exist, for this user only.

        Errors: ConfigError if one cannot be made, or others may write there."""
        spool = cls(path.absolute())
        try:
            for folder in (spool.path, spool.requests, spool.answers):
                folder.mkdir(mode=0o700, exist_ok=True)
                with _opened(folder) as number:
                    if os.fstat(number).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                        raise OSError(errno.EPERM, "others may write there")
        except OSError as error:
            raise ConfigError(
                f"--spool {path}: cannot be used ({error.strerror or error})",
                "a folder that only this user can write, inside a folder that exists",
            ) from None
        return spool

    # ------------------------------------------------------------------------------ the courier

    def ask(self, request: Request) -> str:
        """Write a request to a file; return the file's name, by which the answer is found."""
        content = _encode(request, {"number": secrets.token_hex(16)})
        name = hashlib.sha256(content).hexdigest()
        with self._of(self.requests) as folder:
            _write(folder, name, content)
        return name

    def answer_to(self, name: str) -> Answer | None:
        """Return the answer to the request `name`; None as long as there is none. Errors:
        RequestError if the answer's file is not an answer to this request."""
        try:
            with self._of(self.answers) as folder:
                content = _read(folder, name)
        except _NotTaken as why:
            raise RequestError(f"the answer is {why}", "a regular file") from None
        return None if content is None else _decode_answer(name, content)

    def withdraw(self, name: str) -> None:
        """Remove the request `name`, which was answered or whose answer is no longer awaited."""
        with self._of(self.requests) as folder:
            _remove(folder, name)

    def withdraw_all(self) -> None:
        """Remove all requests, which an earlier courier left."""
        with self._of(self.requests) as folder:
            for name in os.listdir(folder):
                _remove(folder, name)

    # -------------------------------------------------------------------------------- the vault

    def waiting(self) -> list[str]:
        """List the names of requests that have no answer, the oldest first. Leave out a file that
        `take` refused and that has not changed since. Return [] if there are more than MOST files.
        """
        with self._of(self.requests) as folder, self._of(self.answers) as answers:
            found = dict[str, os.stat_result]()
            with os.scandir(folder) as entries:
                listed = list(islice(entries, MOST + 1))
            for entry in listed:
                with suppress(FileNotFoundError):
                    found[entry.name] = entry.stat(follow_symlinks=False)
            for name in set(self._refused) - set(found):
                del self._refused[name]
            if len(listed) > MOST:
                self._warn(f"more than {MOST} files in {self.requests}: none is answered")
                return []
            self._warned.clear()
            new = [
                (status.st_mtime_ns, name)
                for name, status in found.items()
                if NAME.match(name) and self._refused.get(name) != _identify(status)
                if stat.S_ISREG(status.st_mode) and not _is_there(answers, name)
            ]
        return [name for _, name in sorted(new)]

    def take(self, name: str) -> bytes | None:
        """Read a request's file, once. Return None if the file is gone, or if it is refused: it is
        no regular file of this user, has a second name, is too long, or does not hash to its
        name."""
        with self._of(self.requests) as folder:
            seen = _look(folder, name)
            try:
                content = _read(folder, name)
                if content is not None and hashlib.sha256(content).hexdigest() != name:
                    raise _NotTaken("not what its name says")
            except _NotTaken as why:
                log.warning("a file in %s is %s: it is not answered", self.requests, why)
                if seen:
                    self._refused[name] = seen
                return None
        return content

    def put(self, name: str, answer: Answer) -> None:
        """Write the answer to the request `name`. The file's mode and its times are always the
        same, so that they tell nothing."""
        with self._of(self.answers) as folder:
            _write(folder, name, _encode(answer, {"request": name}), dated=False)

    def remove_answered(self) -> None:
        """Remove the answers whose requests are gone, because the courier has read the answer or no
        longer waits for it."""
        with self._of(self.requests) as requests, self._of(self.answers) as answers:
            with os.scandir(answers) as entries:
                listed = [entry.name for entry in islice(entries, MOST_NAMES)]
            for name in listed:
                if NAME.match(name) and not _is_there(requests, name):
                    _remove(answers, name)

    def remove_drafts(self) -> None:
        """Remove files that a vault had not finished writing when it was killed."""
        remove_drafts(self.answers)

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", text)

    @contextmanager
    def _of(self, path: Path) -> Iterator[int]:
        """A context manager: open `path`, one of the folders requests/ and answers/, and yield its
        descriptor. An OSError in the block becomes an InfrastructureError."""
        try:
            with _opened(path) as number:
                yield number
        except OSError as error:
            raise InfrastructureError(
                f"{path}: {error.strerror or type(error).__name__}",
                "a folder of this user's on a disk that has room",
                "free disk space or fix the permissions",
            ) from None


def decode_request(content: bytes) -> Request:
    """Decode the content of a request's file. Errors: RequestError if it is no request, is cut off
    or too long, or was written by another release."""
    way = _InMemory(content)
    try:
        _check_release(_head(way))
        return receive_request(way)
    except (OSError, EOFError):
        raise RequestError("the file of a request is cut off, or too long") from None


def _decode_answer(name: str, content: bytes) -> Answer:
    way = _InMemory(content)
    try:
        head = _head(way)
        _check_release(head)
        if head.get("request") != name:
            raise RequestError("the file holds the answer to another request")
        return receive_answer(way)
    except (OSError, EOFError):
        raise RequestError("the file of an answer is cut off, or too long") from None


def _encode(sent: Request | Answer, head: dict[str, str]) -> bytes:
    way = _InMemory()
    way.send_bytes(json.dumps({"release": __version__, **head}).encode())
    send(way, sent)
    return way.content()


def _head(way: _InMemory) -> dict[str, Any]:
    """Read the first part of a spool's file, a table with the release that wrote the file. In the
    file of an answer the table also has the name of the request. Errors: OSError, EOFError,
    RequestError."""
    try:
        head = json.loads(way.recv_bytes(MOST_HEAD))
    except (ValueError, RecursionError):
        raise RequestError("the file has no header, which a spool's file begins with") from None
    if not isinstance(head, dict):
        raise RequestError("the file has no header, which a spool's file begins with")
    return head


def _check_release(head: dict[str, Any]) -> None:
    if head.get("release") != __version__:
        raise RequestError(
            "the file is of another release",
            f"a file of fedtune {__version__}",
            "run the same release as vault and as courier",
        )


class _InMemory:
    """A channel (`Channel`) whose parts are not sent but written to memory, or read from there. The
    bytes in memory are those of a spool's file: for each part its length, then the part."""

    def __init__(self, content: bytes = b"") -> None:
        self._parts, self._left = list[bytes](), memoryview(content)

    def send_bytes(self, sent: bytes, /) -> None:
        self._parts += [len(sent).to_bytes(LENGTH, "big"), sent]

    def recv_bytes(self, most: int, /) -> bytes:
        """Return the next part of the file. most: the largest number of bytes that it may have.
        Errors: EOFError if the content ends before the part does; OSError if the part is longer
        than `most`."""
        length = int.from_bytes(self._left[:LENGTH], "big")
        if length > most:
            raise OSError("longer than it may be")
        body = bytes(self._left[LENGTH : LENGTH + length])
        if len(self._left) < LENGTH + length:
            raise EOFError
        self._left = self._left[LENGTH + length :]
        return body

    def content(self) -> bytes:
        return b"".join(self._parts)


# ---------------------------------------------------------------------------------- single files


class _NotTaken(Exception):
    """Raised if a file does not belong to a spool. Its text says what the file is, for a person."""


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A context manager: open a folder, and yield its descriptor. Errors: OSError if the path is a
    link, or the folder is another user's."""
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(number).st_uid != os.geteuid():
            raise OSError(errno.EPERM, "another user's folder")
        yield number
    finally:
        os.close(number)


def _look(folder: int, name: str) -> Seen | None:
    try:
        return _identify(os.stat(name, dir_fd=folder, follow_symlinks=False))
    except FileNotFoundError:
        return None


def _is_there(folder: int, name: str) -> bool:
    return _look(folder, name) is not None


def _identify(status: os.stat_result) -> Seen:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(folder: int, name: str) -> bytes | None:
    """Read a file of a spool completely; None if it does not exist. folder: the open descriptor of
    the folder; name: the file's name in it. Errors: _NotTaken if it is a link or no regular file,
    is another user's, has a second name, is too long, or is being written; OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        number = os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EWOULDBLOCK):
            raise _NotTaken("a link, a socket, or held by somebody") from None
        raise
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode):
            raise _NotTaken("no regular file")
        if status.st_uid != os.geteuid() or status.st_nlink != 1:
            raise _NotTaken("another user's, or has a second name")
        if status.st_size > MOST_FILE:
            raise _NotTaken("too long")
        with open(number, "rb", closefd=False) as file:
            content = file.read(status.st_size + 1)
    except MemoryError:
        raise _NotTaken("larger than this machine's memory") from None
    finally:
        os.close(number)
    if len(content) != status.st_size:
        raise _NotTaken("being written")
    return content


def _write(folder: int, name: str, content: bytes, *, dated: bool = True) -> None:
    """Write a file completely or not at all.

    - folder: the open descriptor of the folder
    - name: the file's name in the folder; a file of that name is replaced
    - content: all of its bytes
    - dated: whether the file has the time of this call; if not, its times are 0 (1970)

    Errors: OSError; no file is left then."""
    draft = f"{name}.{secrets.token_hex(4)}.{os.getpid()}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        number = os.open(draft, flags, 0o600, dir_fd=folder)
        try:
            write_all(number, content)
            if not dated:
                os.utime(number, (0, 0))
        finally:
            os.close(number)
        os.rename(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        _remove(folder, draft)
        raise
    os.fsync(folder)


def _remove(folder: int, name: str) -> None:
    """Remove a file, if it exists and may be removed. A folder of that name stays, since neither
    courier nor vault made it."""
    with suppress(FileNotFoundError, IsADirectoryError, PermissionError):
        os.unlink(name, dir_fd=folder)
