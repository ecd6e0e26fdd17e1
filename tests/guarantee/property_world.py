"""One site's shipped worker in two worlds, with and without one unit.

Both worlds get the same messages, as bytes, and their files change alike. Noise and coins are
coupled, the only parts that are replaced: a row's coin hangs on its own name, and a step's noise
takes the sum of either world to one common point. So everything after the noise must be the same
to the last bit, and what was summed before it is seen as it was. Where noise is shared, the
noise is the same in both worlds and the noised sums are not: no answer but words that open in the
sum of all sites may depend on them.

What reaches the vault goes through a courier (property_courier), which may be hostile.

| on the wire                                  | equal: statuses, reasons, counts, arrays, sizes   |
| what the ledger charges                      | equal                                             |
| words, opened with those of two peers        | the sum that was noised, whatever it is           |
| the exact sum, where the unit is charged     | differs by at most C (k C where records are drawn)|
| where it is not there, has withdrawn or      | differs by nothing                                |
| opted out, or has no budget left             |                                                   |
| what is drawn                                | never more noise than was charged in its operation|
| all that a patient moved (q = 1)             | its true ε is at most what the ledger says, under |
|                                              | the assumption of shared noise and without it     |
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from PIL import Image

from fedtune.audit.bounds import gaussian_epsilon
from fedtune.core.config import load_site
from fedtune.core.config.sheet import sheet_path
from fedtune.core.data.records import unit_member
from fedtune.core.dp.filter import total_epsilon
from fedtune.core.errors import FedtuneError
from fedtune.core.ledger import chain
from fedtune.core.ledger.entries import orders_of, samples_first
from fedtune.core.ledger.files import OUTBOX, LedgerError
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry import process_cache
from fedtune.core.secagg.draw import FOLDER as DRAWS
from fedtune.core.secagg.statement import Ready, parse, set_text
from fedtune.core.vault.rank_process import team
from fedtune.core.vault.studies import under_way
from fedtune.core.vault.worker import worker
from fedtune.core.wire.arrays import bodies
from fedtune.core.wire.codec import encode
from fedtune.core.wire.seal import digest_beside, order, receipt, sign_end
from fedtune.courier.app import client_app
from fedtune.flower.records import to_record
from fedtune.officer.sheet import ATTESTED, _typed_hash, describe_data, load_sheet
from fedtune.officer.withdraw import withdraw
from fedtune.public.start import Start
from fedtune.server.admission import plan_message
from tests.forks import forked_children
from tests.guarantee.property_coupling import Coupling, Sum
from tests.guarantee.property_courier import Courier
from tests.guarantee.property_disk import LimitedDisk
from tests.guarantee.property_files import PREFIX, WRITERS, agreeing, write_opt_outs
from tests.guarantee.property_plans import (
    COORDINATOR,
    PEERS,
    SHEET,
    Case,
    Crafted,
    Ids,
    Op,
    Row,
    begun,
    path_of,
)
from tests.guarantee.property_team import joins
from tests.guarantee.property_wire import facts, opened, receipt_facts, set_with
from tests.guarantee.world import Recorder
from tests.media import image, recording

SHM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # no disk waits for each reservation
WOBBLE = 1e-6  # of C: room for a last bit of another row's fp32


# What the coordinator does, with the number of a plan and of an adapter:
#   ("prepare", plan) ("train", plan, round, adapter) ("query", plan, round, adapter)
#   ("ready", plan, round, adapter, attempt) ("masked", plan, round, set)
# whatever the plan says, ("alone", plan, round, adapter), for one site's update, and ("end", plan);
# what its courier does, ("courier", act, number);
# and what happens at the site: its files change, somebody withdraws, its process ends and another
# begins, with the checks of `fedtune client` ("start") or without, under another site.toml
# ("place"); a process of its team is killed; its folder is copied and put back.
EVENTS = ("files", "withdraw", "restart", "start", "place", "a rank ends", "copy", "put back")


@dataclass(frozen=True, repr=False)
class Seen:
    """One operation: what left the site, what was charged so far, and the exact sums."""

    op: Op
    said: dict[str, Any]
    charged: dict[str, list[dict[str, Any]]]
    sums: list[Sum]
    unit_pays: bool


# ------------------------------------------------------------------------------------ one world


class Clock:
    """Stands in for the module `time` of a ledger: each entry has a second of its own, so that none
    is written anew as it was before its folder was put back."""

    def __init__(self) -> None:
        self._seconds = itertools.count(1_700_000_000)

    def time(self) -> int:
        return next(self._seconds)

    def skip(self) -> None:
        """Go on after the seconds of a process that was killed."""
        self._seconds = itertools.count(next(self._seconds) + 1000)


class World:
    """The site in a folder of its own; `without`: the unit whose rows no file has."""

    def __init__(
        self,
        folder: Path,
        case: Case,
        bases: Ids,
        without: str | None,
        limit: int | None = None,
    ) -> None:
        self.folder, self.case, self.without = folder, case, without
        self.coupling = Coupling()
        self.disk = LimitedDisk(folder / "state", case.disk, limit)
        self._courier = Courier(self.coupling, self.disk)
        self._app = client_app(self._courier.ask)
        self._clock = Clock()
        self._paid = 0  # steps
        self._sent_plans = set[int]()
        self.version, self.place = 0, 0
        self._read = {0}  # versions of the files that this process may have read and keeps
        self._team = contextlib.ExitStack()
        self._admitted = False  # whether any plan was: before it, a person reads what is refused
        self._is_there, self._is_put_back = True, False
        self._receipt: dict[str, Any] = {}  # the coordinator's, of the newest answer
        self._stated: dict[tuple[int, int], Ready] = {}  # by plan and round
        self._opened: dict[str, int] = {}  # by the masking key of a draw: for which set
        self.begun = [begun(plan, tuple(sorted(bases.items()))) for plan in case.plans]
        options = [made.study.objective.options for made in self.begun]
        teachers = [str(o["digest"]) for o in options if "digest" in o]
        for number, place in enumerate(case.places):
            (folder / f"site-{number}.toml").write_text(place.toml(case.kinds, teachers))
        self._write()
        self._attest()
        process_cache.clear("workers")

    @property
    def _state(self) -> Path:
        return self.folder / "state"

    @property
    def _copy(self) -> Path:
        return self.folder / "copy"

    @property
    def _site(self) -> Path:
        return self.folder / f"site-{self.place}.toml"

    @property
    def ledger(self) -> Ledger:
        return Ledger(self._state)

    @cached_property
    def _key(self) -> str:
        with self.disk.lifted():
            return self.ledger.key.public

    def _attest(self) -> None:
        """Type a data sheet and attest the records as they are at first, or where they cannot be
        read, as they were before: nobody whose records were never attested joins a study."""
        for number, place in enumerate(self.case.places):
            if place.sheet:
                path = self.folder / f"site-{number}.toml"
                site = load_site(path)
                sheet_path(site).write_text(f'{SHEET} = "Notes of a ward"\n')
                try:
                    describe_data(site)
                except FedtuneError:
                    typed = load_sheet(site)
                    assert typed is not None
                    before = {"records": "", "sheet": _typed_hash(typed)}
                    (site.site.state / ATTESTED).parent.mkdir(parents=True, exist_ok=True)
                    (site.site.state / ATTESTED).write_text(json.dumps(before))

    def live(self) -> list[Seen]:
        with self.coupling.at_work(), self.disk.in_use(), contextlib.ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(chain, "time", self._clock)
            stack.enter_context(forked_children() if self.case.forked else contextlib.nullcontext())
            stack.callback(self._end_process)
            self._start_process()
            return [self._do(op) for op in self.case.ops]

    def _start_process(self) -> None:
        """Begin as `fedtune client` does, with a team where the case has one."""
        if self.case.processes > 1:
            self._team.enter_context(team(self._site, self.case.processes))

    def _end_process(self) -> None:
        self._team.close()
        process_cache.clear("workers")

    def _do(self, op: Op) -> Seen:
        self.coupling.sums, self._is_unsigned = [], False
        said = self._event(op) if op[0] in EVENTS else self._messages(op)
        with self.disk.lifted():
            before, self._paid = self._paid, self._count_paid()
            drawn, paid = len(self.coupling.sums), self._paid - before
            assert drawn == 0 or drawn <= paid, f"{op}: {drawn} draws of noise, {paid} charged"
            assert paid == 0 or not self._is_unsigned, f"{op}: charged, and nobody signed it"
            return Seen(op, said, self._charged(), self.coupling.sums, self._pays())

    def _event(self, op: Op) -> dict[str, Any]:
        """Let something happen at the site; what of it is seen outside."""
        kind, *rest = op
        if kind == "files":
            self.version = rest[0]
            self._read.add(self.version)
            self._write()
        elif kind == "withdraw":
            return self._withdraw(rest[0])
        elif kind in ("restart", "start", "place"):
            self._end_process()
            self._read = {self.version}
            self.place = rest[0] if kind == "place" else self.place
            if kind == "start" and self._admitted and under_way(self._state):
                watch = any(plan.life is not None for plan in self.case.plans)
                with self.disk.lifted():
                    self._is_there = joins(self._site, watch)
                process_cache.clear("workers")
            self._start_process()
            return {"joins": self._is_there}
        elif kind == "a rank ends":
            ranks = worker(str(self._site)).ranks
            for child in ranks.children if ranks else ():
                child.stop()
        elif kind == "copy":
            shutil.rmtree(self._copy, ignore_errors=True)
            shutil.copytree(self._state, self._copy)
        elif kind == "put back" and self._copy.exists():
            self._is_put_back = True
            shutil.rmtree(self._state)
            shutil.copytree(self._copy, self._state)
        return {}

    def _withdraw(self, key: str) -> dict[str, Any]:
        """Withdraw somebody's consent and return what the patient takes away. The unit is not
        there to do so in one of the worlds, and its receipt is its own affair."""
        if key == self.without:
            return {}
        if not self.case.places[self.place].patient:  # there is no such command at this site
            self.ledger.withdraw(unit_member(key))
            return {}
        with self.disk.lifted():
            done = withdraw(load_site(self._site), key, self.ledger, unseen=True)
        return {} if key == self.case.unit else receipt_facts(done)

    def _messages(self, op: Op) -> dict[str, Any]:
        """Send what the coordinator sends; all that an observer of the wire sees."""
        if not self._is_there:
            return {"answer": "nobody is there"}
        asked = self._asked(op)
        if op[0] != "courier" and op[1] in self._sent_plans and any(map(_is_unprepared, asked)):
            asked += [self.ask("prepare", op[1]), *self._asked(op)]  # as a coordinator does
        said: dict[str, Any] = {}
        for number, (reply, size) in enumerate(answered for answered in asked if answered):
            said |= {f"{number}: {k}": v for k, v in facts(reply).items()}
            said[f"{number}: bytes"] = size
        said |= self._courier.said()
        full = self.disk.is_limited  # then an update may wait in memory instead
        return said if full else said | {"files": self._files()}

    def _go_on(self) -> None:
        """Start the vault again, as its client does, where it has ended or was killed."""
        if self._courier.ended:
            self._courier.ended = False
            self._clock.skip()
            self._event(("restart",))

    def _asked(self, op: Op) -> list[tuple[Message, int] | None]:
        """Send an operation's messages, or have the courier do its own."""
        kind, *rest = op
        if kind == "courier":
            self._is_unsigned = self._courier.do(self._site, *rest)
            self._go_on()
            return []
        if kind == "train" and self.begun[rest[0]].study.secure_aggregation:
            return [self._ready(*rest), self._masked(*rest[:2])]
        if kind == "ready":
            return [self._ready(*rest)]
        return [self._masked(*rest) if kind == "masked" else self.ask(kind, *rest)]

    def ask(
        self, kind: str, plan: int, round_: int = 1, adapter: int | Crafted = 0
    ) -> tuple[Message, int]:
        """The site's reply to a coordinator's message, and its bytes as Flower sends it."""
        made = self.begun[plan]
        if kind in ("prepare", "end"):
            content, name = plan_message(made.study, made.frozen, COORDINATOR), "query.prepare"
            if kind == "end":
                content.config_records["plan"].update(sign_end(COORDINATOR, made.study.digest))
            self._sent_plans.add(plan)
            reply, size = self._sent(name, content)
            admission = {} if reply.has_error() else reply.content["admission"]
            self._admitted = self._admitted or bool(admission.get("admitted"))
            return reply, size
        digest = made.study.digest + (":evaluation" if kind == "query" else "")
        arrays = to_record(encode(crafted(made, adapter), made.study.wire.adapter))
        content = self._ordered(digest, round_, adapter=arrays)
        return self._sent("query.evaluate" if kind == "query" else "train", content)

    def _ordered(self, digest: str, round_: int, attempt: int = 0, **beside: Any) -> RecordDict:
        """An order as the coordinator signs it, with its receipt of the newest answer, and what
        goes with it."""
        receipt = json.dumps(self._receipt) if self._receipt else ""
        signed = digest_beside(bodies(beside.get("adapter", {})), beside.get("set"))
        about = order(COORDINATOR, digest, round_, "0" * 32, receipt, attempt, beside=signed)
        return RecordDict({"order": ConfigRecord(about), **beside})

    def _ready(
        self, plan: int, round_: int, adapter: int | Crafted, attempt: int = 1
    ) -> tuple[Message, int]:
        """The site's first answer in a round whose sum alone is opened."""
        made = self.begun[plan]
        keys = [self._key, *(peer.public for peer in PEERS)]
        arrays = to_record(encode(crafted(made, adapter), made.study.wire.adapter))
        asked = ConfigRecord({"asked": json.dumps(keys)})
        digest = f"{made.study.digest}:ready"
        content = self._ordered(digest, round_, attempt, set=asked, adapter=arrays)
        reply, size = self._sent("train.ready", content)
        self._stated.pop((plan, round_), None)
        if not reply.has_error() and reply.content["site"]["status"] == "ready":
            self._stated[plan, round_] = parse(reply.content["site"]["ready"])
        return reply, size

    def _masked(self, plan: int, round_: int, other: int = 0) -> tuple[Message, int] | None:
        """The site's second answer, to a set of its own and the peers' statements; other: another
        set with the same draw. None where it stated nothing.

        Errors: AssertionError where another sum is opened than the one that was noised, or one
        draw is masked for two sets."""
        if (mine := self._stated.get((plan, round_))) is None:
            return None
        peers = set_with(mine, other)
        digest = f"{self.begun[plan].study.digest}:masked"
        stated = ConfigRecord({"statements": set_text([mine, *peers])})
        content = self._ordered(digest, round_, mine.draw.attempt, set=stated)
        reply, size = self._sent("train.masked", content)
        if not reply.has_error() and reply.content["site"]["status"] == "masked":
            total = np.sort(opened(reply, mine, peers))
            whole = any(np.array_equal(total, noised) for noised in self.coupling.noised)
            assert whole, f"round {round_}: another sum is opened than the one that was noised"
            first = self._opened.setdefault(mine.masking, other)
            assert first == other, f"round {round_}: one draw is masked for two sets"
        return reply, size

    def _files(self) -> list[tuple[str, int]]:
        """The draws and answers that wait on disk, with their sizes."""
        folders = (self.folder / "state" / name for name in (DRAWS, OUTBOX))
        return sorted((p.name, p.stat().st_size) for folder in folders for p in folder.glob("*"))

    def _sent(self, name: str, content: RecordDict) -> tuple[Message, int]:
        grid = Recorder([self._site], self._app)
        (node,) = grid.get_node_ids()
        (reply,) = grid.send_and_receive([grid.create_message(content, name, node, "1")])
        self._go_on()
        sealed = {} if reply.has_error() else reply.content.get("site", {})
        if self.case.receipts and sealed.get("header"):
            self._receipt = receipt(COORDINATOR, json.loads(str(sealed["header"]))["ledger"])
        return reply, len(grid.sent[1])

    def _charged(self) -> dict[str, Any]:
        """What the ledger charges; its state where it cannot be read."""
        try:
            ledger = self.ledger
            return {
                name: [asdict(charge) for charge in ledger.charges(name)]
                for name in ledger.datasets
            }
        except LedgerError as error:
            return {"not read": type(error).__name__}

    def _count_paid(self) -> int:
        """Count the steps that the ledger charges, of all studies; 0 where it cannot be read."""
        try:
            return sum(spent.charge.steps for spent in self.ledger.spending())
        except LedgerError:
            return 0

    def _pays(self) -> bool:
        """Whether the newest round, whatever it was of, is one that the unit is charged for."""
        case, unit = self.case, unit_member(self.case.unit)
        place = case.places[self.place]
        anew = bool(place.consent) or any(plan.life for plan in case.plans)
        if not any(map(case.here, {self.version} if anew else self._read)):
            return False
        if place.consent and case.has_opted_out(case.unit, self.version):
            return False
        try:
            ledger, data = self.ledger, place.data
            if place.patient and ledger.hashed(unit) in ledger.withdrawn():
                return False
            spent = ledger.spending(data)
            if not spent or data not in ledger.datasets or not any(p.life for p in case.plans):
                return True
            mine = {c.arrival: c for c in ledger.cohorts(data)}.get(ledger.arrival(data)(unit))
        except LedgerError:  # nothing is summed where it cannot be read
            return False
        return mine is not None and spent[-1].seq in {s.seq for s in mine.spent}

    def claim(self, what: str) -> float:
        """The most that the ledger says of a patient, at twice the policy's δ; infinite where it
        says nothing, as of what was spent before the folder was put back. what: "event", or
        "fallback" if secure aggregation does not hold."""
        if self._is_put_back:
            return math.inf
        ledger, found = self.ledger, list[float]()
        for name in ledger.datasets:
            charges = ledger.charges(name)
            if any(charge.unit == "patient" for charge in charges):
                events = [getattr(charge, what) for charge in charges]
                orders, sampled = orders_of(charges), samples_first(charges)
                found.append(total_epsilon(events, orders, 1e-4, sampled).epsilon)
        return max(found, default=math.inf)

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


