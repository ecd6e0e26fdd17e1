"""Room that a folder keeps free on its disk, so that what must be written there can be.

A site's ledger grows with its records by a few bytes for each. On a disk that is full but for those
bytes, whether a round can be charged would follow from how many records there are. So the state
folder holds a file of a public size which gives way while an order is answered."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("fedtune.site")
ROOM = "room"
LEAST = 64 * 2**10  # bytes: less is not worth a file
SPARE = 256 * 2**10  # bytes that are left to a ledger's entries by what can do without a disk


def bytes_for(declared_size: int) -> int:
    """Return how many bytes a site keeps free: 1 MiB for entries and updates, and for each unit
    that it declares 8 KiB, in which a ledger remembers some twenty records.

    >>> bytes_for(100)
    1867776
    """
    return 2**20 + 8 * 2**10 * declared_size


@contextmanager
def room_to_write(folder: Path, size: int) -> Iterator[None]:
    """Give up the room that `folder` keeps while the block writes there, and set it aside again.

    Raises nothing of its own: a disk without room for it is a warning in this machine's own log,
    and what there is is kept."""
    path = folder / ROOM
    try:
        if not path.exists() and not _allocate(path, size):
            log.warning(
                "%s: the disk has no %d bytes to spare; a round that cannot be charged is not "
                "trained; to do: free space",
                folder,
                size,
            )
        _give_up(path)
    except OSError as error:
        log.warning("%s: no room can be kept there (%s)", folder, error.strerror)
    try:
        yield
    finally:
        while size >= LEAST and not _allocate(path, size):
            size //= 2


def has_room(folder: Path, size: int) -> bool:
    """Return whether `folder`'s disk has `size` bytes beside those that are left to a ledger's
    entries; True where the disk does not say, and a write will."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        disk = os.fstatvfs(descriptor)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return disk.f_bavail * disk.f_frsize >= size + SPARE


def _give_up(path: Path) -> None:
    """Truncate the file. Errors: OSError, also where something else is in its place."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _allocate(path: Path, size: int) -> bool:
    """Grow the file to `size` bytes that are its own on the disk; False, and empty, where they are
    not to be had."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o600)
    except OSError:
        return False
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        os.ftruncate(descriptor, 0)
        return False
    finally:
        os.close(descriptor)
    return True
