"""Answer a query about a site's held-out records, as far as the site's rules allow.

The plan must contain the query, the policy must allow the release of its answer, and the budget of
the held-out records must suffice for the query together with what the study's training still
needs."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from safetensors.numpy import save

from fedtune.core.config import Site, SiteEvaluation, Study
from fedtune.core.config.held_out import CLASS
from fedtune.core.config.patient_columns import patient_column
from fedtune.core.dp.plan import DpPlan, SitePlan
from fedtune.core.dp.query import answer, query_plan
from fedtune.core.errors import PolicyRefused, describe, is_fault
from fedtune.core.ledger.entries import Charge
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import Arrays, digest
from fedtune.core.models.prefix_store import make_room_after
from fedtune.core.objectives._interface import Batch, Network
from fedtune.core.vault import airlock
from fedtune.core.vault.budget import QUERIES_NAME, Budget, check_known, check_rounds
from fedtune.core.vault.declared import permit_declared
from fedtune.core.vault.policy import admit_queries, is_held_out_disjoint
from fedtune.core.vault.prepared import Prepared
from fedtune.core.wire.codec import encode

if TYPE_CHECKING:
    from fedtune.core.vault.worker import SiteWorker

log = logging.getLogger("fedtune.site")


def plan_of_queries(study: Study, round_: int) -> DpPlan:
    """Return the plan by which the study's queries are noised and charged. Errors: PolicyRefused if
    the study has no query after `round_`."""
    if round_ not in study.queries:
        raise PolicyRefused(f"the plan has no query after round {round_}")
    return query_plan(study)


def answer_query(
    site: SiteWorker, prepared: Prepared, plan: DpPlan, round_: int, adapter: Arrays
) -> bytes:
    """Charge a query, then evaluate `adapter` on the held-out records with noise. Return the bytes
    of the answer, which the ledger has stored (in its outbox).

    - site: the SiteWorker of this site, with its settings and ledger
    - prepared: the study, as this site admitted it
    - plan: the plan of the study's queries (`plan_of_queries`)
    - round_: the round after which the coordinator asks
    - adapter: the adapter that came with the order, fp32 by the tensors' names

    The bytes are those of a safetensors file with the noised sums, (2 · cells,) fp32, and with a
    count of the noised steps (`SiteWorker.events_of`) as metadata. Errors: Unprepared,
    BudgetExceeded, PolicyRefused, ModelError, LedgerError."""
    study = prepared.study
    current = site.current()
    training = prepared.private
    assert training is not None  # a study with queries is private
    permit_declared(current, site.home)
    held_out = check_release(study, current, plan, prepared.coordinator)
    site.require_signature(study, current)
    check_rounds([s.charge for s in site.ledger.spending()], current.policy, site.room)
    site.declare(held_out, study, current)
    charges = site.ledger.charges(held_out.name)
    charge = charge_of(study, plan, current, round_, charges)

    def permit(charges: list[Charge]) -> None:
        Budget(current.policy, plan, charges).check_attempts(round_)
        check_budget(current, study, training, plan, charges, round_)

    prepared.network.load_trainable(adapter)  # first: an adapter refused here costs nothing
    site.ledger.ask(held_out.name, permit)
    data = site.data_in_study(study, prepared.network, held_out)
    label = site.slot(plan.study, round_, digest(adapter))[2]
    in_home = current.hospital is not None
    known = partial(check_known, held_out.name, plan.unit, in_home=in_home)
    stated = partial(site.check_stated, current)
    rounds = partial(check_rounds, policy=current.policy, room=site.room)
    reserved = site.ledger.reserve(
        held_out.name,
        charge,
        label,
        permit,
        permit_unknown=known,
        permit_apart=stated,
        permit_all=rounds,
    )
    data = site.who_remain(held_out, data)
    site.log.begin_round(site.ledger.hash_of(reserved), site.ledger.order_of(reserved))
    prepared.network.load_frozen(prepared.frozen)
    ran = SitePlan(plan, make_room=make_room_after)
    sums = answer(ran, _rows_or_none(study, data), site.log, round_)
    events = json.dumps(site.events_of(plan.study))
    payload = save(encode({"sums": sums.numpy()}, "float32"), {"events": events})
    held = airlock.holds_answers(site)
    site.ledger.release(reserved, payload, held=held, keeps_all=site.keeps_all)
    return payload


def check_release(study: Study, site: Site, plan: DpPlan, coordinator: str) -> SiteEvaluation:
    """Check that the policy lets the study query the held-out records. Return the table of
    site.toml that names these records.

    - study: the study that asks
    - site: the settings of this site, with the policy that its file has now (`SiteWorker.current`)
    - plan: the plan of the study's queries
    - coordinator: the public key that signed the study's plan

    Errors: PolicyRefused."""
    if "evaluation" not in site.policy.release:
        raise PolicyRefused('policy.release does not list "evaluation"')
    if site.evaluation is None:
        raise PolicyRefused("site.toml names no held-out records")
    admit_queries(study, site, plan, coordinator)
    return site.evaluation


def check_budget(
    site: Site,
    study: Study,
    training: DpPlan,
    plan: DpPlan,
    charges: Sequence[Charge],
    round_: int,
) -> None:
    """Check that the query after the round `round_`, together with the later queries of the study,
    stays within the site's limits. If the same people may be in the training records, all that the
    study's training has spent and will spend counts, too.

    - site: the settings of this site, with the policy that its file has now
    - study: the study that asks
    - training: the plan of the study's training
    - plan: the plan of the study's queries
    - charges: all charges so far against the dataset that is checked, in the ledger's order
    - round_: the round after which the coordinator asks

    Errors: BudgetExceeded."""
    trained = any(charge.study == study.digest for charge in charges)
    if trained or not is_held_out_disjoint(site):
        remaining = Budget(site.policy, training, charges).remaining()
        if remaining > 0:
            ahead = replace(charge_of(study, training, site, 0, charges), steps=remaining)
            charges = [*charges, ahead]
    Budget(site.policy, plan, charges).check(round_)


def charge_of(
    study: Study, plan: DpPlan, site: Site, round_: int, charges: Sequence[Charge]
) -> Charge:
    """Build the ledger's charge for one query or, if `plan` is that of the training, for one round.

    - study: the study that asks
    - plan: the plan of the study's queries, or of its training
    - site: the settings of this site, with the policy that its file has now; they have a table of
      held-out records
    - round_: the round after which the coordinator asks or, in a charge for training, the round
      that trains
    - charges: the dataset's charges so far, which fix the privacy filter's order"""
    assert site.evaluation is not None
    queries = plan.study != study.digest
    return Charge(
        study=plan.study,
        name=study.study.name + (QUERIES_NAME if queries else ""),
        round=round_,
        noise_multiplier=plan.own_noise,
        sampling_rate=plan.sampling_rate,
        steps=plan.local_steps,
        records=plan.records,
        max_grad_norm=plan.max_grad_norm,
        unit=plan.unit,
        cohort=site.evaluation.cohort,
        order=Budget(site.policy, plan, charges).order,
        sites=plan.sites,
        colluding=plan.colluding,
        membership=site.policy.membership,
        patient=patient_column(site.evaluation) if plan.unit == "patient" else "",
    )


def _rows_or_none(study: Study, data: CachedDataset) -> UnitRows:
    """Score the held-out records, and return the rows of numbers whose noised sum answers the
    coordinator's query. If scoring fails for any reason, the result has no rows, so that the answer
    is noise alone: an error would reveal something about the records."""
    try:
        return UnitRows(study, data)
    except BaseException as error:
        if not is_fault(error):
            raise
        log.error("the adapter was not evaluated (%s): the answer is noise", describe(error))
        return UnitRows(study, None)


class UnitRows:
    """Rows of numbers, one for each unit, whose noised sum is the answer to a query about held-out
    records. The rows themselves have no noise; each is built when it is asked for.

    A row has two numbers for each cell of the query, fp64 (2 · cells,): the sum of the scores and
    the number of the unit's records in the cell, both divided by the number of all the unit's
    records. Only two numbers for each record are stored. Rows are built from them a few at a time,
    so that the memory for rows does not grow with the number of units. `wipe` zeroes the stored
    numbers."""

    @torch.no_grad()
    def __init__(self, study: Study, data: CachedDataset | None) -> None:
        """Score each held-out record for the query of `study`. data: the held-out records; None for
        an object without units."""
        axes = study.query_axes
        self._by_class = CLASS in axes
        self._starts = list(itertools.accumulate(map(len, axes.values()), initial=1))
        self._examples = [] if data is None else data.dataset.examples
        self.dimension = 2 * len(study.query_cells)
        self._records: list[list[int]] = [[] for _ in range(data.dataset.n_units if data else 0)]
        for record, example in enumerate(self._examples):
            self._records[example.unit].append(record)
        self._pairs = torch.ones(len(self._examples), 2, dtype=torch.float64)
        if data is not None:
            for index, scores in _scores(study, data, range(len(self._examples))):
                self._pairs[index, 0] = scores

    def __len__(self) -> int:
        return len(self._records)

    def of_units(self, units: Sequence[int]) -> torch.Tensor:
        """Return one row for each of `units`, fp64 (len(units), 2 · cells). For each cell (all
        records, then each class and group) a row has the sum of the scores and the number of the
        unit's records in the cell, both divided by the number of all the unit's records."""
        rows = torch.zeros(len(units), self.dimension // 2, 2, dtype=torch.float64)
        for row, unit in zip(rows, units, strict=True):
            records = self._records[unit]
            for record in records:
                row[self._cells(record)] += self._pairs[record] / len(records)
        return rows.flatten(1)

    def wipe(self) -> None:
        """Overwrite the stored scores with zeros."""
        self._pairs.zero_()

    def _cells(self, record: int) -> list[int]:
        """Return the numbers of the cells to which a record belongs: 0, the cell of all records,
        and at most one cell of each axis."""
        example = self._examples[record]
        groups = ((example.label,) if self._by_class else ()) + example.groups
        placed = zip(self._starts, groups, strict=False)
        return [0, *(start + place for start, place in placed if place >= 0)]


def _scores(
    study: Study, data: CachedDataset, records: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the scores of `records` in parts: each part is a pair of tensors, the indices of some
    records and their scores in fp64. A record whose score cannot be computed has NaN, which affects
    only its unit."""
    pending = dict.fromkeys(records)
    try:
        may_share = study.objective.resolved.may_run_beside
        compute = partial(_scores_of, study, data.network)
        for batch, scores in data.compute_blocks(compute, records, may_share=may_share):
            index = batch.index[: batch.count]
            for record in index.tolist():
                del pending[record]
            yield index, scores[: batch.count].double().cpu()
        return
    except BaseException as error:
        if not is_fault(error):
            raise
        log.error("held-out records failed (%s)", describe(error))
        make_room_after(error)
    for record in pending:
        if len(records) > 1:
            yield from _scores(study, data, [record])
        else:
            yield torch.tensor([record]), torch.tensor([torch.nan], dtype=torch.float64)


def _scores_of(study: Study, network: Network, batch: Batch) -> torch.Tensor:
    """Compute each record's score, (B,) fp64, in [0, 1]. In a study of labels it is the probability
    of the record's label or, with score = "accuracy", 1 if that label is predicted and 0 if not; a
    record whose label is not one of the study's has 0. In other studies it is exp(-loss). The score
    is NaN if the model's output is not finite."""
    objective, table = study.objective.resolved, study.private_evaluation
    if objective.record_format != "label":
        return torch.exp(-objective.losses(network, batch).double())
    hidden = network.hidden(batch.prefix, batch.mask, tower_states=batch.tower_states)
    logits = network.logits(network.pool(hidden, batch.mask)).double()
    if table is not None and table.score == "accuracy":
        right = (logits.argmax(dim=1) == batch.label).double()
        return torch.where(logits.isfinite().all(dim=1), right, torch.nan)
    found = logits.softmax(dim=1).gather(1, batch.label.clamp_min(0)[:, None])[:, 0]
    return torch.where(batch.label >= 0, found, 0.0)
