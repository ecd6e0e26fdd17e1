"""Store records' states at the cut: in memory up to a limit, then in an encrypted file without a
name.

Hidden states can be turned back into text, so states that do not fit into memory are encrypted
before they are written: AES-256-GCM, with a key per block that exists only in this process's
memory. Once a HiddenStates object is dropped, its key is gone, and nobody can read the states even
if their bytes are still on the disk.

Guarantee: a full store changes how long a step takes, and nothing else. The space that the states
need follows from the length of every record of a site, which an error would disclose. So a refused
write is not an error: the states are computed again whenever they are read (`Unavailable`). The
file leaves `LEAST_FREE` bytes of its disk free for files that must be written: the ledger and its
outbox. It also leaves the bytes free that the ledger's reserve frees while a request is answered
(`PrefixStore.leave_free`)."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import weakref
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedtune.core.bases.find import cache_dir
from fedtune.core.errors import InfrastructureError

log = logging.getLogger("fedtune.models")

_NONCE = bytes(12)  # may be constant, since a key encrypts one block only
_CGROUP = Path("/sys/fs/cgroup/memory.max")
LEAST_FREE = 256 * 2**20  # bytes that the file of states leaves free on its disk


class Unavailable(InfrastructureError):
    """The store of cached hidden states does not hold those that were asked for. The reader
    computes them again."""


class Altered(Unavailable):
    """A block of the file of states was changed after it was written; nothing of it was used."""


class HiddenStates(Protocol):
    """One record's states at the cut, (positions, H), kept for as long as this object is
    referenced."""

    def read(self) -> torch.Tensor:
        """Return the states. Errors: Unavailable if the store does not hold them."""


@lru_cache(maxsize=1)
def default_limit() -> int:
    """Return a quarter of this machine's or container's memory, in bytes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no such file, or "max"
        memory = min(memory, int(_CGROUP.read_text()))
    return memory // 4


class PrefixStore:
    """Keep hidden states for this process, in memory up to a limit and then in a file. The limit
    (`keep`) holds for all records of the process together.

    The first states go to memory and are never moved to the file. Every record is drawn equally
    often, so it does not matter which ones are in memory."""

    def __init__(self) -> None:
        self._used = 0
        self._dropped: deque[int] = deque()  # appended to by finalisers, which may run at any point
        self._in_memory: weakref.WeakSet[_InMemory] = weakref.WeakSet()
        self._file: _File | None = None
        self._memory_is_short = False
        self._refusals: set[str] = set()  # why the file was not written, each logged once
        self.processes = 1  # number of processes that share this machine and do the same work
        self.least_free = LEAST_FREE  # bytes that the file leaves free on its disk

    @property
    def in_memory(self) -> int:
        """Return how many bytes of states are held in memory."""
        while self._dropped:
            self._used -= self._dropped.popleft()
        return self._used

    @property
    def on_disk(self) -> int:
        """Return how many bytes of the file hold states that are still in use."""
        return self._file.used if self._file else 0

    def keep(self, states: torch.Tensor, record: bytes, limit: int | None = None) -> HiddenStates:
        """Store one record's states at the cut: in memory if this process then holds at most
        `limit` bytes there, else in the file. Return an object that reads the states, and keeps
        them for as long as it is referenced.

        - states: the states, (positions, H)
        - record: the digest that names them
        - limit: bytes; None: the process's share of a quarter of the machine's memory

        If the file cannot be written, the returned object holds nothing and its `read` raises
        Unavailable."""
        available = default_limit() // self.processes if limit is None else limit
        if not self._memory_is_short and self.in_memory + states.nbytes <= available:
            self._used += states.nbytes
            stored = _InMemory(states)
            stored.forget = weakref.finalize(stored, self._dropped.append, states.nbytes)
            stored.forget.atexit = False
            self._in_memory.add(stored)
            return stored
        try:
            if (
                self._file is None or self._file.owner != os.getpid()
            ):  # a forked process must not write to the same file
                self._file = _File(cache_dir())
            return _seal(states, record, self._file, self.least_free)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            if reason not in self._refusals:
                log.warning(
                    "the file of states at the cut cannot be written (%s); expected room in %s; "
                    "records that do not fit are computed again in each step, which takes longer; "
                    "to do: free space, name another folder in FEDTUNE_CACHE, or raise "
                    "site.cache_memory",
                    reason,
                    cache_dir(),
                )
            self._refusals.add(reason)
            return _NotStored()

    def leave_free(self, beside: int) -> None:
        """Keep more of the file's disk free: `beside` bytes in addition to LEAST_FREE. The ledger's
        reserve has these bytes, and frees them while a request is answered; the states must not use
        them then."""
        self.least_free = max(self.least_free, LEAST_FREE + beside)

    def release_memory(self) -> None:
        """Drop all states held in memory, and store none there any more. This is called when memory
        ran out. What memory is left for a record must not depend on how many records were read
        before it."""
        self._memory_is_short = True
        for stored in list(self._in_memory):
            stored.drop()


