"""A site's noised sum and the masking key of its draw, on disk until they were masked once.

    STATE/draws/PLAN-ROUND-ATTEMPT-ADAPTER.bin    0600: a sha256, then noised sum, key, statement

The masked words then are in the ledger's outbox, and this file, key and all, is removed: nothing
can mask the draw for another set."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedtune.files.writing import replace, sync_folder
from fedtune.secagg.statement import Draw, Ready, StatementError, parse

FOLDER = "draws"
_CHARACTERS = 24  # of a digest in a file's name
_NAMED = re.compile(r"[0-9a-f]+-([0-9]+)-([0-9]+)-")
_SUM = hashlib.sha256().digest_size


@dataclass(frozen=True, repr=False)
class Waiting:
    """A draw that is ready and not masked. total: the noised integer sum, (d,); reservation: the
    ledger's entry that pays for it; events: the step log's summary, as it is sent."""

    total: npt.NDArray[np.int64]
    key: X25519PrivateKey
    ready: Ready
    reservation: int
    events: str


def store(folder: Path, waiting: Waiting) -> None:
    """Write a draw durably, for this user alone. Errors: InfrastructureError."""
    metadata = {
        "key": waiting.key.private_bytes_raw().hex(),
        "ready": waiting.ready.text(),
        "reservation": str(waiting.reservation),
        "events": waiting.events,
    }
    content = save({"total": waiting.total}, metadata)
    checked = hashlib.sha256(content).digest() + content  # one changed bit would be a wrong sum
    replace(_path(folder, waiting.ready.draw), checked, private=True)


def load_waiting(folder: Path, draw: Draw) -> Waiting | None:
    """Read the draw that waits for its set; None where there is none, or it is damaged: the draw is
    then lost, and another attempt is a new one."""
    try:
        stored = _path(folder, draw).read_bytes()
        content = stored[_SUM:]
        if hashlib.sha256(content).digest() != stored[:_SUM]:
            return None
        length = int.from_bytes(content[:8], "little")
        fields = json.loads(content[8 : 8 + length])["__metadata__"]
        ready = parse(fields["ready"])
        if ready.draw != draw:
            return None
        return Waiting(
            total=load(content)["total"],
            key=X25519PrivateKey.from_private_bytes(bytes.fromhex(fields["key"])),
            ready=ready,
            reservation=int(fields["reservation"]),
            events=fields["events"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, StatementError):
        return None


def destroy(folder: Path, plan: str, before: tuple[float, float] = (math.inf, 0)) -> None:
    """Remove the plan's draws of (round, attempt) up to `before`, with their keys: those that were
    masked, those of attempts that the coordinator gave up, and what a crash left half written; all
    draws of the plan where no round is named."""
    places = folder / FOLDER
    if not places.is_dir():
        return
    for path in places.glob(f"{_short(plan)}-*.bin*"):
        named = _NAMED.match(path.name)
        if named and (int(named[1]), int(named[2])) <= before:
            path.unlink(missing_ok=True)
    sync_folder(places)


def _path(folder: Path, draw: Draw) -> Path:
    parts = (_short(draw.plan), str(draw.round), str(draw.attempt), _short(draw.adapter))
    return folder / FOLDER / ("-".join(parts) + ".bin")


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:_CHARACTERS]
