"""A site's rules for a query about its held-out records: asked for by the plan, released by the
policy, paid from those records' budget, and never from what the study's training still needs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from fedtune.client.policy import admit, order_of, within_budget
from fedtune.config import Site, SiteEvaluation, Study
from fedtune.dp import accountant
from fedtune.dp.plan import DpPlan
from fedtune.dp.query import query_plan
from fedtune.errors import BudgetExceeded, FedtuneError, PolicyRefused
from fedtune.ledger.entries import Charge
from fedtune.models.cache import CachedDataset
from fedtune.objectives import resolve
from fedtune.objectives._interface import Objective

log = logging.getLogger("fedtune.site")


def asked_for(study: Study, round_: int) -> DpPlan:
    """The plan of the study's queries. Errors: PolicyRefused where there is none after `round_`."""
    if round_ not in study.queries:
        raise PolicyRefused(f"a query after round {round_} is not in the plan")
    return query_plan(study)


def allowed(study: Study, site: Site, plan: DpPlan, coordinator: str) -> SiteEvaluation:
    """The records that may be asked about. Errors: PolicyRefused naming the first rule against."""
    if "evaluation" not in site.policy.release:
        raise PolicyRefused('policy.release does not list "evaluation"')
    if site.evaluation is None:
        raise PolicyRefused("site.evaluation is not given")
    admit(study, site.model_copy(update={"data": site.evaluation}), plan, coordinator)
    return site.evaluation


def payable(
    site: Site, study: Study, training: DpPlan, plan: DpPlan, charges: Sequence[Charge]
) -> None:
    """Within both ceilings, with the queries ahead; and where the same people may be in the
    training records, with all that the study's training has spent and has yet to spend.

    Errors: BudgetExceeded."""
    assert site.evaluation is not None  # allowed() saw to it
    trained = [charge for charge in charges if charge.study == study.digest]
    if trained or not _apart(site):
        left = training.steps - sum(charge.steps for charge in trained)
        if left > 0:
            ahead = replace(charge_of(study, training, site, 0, charges), steps=left)
            charges, trained = [*charges, ahead], [*trained, ahead]
    within_budget(site, plan, charges, plan.local_steps)
    mine = [charge.event for charge in charges if charge.study == plan.study]
    queries = plan.events(max(plan.steps - sum(event.steps for event in mine), plan.local_steps))
    whole = [*(charge.event for charge in trained), *mine, *queries]
    if accountant.epsilon(whole, plan.delta) > site.policy.max_epsilon_per_study:
        raise BudgetExceeded(
            "training and queries together would go past policy.max_epsilon_per_study",
            f"at most ε = {site.policy.max_epsilon_per_study} at this site",
            "raise private_evaluation.noise_multiplier, or have the site declare its held-out "
            "records disjoint from those it trains on",
        )


def _apart(site: Site) -> bool:
    """Whether the site says that nobody is in both files; the ledger holds it to that."""
    held_out, data = site.evaluation, site.data
    assert held_out is not None
    return data.name in held_out.disjoint_from or held_out.name in data.disjoint_from


def charge_of(
    study: Study, plan: DpPlan, site: Site, round_: int, charges: Sequence[Charge]
) -> Charge:
    """One query after `round_`, as the ledger keeps it."""
    assert site.evaluation is not None
    queries = plan.study != study.digest
    return Charge(
        study=plan.study,
        name=study.study.name + (" (evaluation)" if queries else ""),
        round=round_,
        noise_multiplier=plan.noise_multiplier,
        sampling_rate=plan.sampling_rate,
        steps=plan.local_steps,
        records=plan.records,
        max_grad_norm=plan.max_grad_norm,
        unit=plan.unit,
        cohort=site.evaluation.cohort,
        order=order_of(site, plan, charges),
    )


@torch.no_grad()
def unit_rows(study: Study, data: CachedDataset) -> torch.Tensor:
    """(score, 1) of each unit with the adapter that is loaded, fp64 (units, 2). Un-noised."""
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
    """Indices of some of `records` with their losses, fp64; NaN of a record that makes a library
    raise, which costs its unit alone. Errors: FedtuneError, which no record decides."""
    left = dict.fromkeys(records)
    try:
        for batch in data.blocks(records):
            index = batch.index[: batch.count]
            losses = objective.losses(data.network, batch)[: batch.count].double().cpu()
            for record in index.tolist():
                del left[record]
            yield index, losses
        return
    except FedtuneError:
        raise
    except Exception as error:  # its words may quote a record
        log.error("held-out records failed (%s)", type(error).__name__)
    for record in left:
        if len(records) > 1:
            yield from _losses(objective, data, [record])
        else:
            yield torch.tensor([record]), torch.tensor([torch.nan], dtype=torch.float64)
