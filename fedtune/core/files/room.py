"""Reserve disk space at a site for what must be written there: ledger, receipts and audit log.

A site's ledger grows by a few bytes for each record, and each withdrawal adds a receipt and an
entry of the audit log. On a disk that is nearly full, the number of records would decide whether a
round can be charged. So a file beside the ledger, called the room, shrinks as these files grow:
ledger, receipts, audit log and room together always have the same, public number of bytes. Whether
the disk has these bytes, and how many more, then depends only on the other files on the disk. If it
does not have them, no order (any request of the coordinator except one for admission) is answered.

While an order is answered, a part of the room is freed for the writes ("given up"), and reserved
again afterwards. The vaults of a hospital's memberships share one ledger and may answer orders at
the same time. Each of them then frees a file of its own, named after the membership, and a common
file shrinks as the ledger grows."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fedtune.core.errors import InfrastructureError
from fedtune.core.files import locks

log = logging.getLogger("fedtune.site")
ROOM = "room"
ORDERS = "orders.lock"  # held while an order is answered; a membership's lock has its name
SHARED = "room.lock"  # held while the files of a hospital's room change
OFFICER = "officer"  # has space of its own, for a withdrawal while orders are answered
LEDGER = "ledger.db"
ROUNDS = 2048  # most rounds that a ledger pays for in its life, by default
OF_A_ROUND = 4 * 2**10  # bytes of all entries that one round makes, at most
OF_MEMBERS = 8 * 2**10  # bytes of what a ledger remembers of a unit's records
OF_A_WITHDRAWAL = 4 * 2**10  # bytes of its receipt; and again of its entry in the audit log
BLOCK = 4096  # bytes of a disk that a file takes at once
RECEIPTS, AUDIT = ("withdrawals/*.json",), ("audit.jsonl", "audit-*.jsonl")


@dataclass(frozen=True)
class Room:
    """The disk space that is reserved beside a ledger: files whose only purpose is to take space
    (the room).

    - folder: the ledger's folder
    - declared_size: the site's or the hospital's declared number of units
    - rounds: the most rounds that the ledger pays for
    - membership: if a hospital's memberships share the ledger, the membership (or OFFICER) for
      whose writes space is freed; else ""
    - memberships: all memberships of the hospital

    >>> room = Room(Path("state"), 100)
    >>> room.of_an_answer, room.size
    (11075584, 22151168)
    """

    folder: Path
    declared_size: int
    rounds: int = ROUNDS
    membership: str = ""
    memberships: tuple[str, ...] = ()

    @property
    def of_an_answer(self) -> int:
        """How many bytes are freed while an order of the coordinator is answered. They are 1 MiB
        for entries and updates, 8 KiB for each unit (for a ledger's hashes of some forty records),
        and as many as the ledger may grow to (`of_the_ledger`), since SQLite first copies each page
        that a transaction changes into its journal."""
        return 2**20 + OF_MEMBERS * self.declared_size + self.of_the_ledger

    @property
    def of_the_ledger(self) -> int:
        """The most bytes by which the room (the file of reserved space) shrinks as the ledger
        grows: 4 KiB for each round that the ledger may ever pay for, and 8 KiB for each declared
        unit."""
        return OF_A_ROUND * self.rounds + OF_MEMBERS * self.declared_size

    @property
    def of_receipts(self) -> int:
        """The most bytes by which the room (the file of reserved space) shrinks as receipts of
        withdrawals are added: 4 KiB for each declared unit."""
        return OF_A_WITHDRAWAL * self.declared_size

    @property
    def of_the_audit_log(self) -> int:
        """The most bytes by which the room (the file of reserved space) shrinks as the audit log
        grows: 1 MiB, and 4 KiB for each declared unit. There is a limit since a coordinator can
        cause any number of entries, which must not use up the space of the ledger or the
        receipts."""
        return 2**20 + OF_A_WITHDRAWAL * self.declared_size

    @property
    def of_growth(self) -> int:
        """The most bytes by which the room shrinks in all, as the ledger, the receipts and the
        audit log grow."""
        return self.of_the_ledger + self.of_receipts + self.of_the_audit_log

    @property
    def lent(self) -> int:
        """How many bytes the users of the room may free at once, all together. The users of a
        hospital's shared ledger are the memberships and the officer; another ledger has one
        user."""
        return self.of_an_answer * max(1, len(self._users))

    @property
    def size(self) -> int:
        """How many bytes the ledger, the receipts, the audit log and the room's own files take
        together. This number does not change as they grow."""
        return self.lent + self.of_growth

    def of(self, membership: str) -> Room:
        """Return a copy of this room with `membership` (or OFFICER) as the one whose space is
        freed. If the ledger is not shared by a hospital's memberships, there is one common space,
        and the copy is equal to this room."""
        return replace(self, membership=membership if self.membership else "")

    def has_space(self, beside: int = 0) -> bool:
        """Return whether the disk has the whole reserved space and `beside` bytes more. If the file
        system does not tell, return True: a write will then fail if the space is missing."""
        try:
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return True
        try:
            disk = os.fstatvfs(descriptor)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        free = disk.f_bavail * disk.f_frsize
        taken = sum(_length(path) for path in self._files)
        return free + taken + self._grown >= self.size + beside

    @contextmanager
    def give_up(self) -> Iterator[None]:
        """A context manager that frees the space that an order's answer needs, for the block's
        writes, and reserves it again afterwards.

        Errors: InfrastructureError, before the block, if the disk does not have the whole space."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise self._none(error) from error
        with locks.hold(_lock_of(self.folder, self.membership)), self._given_up():
            yield

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        try:
            with self._shared():
                self._take(self.of_an_answer)
                self._take(0)
        except OSError as error:
            raise self._none(error) from error
        try:
            yield
        finally:
            try:
                with self._shared():
                    self._take(self.of_an_answer)
            except OSError as error:
                log.warning(
                    "%s: disk space for the ledger cannot be reserved again (%s); no order is "
                    "answered until it can; to do: free space",
                    self.folder,
                    error.strerror,
                )

    @contextmanager
    def _shared(self) -> Iterator[None]:
        """A context manager that holds the lock under which the room's files change, for the length
        of the block. Only a ledger that a hospital's memberships share has and needs this lock."""
        with locks.hold(self.folder / SHARED) if self.membership else nullcontext():
            yield

    def _take(self, of_an_answer: int) -> None:
        """Give the room's files the lengths that they must have now, with `of_an_answer` bytes
        reserved for the answer to an order (0 while an order is answered). The common file is
        shortened first, by as much as ledger, receipts and audit log have grown, so that other
        memberships find their space. Errors: OSError."""
        growth = self.of_growth - self._grown
        if not self.membership:
            _allocate(self.folder / ROOM, growth + of_an_answer)
            return
        _allocate(self.folder / ROOM, growth)
        _allocate(self.folder / f"{ROOM}-{self.membership}", of_an_answer)

    @property
    def _users(self) -> tuple[str, ...]:
        return (*self.memberships, OFFICER) if self.membership else ()

    @property
    def _files(self) -> list[Path]:
        names = [ROOM, *(f"{ROOM}-{name}" for name in self._users)]
        return [self.folder / name for name in names]

    def _none(self, error: OSError) -> InfrastructureError:
        return InfrastructureError(
            f"{self.folder}: no room for the ledger on its disk ({error.strerror})",
            f"{self.size} bytes for the ledger and the file {ROOM!r} beside it",
            "free space; orders are answered from then on",
        )

    @property
    def _grown(self) -> int:
        """How many bytes the ledger, the receipts and the audit log take, each counted up to its
        own limit."""
        return (
            min(_length(self.folder / LEDGER), self.of_the_ledger)
            + min(self._blocks(RECEIPTS), self.of_receipts)
            + min(self._blocks(AUDIT), self.of_the_audit_log)
        )

    def _blocks(self, names: tuple[str, ...]) -> int:
        """Return how many bytes files take on the disk, in whole blocks. names: patterns of `glob`,
        relative to the room's folder, that select the files."""
        files = [path for name in names for path in self.folder.glob(name)]
        return BLOCK * sum(-(-_length(path) // BLOCK) for path in files)


def _lock_of(folder: Path, membership: str) -> Path:
    name = Path(ORDERS)
    return folder / (f"{name.stem}-{membership}{name.suffix}" if membership else ORDERS)


@contextmanager
def between_orders(folder: Path) -> Iterator[bool]:
    """A context manager that keeps the sites whose ledger is in `folder` from answering orders of a
    coordinator for the length of the block. It yields True, or False if an order was being answered
    already. Where it is False, the block must write nothing, since it would take disk space that
    was freed for the ledger.

    Errors: InfrastructureError."""
    stem = Path(ORDERS).stem
    paths = {folder / ORDERS, *folder.glob(f"{stem}-*{Path(ORDERS).suffix}")}
    with ExitStack() as held:
        yield all([held.enter_context(locks.hold_if_free(path)) for path in sorted(paths)])


def reserve(descriptor: int, size: int) -> bool:
    """Reserve `size` bytes on disk for an open file, without changing its length. Return False if
    the disk does not have them; nothing is reserved then. Return True if they are reserved, and
    also if the file system cannot reserve space."""
    of_no_more_length = 1  # FALLOC_FL_KEEP_SIZE
    sizes = ctypes.c_longlong(0), ctypes.c_longlong(size)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(descriptor, of_no_more_length, *sizes) == 0:
        return True
    if ctypes.get_errno() not in (errno.ENOSPC, errno.EDQUOT):
        return True
    os.ftruncate(descriptor, os.fstat(descriptor).st_size)  # a part may have been given already
    return False


def _length(path: Path) -> int:
    """Return a file's length in bytes; 0 if there is no file."""
    with suppress(OSError):
        return path.stat(follow_symlinks=False).st_size
    return 0


def _allocate(path: Path, size: int) -> None:
    """Make the file exactly `size` bytes long, with disk blocks for all of them; a missing file is
    made.
    Errors: OSError if the disk lacks the space, and the file then keeps its length; OSError also if
    `path` is a link, a pipe or a device."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    try:
        before = os.fstat(descriptor).st_size
        try:
            if size > before:
                os.posix_fallocate(descriptor, 0, size)
            os.ftruncate(descriptor, size)
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)
