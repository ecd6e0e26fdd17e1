"""Run the data-parallel processes of a site: each clips and sums a share of every step's rows.

    rank 0   the vault: keeps the ledger, reads the records, draws rows, adds noise, writes the
             log of steps
    rank n   receives the plan, the records, the adapter and the rows from rank 0, and returns an
             integer sum; opens neither the records' files nor the ledger

If the other ranks cannot serve for any reason, rank 0 sums all rows itself. This takes longer and
gives the same sum, so a failure of the other ranks never changes what the coordinator gets.

`fedtune client SITE --processes N` starts the other ranks, unless torchrun has started all of
them."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from fedtune.core.config import Site, Study, load_site, study_from_json
from fedtune.core.data.dataset import Dataset
from fedtune.core.dp.plan import ClippedSum, DpPlan, Team
from fedtune.core.errors import InfrastructureError, PolicyRefused, describe
from fedtune.core.files.writing import replace
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.kept_state import check_reads
from fedtune.core.models.lora import Arrays
from fedtune.core.models.lora import digest as arrays_digest
from fedtune.core.models.network import Network
from fedtune.core.models.prefix_store import PREFIX_STORE
from fedtune.core.models.random_records import random_records
from fedtune.core.models.rank_slice import ALL
from fedtune.core.processes import Child, begin_log
from fedtune.core.training.data_parallel import Group, share_machine, sum_over_workers
from fedtune.core.training.shared_records import fingerprint, pack_records, unpack_records
from fedtune.core.training.unit_gradients import UnitGradientEngine
from fedtune.core.vault.policy import base_for
from fedtune.core.vault.worker import worker

log = logging.getLogger("fedtune.site")
TIMEOUT = 1800.0  # seconds that rank 0 waits for the others in one exchange


class Workers:
    """Starts and ends the worker processes among which a site shares each step. They start with the
    first round that needs them, and again after a failure. Use this as a context manager: at the
    end of the block the processes end.

    - site: the site file
    - size: number of processes, this one (rank 0) included
    - torchrun: whether torchrun started them; if not, this process starts them
    - timeout: seconds that this process waits for the others in one exchange"""

    def __init__(
        self, site: Path, size: int, *, torchrun: bool = False, timeout: float = TIMEOUT
    ) -> None:
        self._site = site
        self.size = size
        self._torchrun = torchrun
        self._timeout = timeout
        self._open, self._sharing = ExitStack(), ExitStack()
        self._group: Group | None = None
        self._prepared: tuple[str, ...] = ()  # study, plan and frozen arrays that all ranks hold
        self._records = ""  # the fingerprint of the records that all ranks hold
        self.children: list[Child] = []

    @contextmanager
    def running(
        self,
        study: Study,
        plan: DpPlan,
        data: CachedDataset,
        frozen: Arrays,
        columns: slice = ALL,
    ) -> Iterator[Team | None]:
        """A context manager for one round of `study`: yield the processes (`Team`) that share its
        steps. All of them have the same plan, frozen arrays and records. Yield None if the other
        processes cannot serve; this process then does the round alone. An error in the block ends
        the other processes, and is raised again.

        - study: the study whose round is trained
        - plan: the plan by which all ranks clip, even if the site file has changed since
        - data: the records that take part in the round, with the network
        - frozen: the study's frozen arrays, fp32 by name, such as LoRA's A
        - columns: the columns of each B that the round trains; by default all"""
        try:
            yield self._team(study, plan, data, frozen, columns)
        except BaseException:
            self.close()
            raise

    def _team(
        self, study: Study, plan: DpPlan, data: CachedDataset, frozen: Arrays, columns: slice
    ) -> Team | None:
        """Start the other processes if they do not run, and send them those parts of the study and
        the records that they do not have yet. Return the team that shares the round; None if
        starting or sending fails.

        - study: the study whose round is trained
        - plan: the plan by which all ranks clip
        - data: the records that take part in the round, with the network
        - frozen: the study's frozen arrays, fp32 by name
        - columns: the columns of each B that the round trains"""
        try:
            group = self._group = self._group or self._start_group()
            self._prepare(group, study, plan, str(data.network.dtype), frozen)
            self._hand_out(group, data.dataset)
        except Exception as error:
            self.give_up(error)
            return None
        return _Lead(self, group, data.network, columns)

    def give_up(self, error: Exception) -> None:
        """End the other processes, which cannot serve because of `error`, and log this at the
        site. The next round starts new ones."""
        log.error(
            "the other processes of this site do not share the round (%s): this one does all of "
            "it, which takes longer; read rank-*.log in the site's state folder",
            describe(error),
        )
        self.close()

    def close(self) -> None:
        """End the other ranks by closing their connections."""
        self._open.close()
        self._group = None
        self._prepared = ()
        self._records = ""
        self.children = []

    def __enter__(self) -> Workers:
        """Limit this process to its share of the machine's cores. This is done now, before the
        first round, so that whatever is computed from the records is always computed with as many
        threads as in the other processes."""
        if self.size > 1:
            for rank in () if self._torchrun else range(1, self.size):
                begin_log(self._log_of(rank))
            self._sharing.callback(torch.set_num_threads, torch.get_num_threads())
            self._sharing.callback(setattr, PREFIX_STORE, "processes", 1)
            share_machine(0, self.size)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._sharing.close()

    def _start_group(self) -> Group:
        group = self._with_torchruns() if self._torchrun else self._spawn_group()
        self._open.callback(group.close)
        return group

    def _spawn_group(self) -> Group:
        home = load_site(self._site).site.state / "ranks"
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="fedtune-ranks-"))
        socket_path = Path(folder, "team")
        for rank in range(1, self.size):
            options = [str(self._site), str(rank), str(self.size), str(socket_path)]
            child = Child("rank", options, home=home, log=self._log_of(rank))
            self.children.append(self._open.enter_context(child))
        return Group(0, self.size, self._timeout, socket_path, self._require_alive)

    def _log_of(self, rank: int) -> Path:
        return load_site(self._site).site.state / f"rank-{rank}.log"

    def _require_alive(self) -> None:
        for child in self.children:
            if not child.alive:
                raise child.build_end_error()

    def _with_torchruns(self) -> Group:
        """Build the group of the processes that torchrun started, with this process as rank 0. The
        group's socket is in a temporary folder, since a socket's path must be short. This path is
        written to a file in the state folder, which only this user can read and in which the other
        ranks look for it."""
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="fedtune-ranks-"))
        socket_path = Path(folder, "team")
        replace(_rendezvous_file(self._site), str(socket_path).encode(), private=True)
        self._open.callback(_rendezvous_file(self._site).unlink, missing_ok=True)
        return Group(0, self.size, self._timeout, socket_path)

    def _prepare(
        self, group: Group, study: Study, plan: DpPlan, dtype: str, frozen: Arrays
    ) -> None:
        """Have every rank build the network of `study` with the arrays `frozen`, and clip its rows
        by `plan`, as this process does. Do nothing if all ranks did so before.

        - group: the connections to the other ranks
        - study: the study whose round is trained
        - plan: the plan by which all ranks clip
        - dtype: type of this process's base weights, as torch writes it: "torch.float32"
        - frozen: the study's frozen arrays, fp32 by name

        Errors: InfrastructureError."""
        wanted = study.digest, json.dumps(asdict(plan)), arrays_digest(frozen)
        if self._prepared == wanted:
            return
        self._prepared, self._records = (), ""
        names = sorted(frozen)
        header: dict[str, Any] = {"do": "prepare", "study": study.model_dump_json()}
        header |= {"names": names, "plan": asdict(plan), "threads": torch.get_num_threads()}
        arrays = [torch.from_numpy(np.asarray(frozen[name], np.float32)) for name in names]
        group.send({**header, "dtype": dtype.removeprefix("torch.")}, arrays)
        self._check_all_did(group, "prepare the study")
        self._prepared = wanted

    def _hand_out(self, group: Group, dataset: Dataset) -> None:
        """Send every rank the records of `dataset`, which this process read, unless the ranks have
        them already. Errors: InfrastructureError."""
        records = fingerprint(dataset)
        if self._records == records:
            return
        self._records = ""
        header, tensors = pack_records(dataset)
        group.send({"do": "records", "records": header}, tensors)
        self._check_all_did(group, "take the records")
        self._records = records

    def _check_all_did(self, group: Group, what: str) -> None:
        done = group.reduce_sum(torch.zeros(self.size, dtype=torch.int64))[1:].tolist()
        for rank, did in enumerate(done, 1):
            if not did:
                raise InfrastructureError(
                    f"process {rank} of those that share this site's steps could not {what}",
                    todo="read the logs rank-*.log in the site's state folder",
                )


class _Lead:
    """The processes that share a step, as rank 0 uses them. It is a Team (fedtune.core.dp.plan),
    whose one method, `total`, sums a step's clipped gradients over all processes.

    - workers: the site's processes, which are ended if a sum fails
    - group: the connections to the other ranks
    - network: this process's network, whose trainable values are sent to each rank before it sums
    - columns: the columns of each B that the round trains"""

    def __init__(self, workers: Workers, group: Group, network: Network, columns: slice) -> None:
        self._workers = workers
        self._group = group
        self._network = network
        self._columns = [columns.start, columns.stop]

    def total(self, sampled: list[int], dimension: int, clipped_sum: ClippedSum) -> torch.Tensor:
        """Sum the clipped gradients of the rows `sampled` over all processes; return the sum in
        multiples of the plan's grid, int64 (dimension,). If that fails, end the other processes and
        raise the error.

        - sampled: the numbers of the rows that were drawn for the step
        - dimension: the number of coordinates of a row's gradient
        - clipped_sum: sums the clipped gradients of this process's share of the rows"""
        parameters = self._network.update_parameters().values()
        flat = torch.cat([p.detach().flatten().cpu() for p in parameters])
        rows = torch.tensor(sampled, dtype=torch.int64)
        header = {"do": "add", "dimension": dimension, "columns": self._columns}
        try:
            self._group.send(header, [flat, rows])
            return sum_over_workers(self._group, sampled, dimension, clipped_sum)
        except Exception as error:
            self._workers.give_up(error)
            raise


