"""Reserve disk space at a site, so that writes which must succeed do.

A site's ledger grows with its records, by a few bytes for each, and each withdrawal leaves a
receipt and an entry of the audit log. On a disk that is nearly full, the number of these would
decide whether a round can be charged, or which records are remembered. So a file beside them
shrinks as they grow: ledger, receipts, audit log and this file together have a constant, public
number of bytes. Whether the disk has these bytes,
and how much it has besides, then depends only on the other files on the disk. If it does not have
them, no order is answered.

A hospital's ledger is shared by the vaults of its memberships, which may answer orders at the same
time. Each then has space of its own to give up while it answers, in a file that bears its name; one
file beside these makes up for what the ledger has grown."""

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
ORDERS = "orders.lock"  # held while an order is answered; a membership's has its name
SHARED = "room.lock"  # held while the files of a hospital's room change
OFFICER = "officer"  # has space to give up too: for a withdrawal while orders are answered
LEDGER = "ledger.db"
ROUNDS = 2048  # that a ledger pays for in its life, where its site does not say otherwise
OF_A_ROUND = 4 * 2**10  # bytes of all entries that one round makes, at most
OF_MEMBERS = 8 * 2**10  # bytes of what a ledger remembers of a unit's records
OF_A_WITHDRAWAL = 4 * 2**10  # bytes of its receipt; and again of its entry in the audit log
BLOCK = 4096  # bytes of a disk that a file takes at once
RECEIPTS, AUDIT = ("withdrawals/*.json",), ("audit.jsonl", "audit-*.jsonl")


@dataclass(frozen=True)
class Room:
    """The space in `folder`, beside a ledger that pays for at most `rounds` rounds, of a site
    that declares `declared_size` units.

    membership, memberships: in a hospital's home, who gives up space and who else does.

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
        """Bytes that are given up while an order is answered: 1 MiB for entries and updates, 8 KiB
        for each unit, in which a ledger remembers some forty records, and the ledger's length:
        SQLite copies each page that a transaction changes into its journal first."""
        return 2**20 + OF_MEMBERS * self.declared_size + self.of_the_ledger

    @property
    def of_the_ledger(self) -> int:
        """Bytes up to which the ledger's length is made up for: 4 KiB for each round that it may
        ever pay for, and again 8 KiB for each unit."""
        return OF_A_ROUND * self.rounds + OF_MEMBERS * self.declared_size

    @property
    def of_receipts(self) -> int:
        """Bytes up to which receipts of withdrawals are made up for."""
        return OF_A_WITHDRAWAL * self.declared_size

    @property
    def of_the_audit_log(self) -> int:
        """Bytes up to which the audit log is made up for. A coordinator can cause entries without
        end: they use up nothing that is the ledger's or the receipts'."""
        return 2**20 + OF_A_WITHDRAWAL * self.declared_size

    @property
    def of_growth(self) -> int:
        """Bytes up to which everything that grows is made up for."""
        return self.of_the_ledger + self.of_receipts + self.of_the_audit_log

    @property
    def lent(self) -> int:
        """Bytes that may be given up at the same time."""
        return self.of_an_answer * max(1, len(self._users))

    @property
    def size(self) -> int:
        """Bytes that ledger, receipts, audit log and the room's own files take together."""
        return self.lent + self.of_growth

    def of(self, membership: str) -> Room:
        """Return the same space, to be given up by another membership or by the OFFICER; a site
        that is no membership has one space for all."""
        return replace(self, membership=membership if self.membership else "")

    def has_space(self, beside: int = 0) -> bool:
        """Return whether the disk has the whole space and `beside` bytes more; True if the file
        system does not say, and a write will show it."""
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
        """Free the space of an answer while the block writes there, and reserve it again
        afterwards.

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
                    "%s: the ledger's room cannot be taken back (%s); no order is answered until "
                    "it can; to do: free space",
                    self.folder,
                    error.strerror,
                )

    @contextmanager
    def _shared(self) -> Iterator[None]:
        """Keep other memberships from changing the room's files while the block does."""
        with locks.hold(self.folder / SHARED) if self.membership else nullcontext():
            yield

    def _take(self, of_an_answer: int) -> None:
        """Make the room's files as long as they are with so many bytes for an answer. What the
        ledger has grown by leaves the file first, so that others find their space. Errors:
        OSError."""
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
        """Bytes of the files that grow, as far as the room makes up for them."""
        return (
            min(_length(self.folder / LEDGER), self.of_the_ledger)
            + min(self._blocks(RECEIPTS), self.of_receipts)
            + min(self._blocks(AUDIT), self.of_the_audit_log)
        )

    def _blocks(self, names: tuple[str, ...]) -> int:
        """Count the bytes that files take of a disk, which gives whole blocks."""
        files = [path for name in names for path in self.folder.glob(name)]
        return BLOCK * sum(-(-_length(path) // BLOCK) for path in files)


def _lock_of(folder: Path, membership: str) -> Path:
    name = Path(ORDERS)
    return folder / (f"{name.stem}-{membership}{name.suffix}" if membership else ORDERS)


@contextmanager
def between_orders(folder: Path) -> Iterator[bool]:
    """Keep the sites with their ledger in `folder` from answering an order while the block runs;
    yields whether no order is being answered: a file that takes space then takes none of the
    ledger's.

    Errors: InfrastructureError."""
    stem = Path(ORDERS).stem
    paths = {folder / ORDERS, *folder.glob(f"{stem}-*{Path(ORDERS).suffix}")}
    with ExitStack() as held:
        yield all([held.enter_context(locks.hold_if_free(path)) for path in sorted(paths)])


def reserve(descriptor: int, size: int) -> bool:
    """Reserve `size` bytes on disk for a file without changing its length, if the file system
    supports it; return whether the disk has them. If it has not, the file takes none of them."""
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
    """Return a file's bytes; 0 if there is no file."""
    with suppress(OSError):
        return path.stat(follow_symlinks=False).st_size
    return 0


def _allocate(path: Path, size: int) -> None:
    """Make the file `size` bytes long, with disk blocks of its own. Errors: OSError, also if
    something else is in its place; the file then keeps its length."""
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
