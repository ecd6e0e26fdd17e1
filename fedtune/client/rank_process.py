"""The other processes of a site: each clips and adds up a share of every step's rows.

    rank 0   the client: talks to Flower, keeps the ledger, draws, adds noise, writes the log
    rank n   reads the same site.toml and the same records; is given the plan, the adapter and the
             rows by rank 0, and gives back an integer sum

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
from fedtune.client.site import SiteWorker, worker
from fedtune.config import Study, load_site, study_from_json
from fedtune.dp.plan import AddUp, Team, plan_for_site
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
from fedtune.training.data_parallel import Group, fingerprint, share_machine, summed
from fedtune.training.unit_gradients import UnitGradientEngine

log = logging.getLogger("fedtune.site")
PATIENCE = 1800.0  # seconds that rank 0 waits for the others in one exchange
SAME, OTHER = 1, 2  # what a rank says of its records; 0: it could not read them


class Workers:
    """A site's team as rank 0 sees it: started with the first round that needs it; after a failure,
    started anew with the next. A context manager that ends it.

    size: processes, this one included; torchrun: they were started by it."""

    def __init__(
        self, site: Path, size: int, *, torchrun: bool = False, timeout: float = PATIENCE
    ) -> None:
        self._site, self.size, self._torchrun = site, size, torchrun
        self._timeout = timeout
        self._open = ExitStack()
        self._group: Group | None = None
        self._agreed: tuple[str, ...] = ()  # what the others have prepared
        self.children: list[Child] = []

    @contextmanager
    def running(
        self, study: Study, data: CachedDataset, frozen: Arrays, columns: slice = ALL
    ) -> Iterator[Team]:
        """The team for one round of `study`, each rank with the same plan, factor and records.
        columns: as local_round has them.

        Errors: InfrastructureError where a rank fails, is gone, is silent, or reads other records
        than this process; whatever goes wrong, the team is ended."""
        try:
            group = self._group = self._group or self._started()
            self._agree(group, study, data, frozen)
            yield _Lead(group, data.network, columns)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the others: they see that the connection closes."""
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
        place = Path(folder, "team")
        for rank in range(1, self.size):
            options = [str(self._site), str(rank), str(self.size), str(place)]
            child = Child("rank", options, home=state / "ranks", log=state / f"rank-{rank}.log")
            self.children.append(self._open.enter_context(child))
        return Group(0, self.size, self._timeout, place, self._alive)

    def _alive(self) -> None:
        for child in self.children:
            if not child.alive:
                raise child.ended()

    def _with_torchruns(self) -> Group:
        """The socket is in a folder of its own, since a path to one must be short; where it is, the
        others read in the state folder, which is this user's alone."""
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="fedtune-ranks-"))
        place = Path(folder, "team")
        replace(_told(self._site), str(place).encode(), private=True)
        self._open.callback(_told(self._site).unlink, missing_ok=True)
        return Group(0, self.size, self._timeout, place)

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
        said = group.reduce_sum(torch.zeros(self.size, dtype=torch.int64))[1:].tolist()
        for rank, answer in enumerate(said, 1):
            if answer != SAME:
                raise InfrastructureError(
                    f"rank {rank} of this site "
                    + ("reads other records" if answer == OTHER else "could not prepare the study"),
                    "the records of rank 0",
                    f"see that its files do not change while it trains; read rank-{rank}.log",
                )
        self._agreed = (study.digest, factor, records)


class _Lead:
    """fedtune.dp.plan.Team, at rank 0."""

    def __init__(self, group: Group, network: Network, columns: slice) -> None:
        self._group, self._network = group, network
        self._columns = [columns.start, columns.stop]

    def total(self, sampled: list[int], dimension: int, own: AddUp) -> torch.Tensor:
        parameters = self._network.parameters().values()
        flat = torch.cat([p.detach().flatten().cpu() for p in parameters])
        rows = torch.tensor(sampled, dtype=torch.int64)
        header = {"do": "add", "dimension": dimension, "columns": self._columns}
        self._group.send(header, [flat, rows])
        return summed(self._group, sampled, dimension, own)


# ------------------------------------------------------------------------------ the other ranks


