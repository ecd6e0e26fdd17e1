"""One site's shipped worker in two worlds, with and without one unit.

Both worlds get the same messages, as bytes, and their files change alike. Noise and coins are
coupled, the only parts that are replaced: a row's coin hangs on its own name, and a step's noise
takes the sum of either world to one common point. So everything after the noise must be the same
to the last bit, and what was summed before it is seen as it was. Where noise is shared, the
noise is the same in both worlds and the noised sums are not: no answer but words that open in the
sum of all sites may depend on them.

| on the wire                                  | equal: statuses, reasons, counts, arrays, sizes   |
| what the ledger charges                      | equal                                             |
| words, opened with those of two peers        | the sum that was noised, whatever it is           |
| the exact sum, where the unit is charged     | differs by at most C (k C where records are drawn)|
| where it is not there, has withdrawn or      | differs by nothing                                |
| opted out, or has no budget left             |                                                   |
| all that a patient moved (q = 1)             | its true ε is at most what the ledger says, under |
|                                              | the assumption of shared noise and without it     |
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from PIL import Image

from fedtune.audit.bounds import gaussian_epsilon
from fedtune.client.rank_process import team
from fedtune.data.records import unit_member
from fedtune.dp.filter import total_epsilon
from fedtune.flower.arrays import to_record
from fedtune.ledger.files import OUTBOX
from fedtune.ledger.ledger import Ledger
from fedtune.registry import process_cache
from fedtune.secagg.draw import FOLDER as DRAWS
from fedtune.secagg.statement import parse, set_text
from fedtune.server.admission import plan_message
from fedtune.training.start import Start
from fedtune.wire.codec import encode
from fedtune.wire.seal import order
from tests.guarantee.property_coupling import Coupling, Sum
from tests.guarantee.property_files import PREFIX, WRITERS, agreeing, write_opt_outs
from tests.guarantee.property_plans import (
    COORDINATOR,
    PEERS,
    Case,
    Crafted,
    Ids,
    Op,
    Row,
    begun,
    path_of,
)
from tests.guarantee.property_wire import facts, opened, set_with
from tests.guarantee.world import Recorder
from tests.media import image, recording

SHM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # no disk waits for each reservation
WOBBLE = 1e-6  # of C: room for a last bit of another row's fp32


"""("prepare", plan) ("train", plan, round, adapter) ("query", plan, round) ("files", version)
("withdraw", key) ("restart",) ("place", number); plan: its number in the case; adapter: a number"""


@dataclass(frozen=True, repr=False)
class Seen:
    """One operation: what left the site, what was charged so far, and the exact sums."""

    op: Op
    said: dict[str, Any]
    charged: dict[str, list[dict[str, Any]]]
    sums: list[Sum]
    unit_pays: bool


# ------------------------------------------------------------------------------------ one world


class World:
    """The site in a folder of its own; `without`: the unit whose rows no file has."""

    def __init__(self, folder: Path, case: Case, bases: Ids, without: str | None) -> None:
        self.folder, self.case, self.without = folder, case, without
        self.coupling = Coupling()
        self.version, self.place = 0, 0
        self.begun = [begun(plan, tuple(sorted(bases.items()))) for plan in case.plans]
        options = [made.study.objective.options for made in self.begun]
        teachers = [str(o["digest"]) for o in options if "digest" in o]
        for number, place in enumerate(case.places):
            (folder / f"site-{number}.toml").write_text(place.toml(case.kinds, teachers))
        self._write()
        process_cache.clear("workers")

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder / "state")

    def live(self) -> list[Seen]:
        with self.coupling.at_work(), contextlib.ExitStack() as stack:
            if self.case.processes > 1:
                stack.enter_context(team(self.folder / "site-0.toml", self.case.processes))
            return [self._do(op) for op in self.case.ops]

    def _do(self, op: Op) -> Seen:
        self.coupling.sums = []
        said: dict[str, Any] = {}
        kind, *rest = op
        if kind == "files":
            self.version = rest[0]
            self._write()
        elif kind == "withdraw":
            self.ledger.withdraw(unit_member(rest[0]))
        elif kind == "restart":
            process_cache.clear("workers")
        elif kind == "place":
            self.place = rest[0]
            process_cache.clear("workers")
        else:
            shared = kind == "train" and self.begun[rest[0]].study.secure_aggregation
            told = self._share(*rest) if shared else [self.ask(kind, *rest)]
            for number, (reply, size) in enumerate(told):
                said |= {f"{number}: {k}": v for k, v in facts(reply).items()}
                said[f"{number}: bytes"] = size
            said["files"] = self._files()
        ledger = self.ledger
        charged = {
            name: [asdict(charge) for charge in ledger.charges(name)] for name in ledger.datasets
        }
        return Seen(op, said, charged, self.coupling.sums, self._pays(ledger))

    def ask(
        self, kind: str, plan: int, round_: int = 1, adapter: int | Crafted = 0
    ) -> tuple[Message, int]:
        """The site's reply to a coordinator's message, and its bytes as Flower sends it."""
        made = self.begun[plan]
        if kind == "prepare":
            content, name = plan_message(made.study, made.frozen, COORDINATOR), "query.prepare"
        else:
            digest = made.study.digest + (":evaluation" if kind == "query" else "")
            arrays = crafted(made, adapter)
            content = RecordDict(
                {
                    "order": ConfigRecord(order(COORDINATOR, digest, round_, "0" * 32, "")),
                    "adapter": to_record(encode(arrays, made.study.wire.adapter)),
                }
            )
            name = "train" if kind == "train" else "query.evaluate"
        return self._sent(name, content)

    def _share(self, plan: int, round_: int, adapter: int | Crafted) -> list[tuple[Message, int]]:
        """The site's part of a round whose sum alone is opened: ready, then masked."""
        made = self.begun[plan]
        sent = to_record(encode(crafted(made, adapter), made.study.wire.adapter))

        def ask(kind: str, said: dict[str, str], **more: ArrayRecord) -> tuple[Message, int]:
            signed = order(COORDINATOR, f"{made.study.digest}:{kind}", round_, "0" * 32, "", 1)
            records = {"order": ConfigRecord(signed), "set": ConfigRecord(said), **more}
            return self._sent(f"train.{kind}", RecordDict(records))

        keys = [self.ledger.key.public, *(peer.public for peer in PEERS)]
        first, size = ask("ready", {"asked": json.dumps(keys)}, adapter=sent)
        if first.has_error() or first.content["site"]["status"] != "ready":
            return [(first, size)]
        mine = parse(first.content["site"]["ready"])
        peers = set_with(mine)
        second, more = ask("masked", {"statements": set_text([mine, *peers])})
        if not second.has_error() and second.content["site"]["status"] == "masked":
            total = np.sort(opened(second, mine, peers))
            whole = any(np.array_equal(total, noised) for noised in self.coupling.noised)
            assert whole, f"round {round_}: another sum is opened than the one that was noised"
        return [(first, size), (second, more)]

    def _files(self) -> list[tuple[str, int]]:
        """The draws and answers that wait on disk, with their sizes."""
        folders = (self.folder / "state" / name for name in (DRAWS, OUTBOX))
        return sorted((p.name, p.stat().st_size) for folder in folders for p in folder.glob("*"))

    def _sent(self, name: str, content: RecordDict) -> tuple[Message, int]:
        grid = Recorder([self.folder / f"site-{self.place}.toml"])
        (node,) = grid.get_node_ids()
        (reply,) = grid.send_and_receive([grid.create_message(content, name, node, "1")])
        return reply, len(grid.sent[1])

    def _pays(self, ledger: Ledger) -> bool:
        """Whether the newest round, whatever it was of, is one that the unit is charged for."""
        case, unit = self.case, unit_member(self.case.unit)
        if not case.here(self.version) or ledger.hashed(unit) in ledger.withdrawn():
            return False
        if case.places[self.place].consent and case.has_opted_out(case.unit, self.version):
            return False
        data = case.places[self.place].data
        spent = ledger.spending(data)
        if not spent or data not in ledger.datasets or not any(p.life for p in case.plans):
            return True
        mine = {c.arrival: c for c in ledger.cohorts(data)}.get(ledger.arrival(data)(unit))
        return mine is not None and spent[-1].seq in {s.seq for s in mine.spent}

    # ------------------------------------------------------------------------------- its files

    def _write(self) -> None:
        # In the world without the unit, the list of those who opted out never had it either.
        write_opt_outs(self.folder, self.case, self.version, self.without)
        for data, rows in self.case.files.items():
            kept = [
                row
                for row in rows
                if row.since <= self.version < row.until and row.owner != self.without
            ]
            path = self.folder / path_of(data, self.case.kinds)
            kind = self.case.kinds.get(data, "jsonl")
            if not kind.startswith("folder"):
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(WRITERS[kind](self._made(path.parent, kept), True))
                continue
            path.mkdir(parents=True, exist_ok=True)
            for old in path.glob("*.*"):
                old.unlink()
            suffix = kind.removeprefix("folder-")
            for owner in dict.fromkeys(row.owner for row in kept):
                mine = self._made(path, [row for row in kept if row.owner == owner])
                body = WRITERS[suffix](mine, False)
                (path / f"{PREFIX.get(suffix, '')}{owner}.{suffix}").write_bytes(body)

    def _made(self, folder: Path, rows: list[Row]) -> list[Any]:
        found = []
        for row in rows:
            body = agreeing(row, self.case, self.version)
            if isinstance(body, dict) and isinstance(body.get("file"), tuple):
                kind, *rest = body["file"]
                name = hashlib.sha256(repr(body["file"]).encode()).hexdigest()[:16]
                made = folder / f"{name}.{'png' if kind == 'image' else 'wav'}"
                if kind == "raw":
                    made.write_bytes(rest[0])
                elif kind == "image" and len(rest) == 3:  # of one colour, so that it is soon made
                    Image.new("L", rest[:2]).save(made)
                elif kind == "image":
                    image(made, *rest)
                else:
                    recording(made, *rest)
                body = body | {"file": made.name}
            found.append(body)
        return found


