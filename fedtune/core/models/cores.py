"""Compute blocks of records side by side: each on one processor core, with one operator thread.

A block's matrix products are too small to keep several cores busy, and with more than one of
PyTorch's operator threads a row's last digits may follow from its place in the block. A block that
one core computes alone gives the same bits however many other blocks are computed at the same time
(docs/decisions/0092-blocks-side-by-side.md)."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from fedtune.core.errors import is_fault

Block = TypeVar("Block")
Result = TypeVar("Result")

# Positions that the blocks held at once may have, for each core. A block of several records has at
# most 256 on a processor; the rest is room for records that are longer.
POSITIONS_PER_CORE = 1024

# The threads of this process, by their number. They all start when the first is needed: if a thread
# started only when a block needs it, the number of a site's blocks could be read from the machine's
# one counter of processes and threads.
_threads: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_threads.clear)  # a forked process has none of these threads


def compute_side_by_side(
    compute: Callable[[Block], Result],
    blocks: Iterable[Block],
    cores: int | None,
    *,
    positions_of: Callable[[Block], int],
    may_share: Callable[[Block], bool] = lambda _: True,
    discard: Callable[[Result], None] = lambda _: None,
) -> Iterator[tuple[Block, Result]]:
    """Yield each block with the result of `compute(block)`, in the blocks' order, while later
    blocks are computed on other cores.

    - compute: called once with each block; in another thread if more than one core is used, except
      with a block that `may_share` excludes
    - blocks: the blocks, which are made one by one as they are needed
    - cores: how many blocks are computed at once; None: one, in the caller's thread, with all of
      PyTorch's operator threads
    - positions_of: returns a block's size in positions (of tokens or states in its sequences).
      Blocks that wait or are being computed have together at most POSITIONS_PER_CORE positions for
      each core; one block is always allowed
    - may_share: returns whether a block may be computed at the same time as others; if not, it is
      computed alone, in the caller's thread
    - discard: called with each result that is not yielded because an earlier block failed or the
      caller stopped

    The blocks are made in the caller's thread, one after the other, before their turn. Each block
    is computed with one of PyTorch's operator threads, and the caller's own thread is limited to
    one until the iteration ends, unless `cores` is None.

    Guarantee: at any number of cores, a result is the one that a single core computes from that
    block alone. The number of threads that this process starts depends on `cores` only. Errors:
    those of `compute`, and of making a block, at the block's turn."""
    if cores is None:
        yield from ((block, compute(block)) for block in blocks)
        return
    pool = _start_threads(cores) if cores > 1 else None
    limit = POSITIONS_PER_CORE * cores
    waiting = deque[tuple[Block, int, Future[Result]]]()
    held = 0
    with one_operator_thread():
        try:
            for block, error in _made(blocks):
                if error is not None:  # raised at its turn: the blocks before it did not fail
                    while waiting:
                        yield _take_first(waiting)
                    raise error
                assert block is not None
                size = positions_of(block)
                beside = pool if may_share(block) else None
                while waiting and not (beside and len(waiting) <= cores and held + size <= limit):
                    held -= waiting[0][1]
                    yield _take_first(waiting)
                if beside:
                    waiting.append((block, size, _submit(beside, compute, block)))
                    held += size
                else:
                    yield block, compute(block)
            while waiting:
                yield _take_first(waiting)
        finally:
            for _, _, result in waiting:
                if result.exception() is None:
                    discard(result.result())


def _made(blocks: Iterable[Block]) -> Iterator[tuple[Block | None, BaseException | None]]:
    """Yield (block, None) for each of `blocks`. If a block cannot be made because of a fault, yield
    (None, the error) in its place, and end."""
    try:
        for block in blocks:
            yield block, None
    except BaseException as error:
        if not is_fault(error):
            raise
        yield None, error


def _take_first(waiting: deque[tuple[Block, int, Future[Result]]]) -> tuple[Block, Result]:
    block, _, result = waiting[0]
    found = result.result()  # if this raises, the result stays among those that are discarded
    waiting.popleft()
    return block, found


def _submit(
    pool: ThreadPoolExecutor, compute: Callable[[Block], Result], block: Block
) -> Future[Result]:
    with_gradients = torch.is_grad_enabled()  # a new thread would begin with gradients enabled

    def run() -> Result:
        with torch.set_grad_enabled(with_gradients):
            return compute(block)

    return pool.submit(run)


def _start_threads(count: int) -> ThreadPoolExecutor:
    """Return the pool of `count` threads, all of which have started. There is one pool for each
    count, which the first call starts."""
    if count not in _threads:
        all_run = threading.Barrier(count + 1)
        mine = torch.get_num_threads()
        pool = ThreadPoolExecutor(count, "block", _begin)
        try:
            for _ in range(count):
                pool.submit(all_run.wait)
            all_run.wait()
        except BaseException:  # a thread that cannot start: the others would wait for it for ever
            all_run.abort()
            pool.shutdown(wait=False)
            raise
        torch.set_num_threads(mine)  # what a thread that starts later begins with
        _threads[count] = pool
    return _threads[count]


def _begin() -> None:
    """Limit a new thread of the pool to one of PyTorch's operator threads. When a thread first uses
    PyTorch, it takes over the process's number of operator threads. So the thread first asks for
    the number, which counts as a use; the number that is set afterwards then stays."""
    torch.get_num_threads()
    torch.set_num_threads(1)


@contextmanager
def one_operator_thread() -> Iterator[None]:
    """A context manager: within the block, compute with one of PyTorch's operator threads in this
    thread. The other operator threads wait; if some of them stayed in use (two of four, say),
    PyTorch would end and start threads."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