# ------------------------------------------------------------------------------ the other ranks


def follow(group: Group, site: Site) -> NoReturn:
    """Serve rank 0's requests until InfrastructureError says that rank 0 has ended.

    - group: the connection to rank 0
    - site: the settings of this site, for its copy of the base, its caches and its disk space

    Guarantee: this process opens neither the records' files nor the ledger, charges nothing, draws
    nothing, adds no noise and writes no step log."""
    PREFIX_STORE.leave_free(site.room.lent)
    prepared: _StudyAtRank | None = None
    while True:
        header, tensors = group.receive()
        if header["do"] == "add":
            if prepared is not None:
                _add(group, prepared, header, tensors)
            continue
        done = torch.zeros(group.size, dtype=torch.int64)
        try:
            if header["do"] == "prepare":
                prepared = None  # frees the old before the new is built
                prepared = _StudyAtRank(site, header, tensors)
            elif prepared is not None:
                prepared.take(unpack_records(header["records"], tensors))
            done[group.rank] = 1
        except Exception as error:
            log.error("this rank cannot serve: %s", describe(error))
        group.reduce_sum(done)


def _add(
    group: Group, prepared: _StudyAtRank, header: dict[str, Any], tensors: list[torch.Tensor]
) -> None:
    """Sum the clipped gradients of this rank's share of a step's rows, and send the sum to rank 0.
    If the rows cannot be summed, send zeros instead, and log why.

    - group: the connection to rank 0, which gets the sum
    - prepared: the study, with the records
    - header: rank 0's message, with "dimension" (the number of coordinates of a row) and "columns"
      (start and stop of the columns of each B that the round trains)
    - tensors: first the values of all parameters, one after another; then the numbers of the rows
      that were drawn in all ranks together

    Errors: InfrastructureError if rank 0 has ended."""
    flat, rows = tensors
    try:
        clipped_sum = prepared.summing_with(flat, slice(*header["columns"]))
        sum_over_workers(group, rows.tolist(), header["dimension"], clipped_sum)
    except InfrastructureError:
        raise
    except Exception as error:  # rank 0 notices that the rows are missing
        log.error("this rank did not add up its rows: %s", describe(error))


