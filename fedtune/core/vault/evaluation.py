"""A site's rules for a private evaluation query: the plan has to ask for it, the policy has to
release it, and the held-out records' budget pays, less what the study's training still needs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from safetensors.numpy import save

from fedtune.core.config import Site, SiteEvaluation, Study
from fedtune.core.dp.plan import DpPlan, SitePlan
from fedtune.core.dp.query import answer, query_plan
from fedtune.core.errors import PolicyRefused, describe
from fedtune.core.ledger.entries import Charge
from fedtune.core.models.cache import CachedDataset
from fedtune.core.models.lora import Arrays, digest
from fedtune.core.models.prefix_store import make_room_after
from fedtune.core.objectives import resolve
from fedtune.core.objectives._interface import Objective
from fedtune.core.vault import airlock
from fedtune.core.vault.budget import Budget, check_rounds
from fedtune.core.vault.policy import admit
from fedtune.core.vault.prepared import Prepared, step_summary
from fedtune.core.wire.codec import encode

if TYPE_CHECKING:
    from fedtune.core.vault.worker import SiteWorker

log = logging.getLogger("fedtune.site")


def plan_of_queries(study: Study, round_: int) -> DpPlan:
    """Return the plan of the study's queries. Errors: PolicyRefused: none follows `round_`."""
    if round_ not in study.queries:
        raise PolicyRefused(f"a query after round {round_} is not in the plan")
    return query_plan(study)


def answered(
    site: SiteWorker, prepared: Prepared, plan: DpPlan, round_: int, adapter: Arrays
) -> bytes:
    """Evaluate `adapter` on the held-out records with noise; returns what is sent, as it stands in
    the ledger. Errors: as SiteWorker.evaluate."""
    study, current, training = prepared.study, site.current(), prepared.private
    assert training is not None  # a study with queries is private
    held_out = check_release(study, current, plan, prepared.coordinator)
    site.require_signature(study, current)
    check_rounds(len(site.ledger.spending()), current.policy)
    site.declare(held_out, study)
    charges = site.ledger.charges(held_out.name)
    charge = charge_of(study, plan, current, round_, charges)

    def permit(charges: list[Charge]) -> None:
        Budget(current.policy, plan, charges).check_attempts(round_)
        check_budget(current, study, training, plan, charges)

    prepared.network.load_trainable(adapter)  # before the charge: a refused one costs nothing
    site.ledger.ask(held_out.name, permit)
    data = site.data_in_study(study, prepared.network, held_out)
    reserved = site.ledger.reserve(held_out.name, charge, digest(adapter), permit)
    prepared.network.load_frozen(prepared.frozen)
    ran = SitePlan(plan, make_room=make_room_after)
    sums = answer(ran, _rows_or_none(study, data), site.log, round_)
    events = step_summary(site.log.steps(plan.study))
    payload = save(encode({"sums": sums.numpy()}, "float32"), {"events": json.dumps(events)})
    site.ledger.release(reserved, payload, held=airlock.holds_answers(site))
    return payload


def check_release(study: Study, site: Site, plan: DpPlan, coordinator: str) -> SiteEvaluation:
    """Return the held-out records that the policy lets the study query. Errors: PolicyRefused."""
    if "evaluation" not in site.policy.release:
        raise PolicyRefused('policy.release does not list "evaluation"')
    if site.evaluation is None:
        raise PolicyRefused("site.evaluation is not given")
    admit(study, site.model_copy(update={"data": site.evaluation}), plan, coordinator)
    return site.evaluation


def check_budget(
    site: Site, study: Study, training: DpPlan, plan: DpPlan, charges: Sequence[Charge]
) -> None:
    """Check that the remaining queries keep below both ceilings; where the same people may be in
    the training records, together with all that the study's training has spent and has yet to.

    Errors: BudgetExceeded."""
    trained = any(charge.study == study.digest for charge in charges)
    if trained or not _apart(site):
        remaining = Budget(site.policy, training, charges).remaining()
        if remaining > 0:
            ahead = replace(charge_of(study, training, site, 0, charges), steps=remaining)
            charges = [*charges, ahead]
    Budget(site.policy, plan, charges).check(plan.local_steps)


def _apart(site: Site) -> bool:
    """Return whether the site declared both files disjoint, which the ledger enforces."""
    held_out, data = site.evaluation, site.data
    assert held_out is not None
    return data.name in held_out.disjoint_from or held_out.name in data.disjoint_from


def charge_of(
    study: Study, plan: DpPlan, site: Site, round_: int, charges: Sequence[Charge]
) -> Charge:
    """Return the ledger's charge for one query after `round_`."""
    assert site.evaluation is not None
    queries = plan.study != study.digest
    return Charge(
        study=plan.study,
        name=study.study.name + (" (evaluation)" if queries else ""),
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
    )


def _rows_or_none(study: Study, data: CachedDataset) -> torch.Tensor:
    """Compute `unit_rows`; no rows where that fails, whatever the cause: the answer is then noise
    alone, since an error would tell of the records."""
    try:
        return unit_rows(study, data)
    except Exception as error:
        log.error("the adapter was not evaluated (%s): the answer is noise", describe(error))
        return torch.zeros(0, 2, dtype=torch.float64)


@torch.no_grad()
def unit_rows(study: Study, data: CachedDataset) -> torch.Tensor:
    """Compute (score, 1) for each unit with the loaded adapter, fp64 (units, 2). Un-noised."""
    objective, dataset = resolve(study.objective), data.dataset
    rows = torch.zeros(dataset.n_units, 2, dtype=torch.float64)
    unit = torch.tensor([example.unit for example in dataset.examples], dtype=torch.long)
    for index, losses in _losses(objective, data, range(len(unit))):
        rows[:, 0].index_add_(0, unit[index], torch.exp(-losses))
    rows[:, 0] /= torch.bincount(unit, minlength=dataset.n_units)
    rows[:, 1] = 1.0
    return rows


def _losses(
    objective: Objective, data: CachedDataset, records: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield indices of some of `records` with their losses, fp64; NaN for a record whose loss
    cannot be computed, which affects its unit alone."""
    pending = dict.fromkeys(records)
    try:
        for batch in data.blocks(records):
            index = batch.index[: batch.count]
            losses = objective.losses(data.network, batch)[: batch.count].double().cpu()
            for record in index.tolist():
                del pending[record]
            yield index, losses
        return
    except Exception as error:
        log.error("held-out records failed (%s)", describe(error))
        make_room_after(error)
    for record in pending:
        if len(records) > 1:
            yield from _losses(objective, data, [record])
        else:
            yield torch.tensor([record]), torch.tensor([torch.nan], dtype=torch.float64)