def follow(group: Group, site: SiteWorker) -> NoReturn:
    """Do what rank 0 says, until InfrastructureError says that it is gone.

    Guarantee: charges nothing, draws nothing, adds no noise, writes no step log; of the ledger it
    reads who has withdrawn and which records are known."""
    work: _Work | None = None
    while True:
        header, tensors = group.receive()
        if header["do"] == "prepare":
            said = torch.zeros(group.size, dtype=torch.int64)
            work = None  # frees the old before the new is read
            try:
                work = _Work(site, header, tensors)
                said[group.rank] = SAME if work.records == header["records"] else OTHER
            except Exception as error:
                log.error("this rank cannot prepare the study: %s", _says(error))
            group.reduce_sum(said)
        elif work is not None:
            flat, rows = tensors
            try:
                own = work.with_parameters(flat, slice(*header["columns"]))
                summed(group, rows.tolist(), header["dimension"], own)
            except InfrastructureError:
                raise
            except Exception as error:  # rank 0 saw that the rows are missing
                log.error("this rank did not add up its rows: %s", _says(error))


class _Work:
    """One study at one rank: network, records, engine and the plan's own clipping."""

    def __init__(
        self, site: SiteWorker, header: dict[str, Any], frozen: list[torch.Tensor]
    ) -> None:
        study = study_from_json(header["study"])
        base = study.base.model_copy(update={"dtype": header["dtype"]})
        # As rank 0 has it: where the study leaves the dtype open, each process measures for itself.
        measured = study.model_copy(update={"base": base})
        self.network = build(measured, base_for(study, site.site))
        arrays = {n: t.numpy() for n, t in zip(header["names"], frozen, strict=True)}
        self.network.load_frozen(arrays)
        data = site.seen(study, self.network)
        self.records = fingerprint(data.dataset)
        how = (data, resolve(study.objective), study.drawn, study.training.engine)
        self._engine_of = partial(UnitGradientEngine, *how)
        self._plan = plan_for_site(study, site.site.site.declared_size)
        self._checkpointing = site.site.site.gradient_checkpointing

    def with_parameters(self, flat: torch.Tensor, columns: slice) -> AddUp:
        """What adds up rows with the parameters `flat`, all in their order, of whose B's these
        columns are trained."""

        def own(rows: list[int]) -> torch.Tensor:
            engine = self._engine_of(columns)
            pieces = torch.split(flat, [p.numel() for p in engine.parameters])
            with torch.no_grad():
                for parameter, piece in zip(engine.parameters, pieces, strict=True):
                    parameter.copy_(piece.view_as(parameter))
            with self.network.recomputing(self._checkpointing and engine.name == "one-pass"):
                return self._plan.clipped_sum(rows, engine.dimension, engine)

        return own


def _says(error: Exception) -> str:
    """The class, and the words of our own errors: they hold no record."""
    words = f": {error}" if isinstance(error, FedtuneError) else ""
    return type(error).__name__ + words


def _told(site: Path) -> Path:
    """Where rank 0 says under torchrun where its socket is."""
    return load_site(site).site.state / "ranks" / os.environ.get("TORCHELASTIC_RUN_ID", "team")


@contextmanager
def team(site: Path, processes: int) -> Iterator[None]:
    """Share the rounds of this process' worker of `site` among `processes`, or torchrun's."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = Workers(site, max(size, processes), torchrun=size > 1)
    with ranks:
        worker(str(site)).ranks = ranks if ranks.size > 1 else None
        yield


def follow_torchrun(site: Path) -> None:
    """Be one of the other ranks that torchrun started, until rank 0 ends."""
    _follow(site, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None)


def _follow(site: Path, rank: int, size: int, place: Path | None) -> None:
    share_machine(rank, size)
    here = SiteWorker(load_site(site), site)
    group = Group(rank, size, None, place or _found(site))
    try:
        follow(group, here)
    except InfrastructureError as error:
        log.info("%s", error)  # rank 0 is gone, and this process with it
    finally:
        group.close()


def _found(site: Path) -> Path:
    """Where torchrun's rank 0 listens. Errors: InfrastructureError where it never says so."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with suppress(OSError):
            place = Path(_told(site).read_text(encoding="utf-8"))
            if place.exists():  # else it is what a team before left behind
                return place
        time.sleep(0.1)
    raise InfrastructureError("rank 0 of this site's team does not say where it is")


def main(options: list[str]) -> None:
    """SITE RANK SIZE SOCKET: one of the ranks that rank 0 started."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    site, rank, size, place = options
    _follow(Path(site), int(rank), int(size), Path(place))
