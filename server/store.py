"""What survives a crash: one checkpoint file, replaced whole after every round.

out/checkpoint/run.safetensors    arrays, and in its header everything else as JSON
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from fedtune.config import Study, study_from_json
from fedtune.errors import ConfigError, InfrastructureError, InputError
from fedtune.files import replace
from fedtune.flower.arrays import Arrays
from fedtune.strategies import State

FORMAT = "fedtune-run-2"
FILE = Path("checkpoint") / "run.safetensors"
T = TypeVar("T")


class CheckpointError(InputError):
    """A checkpoint that is damaged, or of another study."""


@dataclass
class Progress:
    """A run between two rounds.

    asked: digest of the study as it was given; study: the same, resolved; round: the last one done;
    events: site -> its step log for this study so far; queries: the same for its answers about
    held-out records; keys: site -> its public signing key;
    receipts: site -> its newest receipt, sent back with the next order; history: one
    entry per round done.
    Guarantee: everything in it is public or was noised at a site before it was sent."""

    asked: str
    study: Study
    adapter: Arrays
    frozen: Arrays
    round: int = 0
    strategy: State = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    receipts: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    queries: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    admission: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


JSON_FIELDS = (
    *("asked", "round", "sizes", "keys", "receipts"),
    *("events", "queries", "before", "admission", "history"),
)
ARRAY_FIELDS = ("adapter", "frozen", "strategy")


def save(out: Path, progress: Progress) -> None:
    """Replace the checkpoint. Guarantee: whatever crashes, the old or the new one is whole.

    Errors: InfrastructureError when the disk refuses."""
    body = {name: getattr(progress, name) for name in JSON_FIELDS}
    body["study"] = progress.study.model_dump_json()
    arrays = {
        f"{group}/{name}": np.array(array, order="C")
        for group in ARRAY_FIELDS
        for name, array in getattr(progress, group).items()
    }
    text = json.dumps(body, sort_keys=True)
    header = {"format": FORMAT, "body": text, "sha256": _digest(text, arrays)}
    replace(out / FILE, to_bytes(arrays, header))


def load(out: Path, study: Study) -> Progress | None:
    """The checkpoint of `study` in `out`, or None where there is none.

    Errors: CheckpointError (damaged, or another study's)."""
    path = out / FILE
    if not path.exists():
        return None
    body, arrays = _read(path)
    if body["asked"] != study.digest:
        raise CheckpointError(
            f"{path}: belongs to another study ({body['asked'][:19]}…)",
            f"this one ({study.digest[:19]}…)",
            "go back to the study it was made with, or choose another --out",
        )
    resolved = study_from_json(body.pop("study"))
    here = {"public": study.public, "evaluation": study.evaluation}  # files may have moved
    fields: dict[str, Any] = body | {group: {} for group in ARRAY_FIELDS}
    for key, array in arrays.items():
        group, _, name = key.partition("/")
        fields[group][name] = array
    return Progress(study=resolved.model_copy(update=here), **fields)


def open_folder(out: Path, study: Study, *, resume: bool) -> Progress | None:
    """Make `out`, or find the run that it holds.

    Errors: ConfigError where a run is there and `resume` was not asked for; CheckpointError."""
    if not resume and any((out / name).exists() for name in (FILE, "report.json")):
        raise ConfigError(
            f"{out}: a run is already there",
            "an empty folder",
            "continue that run with --resume, or choose another --out",
        )
    _disk(out, lambda: out.mkdir(parents=True, exist_ok=True))
    return load(out, study) if resume else None


class Receipts:
    """The newest receipt of each site, by its public key, beyond any one run; None: kept nowhere.

    A site that was restored from an old copy is told by the first order of the next study what it
    must already have signed. Errors: CheckpointError where the file is damaged."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            found = json.loads(self.path.read_text())
            if isinstance(found, dict) and all(isinstance(r, dict) for r in found.values()):
                return found
        except (OSError, ValueError, RecursionError):
            pass
        raise CheckpointError(
            f"{self.path}: damaged",
            "the receipts as they were written",
            "restore it from a copy; without it a site that was rolled back is noticed later",
        )

    def keep(self, receipts: dict[str, dict[str, Any]]) -> None:
        """Add these to what is there, whole or not at all. Errors: InfrastructureError."""
        if self.path is not None and receipts:
            body = json.dumps(self.read() | receipts, sort_keys=True)
            replace(self.path, body.encode())


def _disk(path: Path, action: Any) -> None:
    try:
        action()
    except OSError as error:
        raise InfrastructureError(
            f"{path}: cannot be written ({error.strerror})", todo="free the disk or fix the rights"
        ) from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if header.get("format") == FORMAT and header["sha256"] == _digest(header["body"], arrays):
            body: dict[str, Any] = json.loads(header["body"])
            return body, arrays
    except (SafetensorError, OSError, KeyError, ValueError):
        pass
    raise CheckpointError(
        f"{path}: damaged, or not a checkpoint of this version of fedtune",
        "the file as it was written",
        "restore it from a copy, or start again in another --out",
    )


def _digest(text: str, arrays: dict[str, Any]) -> str:
    """sha256 over the JSON and over every array's name, type, shape and bytes."""
    total = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        total.update(f"\0{name}\0{array.dtype}\0{array.shape}\0".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
