"""Two small hospitals, and a study over them, with everything that crosses the wire recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.core.config import load_study
from fedtune.core.registry import process_cache
from fedtune.flower import api
from fedtune.flower.grid import InProcessGrid
from fedtune.launch.in_one_process import app
from fedtune.server import rounds
from fedtune.server.parts import Dependencies, Settings

STUDY = """
[study]
name = "inventory"
[base]
model = "{base}"
dtype = "float32"
[lora]
rank = 4
alpha = 8
modules = ["q_proj", "down_proj"]
last_layers = 2
[objective]
name = "{objective}"
max_length = 64
[training]
rounds = 3
sampling_rate = 0.5
learning_rate = 0.5
[clipping]
max_grad_norm = 0.5
[privacy]
noise_multiplier = 0.849
delta = 1e-3
unit = "patient"
max_records_per_unit = 4
[strategy]
min_sites = 2
round_timeout = 120
"""
SITE = """
[site]
name = "{name}"
declared_size = 20
state = "state-{name}"
[data]
path = "{name}.jsonl"
columns = {{ prompt = "q", {answers}, patient = "who" }}
[policy]
bases = "any"
"""
NAMES = ("north", "south")
ANSWERS = {  # objective -> the columns that its answers are in
    "causal_lm": 'completion = "a"',
    "dpo": 'chosen = "a", rejected = "b"',
}
Row = dict[str, Any]


def patients(count: int, records: int = 2) -> list[Row]:
    return [
        {
            "who": f"patient-{p}",
            "q": f"fever on day {p * 7 + n}, no cough",
            "a": "yn"[p % 2],
            "b": "ny"[p % 2],
        }
        for p in range(count)
        for n in range(records)
    ]


@dataclass
class Recorder(InProcessGrid):
    """The in-process grid, keeping every message as it crosses the wire, in both directions."""

    files: Sequence[Path]
    answered_by: ClientApp = app
    sent: list[bytes] = field(default_factory=list)
    replies: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.files, self.answered_by)

    def _answer(self, body: bytes) -> Message:
        reply = super()._answer(body)
        self.replies.append(reply)
        self.sent += [body, api.message_to_proto(reply).SerializeToString()]
        return reply


def lay_out(
    folder: Path,
    base: Path,
    north: list[Row],
    south: list[Row] | None = None,
    objective: str = "causal_lm",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(NAMES, (north, patients(12) if south is None else south), strict=True):
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
        (folder / f"site-{name}.toml").write_text(
            SITE.format(name=name, answers=ANSWERS[objective])
        )
    (folder / "study.toml").write_text(STUDY.format(base=base, objective=objective))
    return folder / "study.toml"


def run(study: Path, between: Callable[[str], None] | None = None) -> Recorder:
    """The whole study as between machines: sites are not asked about their files beforehand."""
    process_cache.clear("workers")
    grid = Recorder([study.parent / f"site-{name}.toml" for name in NAMES])

    def on_event(kind: str, _: dict[str, Any]) -> None:
        if between:
            between(kind)

    parts = Dependencies(settings=Settings(patience=0.0, pause=0.0))
    rounds.run(grid, load_study(study), study.parent / "run", parts=parts, on_event=on_event)
    return grid


def leaves(reply: Message) -> Iterator[tuple[str, str]]:
    """(path, what) of every field of a reply: type, and for arrays dtype and shape."""
    if reply.has_error():
        yield "error", str(reply.error.code)
        return
    yield "metadata.message_type", reply.metadata.message_type
    content: RecordDict = reply.content
    for record_name, record in content.items():
        if isinstance(record, ArrayRecord):
            for name, array in record.items():
                yield f"{record_name}/{name}", f"{array.dtype} {tuple(array.shape)}"
        elif isinstance(record, ConfigRecord):
            for name, value in record.items():
                yield f"{record_name}.{name}", type(value).__name__
        else:
            yield record_name, type(record).__name__
