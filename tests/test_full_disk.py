"""A disk that fills up, or that nobody can write to any more, under a whole study: it stops with a
sentence, nothing is half written or under-charged, and it goes on once there is room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedtune.core.dp.steplog import StepLog
from fedtune.core.errors import InfrastructureError
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.run_folder import SIGNATURE
from fedtune.evidence.verify import verify
from tests.disks import Disk, disk
from tests.network.kit import OFF, PRIVATE, SITE, STUDY, records
from tests.simulated import simulate
from tests.test_cli import run

SITES = ("north", "south")
ROUNDS = 2
# Shares of what a whole run writes: a disk that is full from the start, in the first round, ...
SHARES = [0.0, 0.4, 0.8]
ALL_SHARES = [number / 20 for number in range(20)]


class World:
    """A study, its two sites and its run, all on one disk."""

    def __init__(self, folder: Path, base: Path, privacy: str) -> None:
        folder.mkdir()
        self.study, self.run = folder / "study.toml", folder / "run"
        asks = {"rounds": ROUNDS, "min_sites": len(SITES), "round_timeout": 60}
        self.study.write_text(STUDY.format(privacy=privacy, base=base, **asks))
        self.sites = [folder / name / "site.toml" for name in SITES]
        for seed, site in enumerate(self.sites):
            site.parent.mkdir()
            site.write_text(SITE.format(name=site.parent.name))
            records(site.parent / "data.jsonl", seed, 16)

    def simulate(self, resume: bool = False) -> None:
        simulate(self.study, self.sites, self.run, resume=resume)

    def adapter(self) -> dict[str, np.ndarray]:
        return load_file(self.run / "adapter" / "adapter_model.safetensors")

    def check(self, private: bool) -> None:
        verify(self.run)
        assert not [*self.study.parent.rglob("*.new")]
        for site in self.sites:
            ledger = Ledger(site.parent / "state")
            ledger.verify()
            paid = Counter[int]()
            for each in ledger.spending("records"):
                paid[each.charge.round] += each.charge.steps
            steps = StepLog(site.parent / "state" / "steps.jsonl").steps()
            if private:
                assert not Counter(step.round for step in steps) - paid
                assert set(paid) == set(range(1, ROUNDS + 1))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Disk]:
    with disk(tmp_path / "disk", megabytes=1024) as made:
        yield made


def full_disk(made: Disk, base: Path, privacy: str, shares: list[float]) -> None:
    before = made.free
    whole = World(made.path / "whole", base, privacy)
    whole.simulate()
    writes = before - made.free
    stopped = 0
    for number, share in enumerate(shares):
        world = World(made.path / str(number), base, privacy)
        with made.with_room_for(int(share * writes)):
            try:
                world.simulate()
            except InfrastructureError as error:
                stopped += 1
                assert error.exit_code == 4 and "; to do: " in str(error)
        if not (world.run / SIGNATURE).exists():
            world.simulate(resume=True)
        world.check(private=privacy != OFF)
        if privacy == OFF:
            assert all(np.array_equal(a, world.adapter()[n]) for n, a in whole.adapter().items())
    assert stopped >= len(shares) / 2


@pytest.mark.long
def test_a_study_goes_on_after_its_disk_was_full(small: Disk, tiny_base: Path) -> None:
    full_disk(small, tiny_base, PRIVATE, SHARES)


@pytest.mark.long
@pytest.mark.parametrize("privacy", [OFF, PRIVATE], ids=["off", "private"])
def test_a_study_goes_on_wherever_its_disk_was_full(
    small: Disk, tiny_base: Path, privacy: str
) -> None:
    full_disk(small, tiny_base, privacy, ALL_SHARES)


READS = [
    ("verify {run}", 3),
    ("log {state}", 0),
    ("plan {study} {site}", 0),
    ("data report {site}", 0),
]
WRITES = [
    "purge {site} --yes",
    "ledger {site}",
    "enroll {site} --out {elsewhere}/north.request",
    "simulate {study} {site} {other} --out {run}-2",
    "export {run} --out {run}-export",
]


def test_a_disk_that_nobody_can_write_to_is_named(
    small: Disk, tiny_base: Path, tmp_path: Path
) -> None:
    """What only reads works; what has to write says which file it cannot."""
    world = World(small.path / "world", tiny_base, PRIVATE)
    world.simulate()
    site, other = world.sites
    words = {
        "run": world.run,
        "study": world.study,
        "site": site,
        "other": other,
        "state": site.parent / "state",
        "elsewhere": tmp_path,
    }
    with small.read_only():
        for line, code in READS:
            told = run(*line.format(**words).split())
            assert told.exit_code == code, f"{line}: {told.output}"
        for line in WRITES:
            told = run(*line.format(**words).split())
            assert told.exit_code == 4, f"{line}: {told.output}"
            assert str(small.path) in told.output, f"{line}: {told.output}"
            assert "Read-only file system" in told.output or "readonly" in told.output, line
