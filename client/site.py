"""A site's worker: plan -> policy -> data -> noised steps -> update. Nothing else leaves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from client.policy import admit
from fedtune.config import Site, Study, load_site
from fedtune.data.tokens import load_dataset
from fedtune.dp.plain import PlainPlan, plain_plan
from fedtune.dp.plan import DpPlan, plan_for_site
from fedtune.dp.steplog import Step, StepLog
from fedtune.errors import PolicyRefused, Refused
from fedtune.models.cache import Cached
from fedtune.models.lora import Arrays
from fedtune.models.network import Network, build
from fedtune.training import check_trains, local_round


class Unprepared(Refused):
    """This site does not know the plan (it was restarted, or joined late): send it again."""


@dataclass(frozen=True)
class Admission:
    """What a site says of a plan. Every field is public."""

    admitted: bool
    reason: str
    name: str
    declared_size: int


@dataclass(frozen=True, repr=False)
class Update:
    """delta: trained minus given, fp32 by name; events: the steps this study ran here so far."""

    delta: Arrays
    events: list[dict[str, float | int]]


@dataclass(frozen=True, repr=False)
class _Prepared:
    study: Study
    network: Network
    data: Cached
    plan: DpPlan | PlainPlan
    frozen: Arrays


@cache
def worker(path: str) -> SiteWorker:
    """The one worker of a site file in this process: data and model stay loaded between rounds."""
    return SiteWorker(load_site(Path(path)), Path(path))


class SiteWorker:
    """Guarantee: a plan is checked against the policy before data is read, and against the budget
    before every round; what was spent is on disk before an update exists."""

    def __init__(self, site: Site, path: Path | None = None) -> None:
        self.site, self._path = site, path
        self.log = StepLog(site.site.state / "steps.jsonl")
        self._prepared: dict[str, _Prepared] = {}
        self._view: tuple[object, ...] = ()
        self._cached: Cached | None = None

    def prepare(self, study: Study, frozen: Arrays) -> Admission:
        """Admit or refuse `study`; on admission the data is read and the model is ready.

        Errors: DataError, ModelError: the site cannot take part (details stay local)."""
        plan = plan_for_site(study, self._size) if study.private else None
        try:
            admit(study, self._current(), plan, self.log)
        except Refused as refusal:
            return self._says(False, str(refusal))
        if study.digest in self._prepared:
            return self._says(True, "")
        network = build(study, self.site.site.base)
        frozen = network.adopt(study, frozen)
        check_trains(study, network)
        self._prepared[study.digest] = _Prepared(
            study,
            network,
            self._data(study, network),
            plan or plain_plan(study, self._size),
            frozen,
        )
        return self._says(True, "")

    def _data(self, study: Study, network: Network) -> Cached:
        """This site's records as `study` sees them; studies that see them alike share the states
        at the cut. Errors: DataError."""
        view = (network, study.objective, study.unit, study.max_records_per_unit)
        if self._view != view or self._cached is None:
            dataset = load_dataset(self.site.data, study, network.tokenizer)
            self._view, self._cached = view, Cached(network, dataset)
        return self._cached

    def train(self, digest: str, round_: int, adapter: Arrays) -> Update:
        """One local round. Errors: Unprepared, BudgetExceeded, PolicyRefused, ModelError."""
        prepared = self._prepared.get(digest)
        if prepared is None:
            raise Unprepared("this site does not know the plan", todo="send it again")
        study, plan = prepared.study, prepared.plan
        if not 1 <= round_ <= (study.training.rounds or 0):
            raise PolicyRefused(f"round {round_} is not in the plan")
        admit(study, self._current(), plan if isinstance(plan, DpPlan) else None, self.log)
        prepared.network.load_frozen(prepared.frozen)
        delta = local_round(study, prepared.data, plan, self.log, round_, adapter)
        return Update(delta, _summary(self.log.steps(digest)))

    def _current(self) -> Site:
        """The site file as it stands now: a policy that was tightened holds from the next round."""
        return self.site if self._path is None else load_site(self._path)

    @property
    def rejected(self) -> Counter[str]:
        """Rejected records by reason, for the site's own eyes."""
        return sum((p.data.dataset.rejected for p in self._prepared.values()), Counter[str]())

    @property
    def _size(self) -> int:
        return self.site.site.declared_size

    def _says(self, admitted: bool, reason: str) -> Admission:
        return Admission(admitted, reason, self.site.site.name, self._size)


def _summary(steps: list[Step]) -> list[dict[str, float | int]]:
    counts = Counter((s.noise_multiplier, s.sampling_rate, s.max_grad_norm) for s in steps)
    return [
        {"sigma": sigma, "q": rate, "max_grad_norm": norm, "steps": count}
        for (sigma, rate, norm), count in counts.items()
    ]
