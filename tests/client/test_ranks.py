"""A site whose rounds are shared among two real processes: same update, charges and refusals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedtune.core.config import load_site
from fedtune.core.data.dataset import Dataset, Example, Passage, SoftTargets
from fedtune.core.data.media import Media
from fedtune.core.dp import noise, sampling
from fedtune.core.errors import InfrastructureError, PolicyRefused
from fedtune.core.files.room import Room
from fedtune.core.models.prefix_store import LEAST_FREE, PREFIX_STORE
from fedtune.core.training.shared_records import fingerprint, pack_records, unpack_records
from fedtune.core.vault import rank_process
from fedtune.core.vault.rank_process import Workers, follow, follow_torchrun, team
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.vault.worker import worker as worker_of
from fedtune.core.wire.codec import VALUES
from fedtune.flower.ports import free_port
from fedtune.officer.site_files import sites_in
from fedtune.officer.withdraw import withdraw
from fedtune.public.start import Start
from tests.client.site_kit import make_site
from tests.client.test_site import begun, notes
from tests.conftest import tiny_llama
from tests.server.test_simulate import world as world_of_two
from tests.simulated import simulate

pytestmark = pytest.mark.usefixtures("without_self_test")

ROOT = Path(__file__).resolve().parents[2]
world = world_of_two

SITE = """
[site]
name = "a"
declared_size = 12
state = "state"
[data]
path = "notes.jsonl"
[data.columns]
prompt = "note"
completion = "answer"
patient = "who"
[policy]
bases = "any"
max_delta = 1e-4
"""


def two_steps(base: Path) -> Start:
    training = {"rounds": 4, "sampling_rate": 1.0, "learning_rate": 0.1, "local_steps": 2}
    return begun(base, training=training, wire={"update": "float32"})


def site_in(folder: Path) -> Path:
    notes(folder)
    (folder / "site.toml").write_text(SITE)
    return folder / "site.toml"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return site_in(tmp_path / "shared")


@pytest.fixture
def worker(path: Path) -> Iterator[SiteWorker]:
    """A site whose rounds two processes share."""
    made = SiteWorker(load_site(path), path)
    with Workers(path, 2, timeout=60.0) as made.ranks:
        yield made


def vector(update: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([update[name].ravel() for name in sorted(update)]).astype(np.float64)


def test_two_processes_make_the_update_of_one(
    worker: SiteWorker, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps a round: the second starts from what rank 0 made of the first. A withdrawal between
    rounds reaches both. Without the noise what is left is the clipped sums."""
    made, site = two_steps(tiny_base), site_in(tmp_path / "alone")
    alone = SiteWorker(load_site(site), site)
    for each in (worker, alone):
        assert each.prepare(made.study, made.frozen).admitted
    monkeypatch.setattr(noise, "gaussian_on_grid", lambda d, std, grid: torch.zeros(d).long())
    for round_ in (1, 2):
        sums = [
            vector(w.train(made.study.digest, round_, made.adapter).delta) for w in (worker, alone)
        ]
        assert np.array_equal(sums[0], sums[1]) and np.any(sums[1])
        assert len(worker.log.steps()) == len(alone.log.steps()) == 2 * round_
        for each in (worker, alone):
            withdraw(each.site, "p4", each.ledger)
    assert len(worker.ledger.charges("records")) == 2


