"""Data-parallel processes of a site: each clips and sums a share of every step's rows.

    rank 0   the client: talks to Flower, keeps the ledger, draws, adds noise, writes the log
    rank n   reads the same site.toml and the same records; receives the plan, the adapter and the
             rows from rank 0, and returns an integer sum

`fedtune client SITE --processes N` starts them itself; under torchrun they are there already."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from fedtune.client.policy import base_for
from fedtune.client.reading import without_withdrawn
from fedtune.client.site import SiteWorker, worker
from fedtune.config import Study, load_site, study_from_json
from fedtune.dp.plan import ClippedSum, Team, plan_for_site
from fedtune.errors import FedtuneError, InfrastructureError
from fedtune.files.writing import replace
from fedtune.flower.processes import Child
from fedtune.models.build import build
from fedtune.models.cache import CachedDataset
from fedtune.models.lora import Arrays
from fedtune.models.lora import digest as arrays_digest
from fedtune.models.network import Network
from fedtune.models.prefix_store import PREFIX_STORE
from fedtune.models.rank_slice import ALL
from fedtune.objectives import resolve
from fedtune.training.data_parallel import Group, fingerprint, share_machine, sum_over_workers
from fedtune.training.unit_gradients import UnitGradientEngine

log = logging.getLogger("fedtune.site")
TIMEOUT = 1800.0  # seconds that rank 0 waits for the others in one exchange
SAME, OTHER = 1, 2  # a rank's records against rank 0's; 0: it could not read them


class Workers:
    """A site's worker processes: rank 0 starts them with the first round that needs them, and again
    after a failure. A context manager that ends them.

    size: processes, this one included; torchrun: torchrun started them."""

    def __init__(
        self, site: Path, size: int, *, torchrun: bool = False, timeout: float = TIMEOUT
    ) -> None:
        self._site, self.size, self._torchrun = site, size, torchrun
        self._timeout = timeout
        self._open = ExitStack()
        self._group: Group | None = None
        self._agreed: tuple[str, ...] = ()  # the study, factor and records that all have prepared
        self.children: list[Child] = []

    @contextmanager
    def running(
        self, study: Study, data: CachedDataset, frozen: Arrays, columns: slice = ALL
    ) -> Iterator[Team]:
        """Provide the team for one round of `study`, all ranks with the same plan, factor and
        records. columns: as in local_round.

        Errors: InfrastructureError where a rank fails, ends, does not answer in time, or reads
        other records than this process. Any error ends the team."""
        try:
            group = self._group = self._group or self._started()
            self._agree(group, study, data, frozen)
            yield _Lead(group, data.network, columns)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the other ranks by closing their connections."""
        self._open.close()
        self._group, self._agreed, self.children = None, (), []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> Group:
        threads = torch.get_num_threads()
        self._open.callback(torch.set_num_threads, threads)
        self._open.callback(setattr, PREFIX_STORE, "processes", 1)
        share_machine(0, self.size)
        group = self._with_torchruns() if self._torchrun else self._spawned()
        self._open.callback(group.close)
        return group

    def _spawned(self) -> Group:
        state = load_site(self._site).site.state
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="fedtune-ranks-"))
        socket_path = Path(folder, "team")
        for rank in range(1, self.size):
            options = [str(self._site), str(rank), str(self.size), str(socket_path)]
            child = Child("rank", options, home=state / "ranks", log=state / f"rank-{rank}.log")
            self.children.append(self._open.enter_context(child))
        return Group(0, self.size, self._timeout, socket_path, self._alive)

    def _alive(self) -> None:
        for child in self.children:
            if not child.alive:
                raise child.ended()

    def _with_torchruns(self) -> Group:
        """Listen in a temporary folder, since a socket's path must be short, and write that path to
        the state folder, which only this user can read."""
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="fedtune-ranks-"))
        socket_path = Path(folder, "team")
        replace(_rendezvous_file(self._site), str(socket_path).encode(), private=True)
        self._open.callback(_rendezvous_file(self._site).unlink, missing_ok=True)
        return Group(0, self.size, self._timeout, socket_path)

    def _agree(self, group: Group, study: Study, data: CachedDataset, frozen: Arrays) -> None:
        """Have every rank prepare `study`, unless it has. Errors: InfrastructureError."""
        records, factor = fingerprint(data.dataset), arrays_digest(frozen)
        if self._agreed == (study.digest, factor, records):
            return
        dtype = str(data.network.dtype).removeprefix("torch.")
        names = sorted(frozen)
        header = {"do": "prepare", "study": study.model_dump_json(), "dtype": dtype}
        arrays = [torch.from_numpy(np.asarray(frozen[name], np.float32)) for name in names]
        group.send({**header, "records": records, "names": names}, arrays)
        statuses = group.reduce_sum(torch.zeros(self.size, dtype=torch.int64))[1:].tolist()
        for rank, status in enumerate(statuses, 1):
            if status != SAME:
                raise InfrastructureError(
                    f"rank {rank} of this site "
                    + ("reads other records" if status == OTHER else "could not prepare the study"),
                    "the records of rank 0",
                    f"see that its files do not change while it trains; read rank-{rank}.log",
                )
        self._agreed = (study.digest, factor, records)


