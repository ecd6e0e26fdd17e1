"""A site whose rounds are shared among two real processes: same update, charges and refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedtune.client.rank_process import Workers, team
from fedtune.client.site import SiteWorker
from fedtune.client.site import worker as worker_of
from fedtune.client.withdraw import withdraw
from fedtune.config import load_site
from fedtune.config.sites import sites_in
from fedtune.data.dataset import Dataset, Example, Passage
from fedtune.dp import noise
from fedtune.errors import InfrastructureError
from fedtune.flower.processes import free_port
from fedtune.training.data_parallel import fingerprint
from fedtune.training.start import Start
from fedtune.wire.codec import VALUES
from tests.client.test_site import begun, notes
from tests.server.test_simulate import world as world_of_two
from tests.simulated import simulate

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
        assert np.linalg.norm(sums[0] - sums[1]) < 1e-4 * np.linalg.norm(sums[1]) > 0
        assert len(worker.log.steps()) == len(alone.log.steps()) == 2 * round_
        for each in (worker, alone):
            withdraw(each.site, "p4", each.ledger)
    assert len(worker.ledger.charges("records")) == 2


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
    assert np.linalg.norm(sums[0] - sums[1]) < 1e-4 * np.linalg.norm(sums[0]) > 0


def test_a_rank_that_dies_costs_the_round_and_the_next_has_a_new_one(
    worker: SiteWorker, tiny_base: Path
) -> None:
    made, ranks = two_steps(tiny_base), worker.ranks
    assert ranks is not None
    worker.prepare(made.study, made.frozen)
    worker.train(made.study.digest, 1, made.adapter)
    (child,) = ranks.children
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(InfrastructureError, match="is gone or does not answer"):
        worker.train(made.study.digest, 2, made.adapter)
    assert {step.round for step in worker.log.steps()} == {1}, "nothing of the step was released"
    assert [charge.round for charge in worker.ledger.charges("records")] == [1, 2]
    worker.train(made.study.digest, 2, made.adapter)
    assert [charge.round for charge in worker.ledger.charges("records")] == [1, 2, 2]


def test_ranks_that_read_other_records_are_refused(
    worker: SiteWorker, path: Path, tiny_base: Path
) -> None:
    """The file changes between rank 0's reading and the other's."""
    made = two_steps(tiny_base)
    worker.prepare(made.study, made.frozen)
    notes_file = path.with_name("notes.jsonl")
    prepared = worker._prepared[made.study.digest]
    data = worker.data_for(made.study, prepared.network, worker.site.data)
    before = fingerprint(data.dataset)
    lines = notes_file.read_text().splitlines()
    changed = json.loads(lines[3]) | {"note": "something else altogether"}
    notes_file.write_text("\n".join([*lines[:3], json.dumps(changed), *lines[4:]]) + "\n")
    assert fingerprint(worker.current_dataset(made.study, data.network).dataset) != before
    with (
        pytest.raises(InfrastructureError, match="rank 1 of this site reads other records"),
        worker.ranks.running(made.study, data, prepared.frozen),  # type: ignore[union-attr]
    ):
        pass
    assert worker.log.steps() == []


def test_a_withdrawal_from_a_file_that_grew_ends_no_round(
    worker: SiteWorker, path: Path, tiny_base: Path
) -> None:
    """Nor do the rows that came meanwhile take part: rank 0 did not read them."""
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
    assert {step.round for step in worker.log.steps()} == {1, 2}


def test_the_order_of_records_is_part_of_what_must_agree(path: Path, tiny_base: Path) -> None:
    """Rows are numbers: the same records in another order would be other rows."""
    made = two_steps(tiny_base)
    worker = SiteWorker(load_site(path), path)
    worker.prepare(made.study, made.frozen)
    network = worker._prepared[made.study.digest].network
    first = worker.current_dataset(made.study, network).dataset
    notes_file = path.with_name("notes.jsonl")
    notes_file.write_text("\n".join(reversed(notes_file.read_text().splitlines())) + "\n")
    second = worker.current_dataset(made.study, network).dataset
    assert first.content_hash == second.content_hash
    assert fingerprint(first) != fingerprint(second)


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