def crafted(made: Start, adapter: int | Crafted) -> dict[str, np.ndarray]:
    """What a coordinator may send: the study's start, something trained, something hostile."""
    if isinstance(adapter, Crafted):
        return {n: np.array(adapter.arrays[n], np.float32) for n in made.adapter}
    if adapter == 0:
        return made.adapter
    draw = np.random.default_rng(adapter)
    scale = {1: 0.1, 2: 30.0}.get(adapter, 1e8)
    return {
        n: (draw.normal(size=a.shape) * scale).astype(np.float32) for n, a in made.adapter.items()
    }


# ----------------------------------------------------------------------------- the two compared


def check(case: Case, bases: Ids) -> list[tuple[list[Seen], list[Seen]]]:
    """Live through `case` with and without its unit, and hold the guarantee to what is seen.

    Errors: AssertionError."""
    worlds = []
    logging.disable(logging.ERROR)
    try:
        for without in (None, case.unit):
            with tempfile.TemporaryDirectory(dir=SHM, prefix="fedtune-property-") as folder:
                world = World(Path(folder), case, bases, without)
                seen = world.live()
                said = [claims(world.ledger, what) for what in ("event", "fallback")]
                worlds.append((seen, said))
    finally:
        logging.disable(logging.NOTSET)
        process_cache.clear("workers")
    (with_it, claimed), (without_it, _) = worlds
    moved = [0.0, 0.0]  # in standard deviations, squared: of the honest sites' noise, of its own
    for one, other in zip(with_it, without_it, strict=True):
        same_on_the_wire(one, other)
        assert one.charged == other.charged, f"{one.op}: the unit is seen in what is charged"
        assert len(one.sums) == len(other.sums), f"{one.op}: another number of steps"
        for a, b in zip(one.sums, other.sums, strict=True):
            alone = compared(case, one, a, b) ** 2
            moved = [moved[0] + alone / (a.plan.sites - a.plan.colluding), moved[1] + alone]
    for squared, claim in zip(moved, claimed, strict=True):
        true = gaussian_epsilon(math.sqrt(squared), 2e-4)
        assert true <= max(claim, default=math.inf) * (1 + 1e-6), f"ε {true:.3g}, not {claim}"
    return [(with_it, without_it)]