class _StudyAtRank:
    """What a rank other than 0 keeps of a study: the network, the records, and the plan by which it
    clips."""

    def __init__(self, site: Site, header: dict[str, Any], frozen: list[torch.Tensor]) -> None:
        study = study_from_json(header["study"])
        base = study.base.model_copy(update={"dtype": header["dtype"]})
        # rank 0's dtype: where the study leaves it open, each process would measure its own.
        measured = study.model_copy(update={"base": base})
        self.network = build(measured, base_for(study, site))
        check_reads(measured, self.network)
        self.network.load_frozen(
            {name: array.numpy() for name, array in zip(header["names"], frozen, strict=True)}
        )
        self._plan = DpPlan(**header["plan"])
        # As many as rank 0, since the last bits of a product may depend on the number of threads.
        torch.set_num_threads(int(header["threads"]))
        self._study, self._site = study, site.site
        self._start_threads()
        self._data = CachedDataset(self.network, Dataset([], 0, Counter()))

    def _start_threads(self) -> None:
        """Start this process's threads now, by computing gradients of generated units. Rank 0 does
        the same in its self-test. Without this, a process would start its threads in the first
        round in which it gets a row. Each thread takes the machine's next process number. So
        whoever sees these numbers could tell how many rows there are, or were drawn."""
        generated = CachedDataset(self.network, random_records(self.network, self._study))
        engine = UnitGradientEngine(
            generated, self._study.objective.resolved, engine=self._study.training.engine
        )
        engine.matrix(range(generated.dataset.n_units))

    def take(self, dataset: Dataset) -> None:
        """Train on these records from now on, and drop the cached states of all other records."""
        self._data = CachedDataset(self.network, dataset, self._site.cache_bytes)

    def summing_with(self, flat: torch.Tensor, columns: slice) -> ClippedSum:
        """Return a function that takes the numbers of rows and returns the sum of their clipped
        gradients in multiples of the plan's grid, int64 (d,).

        - flat: the values of all parameters at which the gradients are computed, one after another
        - columns: the columns of each B that are trained"""

        def clipped_sum(rows: list[int]) -> torch.Tensor:
            engine = UnitGradientEngine(
                self._data,
                self._study.objective.resolved,
                sampling_unit=self._study.sampling_unit,
                engine=self._study.training.engine,
                columns=columns,
            )
            pieces = torch.split(flat, [p.numel() for p in engine.parameters])
            with torch.no_grad():
                for parameter, piece in zip(engine.parameters, pieces, strict=True):
                    parameter.copy_(piece.view_as(parameter))
            recompute = self._site.gradient_checkpointing and engine.name == "one-pass"
            with self.network.recomputing(recompute):
                return self._plan.clipped_sum(rows, engine.dimension, engine)

        return clipped_sum