class _Lead:
    """fedtune.dp.plan.Team, at rank 0."""

    def __init__(self, group: Group, network: Network, columns: slice) -> None:
        self._group, self._network = group, network
        self._columns = [columns.start, columns.stop]

    def total(self, sampled: list[int], dimension: int, clipped_sum: ClippedSum) -> torch.Tensor:
        parameters = self._network.parameters().values()
        flat = torch.cat([p.detach().flatten().cpu() for p in parameters])
        rows = torch.tensor(sampled, dtype=torch.int64)
        header = {"do": "add", "dimension": dimension, "columns": self._columns}
        self._group.send(header, [flat, rows])
        return sum_over_workers(self._group, sampled, dimension, clipped_sum)


# ------------------------------------------------------------------------------ the other ranks


def follow(group: Group, site: SiteWorker) -> NoReturn:
    """Serve rank 0's requests until InfrastructureError says that it has ended.

    Guarantee: charges nothing, draws nothing, adds no noise, writes no step log; of the ledger it
    reads who has withdrawn and which records are known."""
    prepared: _StudyAtRank | None = None
    while True:
        header, tensors = group.receive()
        if header["do"] == "prepare":
            statuses = torch.zeros(group.size, dtype=torch.int64)
            try:
                if prepared is None or not prepared.serves(header, tensors):
                    prepared = None  # frees the old before the new is read
                    prepared = _StudyAtRank(site, header, tensors)
                statuses[group.rank] = SAME if prepared.records == header["records"] else OTHER
            except Exception as error:
                log.error("this rank cannot prepare the study: %s", _describe_error(error))
            group.reduce_sum(statuses)
        elif prepared is not None:
            flat, rows = tensors
            try:
                clipped_sum = prepared.summing_with(flat, slice(*header["columns"]))
                sum_over_workers(group, rows.tolist(), header["dimension"], clipped_sum)
            except InfrastructureError:
                raise
            except Exception as error:  # rank 0 notices that the rows are missing
                log.error("this rank did not add up its rows: %s", _describe_error(error))


def _asked(header: dict[str, Any], frozen: list[torch.Tensor]) -> tuple[str, ...]:
    """Return what rank 0 asks to be prepared, but for the records."""
    factor = {name: array.numpy() for name, array in zip(header["names"], frozen, strict=True)}
    return header["study"], header["dtype"], arrays_digest(factor)