def same_on_the_wire(one: Seen, other: Seen) -> None:
    differ = {
        key: tuple(str(seen.said.get(key, "nothing"))[:200] for seen in (one, other))
        for key in {**one.said, **other.said}
        if one.said.get(key) != other.said.get(key)
    }
    assert not differ, f"{one.op}: the unit is seen on the wire: {differ}"


def compared(case: Case, seen: Seen, a: Sum, b: Sum) -> float:
    """How far the sum moved, in standard deviations of its noise (0 where some are not drawn).
    Errors: AssertionError where it moved too far."""
    assert (a.plan, a.std, len(a.total)) == (b.plan, b.std, len(b.total)), "another mechanism"
    plan, grid = a.plan, a.plan.grid_at(len(a.total))
    assert a.std >= plan.own_noise * plan.max_grad_norm, "less noise than the plan says"
    assert plan.own_noise >= plan.noise_multiplier / math.sqrt(plan.sites - plan.colluding)
    assert plan.divisor == b.plan.divisor
    distance = float((a.total - b.total).double().norm()) * grid
    rows = plan.records if plan.unit == "patient" else max(1, case.rows)
    most = rows * (plan.max_grad_norm + math.sqrt(len(a.total)) * grid / 2)
    if not seen.unit_pays:
        most = 0.0
    room = WOBBLE * plan.max_grad_norm
    assert distance <= most + room, (
        f"{seen.op}: the sum moved by {distance / plan.max_grad_norm:.3f} C, at most "
        f"{most / plan.max_grad_norm:.3f} C"
    )
    return distance / a.std if plan.sampling_rate == 1.0 else 0.0


def claims(ledger: Ledger, what: str) -> list[float]:
    """What the ledger says of a patient of each dataset, at twice the policy's δ; what: "event", or
    "fallback" if secure aggregation does not hold."""
    found = []
    for name in ledger.datasets:
        charges = ledger.charges(name)
        if any(charge.unit == "patient" for charge in charges):
            events = [getattr(charge, what) for charge in charges]
            found.append(total_epsilon(events, charges[0].order, 1e-4).epsilon)
    return found