def _rendezvous_file(site: Path) -> Path:
    """Return the file in which rank 0, under torchrun, writes its socket's path."""
    return load_site(site).site.state / "ranks" / os.environ.get("TORCHELASTIC_RUN_ID", "team")


@contextmanager
def team(site: Path, processes: int) -> Iterator[None]:
    """A context manager: during the block, the SiteWorker of the site file `site` shares the steps
    of its rounds among `processes` processes, this one included, or among those that torchrun
    started."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = Workers(site, max(size, processes), torchrun=size > 1)
    with ranks:
        worker(str(site)).ranks = ranks if ranks.size > 1 else None
        yield


def follow_torchrun(site: Path) -> None:
    """Run as one of the ranks ≥ 1 that torchrun started, until rank 0 ends.

    This process holds records but is not confined, unlike ranks that the site itself starts. site:
    the site file. Errors: PolicyRefused if policy.isolation is "required"."""
    isolation = load_site(site).policy.isolation
    if isolation == "required":
        raise PolicyRefused(
            'policy.isolation = "required", and a process that torchrun starts is not confined',
            "processes that the site starts itself",
            "run `fedtune client --processes N` in place of torchrun",
        )
    log.warning("a process that torchrun started holds records and has a network")
    _follow(site, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None)


def _follow(site: Path, rank: int, size: int, socket_path: Path | None) -> None:
    """Join rank 0 and serve it until it ends.

    - site: the site file
    - rank, size: this process's number, from 1, and the number of all processes
    - socket_path: the socket of rank 0; None: the one that torchrun's rank 0 publishes"""
    share_machine(rank, size)
    loaded = load_site(site)
    group = Group(rank, size, None, socket_path or _await_rank_0(site))
    try:
        follow(group, loaded)
    except InfrastructureError as error:
        log.info("%s", error)  # rank 0 has ended, and so does this process
    finally:
        group.close()


def _await_rank_0(site: Path) -> Path:
    """Wait until torchrun's rank 0 listens, and return its socket's path. Errors:
    InfrastructureError after TIMEOUT."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        with suppress(OSError):
            socket_path = Path(_rendezvous_file(site).read_text(encoding="utf-8"))
            if socket_path.exists():  # else an earlier team left the file
                return socket_path
        time.sleep(0.1)
    raise InfrastructureError(
        "several processes share this site's steps, and the first of them (rank 0) does not "
        "publish its address"
    )


def main(options: list[str]) -> None:
    """Run as a rank that rank 0 started, until rank 0 ends.

    options: SITE RANK SIZE SOCKET, which are the site file; this process's number, from 1; the
    number of all processes; and the path of rank 0's socket."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    site, rank, size, socket_path = options
    _follow(Path(site), int(rank), int(size), Path(socket_path))
