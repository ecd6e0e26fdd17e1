"""Hold locks on files. A lock is released when the process that holds it ends, for whatever reason.

In a folder that other users can write, a lock's name may belong to a link, a pipe or a device. Each
of these is refused without waiting."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedtune.core.errors import InfrastructureError
from fedtune.core.files import reading, writing


@contextmanager
def hold(path: Path, *, shared: bool = False) -> Iterator[None]:
    """A context manager that waits for the lock on the file `path`, and holds it for the length of
    the block.

    shared: whether other processes that ask for it with shared=True may hold it at the same time. A
    missing lock file is made, except if `shared` is true, when it is an error. Errors:
    InfrastructureError."""
    with mapping_errors(path):
        if shared:
            descriptor = reading.descriptor(path, os.O_RDONLY | os.O_NOFOLLOW)
        else:
            descriptor = writing.open_own(path, os.O_RDWR)
    try:
        with mapping_errors(path):
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        _let_go(descriptor)


@contextmanager
def hold_if_free(path: Path) -> Iterator[bool]:
    """A context manager that takes the lock on the file `path` for the length of the block if
    nobody else holds it, without waiting. It yields whether it has taken the lock. The lock file is
    made if it is missing. Errors: InfrastructureError."""
    with mapping_errors(path):
        descriptor = writing.open_own(path, os.O_RDWR)
    try:
        with mapping_errors(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_ours = True
            except BlockingIOError:
                is_ours = False
        yield is_ours
    finally:
        _let_go(descriptor)


def _let_go(descriptor: int) -> None:
    """Release a lock and close its file. Closing alone would not release the lock if a process that
    was forked meanwhile has the file's descriptor too."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def hold_alone(path: Path, who: str, folder: Path) -> Iterator[bool]:
    """A context manager that holds a lock for the length of the block as the only process of its
    kind. It yields whether the last process that held the lock was killed. The lock file is removed
    at the end.

    - path: the lock file
    - who, folder: the kind of process, and the folder that it uses, for the error

    Errors: InfrastructureError at once, without waiting, if another process holds the lock; it
    names that process."""
    with mapping_errors(path):
        descriptor = _lock_file(path)
    if descriptor is None:
        raise InfrastructureError(
            f"another {who} (process {_holder(path)}) uses {folder}",
            "one such process at a time",
            "end the other process first, or give this one a folder of its own",
        )
    try:
        with mapping_errors(path):
            killed = bool(os.pread(descriptor, 1, 0))
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield killed
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


@contextmanager
def mapping_errors(path: Path) -> Iterator[None]:
    """A context manager that turns an OSError in the block into an InfrastructureError, which names
    the lock file `path`."""
    try:
        yield
    except OSError as error:
        raise InfrastructureError(
            f"{path}: cannot be locked ({error.strerror})",
            "a file that this user may write",
            "remove what is there, free disk space or fix the permissions",
        ) from None


def _lock_file(path: Path) -> int | None:
    """Lock the file that has the name `path` at present, and return its descriptor. Return None if
    another process has locked it. If the last holder removes the file meanwhile, the new file is
    locked. Errors: OSError."""
    while True:
        descriptor = writing.open_own(path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the last holder has removed this file meanwhile


def _holder(path: Path) -> str:
    with suppress(OSError, ValueError):
        return str(int(path.read_text(encoding="ascii")[:20]))
    return "unknown"
