"""Store of records' states at the cut: in memory up to a limit, then in an encrypted file without a
name.

Hidden states can be turned back into text, so what does not fit into memory is sealed before it is
written: AES-256-GCM, for each block a key of its own that exists in this process' memory alone.
Whoever drops a State has erased it, wherever its bytes still lie."""

from __future__ import annotations

import errno
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

from fedtune.bases.find import cache_dir
from fedtune.errors import InfrastructureError

_NONCE = bytes(12)  # constant: a key seals one block and no other
_CGROUP = Path("/sys/fs/cgroup/memory.max")


class Altered(InfrastructureError):
    """Error of a block that was changed in the file; nothing of it was used."""


class HiddenStates(Protocol):
    """One record's states at the cut, (positions, H), kept for as long as this object is
    referenced."""

    def read(self) -> torch.Tensor:
        """Read the states. Errors: Altered."""


@lru_cache(maxsize=1)
def default_limit() -> int:
    """Return a quarter of this machine's or container's memory, in bytes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no such file, or "max"
        memory = min(memory, int(_CGROUP.read_text()))
    return memory // 4


class PrefixStore:
    """Hidden states kept by this process; the limit is the process', for all records together.

    First come, first in memory: every record is drawn equally often, so it does not matter which
    ones are there, and nothing is moved."""

    def __init__(self) -> None:
        self._used = 0
        self._dropped: deque[int] = deque()  # by finalisers, which may run at any point
        self._file: _File | None = None
        self.processes = 1  # that share this machine and do the same work

    @property
    def in_memory(self) -> int:
        """Return the bytes of states held in memory."""
        while self._dropped:
            self._used -= self._dropped.popleft()
        return self._used

    @property
    def on_disk(self) -> int:
        """Return the bytes of referenced blocks in the file."""
        return self._file.used if self._file else 0

    def keep(self, states: torch.Tensor, record: bytes, limit: int | None = None) -> HiddenStates:
        """Store `states` (positions, H) of `record`, in memory if the process then holds at most
        `limit` bytes (None: its share of a quarter of the machine's memory). Errors:
        InfrastructureError (disk)."""
        stored: _InMemory | _Sealed
        available = default_limit() // self.processes if limit is None else limit
        if self.in_memory + states.nbytes <= available:
            self._used += states.nbytes
            stored = _InMemory(states)
            weakref.finalize(stored, self._dropped.append, states.nbytes).atexit = False
            return stored
        if self._file is None or self._file.owner != os.getpid():  # a fork shares the file's end
            self._file = _File(cache_dir())
        return _seal(states, record, self._file)


PREFIX_STORE = PrefixStore()


@dataclass(frozen=True, repr=False, eq=False)
class _InMemory:
    states: torch.Tensor

    def read(self) -> torch.Tensor:
        return self.states


@dataclass(frozen=True, repr=False, eq=False)
class _Sealed:
    """States in an encrypted block. record: bound into the seal, so that no block passes for
    another record's."""

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


def _seal(states: torch.Tensor, record: bytes, file: _File) -> _Sealed:
    key = AESGCM.generate_key(256)
    plaintext = states.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    block = AESGCM(key).encrypt(_NONCE, plaintext, record)
    at = file.write(block)
    sealed = _Sealed(file, at, len(block), key, record, states.shape, states.dtype)
    weakref.finalize(sealed, file.dropped.append, (at, len(block))).atexit = False
    return sealed


class _File:
    """Blocks in a file of mode 0600 that has no name (where the platform permits), so that no crash
    leaves it behind. The room of an unreferenced block is used again for one of its size."""

    def __init__(self, folder: Path) -> None:
        self.owner, self._end, self._used = os.getpid(), 0, 0
        self.dropped: deque[tuple[int, int]] = deque()
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _refused(error) from None
        weakref.finalize(self, self._file.close)

    @property
    def used(self) -> int:
        """Return the bytes of referenced blocks."""
        while self.dropped:
            at, size = self.dropped.popleft()
            self._free[size].append(at)
            self._used -= size
        return self._used

    @property
    def number(self) -> int:
        """Return the file's descriptor."""
        return self._file.fileno()

    def write(self, block: bytes) -> int:
        """Write a block and return its offset."""
        if self.used == 0:  # everything was dropped, and goes from the disk too
            self._free.clear()
            self._end = 0
            os.ftruncate(self.number, 0)
        size, free = len(block), self._free[len(block)]
        at = free.pop() if free else self._end
        try:
            if os.pwrite(self.number, block, at) != size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _refused(error) from None
        self._end, self._used = max(self._end, at + size), self._used + size
        return at

    def read(self, at: int, size: int) -> bytes:
        return os.pread(self.number, size, at)


def _refused(error: OSError) -> InfrastructureError:
    return InfrastructureError(
        f"the file of states at the cut cannot be written ({error.strerror})",
        todo="free space, name another folder in FEDTUNE_CACHE, or raise site.cache_memory",
    )
