"""Do a site's part of a study in one object, SiteWorker. It checks a plan against the policy; then,
for each round, it reads the records, charges the ledger, takes the noised steps, stores the update,
and seals it."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.numpy import load, save

from fedtune.core.config import Site, SiteData, Study, load_site
from fedtune.core.config.patient_columns import (
    disjoint_datasets,
    patient_column,
    patient_columns,
)
from fedtune.core.data.dataset import Dataset
from fedtune.core.data.group_reader import group_reader
from fedtune.core.data.load import check_columns
from fedtune.core.dp.non_private import non_private_plan
from fedtune.core.dp.plan import DpPlan, SitePlan, StepPlan
from fedtune.core.dp.steplog import Step, StepLog
from fedtune.core.errors import DataError, PolicyRefused, Refused, describe, is_fault
from fedtune.core.files.room import LEDGER, Room
from fedtune.core.ledger.adopted import check_has_adopted
from fedtune.core.ledger.entries import Charge, Slot, slot_of
from fedtune.core.ledger.ledger import MEMBER_BYTES, Ledger, LedgerError, NoRoom, signing_key
from fedtune.core.ledger.patient_column import check_column_stays
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import Arrays
from fedtune.core.models.lora import digest as arrays_digest
from fedtune.core.models.network import Network
from fedtune.core.models.prefix_store import PREFIX_STORE, make_room_after
from fedtune.core.models.rank_slice import rank_slice
from fedtune.core.models.teacher import teacher_for
from fedtune.core.registry import process_cache
from fedtune.core.secagg.draw import Draws, remove_stored
from fedtune.core.training.local_round import local_round
from fedtune.core.vault import airlock, evaluation, noted, studies
from fedtune.core.vault.budget import Budget, check_known, check_rounds
from fedtune.core.vault.declared import paid_by_run, permit_declared, run_ledger, with_new_policy
from fedtune.core.vault.logged_steps import check_all_logged, check_none_lost
from fedtune.core.vault.own_loss import kept
from fedtune.core.vault.policy import (
    LAST_ROUND,
    admit,
    base_for,
    compute_plan,
    pin_others,
)
from fedtune.core.vault.prepared import (
    Admission,
    Prepared,
    Unsigned,
    Update,
    build_unprepared,
    check_waiting_update,
    metadata_of,
    step_summary,
)
from fedtune.core.vault.reading import keep_counts, read_for_training, without_withdrawn
from fedtune.core.vault.site_checks import check_learns, check_models, self_test
from fedtune.core.wire.codec import Shapes, encode
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.seal import Header, seal

if TYPE_CHECKING:
    from fedtune.core.vault.rank_process import Workers

log = logging.getLogger("fedtune.site")
_workers: dict[str, SiteWorker] = process_cache.register("workers", {})


def worker(path: str) -> SiteWorker:
    """Return the SiteWorker of the site file `path`. This process has one for each site file, so
    that data and model stay loaded between rounds."""
    if path not in _workers:
        _workers[path] = SiteWorker(load_site(Path(path)), Path(path))
    return _workers[path]


def start_worker(path: str, checked: Site) -> None:
    """Make the function `worker` return, for the site file `path`, a SiteWorker with the tables
    that were checked when a person started the site, whatever the file says by now. checked: these
    tables (`core/config/checked.py`)."""
    _workers[path] = SiteWorker(checked, Path(path))


def drop_if_changed(path: Path) -> None:
    """Make the function `worker` load the site file `path` anew if the file changed since it was
    loaded. Errors: ConfigError."""
    current = _workers.get(str(path))
    if current and current.site != load_site(path):
        del _workers[str(path)]


class SiteWorker:
    """The object that does a site's part of its studies: it admits plans, trains rounds, answers
    queries and charges the ledger.

    - site: the settings with which the site takes part
    - path: the site file, whose policy is read anew for every plan and order; None: the policy of
      `site` holds throughout

    Guarantee: a plan is checked against the policy before data is read; every round is reserved in
    the ledger before it trains; an update is on disk and in the ledger before it is sent, and is
    sent again rather than trained again."""

    def __init__(self, site: Site, path: Path | None = None) -> None:
        self.site, self._path = site, path
        log_path = (site.site.ledger or site.home) / "steps.jsonl"
        self.log = StepLog(log_path, site.policy.membership)
        self.ranks: Workers | None = None  # other processes that share a round's work
        self.draws = Draws()  # draws that wait in this process for their set of sites
        self.peers: tuple[str, ...] = ()  # keys of all sites, where this machine simulates them
        self.simulated = False  # whether the person who runs the study runs this site too
        self._prepared: dict[str, Prepared] = {}
        # By dataset: the view that it was loaded for, and the data.
        self._cached: dict[str, tuple[object, CachedDataset]] = {}
        self._of_runs: dict[str, SiteWorker] = {}  # by plan, for declared data in a consortium
        PREFIX_STORE.leave_free(self.room.lent)

    @cached_property
    def home(self) -> Ledger:
        """The site's lifetime ledger, with receipts, declarations, signatures and withdrawals. The
        memberships of a hospital share it."""
        return Ledger(self.site.home, self.room)

    @cached_property
    def ledger(self) -> Ledger:
        """The ledger to which rounds are charged: the site's lifetime ledger, or that of one run of
        declared data."""
        of_run = self.site.site.ledger
        ledger = Ledger(of_run, self.room) if of_run else self.home
        remove_stored(ledger.folder)
        return ledger

    @property
    def has_ledger(self) -> bool:
        """Whether the ledger to which rounds are charged exists already. The ledger of a run of
        declared data is made when its first round is ordered; for the lifetime ledger this is
        always True."""
        of_run = self.site.site.ledger
        return of_run is None or (of_run / LEDGER).exists()

    @cached_property
    def key(self) -> SigningKey:
        return signing_key(self.site, self.home)

    @property
    def keeps_all(self) -> bool:
        """Whether earlier updates stay stored when another one is released: in a simulation, and
        while a person has frozen the lifetime ledger. Errors: LedgerError."""
        return self.simulated or self.home.frozen is not None

    @property
    def room(self) -> Room:
        """The disk space reserved beside the site's ledger. Other files are written only where they
        leave this space free."""
        return self.site.room

    def room_to_answer(self) -> AbstractContextManager[None]:
        """Return a context manager for the time in which an order is answered. During the block the
        reserved disk space is free for what the order writes, which then succeeds whatever else
        fills the disk and however many records the ledger remembers. Errors: InfrastructureError if
        the space cannot be reserved; nothing is then read, charged or sent."""
        return self.room.give_up()

    def of_run(self, digest: str) -> SiteWorker:
        """Return the SiteWorker whose ledger is charged for the plan with this digest: the plan's
        own one if `keep_run` keeps one, else this object."""
        return self._of_runs.get(digest, self)

    def begin_run(self, digest: str) -> SiteWorker:
        """Return the SiteWorker whose ledger is charged for the plan with this digest. For declared
        data in a consortium, each plan has its own SiteWorker with its own ledger: return the one
        that `keep_run` keeps, else a new one. In all other cases return this object. The caller has
        checked the plan's signature."""
        if not self.site.data.declared or self.site.site.ledger:
            return self
        if (of_run := self._of_runs.get(digest)) is None:
            of_run = SiteWorker(paid_by_run(self.site, run_ledger(self.site, digest)), self._path)
            of_run.home = self.home
            of_run.ranks = self.ranks
            of_run.peers = self.peers
            of_run.simulated = self.simulated
        return of_run

    def keep_run(self, digest: str, of_run: SiteWorker) -> None:
        """Keep what `begin_run` returned for an admitted plan, so that the plan's orders find the
        model. Only the `studies.MOST` plans that were admitted last are kept. A plan that is not
        admitted leaves nothing here, since anybody can make up any number of plans.

        digest: the plan's digest; of_run: the SiteWorker that admitted the plan"""
        if of_run is not self:
            self._of_runs.pop(digest, None)
            self._of_runs[digest] = of_run
            for oldest in list(self._of_runs)[: -studies.MOST]:
                del self._of_runs[oldest]  # its coordinator sends the plan again

    def end_run(self, digest: str) -> None:
        """Note that the study of the plan `digest` has ended (`finish`), and keep nothing of its
        run in memory. Errors: LedgerError."""
        self.of_run(digest).finish(digest)
        self._of_runs.pop(digest, None)

    def prepare(self, study: Study, frozen: Arrays, coordinator: str = "") -> Admission:
        """Admit or refuse `study`, and return the answer. On admission, build the model, and note
        that the study is running here. No record is read before a round is charged.

        - study: the plan that the coordinator sent
        - frozen: the plan's frozen arrays that came with it, fp32 by name; {} if it has none
        - coordinator: the public key that signed the plan; "" if none did

        Errors: DataError, ModelError, LedgerError if the site cannot take part; their text stays at
        the site."""
        try:
            self.home.check_not_frozen()  # an order asks before its work, and under the lock
            if self.site.hospital:
                check_has_adopted(self.site.site.state, self.home)
            plan = compute_plan(study, self.current(), coordinator)
            studies.check_number(self.site.site.state, study)
            self.permit(study, plan, coordinator)
            if plan:
                self.check_steps(study.digest)
            prepared = self._prepared.get(study.digest)
            if prepared is None:
                self._cached.clear()  # an earlier study's records take no memory from this one
                prepared = self._prepare_model(study, plan, frozen, coordinator)
            # Another admitted coordinator may send the same plan: its orders are signed by another
            # key and its receipts are its own, but what was prepared stays valid.
            self._prepared.pop(study.digest, None)
            self._prepared[study.digest] = replace(prepared, coordinator=coordinator)
            for oldest in list(self._prepared)[: -studies.MOST]:
                del self._prepared[oldest]  # its coordinator sends the plan again
        except Unsigned as waits:
            return replace(self._admission(False, str(waits)), waits=True)
        except Refused as refusal:
            return self._admission(False, str(refusal))
        lora = study.lora
        chosen = self._prepared[study.digest].lora_rank if lora and lora.min_rank else None
        studies.begin(self.site.site.state, study)
        declared, free = self.site.data.declared, self.site.free_query
        return replace(self._admission(True, "", chosen), declared=declared, free_query=free)

    def finish(self, digest: str) -> None:
        """Note that the study of the plan `digest` has ended, and destroy the draws of shared noise
        that it left. While the ledger is frozen, the study's file is kept (`studies.end`). The
        caller has checked the coordinator's signed statement that the study has ended. Errors:
        LedgerError."""
        self.draws.destroy(digest)  # of attempts that were given up
        studies.end(self.site.site.state, digest, is_kept=self.home.frozen is not None)

    def _prepare_model(
        self, study: Study, plan: DpPlan | None, frozen: Arrays, coordinator: str
    ) -> Prepared:
        """Build the model of an admitted study, check it, and return the study ready to train.

        - study: the plan that the coordinator sent
        - plan: this site's plan for the training; None if privacy = "off"
        - frozen: the plan's frozen arrays that came with it, fp32 by name
        - coordinator: the public key that signed the plan

        Errors: Refused, DataError, ModelError, InfrastructureError."""
        network = build(study, base_for(study, self.site))
        check_models(study, network)
        rank = study.lora.rank_at(self.site.site.lora_rank) if study.lora else None
        if plan:
            self_test(study, network, self._size, rank)
        frozen = network.adopt(study, frozen)
        check_learns(study, network, rank)
        self._check_source(study, network, self.site.data)
        ran = plan or non_private_plan(study, self._size)
        return Prepared(study, network, ran, frozen, coordinator, rank)

    def permit(
        self, study: Study, plan: DpPlan | None, coordinator: str, round_: int | None = None
    ) -> Site:
        """Check the study against the site file as it is now: policy, signature and budget. Return
        the settings that were read, so that a round reads the file only once.

        - study: the study that is to be admitted, or whose round is to be charged
        - plan: this site's plan for its training; None if privacy = "off"
        - coordinator: the public key that signed the plan
        - round_: the round that is about to run; None if none is

        Errors: Refused, ConfigError, LedgerError."""
        site = self.current()
        permit_declared(site, self.home)
        admit(study, site, plan, coordinator)
        self.require_signature(study, site)
        if not self.has_ledger:  # a plan that no budget pays for begins none, whoever sends it
            check_rounds([], site.policy, self.room)
            check_column_stays(None, site, self._dataset, study.unit)
            if plan:
                Budget(site.policy, plan, []).check(round_)
            if round_ is None:
                return site
        check_rounds([s.charge for s in self.ledger.spending()], site.policy, self.room)
        self.declare(site.data, study, site)
        charges = self.ledger.charges(self._dataset)
        if study.continuous:  # a unit that arrives now must have budget to take part
            charges = self.ledger.newcomer(self._dataset)
        if plan:
            Budget(site.policy, plan, charges).check(round_)
        return site

    def check_steps(self, digest: str) -> None:
        """Check that ledger and step log know every step that a private plan ran here; without that
        the plan gets no answer. digest: the plan's digest, or that of its queries. Errors:
        BudgetExceeded, LedgerError."""
        if self.has_ledger:
            check_none_lost(self.ledger, digest, in_home=self.site.hospital is not None)
            check_all_logged(self.ledger, self.log, digest, self.site.policy.own_memberships)

    def declare(self, data: SiteData, study: Study, site: Site) -> None:
        """Enter three facts about a dataset in the ledger, before its charges are read: its cohort,
        its column of patients, and the datasets with which it shares no patient (from which it is
        disjoint). Enter the last two for every other dataset in the ledger too, since it may take
        long until that dataset itself is charged. The facts are those of site.toml now or, if a
        hospital's memberships share the ledger, of hospital.toml.

        - data: the table of site.toml that names the dataset
        - study: the study that will charge it, for its unit
        - site: the settings of this site, with the policy that its file has now

        Errors: BudgetExceeded if the cost of earlier rounds on `data` is unknown; PolicyRefused if
        the study protects records, and the ledger remembers a column of patients."""
        apart = disjoint_datasets(site)
        for other in sorted({*self.ledger.datasets} - {data.name}):
            # A dataset that is no longer listed is disjoint from none.
            self.ledger.declare(other, apart.get(other, ()))
        columns = patient_columns(site)
        self.ledger.declare(data.name, data.disjoint_from, cohort=data.cohort, columns=columns)
        check_column_stays(self.ledger, site, data.name, study.unit)
        unknown = self.ledger.unknown(data.name, study.unit)
        check_known(data.name, study.unit, unknown, in_home=site.hospital is not None)

    def check_stated(
        self, site: Site, declared: Mapping[str, Sequence[str]], columns: Mapping[str, str]
    ) -> None:
        """If a hospital's memberships share the ledger, check that the ledger's declarations are
        still those of hospital.toml as this vault read it, and that this vault tells patients apart
        by the columns that are declared. This is called under the lock of the ledger, just before a
        charge.

        - site: the settings with hospital.toml as this vault read it
        - declared: dataset's name -> the datasets that the ledger now has as disjoint from it
        - columns: dataset's name -> the column of patients that the ledger now has for it

        Errors: Unprepared if another membership's vault entered another version of hospital.toml
        meanwhile. The coordinator is told the same as after a restart, and sends the plan again;
        this vault then reads the file anew. PolicyRefused if another column tells patients apart
        since this vault was started: its charge would be for units by the earlier column."""
        if hospital := site.policy.hospital:
            stated = {name: sorted({*hospital.disjoint_from.get(name, ())}) for name in declared}
            named = {name: hospital.patients.get(name, it) for name, it in columns.items()}
            if stated != declared or named != columns:
                raise build_unprepared()
            for table in (self.site.data, self.site.evaluation):
                own = patient_column(table) if table else ""
                if table and columns.get(table.name, own) != own:
                    raise PolicyRefused(
                        "[hospital] was changed: other units are told apart since the site was "
                        "started",
                        "the hospital's settings as they are now",
                        "the site may start `fedtune client` again",
                    )

    def require_signature(self, study: Study, site: Site) -> None:
        """Check that a person here signed the plan, if the site's policy requires it. In a
        simulation the rule "reviewed" needs no signature: one person has both the plan and the
        site's file.

        Errors: Unsigned; the caller that answers the coordinator then stores the plan for `fedtune
        review`."""
        rule = site.policy.admission
        if rule == "standing" or self.home.admitted(study.digest, site.policy.own_memberships):
            return
        if rule == "reviewed" and self.simulated:
            return
        raise Unsigned(
            f'policy.admission = "{rule}" and nobody at the site has signed this plan',
            todo="ask the site to run `fedtune review` with --sign",
        )

    def data_for(self, study: Study, network: Network, data: SiteData) -> CachedDataset:
        """Load one dataset for `study`. Studies that read the dataset in the same way share the
        cached outputs of the frozen layers. In a study without a last round, or with data.consent,
        the files are read anew each round; in other studies the dataset in memory is used. A
        withdrawal must not cause the files to be read again: they may have new rows by now, whose
        effect would reveal the withdrawal. `who_remain` leaves out who withdrew since the dataset
        was read.

        - study: the study by which records are rendered, tokenised and capped
        - network: the model that the site built for it
        - data: the table of site.toml that names the dataset

        Errors: DataError if the columns do not fit the study, or there is no file."""
        anew = study.continuous or bool(data.consent)
        groups = group_reader(data, study)
        apart: list[tuple[str, str]] = []
        if self.site.hospital:  # which may be declared otherwise while this membership runs
            apart = [pair for pair in self.home.disjoint if data.name in pair]
        of_study = study.objective, study.unit, study.max_records_per_unit
        view = (data, network, *of_study, groups, apart)
        cached_view, cached = self._cached.get(data.name, (None, None))
        if anew or cached_view != view or cached is None:
            dataset = self._read(study, network, data)
            keep_counts(self.site, data, study, dataset)
            elsewhere = self._remember(study, data, dataset)
            dataset = dataset.exclude_units(elsewhere.__contains__)
            cached = CachedDataset(network, dataset, self.site.site.cache_bytes)
            self._cached[data.name] = None if anew else view, cached
        return cached

    def _remember(self, study: Study, data: SiteData, dataset: Dataset) -> frozenset[bytes]:
        """Enter in the ledger, as hashes, what it needs to recognise the units and records of a
        dataset later. Return the keys of the units that must be left out because they take part in
        a dataset that is disjoint from this one; another membership may have entered them since
        `dataset` was read.

        Guarantee: at most REMEMBERED records of a unit are entered as trained on, and the disk
        space reserved for the ledger suffices for them. If a unit has more records than the cap
        allows, a later reading takes the known ones first. What it takes thus depends only on that
        unit's records and history, never on free disk space. The hashes of other records, by which
        a private record is recognised if somebody declares it public, are entered only if the disk
        has space for them beside the reserved one. Errors: LedgerError; NoRoom if the disk has less
        space than was reserved."""
        folder, known = self.ledger.folder, self.ledger.member_test(data.name)
        new = sum(not known(member) for member in dataset.members)
        members = dataset.trained
        if not new or self.room.has_space(MEMBER_BYTES * new):
            members = dataset.members
        if len(members) < len(dataset.members):
            log.warning(
                "%s: the disk has no room for all that the ledger remembers of records; until it "
                "has, and this client is started again, these are not known again where somebody "
                "declares them public; to do: free space",
                folder,
            )
        arrivals = dataset.keys if study.continuous else None
        about = data.name, None, dataset.content_hash
        try:
            return self.ledger.declare(*about, members, data.cohort, arrivals, dataset.keys)
        except NoRoom:  # for texts: what a later reading chooses by comes first
            if members == dataset.trained:
                raise
            return self.ledger.declare(*about, dataset.trained, data.cohort, arrivals, dataset.keys)

    def data_in_study(self, study: Study, network: Network, data: SiteData) -> CachedDataset:
        """Load a dataset as `data_for` does, but return an empty one if the records cannot be read
        now, for whatever reason, or if the disk has no space for what the ledger remembers of them.
        The site answers the round in any case; with an empty dataset its answer is noise alone, and
        is charged.

        Errors: LedgerError other than NoRoom, since without a ledger nothing can be charged."""
        return self._or_nobody(network, data, partial(self.data_for, study, network, data))

    def who_remain(self, data: SiteData, read: CachedDataset) -> CachedDataset:
        """Return a dataset without the patients who withdrew since it was read; reading may have
        taken hours. Call this after a charge. Then the order of the ledger's entries decides:
        whoever withdrew before the charge takes no part in what was charged.

        - data: the table of site.toml that names the dataset
        - read: the dataset as `data_in_study` returned it. If this object keeps it in memory, the
          result takes its place there

        Guarantee: rows are left out, and nothing else changes. If this fails, an empty dataset is
        returned, except for the errors named here. Errors: a LedgerError other than NoRoom, and a
        request to end this process."""

        def remaining() -> CachedDataset:
            left = without_withdrawn(read, self.home)
            view, cached = self._cached.get(data.name, (None, None))
            if cached is read:
                self._cached[data.name] = view, left
            return left

        return self._or_nobody(read.network, data, remaining)

    def _or_nobody(
        self, network: Network, data: SiteData, records: Callable[[], CachedDataset]
    ) -> CachedDataset:
        """Return what `records` returns. If it fails, log the error and return an empty dataset.
        Errors: only a LedgerError other than NoRoom is passed on, and a request to end this process
        (`is_fault`)."""
        try:
            return records()
        except BaseException as error:
            unpaid = isinstance(error, LedgerError) and not isinstance(error, NoRoom)
            if unpaid or not is_fault(error):
                raise
            log.error(
                "%s: the records cannot be read or remembered (%s); this site takes part with "
                "noise alone until they can",
                data.where,
                describe(error),
            )
            return CachedDataset(network, Dataset([], 0, Counter()))

    def _read(self, study: Study, network: Network, data: SiteData) -> Dataset:
        """Read the dataset without the patients who withdrew. If the records cannot be read, return
        an empty dataset. With fewer than two units the round goes on, too: one record more or less,
        or a broken one, must not be seen from outside. Errors: DataError if there is no file, or
        the columns do not fit the study; no record decides this. data: the table of site.toml that
        names the dataset."""
        self._check_source(study, network, data)
        try:
            dataset = read_for_training(
                data, study, network.tokenizer, network.reader, self.home, teacher_for(study)
            )
        except DataError as error:  # a folder without a file, a path of another kind
            log.error("%s. This site takes part with noise alone until it is corrected", error)
            return Dataset([], 0, Counter())
        if dataset.n_units < 2:
            log.error("%s: too few usable records; this site sends noise alone", data.where)
        return dataset

    def _check_source(self, study: Study, network: Network, data: SiteData) -> None:
        """Check that the records' source exists and that its columns fit the study. No record is
        read. data: the table of site.toml that names the records. Errors: DataError."""
        check_columns(data, study, network.tokenizer, reader=network.reader)
        if not (data.url or data.path.exists()):
            raise DataError(f"{data.path}: no such file", "the site's records")

    def train(self, digest: str, round_: int, adapter: Arrays, receipt: str = "") -> Update:
        """Train one round at this site from `adapter`, and return the update. If the round was
        trained already, return the stored update instead.

        - digest: the plan's digest
        - round_: the number of the round, from 1
        - adapter: the adapter that came with the order, fp32 by the tensors' names
        - receipt: the coordinator's receipt for this site's ledger that came with the order, as
          JSON; "" if it has none

        Errors: Unprepared, BudgetExceeded, PolicyRefused, ModelError, LedgerError; Held if the
        update, which is charged, waits for a person at the site; Void if that person refused it."""
        if (prepared := self.begin(digest, round_, receipt)).study.secure_aggregation:
            raise PolicyRefused(
                "under this plan only the sum of all sites is opened, never one site's update"
            )
        slot = self.slot(digest, round_, arrays_digest(adapter))
        airlock.check_not_refused(self.ledger, slot)
        payload = self.ledger.released(*slot)
        if payload is None:
            payload = self._train(prepared, round_, adapter, slot[2])
        else:
            check_waiting_update(prepared, round_, payload)
        airlock.check_let_go(self.ledger, slot)
        return Update(load(payload), json.loads(metadata_of(payload)["events"]))

    def slot(self, plan: str, round_: int, label: str) -> Slot:
        """Return the key under which the ledger keeps the answer to an order: the triple (plan,
        round_, label).

        - plan: digest of the plan or, for a query, its `queries_digest`
        - round_: the number of the round
        - label: digest of the adapter that came with the order, or the label of a draw

        In a membership of a hospital the third item also has the membership's name (`slot_of`), so
        that two memberships never share a key. One exception: if this site answered the order
        before the hospital had a home, or a person decided about that answer, the key without the
        name is returned."""
        policy = self.site.policy
        earlier = plan, round_, label
        may_be_earlier = policy.membership and "" in policy.own_memberships
        if may_be_earlier and self.ledger.has_answered(earlier):
            return earlier
        return slot_of(earlier, policy.membership)

    def begin(self, digest: str, round_: int, receipt: str) -> Prepared:
        """Check that an order's round is in the plan, and compare the ledger with the coordinator's
        receipt. Return the study as this site admitted it.

        - digest: the plan's digest
        - round_: the number of the round, from 1
        - receipt: the coordinator's receipt that came with the order, as JSON; "" if it has none

        Errors: Unprepared, PolicyRefused, LedgerError."""
        prepared = self._require(digest)
        study = prepared.study
        last = LAST_ROUND if study.continuous else study.training.rounds or 0
        if not 1 <= round_ <= last:
            raise PolicyRefused(f"round {round_} is not in the plan")
        noted.accept(self, receipt, prepared.coordinator)
        if prepared.private:
            self.check_steps(digest)
        return prepared

    def reserve(
        self, prepared: Prepared, round_: int, adapter: Arrays, slot: str
    ) -> tuple[CachedDataset, int]:
        """Charge a round in the ledger, before it trains. Return the records that take part, and
        the number of the ledger's new entry. The network then has the adapter's values and the
        frozen ones.

        - prepared: the study, as this site admitted it
        - round_: the number of the round, from 1
        - adapter: the adapter that the round starts from, fp32 by the tensors' names
        - slot: the third item of the ledger's key for the answer, which the method `slot` returns:
          the adapter's digest, in a hospital's membership together with the membership's name

        Errors: Unprepared, BudgetExceeded, PolicyRefused, ModelError, LedgerError; nothing is
        charged then."""
        study, plan = prepared.study, prepared.private
        site = self.permit(study, plan, prepared.coordinator, round_)
        prepared.network.load_trainable(adapter)  # before the charge: a refused one costs nothing
        charge = self.charge_of(study, plan, site, round_)

        def permit(charges: list[Charge]) -> None:
            if plan:
                budget = Budget(site.policy, plan, charges)
                budget.check_attempts(round_)
                budget.check(round_)

        def permit_other(charges: list[Charge]) -> None:
            if plan:
                Budget(site.policy, plan, charges).check_ceilings(round_)

        # Again under the write lock: another membership may have paid since.
        in_home = site.hospital is not None
        known = partial(check_known, self._dataset, study.unit, in_home=in_home)
        stated = partial(self.check_stated, site)
        rounds = partial(check_rounds, policy=site.policy, room=self.room)
        # Before a record is read, since each reading may add an entry to the ledger. In a
        # continuous study `permit` sees one cohort's charges, which may lack some attempts.
        if plan and study.continuous:
            Budget(site.policy, plan, self.ledger.charges(self._dataset)).check_attempts(round_)
        self.ledger.ask(self._dataset, permit, permit_other, of_newcomers=study.continuous)
        data = self.data_in_study(study, prepared.network, self.site.data)
        if study.continuous:  # `permit` asks of a cohort, and leaves out one that it refuses
            reserved, spent = self.ledger.reserve_for(
                self._dataset,
                charge,
                slot,
                permit,
                permit_other,
                permit_unknown=known,
                permit_apart=stated,
                permit_all=rounds,
            )
            left = partial(self._with_budget_left, data, spent)
            data = self._or_nobody(data.network, self.site.data, left)
        else:
            reserved = self.ledger.reserve(
                self._dataset,
                charge,
                slot,
                permit,
                permit_unknown=known,
                permit_apart=stated,
                permit_all=rounds,
            )
        data = self.who_remain(self.site.data, data)
        self.log.begin_round(self.ledger.hash_of(reserved), self.ledger.order_of(reserved))
        if plan is None:  # a mechanism logs its noised steps; a restore charges by the log
            steps = study.training.local_steps
            self.log.append(Step(study.digest, round_, 0.0, 1.0, 0.0, study.unit), steps)
        prepared.network.load_frozen(prepared.frozen)
        return data, reserved

    def _train(self, prepared: Prepared, round_: int, adapter: Arrays, digest: str) -> bytes:
        """Charge a round, train it, and return the encoded update, the bytes of a safetensors file.
        The ledger stores these bytes, too (in its outbox), if the update has noise.

        - prepared: the study, as this site admitted it
        - round_: the number of the round, from 1
        - adapter: the adapter that the round starts from, fp32 by the tensors' names
        - digest: the third item of the ledger's key for the answer: the adapter's digest, in a
          hospital's membership together with the membership's name"""
        study, plan = prepared.study, prepared.private
        data, reserved = self.reserve(prepared, round_, adapter, digest)
        recompute = self.site.site.gradient_checkpointing
        columns = rank_slice(study.lora, prepared.lora_rank, round_)
        with self.step_plan(prepared, data, columns) as ran, kept(self.site, study, round_) as own:
            given = (study, data, ran, self.log, round_, adapter, recompute, columns)
            delta = local_round(*given, own)
        sent = encode(delta, study.wire.update)  # after the noise, before the ledger
        payload = save(sent, {"events": json.dumps(self.events(prepared))})
        if plan:  # an update without noise is not stored; ordered again, it is trained again
            held = airlock.holds_answers(self)
            self.ledger.release(reserved, payload, held=held, keeps_all=self.keeps_all)
        return payload

    def events(self, prepared: Prepared) -> list[dict[str, Any]]:
        """Return how many noised steps a study ran here so far, in the form of `events_of`; [] if
        the study is not private."""
        return self.events_of(prepared.study.digest) if prepared.private else []

    def events_of(self, digest: str) -> list[dict[str, Any]]:
        """Return how many noised steps a plan ran here so far: a list with one dict for each
        combination of σ, sampling rate, clipping norm and records per unit, with its number of
        steps (`step_summary`). Only this membership's steps count, since the coordinator of another
        membership may have sent the same plan. digest: the plan's digest. Errors:
        LedgerError if steps are missing; a number that is too small is never stated."""
        self.check_steps(digest)
        return step_summary(self.log.steps(digest, self.site.policy.own_memberships))

    def _with_budget_left(self, data: CachedDataset, spent: frozenset[int]) -> CachedDataset:
        """Return the dataset without the cohorts whose lifetime budget is used up. From outside
        nobody can observe which these are: batch, noise and divisor do not depend on the true
        number of units.

        spent: the cohorts without budget, each by the number of the ledger's entry for its arrival,
        as `Ledger.reserve_for` returns them"""
        arrival = self.ledger.arrival(self._dataset)
        remaining = data.dataset.exclude_units(lambda key: arrival(key) in spent)
        if remaining.n_units < min(2, data.dataset.n_units):
            log.error("fewer than 2 units have budget left; see `fedtune ledger`")
        cached = data.of(remaining)
        self._cached[self._dataset] = None, cached  # drops the states of those left out
        return cached

    @contextmanager
    def step_plan(
        self, prepared: Prepared, data: CachedDataset, columns: slice
    ) -> Iterator[StepPlan]:
        """A context manager: yield the object that draws a round's rows, clips their gradients and
        adds the noise. If this site has other processes, they share the work of its steps.

        - prepared: the study, as this site admitted it
        - data: the records that take part
        - columns: the columns of each B that the round trains"""
        if prepared.private is None:
            yield prepared.plan
        elif self.ranks is None:
            yield SitePlan(prepared.private, make_room=make_room_after)
        else:
            with self.ranks.running(
                prepared.study, prepared.private, data, prepared.frozen, columns
            ) as team:
                yield SitePlan(prepared.private, team, make_room_after)

    def evaluate(self, digest: str, round_: int, adapter: Arrays, receipt: str = "") -> Update:
        """Evaluate `adapter` on the held-out records, and return the noised answer. If the query
        was answered already, return the stored answer instead.

        - digest: the plan's digest
        - round_: the round after which the coordinator asks
        - adapter: the adapter that came with the order, fp32 by the tensors' names
        - receipt: the coordinator's receipt for this site's ledger that came with the order, as
          JSON; "" if it has none

        Errors: Unprepared, BudgetExceeded, PolicyRefused, ModelError, LedgerError; Held if the
        answer, which is charged, waits for a person at the site; Void if that person refused it."""
        prepared = self._require(digest)
        plan = evaluation.plan_of_queries(prepared.study, round_)
        noted.accept(self, receipt, prepared.coordinator)
        self.check_steps(digest)
        slot = self.slot(plan.study, round_, arrays_digest(adapter))
        airlock.check_not_refused(self.ledger, slot)
        payload = self.ledger.released(*slot)
        if payload is None:
            payload = evaluation.answer_query(self, prepared, plan, round_, adapter)
        airlock.check_let_go(self.ledger, slot)
        return Update(load(payload), json.loads(metadata_of(payload)["events"]))

    def charge_of(self, study: Study, plan: DpPlan | None, site: Site, round_: int) -> Charge:
        """Build the charge that the ledger enters for one round of a plan.

        - study: the study of the round
        - plan: this site's plan for its training; None if privacy = "off"; the charge's σ is then 0
        - site: the settings of this site, with the policy that its file has now
        - round_: the number of the round, from 1"""
        charges = self.ledger.charges(self._dataset)
        return Charge(
            study=study.digest,
            name=study.study.name,
            round=round_,
            noise_multiplier=plan.own_noise if plan else 0.0,
            sampling_rate=plan.sampling_rate if plan else 1.0,
            steps=study.training.local_steps,
            records=plan.records if plan else 1,
            max_grad_norm=plan.max_grad_norm if plan else 0.0,
            unit=study.unit,
            cohort=self.site.data.cohort,
            order=Budget(site.policy, plan, charges).order if plan else 2.0,
            sites=plan.sites if plan else 1,
            colluding=plan.colluding if plan else 0,
            membership=site.policy.membership,
            patient=patient_column(self.site.data) if study.unit == "patient" else "",
        )

    def sealed(self, digest: str, round_: int, nonce: str, content_digest: str) -> dict[str, str]:
        """Sign the context of an answer. Return the seal as {"header": JSON text, "signature": the
        site's signature of it}, both to be sent with the answer.

        - digest: the plan's digest
        - round_: the round, as in the order
        - nonce: the random text of the order, which the header repeats
        - content_digest: `body_digest` of the answer's arrays and text fields

        Errors: Unprepared if the site does not know the plan."""
        prepared, audit = self._require(digest), noted.acts(self).head
        membership, coordinator = self.site.policy.membership, prepared.coordinator
        header = Header(
            plan=digest,
            round=round_,
            base=prepared.study.base.digest or "",
            site=self.site.site.name,
            receiver=coordinator,
            nonce=nonce,
            body=content_digest,
            ledger=self.home.head_statement(audit, membership, coordinator),
        )
        return seal(self.key, header)

    def shapes(self, digest: str) -> Shapes:
        """Return the shapes of the adapter's tensors, by name. digest: the plan's digest. Errors:
        Unprepared if the site does not know the plan."""
        return {n: tuple(p.shape) for n, p in self._require(digest).network.parameters().items()}

    def study_of(self, digest: str) -> Study:
        """Return the plan with this digest. Errors: Unprepared if the site does not know the
        plan."""
        return self._require(digest).study

    def coordinator_of(self, digest: str) -> str:
        """Return the public key that signed the plan with this digest. Errors: Unprepared if the
        site does not know the plan."""
        return self._require(digest).coordinator

    def _require(self, digest: str) -> Prepared:
        if (prepared := self._prepared.get(digest)) is None:
            raise build_unprepared()
        return prepared

    def current(self) -> Site:
        """Read the site file again, and return the site with the policy that the file has now;
        policy.peers is without the site's own key. A tightened policy thus applies from the next
        round. Other changes apply when the site is started again (`with_new_policy`)."""
        site = with_new_policy(load_site(self._path), self.site) if self._path else self.site
        if not site.policy.peers and not self.peers:
            return site
        return pin_others(site.with_peers(site.policy.peers or self.peers), self.key.public)

    @property
    def _dataset(self) -> str:
        return self.site.data.name

    @property
    def _size(self) -> int:
        return self.site.site.declared_size

    def _admission(self, admitted: bool, reason: str, lora_rank: int | None = None) -> Admission:
        return Admission(admitted, reason, self.site.site.name, self._size, lora_rank)