def _is_unprepared(answered: tuple[Message, int] | None) -> bool:
    """Whether a site asks for the plan."""
    if answered is None or answered[0].has_error():
        return False
    site = answered[0].content.config_records.get("site", {})
    return site.get("status") == "unprepared"


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


def check(case: Case, bases: Ids) -> None:
    """Live through `case` with and without its unit, and hold the guarantee to what is seen; once
    more where the disk is full, at a size that follows from what either world needed.

    Errors: AssertionError."""
    needs = compare(case, bases, None)
    if case.disk and any(needs):
        compare(case, bases, case.disk.limit(needs))


def compare(case: Case, bases: Ids, limit: int | None) -> tuple[int, int]:
    """Live through `case` in both worlds on a disk of `limit` bytes, and return how many they used.

    Errors: AssertionError."""
    lives: list[list[Seen]] = []
    needs, claimed = list[int](), list[float]()
    logging.disable(logging.ERROR)
    try:
        for without in (None, case.unit):
            with tempfile.TemporaryDirectory(dir=SHM, prefix="fedtune-property-") as folder:
                world = World(Path(folder), case, bases, without, limit)
                lives.append(world.live())
                needs.append(world.disk.needed)
                if without is None:
                    claimed = [world.claim(what) for what in ("event", "fallback")]
    finally:
        logging.disable(logging.NOTSET)
        process_cache.clear("workers")
    moved = [0.0, 0.0]  # in standard deviations, squared: of the honest sites' noise, of its own
    for one, other in zip(*lives, strict=True):
        same_on_the_wire(one, other)
        assert one.charged == other.charged, f"{one.op}: the unit is seen in what is charged"
        assert len(one.sums) == len(other.sums), f"{one.op}: another number of steps"
        for a, b in zip(one.sums, other.sums, strict=True):
            alone = compared(case, one, a, b) ** 2
            moved = [moved[0] + alone / (a.plan.sites - a.plan.colluding), moved[1] + alone]
    for squared, claim in zip(moved, claimed, strict=True):
        true = gaussian_epsilon(math.sqrt(squared), 2e-4)
        assert true <= claim * (1 + 1e-6), f"ε {true:.3g}, not {claim}"
    return needs[0], needs[1]


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