class _StudyAtRank:
    """One study at one rank: network, records, engine and the plan's own clipping."""

    def __init__(
        self, site: SiteWorker, header: dict[str, Any], frozen: list[torch.Tensor]
    ) -> None:
        study = study_from_json(header["study"])
        base = study.base.model_copy(update={"dtype": header["dtype"]})
        # rank 0's dtype: where the study leaves it open, each process would measure its own.
        measured = study.model_copy(update={"base": base})
        self.network = build(measured, base_for(study, site.site))
        arrays = {n: t.numpy() for n, t in zip(header["names"], frozen, strict=True)}
        self.network.load_frozen(arrays)
        self._home, self._prepared_for = site.home, _asked(header, frozen)
        self._objective = resolve(study.objective), study.sampling_unit, study.training.engine
        self._take(site.current_dataset(study, self.network))
        self._plan = plan_for_site(study, site.site.site.declared_size)
        self._checkpointing = site.site.site.gradient_checkpointing

    def serves(self, header: dict[str, Any], frozen: list[torch.Tensor]) -> bool:
        """Take what was read before, less whoever withdrew since, and return whether rank 0 asks
        for it: it does not read its files anew for a withdrawal, and rows that came to them
        meanwhile must not tell of one by ending the round."""
        left = without_withdrawn(self._data, self._home)
        same = self._prepared_for == _asked(header, frozen)
        if same and fingerprint(left.dataset) == header["records"]:
            self._take(left)
            return True
        return False

    def _take(self, data: CachedDataset) -> None:
        self._data, self.records = data, fingerprint(data.dataset)
        self._engine_of = partial(UnitGradientEngine, data, *self._objective)

    def summing_with(self, flat: torch.Tensor, columns: slice) -> ClippedSum:
        """Return a function that sums rows' clipped gradients at the parameters `flat`, all in
        order, where these columns of each B are trained."""

        def clipped_sum(rows: list[int]) -> torch.Tensor:
            engine = self._engine_of(columns)
            pieces = torch.split(flat, [p.numel() for p in engine.parameters])
            with torch.no_grad():
                for parameter, piece in zip(engine.parameters, pieces, strict=True):
                    parameter.copy_(piece.view_as(parameter))
            with self.network.recomputing(self._checkpointing and engine.name == "one-pass"):
                return self._plan.clipped_sum(rows, engine.dimension, engine)

        return clipped_sum


def _describe_error(error: Exception) -> str:
    """Name the error's class, with the message of a FedtuneError alone: it quotes no record."""
    message = f": {error}" if isinstance(error, FedtuneError) else ""
    return type(error).__name__ + message


def _rendezvous_file(site: Path) -> Path:
    """Return the file in which rank 0, under torchrun, writes its socket's path."""
    return load_site(site).site.state / "ranks" / os.environ.get("TORCHELASTIC_RUN_ID", "team")


@contextmanager
def team(site: Path, processes: int) -> Iterator[None]:
    """Share the rounds of this process' worker for `site` among `processes`, or torchrun's."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = Workers(site, max(size, processes), torchrun=size > 1)
    with ranks:
        worker(str(site)).ranks = ranks if ranks.size > 1 else None
        yield


def follow_torchrun(site: Path) -> None:
    """Run as one of the ranks ≥ 1 that torchrun started, until rank 0 ends."""
    _follow(site, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None)


def _follow(site: Path, rank: int, size: int, socket_path: Path | None) -> None:
    share_machine(rank, size)
    site_worker = SiteWorker(load_site(site), site)
    group = Group(rank, size, None, socket_path or _await_rank_0(site))
    try:
        follow(group, site_worker)
    except InfrastructureError as error:
        log.info("%s", error)  # rank 0 has ended, and so does this process
    finally:
        group.close()


def _await_rank_0(site: Path) -> Path:
    """Wait for the socket of torchrun's rank 0. Errors: InfrastructureError after TIMEOUT."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        with suppress(OSError):
            socket_path = Path(_rendezvous_file(site).read_text(encoding="utf-8"))
            if socket_path.exists():  # else an earlier team left the file
                return socket_path
        time.sleep(0.1)
    raise InfrastructureError("rank 0 of this site's team does not say where it is")


def main(options: list[str]) -> None:
    """Run as a rank that rank 0 started. options: SITE RANK SIZE SOCKET."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    site, rank, size, socket_path = options
    _follow(Path(site), int(rank), int(size), Path(socket_path))
