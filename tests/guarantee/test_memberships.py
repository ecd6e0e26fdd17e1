"""One unit's presence at a hospital moves each consortium's sum by at most C, and nothing else.

Two worlds, with and without the unit, get the same messages of two coordinators in the same order;
coins and noise are coupled (property_coupling), so that what is sent must be the same to the last
bit. FEDTUNE_MEMBERSHIPS says how many stories the long form tells (without it: 100)."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.core.config import load_site
from fedtune.core.data.records import unit_member
from fedtune.core.errors import BudgetExceeded
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry import process_cache
from fedtune.core.vault import worker as workers
from fedtune.core.vault.answers import Place, answer
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire.arrays import bodies, pack_arrays
from fedtune.core.wire.codec import encode
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.protocol import version_fields
from fedtune.core.wire.requests import Answer, Request
from fedtune.core.wire.seal import digest_beside, order, sign_plan
from fedtune.officer.withdraw import withdraw
from fedtune.public.start import Start
from tests.client.hospital_kit import NAMES, make_hospital, study_of
from tests.guarantee.property_coupling import Coupling, Sum

UNIT = "p5"
WOBBLE = 1e-6  # of C: room for a last bit of another row's fp32
COORDINATORS = {name: SigningKey() for name in NAMES}
Op = tuple[str, ...]  # ("prepare", NAME) ("train", NAME, ROUND) ("withdraw", KEY) ("restart",)


@dataclass(frozen=True)
class Seen:
    """One operation: what left the site, what is charged by then, and the exact sums."""

    said: dict[str, Any]
    charged: list[dict[str, Any]]
    sums: list[Sum]


class World:
    """A hospital with two memberships; without: the unit whose rows its file has not."""

    def __init__(self, home: Path, made: dict[str, Start], without: str | None) -> None:
        self.files, self.made, self.home = make_hospital(home, ceiling=6.0), made, home
        path = home / "notes.jsonl"
        rows = [row for row in path.read_text().splitlines() if json.loads(row)["who"] != without]
        path.write_text("".join(row + "\n" for row in rows))
        self.coupling = Coupling()
        process_cache.clear("workers")

    def live(self, ops: list[Op]) -> list[Seen]:
        with self.coupling.at_work():
            return [self._do(op) for op in ops]

    def _do(self, op: Op) -> Seen:
        self.coupling.sums = []
        kind, *rest = op
        said: dict[str, Any] = {}
        if kind == "restart":
            process_cache.clear("workers")
        elif kind == "withdraw":
            withdraw(load_site(self.files["onco"]), rest[0], Ledger(self.home), unseen=True)
        else:
            said = facts(self._ask(kind, *rest))
        charges = Ledger(self.home).charges("records")
        return Seen(said, [asdict(charge) for charge in charges], self.coupling.sums)

    def _ask(self, kind: str, name: str, round_: str = "1") -> Answer:
        made, key = self.made[name], COORDINATORS[name]
        place = Place(str(self.files[name]), key.public)
        digest = made.study.digest
        if kind == "prepare":
            plan: dict[str, Any] = {"study": made.study.model_dump_json(), "digest": digest}
            plan |= {**sign_plan(key, digest), **version_fields()}
            return answer(place, Request("prepare", {"plan": plan}, pack_arrays(made.frozen)))
        adapter = pack_arrays(encode(made.adapter, made.study.wire.adapter))
        beside = digest_beside(bodies(adapter))
        about = order(key, digest, int(round_), "0" * 32, "", beside=beside)
        return answer(place, Request("train", {"order": about}, adapter))


def facts(reply: Answer) -> dict[str, Any]:
    """Return what a coordinator sees: lengths of what is sealed, and everything else as it is."""
    sealed = ("key", "header", "signature")
    said = {k: len(str(v)) if k in sealed else v for k, v in reply.fields.items()}
    arrays = {name: hashlib.sha256(array.data).hexdigest() for name, array in reply.arrays.items()}
    return said | arrays


def random_story(seed: int) -> list[Op]:
    draw = random.Random(seed)
    ops: list[Op] = [("prepare", name) for name in NAMES]
    rounds = dict.fromkeys(NAMES, 1)
    for _ in range(draw.randint(4, 9)):
        name = draw.choice(NAMES)
        what = draw.random()
        if what < 0.7:
            again = draw.random() < 0.2 and rounds[name] > 1
            ops.append(("train", name, str(rounds[name] - again)))
            rounds[name] = min(rounds[name] + 1 - again, 4)
        elif what < 0.8:
            ops.append(("withdraw", draw.choice(("p1", "p2", UNIT))))
        else:
            ops += [("restart",), *(("prepare", name) for name in NAMES)]
    return ops


def compare(folder: Path, made: dict[str, Start], ops: list[Op]) -> float:
    """Tell a story in both worlds; return the most by which the unit moved a sum, in C.

    Errors: AssertionError if anything else differs."""
    with_it = World(folder / "with", made, None).live(ops)
    without = World(folder / "without", made, UNIT).live(ops)
    most = 0.0
    for op, here, there in zip(ops, with_it, without, strict=True):
        assert here.said == there.said, f"{op}: what is sent differs"
        assert here.charged == there.charged, f"{op}: what is charged differs"
        assert len(here.sums) == len(there.sums), f"{op}: another number of draws"
        for one, other in zip(here.sums, there.sums, strict=True):
            moved = torch.linalg.vector_norm((one.total - other.total).double())
            grid = one.plan.grid_at(len(one.total))
            most = max(most, float(moved) * grid / one.plan.max_grad_norm)
    assert most <= 1 + WOBBLE, f"a sum moved by {most} C"
    process_cache.clear("workers")
    return most


@pytest.fixture
def made(tiny_base: Path) -> dict[str, Start]:
    """Studies whose C is below the length of every record's gradient."""
    return {name: study_of(name, tiny_base, max_grad_norm=1e-3) for name in NAMES}


