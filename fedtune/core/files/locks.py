"""Lock files, each held by one process and released when that process ends, for whatever reason.

In a folder that other users can write, the name of a lock may be a link, a pipe or a device:
each is refused without waiting."""

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
    """Wait for the lock and hold it; the lock file is made if it is missing.

    shared: share the lock with other readers. Errors: InfrastructureError."""
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
    """Hold the lock in the block, unless another process does. Yields whether it is held; the
    lock file is made if it is missing. Errors: InfrastructureError."""
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
    """Unlock before closing: a process that was forked meanwhile has the descriptor too."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def hold_alone(path: Path, who: str, folder: Path) -> Iterator[bool]:
    """Hold the lock as the only process of its kind; the lock file is removed on release.

    who, folder: the name of such a process, and the folder it uses, for the error. Yields whether
    the last holder was killed. Errors: InfrastructureError naming the process that holds it."""
    with mapping_errors(path):
        descriptor = _lock_file(path)
    if descriptor is None:
        raise InfrastructureError(
            f"another {who} (process {_holder(path)}) uses {folder}",
            "one at a time",
            "end that one first, or give this one a folder of its own",
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
    """Turn errors of the operating system into InfrastructureError, naming the lock."""
    try:
        yield
    except OSError as error:
        raise InfrastructureError(
            f"{path}: cannot be locked ({error.strerror})",
            "a file that this user may write",
            "remove what is there, free the disk or fix the permissions",
        ) from None


def _lock_file(path: Path) -> int | None:
    """Lock the file that has the name now; None if another process has locked it.

    Errors: OSError."""
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
        os.close(descriptor)  # who let it go had removed it meanwhile


def _holder(path: Path) -> str:
    with suppress(OSError, ValueError):
        return str(int(path.read_text(encoding="ascii")[:20]))
    return "unknown"