@pytest.mark.usefixtures("forks")
def test_two_processes_train_as_few_ranks_as_their_site(
    path: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of the adapter, not of the team: both processes clip over the site's own columns, as
    the site declared them, whatever its file says since."""
    lora = {"rank": 4, "alpha": 8.0, "modules": ["q_proj"], "min_rank": 1}
    made, site = begun(tiny_base, lora=lora, wire={"update": "float32"}), site_in(tmp_path / "one")
    for each in (path, site):
        each.write_text(SITE.replace("[data]", "lora_rank = 2\n[data]"))
    alone, shared = SiteWorker(load_site(site), site), SiteWorker(load_site(path), path)
    for each_worker in (alone, shared):
        assert each_worker.prepare(made.study, made.frozen).lora_rank == 2
    monkeypatch.setattr(noise, "gaussian_on_grid", lambda d, std, grid: torch.zeros(d).long())
    path.write_text(SITE.replace("[data]", "lora_rank = 3\n[data]"))
    with Workers(path, 2, timeout=60.0) as shared.ranks:
        both = [w.train(made.study.digest, 1, made.adapter).delta for w in (alone, shared)]
    half = sum(array.size for array in made.adapter.values()) // 2
    assert [update[VALUES].size for update in both] == [half, half]
    sums = [vector(update) for update in both]
    assert np.array_equal(sums[0], sums[1]) and np.any(sums[1])


@pytest.mark.usefixtures("forks")
def test_every_process_clips_by_the_plan_of_the_first_whatever_the_site_file_says_since(
    path: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where σ follows from ε and the declared size, so does the grid of whole numbers. A person
    corrects that size before the other process has started."""
    training = {"rounds": 3, "expected_batch": 10, "learning_rate": 0.1}
    privacy = {"epsilon": 8.0, "delta": 1e-5, "unit": "patient"}
    made = begun(tiny_base, training=training, privacy=privacy, wire={"update": "float32"})
    site = site_in(tmp_path / "alone")
    alone, shared = SiteWorker(load_site(site), site), SiteWorker(load_site(path), path)
    for each in (alone, shared):
        assert each.prepare(made.study, made.frozen).admitted
    without_noise(monkeypatch)
    monkeypatch.setattr(sampling, "poisson", lambda rows, rate: list(range(rows)))
    monkeypatch.setattr(SiteWorker, "current", lambda self: self.site)  # what is said since waits
    path.write_text(SITE.replace("declared_size = 12", "declared_size = 400"))
    with Workers(path, 2, timeout=60.0) as shared.ranks:
        both = [vector(w.train(made.study.digest, 1, made.adapter).delta) for w in (alone, shared)]
        assert shared.ranks.children  # they shared it
    assert np.array_equal(both[0], both[1]) and np.any(both[1])


def test_records_read_before_the_first_round_have_the_threads_of_every_process(
    path: Path, tiny_base: Path
) -> None:
    """Which rows share a block follows from the threads that they were read with."""
    made, before = two_steps(tiny_base), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        worker = SiteWorker(load_site(path), path)
        with Workers(path, 2, timeout=60.0) as worker.ranks:
            worker.prepare(made.study, made.frozen)
            worker.train(made.study.digest, 1, made.adapter)
            (_, data), *_ = worker._cached.values()
            assert data.cores == torch.get_num_threads() == 2
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_a_process_that_was_given_no_row_starts_no_thread_with_its_first(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread takes a number of the machine's one counter: how many were drawn is secret."""
    made, before = two_steps(tiny_llama(tmp_path / "wider", hidden=256)), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        worker = SiteWorker(load_site(path), path)
        with Workers(path, 2, timeout=60.0) as worker.ranks:
            worker.prepare(made.study, made.frozen)
            threads = []
            for round_, drawn in enumerate(([], list(range(12))), 1):
                monkeypatch.setattr(sampling, "poisson", lambda rows, rate, drawn=drawn: drawn)
                worker.train(made.study.digest, round_, made.adapter)
                (child,) = worker.ranks.children
                threads.append(len(os.listdir(f"/proc/{child.pid}/task")))
        assert threads[0] == threads[1] > 1
    finally:
        torch.set_num_threads(before)


def without_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(noise, "gaussian_on_grid", lambda d, std, grid: torch.zeros(d).long())


@pytest.mark.usefixtures("forks")
def test_a_rank_that_dies_costs_time_alone_and_the_next_round_has_a_new_one(
    worker: SiteWorker, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 sums all rows itself: the update and the charge are those of a round without ranks."""
    made, ranks, site = two_steps(tiny_base), worker.ranks, site_in(tmp_path / "alone")
    assert ranks is not None
    alone = SiteWorker(load_site(site), site)
    for each in (worker, alone):
        each.prepare(made.study, made.frozen)
    without_noise(monkeypatch)
    worker.train(made.study.digest, 1, made.adapter)
    (child,) = ranks.children
    os.kill(child.pid, signal.SIGKILL)
    update, expected = (
        vector(each.train(made.study.digest, 2, made.adapter).delta) for each in (worker, alone)
    )
    assert np.array_equal(update, expected) and np.any(expected)
    assert ranks.children == []
    assert [charge.round for charge in worker.ledger.charges("records")] == [1, 2]
    worker.train(made.study.digest, 3, made.adapter)
    assert [child.alive for child in ranks.children] == [True]
    assert [charge.round for charge in worker.ledger.charges("records")] == [1, 2, 3]


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("processes", [2, 3, 4, 8])
def test_updates_are_equal_to_the_last_bit_with_any_number_of_processes_and_one_killed(
    path: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Rows are drawn in any order. In round 2 a process is killed between the two steps, and round
    3 has new ones."""
    made, site = two_steps(tiny_base), site_in(tmp_path / "alone")
    without_noise(monkeypatch)

    def updates_of(worker: SiteWorker) -> list[np.ndarray]:
        draw = random.Random(0)
        monkeypatch.setattr(sampling, "poisson", lambda n, rate: draw.sample(range(n), n - 1))
        assert worker.prepare(made.study, made.frozen).admitted
        rounds = (1, 2, 3)
        return [vector(worker.train(made.study.digest, r, made.adapter).delta) for r in rounds]

    expected = updates_of(SiteWorker(load_site(site), site))
    worker, sums = SiteWorker(load_site(path), path), 0
    honest = rank_process._Lead.total

    def total(self: Any, *step: Any) -> torch.Tensor:
        nonlocal sums
        sums += 1
        if sums == 4:
            child = self._workers.children[-1]
            os.kill(child.pid, signal.SIGKILL)
            while child.alive:
                time.sleep(0.01)
        return honest(self, *step)

    monkeypatch.setattr(rank_process._Lead, "total", total)
    with Workers(path, processes, timeout=60.0) as worker.ranks:
        found = updates_of(worker)
        assert len(worker.ranks.children) == processes - 1
    assert sums == 6
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(np.linalg.norm(update) > 0 for update in found)


def test_ranks_that_cannot_be_started_cost_time_alone(
    worker: SiteWorker, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Workers) -> None:
        raise OSError(28, "No space left on device")

    made = two_steps(tiny_base)
    worker.prepare(made.study, made.frozen)
    monkeypatch.setattr(Workers, "_spawn_group", fails)
    assert np.isfinite(vector(worker.train(made.study.digest, 1, made.adapter).delta)).all()
    assert [charge.round for charge in worker.ledger.charges("records")] == [1]


@pytest.mark.usefixtures("forks")
def test_ranks_train_on_what_rank_0_read(
    worker: SiteWorker, path: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the files hold by then: records are read once, by the process with the ledger, in a
    study's first round."""
    made, site = two_steps(tiny_base), site_in(tmp_path / "alone")
    alone = SiteWorker(load_site(site), site)
    for each in (worker, alone):
        each.prepare(made.study, made.frozen)
    without_noise(monkeypatch)
    worker.train(made.study.digest, 1, made.adapter)
    notes_file = path.with_name("notes.jsonl")
    lines = notes_file.read_text().splitlines()
    more = json.loads(lines[0]) | {"who": "somebody new", "note": "came later"}
    changed = json.loads(lines[3]) | {"note": "something else altogether"}
    new = [*lines[:3], json.dumps(changed), *lines[4:], json.dumps(more)]
    notes_file.write_text("\n".join(new) + "\n")
    update, expected = (
        vector(each.train(made.study.digest, 2, made.adapter).delta) for each in (worker, alone)
    )
    assert np.array_equal(update, expected) and np.any(expected)
    assert worker.ranks is not None and len(worker.ranks.children) == 1


@pytest.mark.usefixtures("forks")
def test_a_withdrawal_from_a_file_that_grew_reaches_the_ranks(
    worker: SiteWorker, path: Path, tiny_base: Path
) -> None:
    """The rows that came meanwhile take no part: rank 0 did not read them."""
    made = two_steps(tiny_base)
    worker.prepare(made.study, made.frozen)
    worker.train(made.study.digest, 1, made.adapter)
    grown = path.with_name("notes.jsonl")
    lines = grown.read_text().splitlines()
    more = json.loads(lines[0]) | {"who": "somebody new", "note": "came later"}
    grown.write_text("\n".join([*lines, json.dumps(more)]) + "\n")
    before = worker.data_for(
        made.study, worker._prepared[made.study.digest].network, worker.site.data
    )
    leaving = str(json.loads(lines[0])["who"])
    withdraw(worker.site, leaving, worker.ledger)
    worker.train(made.study.digest, 2, made.adapter)
    after = worker.data_for(made.study, before.network, worker.site.data)
    assert after.dataset.n_units == before.dataset.n_units - 1
    assert worker.ranks is not None
    assert worker.ranks._records == fingerprint(after.dataset) != fingerprint(before.dataset)


def of_every_kind() -> list[Dataset]:
    """Datasets with whatever a record may hold; the keys are those of nobody."""
    draw = np.random.default_rng(0)

    def passage(length: int) -> Passage:
        ids = draw.integers(0, 300, length, dtype=np.int32)
        return Passage(ids, np.where(ids % 3 == 0, ids, -100).astype(np.int32))

    def example(length: int, unit: int, **more: object) -> Example:
        return Example(*passage(length), label=unit % 2, unit=unit, **more)  # type: ignore[arg-type]

    def soft(length: int) -> SoftTargets:
        return SoftTargets(
            draw.integers(0, 300, (length, 4), dtype=np.int32),
            draw.normal(size=(length, 4)).astype(np.float32),
        )

    bodies = (b"one image", b"another")
    images = [Media.of("image", body) for body in bodies]
    kinds = [
        [],
        [example(3, 0), example(9, 1), example(1, 1)],
        [example(4, 0, rejected=passage(7)), example(2, 1, rejected=passage(5))],
        [example(4, 0, soft=soft(3)), example(4, 1, soft=soft(1))],
        [example(3, at, media=images[at % 2], tiles=at + 1) for at in range(2)],
    ]
    keys = (b"patient-one", b"patient-two")
    return [Dataset(one, min(len(one), 2), Counter(), keys=keys[: len(one)]) for one in kinds]


@pytest.mark.parametrize("at", range(5))
def test_the_other_processes_get_each_record_as_it_trains_and_no_key(at: int) -> None:
    dataset = of_every_kind()[at]
    header, tensors = pack_records(dataset)
    content = json.dumps(header).encode() + b"".join(t.numpy().tobytes() for t in tensors)
    assert b"patient" not in content
    again = unpack_records(json.loads(json.dumps(header)), tensors)
    assert fingerprint(again) == fingerprint(dataset)
    assert (again.n_units, again.by_unit) == (dataset.n_units, dataset.by_unit)
    for one, other in zip(again.examples, dataset.examples, strict=True):
        assert [p.input_ids.dtype for p in one.passages] == [np.int32] * len(other.passages)
        assert (one.media is None) == (other.media is None)
        if one.media and other.media:
            assert (one.media.kind, one.media.body) == (other.media.kind, other.media.body)


def test_the_order_of_records_is_part_of_what_must_agree() -> None:
    """Rows are numbers: the same records in another order would be other rows."""
    for dataset in of_every_kind()[1:]:
        backwards = replace(dataset, examples=dataset.examples[::-1])
        assert fingerprint(dataset) != fingerprint(backwards)


@pytest.mark.long  # three processes; by default: two that the site starts itself
def test_torchrun_starts_the_ranks_too(path: Path, tmp_path: Path, tiny_base: Path) -> None:
    out = tmp_path / "update.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += ["-m", "tests.client.torchrun_site", str(path), str(tiny_base), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.isfinite(vector(load_file(out))).all()
    assert len((path.parent / "state" / "steps.jsonl").read_text().splitlines()) == 2


@pytest.mark.usefixtures("forks")
def test_a_simulated_study_with_a_site_of_two_processes(world: Path) -> None:
    """From files to report, through the same apps; the other site stays alone."""
    first, second = sites_in(world)
    with team(first.resolve(), 2):
        body = simulate(world / "study.toml", [first, second], world / "out")
        ranks = worker_of(str(first.resolve())).ranks
        assert ranks is not None and [child.alive for child in ranks.children] == [True]
        children = list(ranks.children)
    assert not any(child.alive for child in children)
    assert body["rounds"][-1]["participants"] == ["a", "b"]
    for name in ("a", "b"):  # the noise of a step is one line of one log, however many processes
        assert body["privacy"]["sites"][name]["steps"] == 2
        assert len((world / f"state-{name}" / "steps.jsonl").read_text().splitlines()) == 2


def test_processes_that_hold_other_worse_answers_do_not_agree() -> None:
    ids, none = np.arange(4, dtype=np.int32), np.full(4, -100, dtype=np.int32)

    def pair_with(worse: np.ndarray) -> str:
        one = Example(ids, none, -100, 0, Passage(worse, none))
        return fingerprint(Dataset([one], 1, Counter()))

    assert pair_with(ids) == pair_with(ids) != pair_with(ids[::-1].copy())


def test_torchrun_starts_no_process_at_a_site_that_requires_walls(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would hold records, and have a network."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    path.write_text(f'{SITE}isolation = "required"\n')
    with pytest.raises(PolicyRefused, match="not confined"):
        follow_torchrun(path)


def test_states_of_every_process_leave_free_what_the_room_of_the_ledger_lends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a site whose room lends more than the file of states leaves free in any case."""
    site = make_site(tmp_path, patient="who")
    table = site.site.model_copy(update={"declared_size": 40_000})
    policy = site.policy.model_copy(update={"max_rounds": 3_000})
    site = site.model_copy(update={"site": table, "policy": policy})
    lent = Room(site.site.state, 40_000, 3_000).of_an_answer
    assert lent > LEAST_FREE

    class Ended:
        def receive(self) -> None:
            raise InfrastructureError("rank 0 has ended", "its requests")

    monkeypatch.setattr(PREFIX_STORE, "least_free", LEAST_FREE)
    SiteWorker(site)
    assert PREFIX_STORE.least_free == LEAST_FREE + lent
    monkeypatch.setattr(PREFIX_STORE, "least_free", LEAST_FREE)
    with pytest.raises(InfrastructureError, match="has ended"):
        follow(Ended(), site)  # type: ignore[arg-type]
    assert PREFIX_STORE.least_free == LEAST_FREE + lent
