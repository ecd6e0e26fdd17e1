"""Measure the coordinator's memory, which must not grow with the sites: a thousand, 10 MB each.

    python -m benchmarks.scale [--sites 1000] [--megabytes 10] [--secure]

One private round over the in-process grid: real Flower messages, real seals, updates encoded as a
plan has them by default, every check of fedtune/server/admission.py, the streamed mean of FedAvg, a
checkpoint. Only the sites' training is left out. What is printed is the memory of the whole process
(resident, from /proc/self/statm), sites included; a coordinator that held every update would need
sites × megabytes more. --secure: the sites mask an integer sum, and the coordinator opens it."""

from __future__ import annotations

import argparse
import atexit
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from flwr.app import Message

import fedtune.core.vault.answers
import fedtune.launch.in_one_process
from fedtune.core.config import Study
from fedtune.core.dp.shared_noise import bits_of, joint_sigma, own_sigma
from fedtune.core.files.room import Room
from fedtune.core.secagg import masks
from fedtune.core.secagg.statement import Draw, Ready, parse_set, set_digest
from fedtune.core.vault import secure_round
from fedtune.core.vault.prepared import Admission, Update
from fedtune.core.wire import codec
from fedtune.core.wire.codec import VALUES, Shapes, encode, shapes
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.seal import Header, seal
from fedtune.flower.grid import InProcessGrid
from fedtune.server import rounds
from fedtune.server.parts import Dependencies, Settings