PREFIX_STORE = PrefixStore()


class _NotStored:
    """Stands for states for which there was no space: `read` always raises Unavailable."""

    def read(self) -> torch.Tensor:
        raise Unavailable("there was no room for these states at the cut")


class _InMemory:
    """Hidden states in this process's memory, until they are dropped. forget: a function that
    subtracts their bytes from the store's count; only its first call has an effect."""

    forget: weakref.finalize[[int], _InMemory]

    def __init__(self, states: torch.Tensor) -> None:
        self._states: torch.Tensor | None = states

    def read(self) -> torch.Tensor:
        if self._states is None:
            raise Unavailable("these states at the cut were dropped from memory to make room")
        return self._states

    def drop(self) -> None:
        self._states = None
        self.forget()


@dataclass(frozen=True, repr=False, eq=False)
class _Sealed:
    """States in an encrypted block of the file.

    - file, at, size: the file, and the block's offset and length in bytes
    - key: the block's own key, which is held nowhere else
    - record: the digest that names the states; it is authenticated with the block, so that one
      record's block cannot be read as another's
    - shape, dtype: the shape and the number format of the states"""

    file: _File
    at: int
    size: int
    key: bytes
    record: bytes
    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        block = self.file.read(self.at, self.size)
        try:
            plaintext = AESGCM(self.key).decrypt(_NONCE, block, self.record)
        except InvalidTag:
            raise Altered(
                "the file of states at the cut was altered", "the block that was written"
            ) from None
        return torch.frombuffer(bytearray(plaintext), dtype=self.dtype).view(self.shape)


def _seal(states: torch.Tensor, record: bytes, file: _File, least_free: int) -> _Sealed:
    """Encrypt states under a new key, and write them to the file. Return the object that reads
    them, which alone has the key.

    - states: one record's states at the cut, on the CPU
    - record: the digest that names them; it is authenticated with the block
    - file: the process's file of blocks
    - least_free: how many bytes of the file's disk must stay free

    Errors: OSError if the block cannot be written."""
    key = AESGCM.generate_key(256)
    plaintext = states.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    block = AESGCM(key).encrypt(_NONCE, plaintext, record)
    at = file.write(block, least_free)
    sealed = _Sealed(file, at, len(block), key, record, states.shape, states.dtype)
    weakref.finalize(sealed, file.dropped.append, (at, len(block))).atexit = False
    return sealed


class _File:
    """A file of encrypted blocks, of mode 0600. Where the platform permits, the file has no name,
    so that a crash does not leave it behind. When a block is no longer in use, its space is taken
    by the next block of the same size."""

    def __init__(self, folder: Path) -> None:
        self.owner = os.getpid()
        self._end = 0
        self._used = 0
        self.dropped: deque[tuple[int, int]] = deque()
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    @property
    def used(self) -> int:
        """Return how many bytes hold blocks that are still in use."""
        while self.dropped:
            at, size = self.dropped.popleft()
            self._free[size].append(at)
            self._used -= size
        return self._used

    @property
    def number(self) -> int:
        """Return the file's descriptor."""
        return self._file.fileno()

    def write(self, block: bytes, least_free: int) -> int:
        """Write a block and return its offset. Errors: OSError, also if the disk would have less
        than `least_free` bytes free afterwards; blocks stored before stay intact."""
        if self.used == 0:  # everything was dropped, and goes from the disk too
            self._free.clear()
            self._end = 0
            os.ftruncate(self.number, 0)
        size, free = len(block), self._free[len(block)]
        if not free:
            disk = os.fstatvfs(self.number)
            if disk.f_bavail * disk.f_frsize < size + least_free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        at = free[-1] if free else self._end
        if os.pwrite(self.number, block, at) != size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if free:
            free.pop()
        self._end, self._used = max(self._end, at + size), self._used + size
        return at

    def read(self, at: int, size: int) -> bytes:
        return os.pread(self.number, size, at)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of the machine or of its GPU ran out. PyTorch has an error class
    only for the GPU's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def make_room_after(error: BaseException) -> None:
    """Drop the states held in memory if `error` says that memory ran out, so that the next
    computation has room."""
    if is_out_of_memory(error):
        log.warning("memory ran out; states at the cut are kept in memory no longer")
        PREFIX_STORE.release_memory()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
