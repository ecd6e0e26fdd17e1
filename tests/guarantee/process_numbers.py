"""BASE FOLDER THREADS: how many numbers of processes and threads each order to a site uses up, as
whoever forks before and after it sees, with long notes; and then, in another process, with a short
one of one more patient. In the second of each two studies, the twin, a thread starts for each
block. Prints a list for each study, as JSON.

Alone in a namespace of process numbers (`unshare --pid --fork`), so that nobody else uses any."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fedtune.core.models import cores
from fedtune.core.vault import worker
from fedtune.core.vault.worker import SiteWorker
from tests.guarantee import world

PATIENTS = 10


def next_number() -> int:
    """Return the number that the next process gets, by starting one."""
    number = os.fork()
    if number == 0:
        os._exit(0)
    os.waitpid(number, 0)
    return number


def counting(method: Callable[..., Any], used: list[tuple[str, int]]) -> Callable[..., Any]:
    """Let a method of the site "north" note how many numbers it uses up."""

    def counted(self: SiteWorker, *args: Any, **options: Any) -> Any:
        before = next_number()
        answer = method(self, *args, **options)
        if self.site.site.name == world.NAMES[0]:
            used.append((method.__name__, next_number() - before - 1))
        return answer

    return counted


class AsNeeded:
    """The twin of the threads that all start at once."""

    def submit(self, run: Callable[[], Any]) -> Future[Any]:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as one:
            return one.submit(run)


def study(folder: Path, base: Path, short: bool) -> Path:
    """Lay out a study of all patients in each of two local steps."""
    rows = world.patients(PATIENTS, records=1)
    rows = [row | {"q": f"{row['q']}, {row['q']}"} for row in rows]
    if short:
        rows.append({"who": "one-more", "q": "ok", "a": "y", "b": "n"})
    path = world.lay_out(folder, base, rows, world.patients(2, records=1))
    text = path.read_text().replace("sampling_rate = 0.5", "sampling_rate = 1.0\nlocal_steps = 2")
    text = text.replace("rounds = 3", "rounds = 1").replace("0.849", "4.0")
    path.write_text(text)
    return path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    for short in (False, True):
        if os.fork() == 0:
            count(options.base, options.folder / str(short), options.threads, short)
            os._exit(0)
        assert os.wait()[1] == 0


def count(base: Path, folder: Path, threads: int, short: bool) -> None:
    torch.set_num_threads(threads)
    worker.self_test = lambda *_: None  # which reads no record, and takes seconds for this base
    used: list[tuple[str, int]] = []
    for name in ("prepare", "train"):
        setattr(SiteWorker, name, counting(getattr(SiteWorker, name), used))
    for name in ("shipped", "twin"):
        if name == "twin":
            cores._start_threads = lambda _: AsNeeded()  # type: ignore[assignment,return-value]
        used.clear()
        world.run(study(folder / name, base, short))
        print(json.dumps(used), flush=True)


if __name__ == "__main__":
    main()