MARKS = (0, 1, 10, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
MEMORY = Path("/dev/shm")
ACTS = Path(mkdtemp(prefix="fedtune-scale-", dir=MEMORY if MEMORY.is_dir() else None))
atexit.register(shutil.rmtree, ACTS, True)
SIGMA, RATE, SIZE = 1.5, 0.25, 200
EVENT = {"sigma": SIGMA, "q": RATE, "max_grad_norm": 1.0, "records": 1, "steps": 1}


class Site:
    """Answers as a site does: one fixed noised update, sealed with its own key."""

    noise = SIGMA

    def __init__(self, name: str, update: dict[str, np.ndarray]) -> None:
        self.name, self.update, self.key = name, update, SigningKey()
        policy = SimpleNamespace(admission="standing", own_memberships=frozenset({""}))
        self.site = SimpleNamespace(
            site=SimpleNamespace(name=name, declared_size=SIZE), policy=policy
        )
        # One audit log for all: a site has its own.
        self.home = SimpleNamespace(
            folder=ACTS, key=self.key, admitted=lambda *_: False, check_not_frozen=lambda: None
        )
        self.room = Room(ACTS, SIZE)
        self.coordinator = ""

    def prepare(self, study: Study, frozen: Any, coordinator: str) -> Admission:
        self.coordinator = coordinator
        return Admission(True, "", self.name, SIZE)

    def coordinator_of(self, digest: str) -> str:
        return self.coordinator

    def train(self, digest: str, round_: int, adapter: Any, receipt: str) -> Update:
        return Update(encode(self.update, study(1).wire.update), [EVENT])

    def ready(self, digest: str, round_: int, attempt: int, adapter: Any, *_: Any) -> Update:
        draw = Draw(digest, round_, attempt, codec.digest(adapter))
        self.masking = masks.new_key()
        public = masks.public_of(self.masking)
        ready = Ready(draw, self.name, SIZE, self.key.public, public, self.noise)
        self.statement = ready.signed(self.key)
        return Update({}, [EVENT], {"ready": self.statement.text()})

    def masked(self, digest: str, round_: int, attempt: int, text: str, receipt: str) -> Update:
        statements = parse_set(text)
        total = np.ones(sum(array.size for array in self.update.values()), np.int64)
        sigma = joint_sigma(SIGMA, len(statements) - 1)
        plan = study(len(statements), secure=True)
        bits = bits_of(plan, sigma, [ready.size for ready in statements], len(total))
        words = masks.mask(total, self.masking, self.statement, statements, bits)
        return Update({VALUES: words}, [EVENT], {"set": set_digest(statements)})

    def of_run(self, digest: str) -> Site:
        return self

    def begin_run(self, digest: str) -> Site:
        return self

    def keep_run(self, digest: str, of_run: Site) -> None:
        pass

    def current(self) -> Any:
        return self.site

    def room_to_answer(self) -> AbstractContextManager[None]:
        return nullcontext()

    def shapes(self, digest: str) -> Shapes:
        return shapes(self.update)

    def sealed(self, digest: str, round_: int, nonce: str, body: str) -> dict[str, str]:
        statement = {"token": "0" * 200}
        header = Header(digest, round_, "", self.name, self.coordinator, nonce, body, statement)
        return seal(self.key, header)


class SharedGrid(InProcessGrid):
    """Keeps the one adapter of all waiting orders once, as the SuperLink's database does."""

    def __init__(self, sites: list[Path]) -> None:
        super().__init__(sites, fedtune.launch.in_one_process.app, str)
        self._orders: dict[str, Message] = {}
        self._next = itertools.count(1)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        new = {str(next(self._next)): message for message in messages}
        self._orders |= new
        return list(new)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for identity in message_ids:
            if (order := self._orders.pop(identity, None)) is not None:
                self._numbers = itertools.count(int(identity))
                yield from super().pull_messages(super().push_messages([order]))


def study(sites: int, secure: bool = False) -> Study:
    tables: dict[str, Any] = {"secure_aggregation": {}} if secure else {}
    sigma = joint_sigma(SIGMA, sites - 1) if secure else SIGMA
    return Study.model_validate(
        tables
        | {
            "study": {"name": "scale"},
            "base": {"model": "none"},
            "objective": {"name": "causal_lm"},
            "training": {"rounds": 1, "sampling_rate": RATE, "learning_rate": 1.0},
            "clipping": {},
            "privacy": {"noise_multiplier": sigma, "delta": 1e-5},
            "strategy": {"min_sites": sites},
        }
    )


def resident() -> float:
    """MiB of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(sites: int, megabytes: float, secure: bool = False) -> dict[int, float]:
    """MiB after so many sites have been taken in."""
    number = int(megabytes * 1e6 / 4 / 4)
    shape = {f"layer.{k}": (number,) for k in range(4)}
    rng = np.random.default_rng(0)
    scale = SIGMA / (RATE * SIZE)
    update = {n: (scale * rng.standard_normal(s)).astype(np.float32) for n, s in shape.items()}
    if secure:
        Site.noise = own_sigma(joint_sigma(SIGMA, sites - 1), sites - 1)
    by_name = {f"site-{k:05d}": Site(f"site-{k:05d}", update) for k in range(sites)}
    memory_by_sites: dict[int, float] = {}
    taken = 0

    def on_event(kind: str, data: dict[str, Any]) -> None:
        nonlocal taken
        taken += kind == "site" and data["status"] == ("masked" if secure else "trained")
        if taken in MARKS and taken not in memory_by_sites:
            memory_by_sites[taken] = resident()
            print(f"{taken:>6} sites  {memory_by_sites[taken]:8.1f} MiB", flush=True)

    start = SimpleNamespace(
        study=study(sites, secure),
        frozen={},
        strategy={},
        adapter={n: np.zeros(s, np.float32) for n, s in shape.items()},
    )
    parts = Dependencies(
        start=lambda _: start, epsilon=lambda events, delta: 1.0, licence=lambda _: "none",
        engine=lambda _: "none",
        save=lambda study, adapter, frozen, folder: folder.mkdir(), report=lambda out, body: None,
        settings=Settings(patience=0.0, pause=0.0),
    )  # fmt: skip
    grid = SharedGrid([Path(name) for name in by_name])
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(fedtune.core.vault.answers, "worker", by_name.__getitem__),
        patch.object(secure_round, "draw_sum", Site.ready),
        patch.object(secure_round, "mask_sum", Site.masked),
    ):
        rounds.run(grid, start.study, Path(folder) / "out", parts=parts, on_event=on_event)
    return memory_by_sites


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sites", type=int, default=1_000)
    parser.add_argument("--megabytes", type=float, default=10.0)
    parser.add_argument("--secure", action="store_true", help="with secure aggregation")
    chosen = parser.parse_args()
    began = time.monotonic()
    memory_by_sites = measure(chosen.sites, chosen.megabytes, chosen.secure)
    grown = (
        max(memory_by_sites.values())
        - memory_by_sites[min(k for k in memory_by_sites if k >= min(10, chosen.sites))]
    )
    print(
        f"{chosen.sites} sites × {chosen.megabytes:g} MB: {grown:+.1f} MiB after the first ten, "
        f"{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