@pytest.mark.parametrize("seed", range(4))
def test_a_unit_moves_each_sum_by_c_and_nothing_else(
    tmp_path: Path, made: dict[str, Start], seed: int
) -> None:
    compare(tmp_path, made, random_story(seed))


def test_it_does_move_the_sums_of_both(tmp_path: Path, made: dict[str, Start]) -> None:
    ops: list[Op] = [("prepare", name) for name in NAMES]
    for name in NAMES:
        (tmp_path / name).mkdir()
        assert compare(tmp_path / name, made, [*ops, ("train", name, "1")]) > 0.1


@pytest.mark.long
def test_a_unit_moves_each_sum_by_c_in_many_stories(tmp_path: Path, made: dict[str, Start]) -> None:
    number = int(os.environ.get("FEDTUNE_MEMBERSHIPS", "100"))
    most = 0.0
    for seed in range(number):
        (folder := tmp_path / str(seed)).mkdir()
        most = max(most, compare(folder, made, random_story(1000 + seed)))
        shutil.rmtree(folder)
    print(f"{number} stories: a sum moved by {most:.6f} C at most")


OPS: list[Op] = [
    *(("prepare", name) for name in NAMES),
    *(("train", name, "1") for name in NAMES),
]


def test_a_refusal_by_what_the_other_read_is_caught(
    tmp_path: Path, made: dict[str, Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twin: whether the ledger knows the unit, which the other membership read, decides."""
    train = SiteWorker.train

    def broken(self: SiteWorker, *given: Any) -> Any:
        if self.home.holds("records", unit_member(UNIT)):
            raise BudgetExceeded("the ledger knows a unit")
        return train(self, *given)

    monkeypatch.setattr(SiteWorker, "train", broken)
    with pytest.raises(AssertionError, match="what is sent differs"):
        compare(tmp_path, made, OPS)


def test_a_sum_that_the_other_moved_is_caught(
    tmp_path: Path, made: dict[str, Start], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A twin: units that another membership trained on are left out of this one's rounds, all of
    them where they are even in number."""
    data_for = SiteWorker.data_for

    def broken(self: SiteWorker, *given: Any) -> Any:
        data = data_for(self, *given)
        others = [
            c for c in self.home.charges("records") if c.membership != self.site.policy.membership
        ]
        known = len(data.dataset.keys) % 2 if others else 1
        return data.of(data.dataset.exclude_units(lambda key: not known))

    monkeypatch.setattr(workers.SiteWorker, "data_for", broken)
    with pytest.raises(AssertionError, match="a sum moved by"):
        compare(tmp_path, made, OPS)
