"""Check a plan against the site's rules before any record is read. Deny by default.

A refusal names only the rule and public values, so the coordinator may see it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fedtune.core.bases.find import Base, base_of_plan
from fedtune.core.config import (
    BASES,
    RELEASE,
    LoraTable,
    PolicyTable,
    PrivacyTable,
    Site,
    Study,
    noise_shares,
)
from fedtune.core.config.patient_columns import disjoint_datasets
from fedtune.core.config.sheet import list_lacking, load_sheet
from fedtune.core.dp import accountant
from fedtune.core.dp.calibration import sampling_rate
from fedtune.core.dp.plan import DpPlan, plan_for_site
from fedtune.core.dp.query import query_plan
from fedtune.core.dp.shared_noise import own_sigma
from fedtune.core.errors import ConfigError, PolicyRefused
from fedtune.core.modalities import MODALITIES
from fedtune.core.objectives import OBJECTIVES
from fedtune.core.registry import Group
from fedtune.core.strategy import STRATEGIES

COMPUTED = 100.0  # the largest ε that is computed, unless the policy's ceiling is higher
LAST_ROUND = 10**9  # stands for the last round of a plan without one; an entry has space for it


def base_for(study: Study, site: Site) -> Base:
    """Find, on this machine, the base that a plan names by its digest. site.base comes first;
    `base_of_plan` describes where else this looks, and when a base is fetched.

    Errors: PolicyRefused, ModelError, InfrastructureError."""
    listed = () if site.policy.bases == "any" else site.policy.bases
    return base_of_plan(study.base.digest, site.site.base, listed)


def compute_plan(study: Study, site: Site, coordinator: str = "") -> DpPlan | None:
    """Check the study against the site's data sheet and rules, then compute and return the plan of
    noised steps that the site would run; None if privacy = "off". The figures that the study states
    are checked first, since a computation from figures without a bound may never end.

    coordinator: the public key (hexadecimal) that signed the plan; "" if none did. Errors:
    PolicyRefused naming the first rule that refuses."""
    for refusal in sheet_refusals(study, site):
        raise refusal
    admit(study, site, None, coordinator)
    return compute_within_limits(study, site) if study.private else None


def compute_within_limits(study: Study, site: Site) -> DpPlan:
    """Compute the plan of noised steps that the site would run, unless it has more steps than
    policy.max_steps or an ε far too large. For such figures, which somebody may have chosen to do
    harm, the computation might never end. So all code of a site computes plans by this function.

    - study: a private study
    - site: the settings of this site, with its declared size and its policy

    Errors: PolicyRefused if the study has more steps, or an ε above both COMPUTED and the policy's
    ceiling of a study, or no plan fits its budget."""
    stated = _stated_figures(study, site.site.declared_size)
    for refusal in _at_most("steps", stated.steps or 0, "max_steps", site.policy):
        raise refusal
    if _least_cost(study, stated) > max(COMPUTED, site.policy.max_epsilon_per_study):
        raise _past_ceiling(site.policy)
    try:
        return plan_for_site(study, site.site.declared_size, site.policy.max_steps)
    except ConfigError as error:  # its text has only public figures
        raise PolicyRefused(error.happened, error.expected, error.todo) from None


def admit(study: Study, site: Site, plan: DpPlan | None, coordinator: str = "") -> None:
    """Check that the site's rules admit the study.

    - study: the study that a coordinator asks this site to run
    - site: the settings of this site, with the policy that its file has now
    - plan: this site's plan for the training, whose figures are checked. None if privacy = "off",
      or if it is not computed yet; then the figures that the study states are checked instead
    - coordinator: the public key (hexadecimal) that signed the plan; "" if none did, which a policy
      that lists coordinators refuses

    Errors: PolicyRefused naming the first rule that refuses."""
    for refusal in refusals(study, site, plan, coordinator):
        raise refusal


def admit_queries(study: Study, site: Site, queries: DpPlan, coordinator: str) -> None:
    """Check that the site's rules admit the queries of an admitted study.

    - study: the study that asks
    - site: the settings of this site, with the policy that its file has now
    - queries: the plan of the study's queries
    - coordinator: the public key (hexadecimal) that signed the plan; "" if none did, which a policy
      that lists coordinators refuses

    The rules about the study and about what is protected (σ, δ, units) apply to a query; its σ is
    that of this site's own noise. The bounds on C, q and steps apply to training only: a query's C
    follows from how many numbers its answer has, it reads every unit, and it is asked at most once
    a round. Errors: PolicyRefused naming the first rule that refuses."""
    policy, size = site.policy, site.site.declared_size
    rules = (
        _about_study(study, site, coordinator),
        _about_unit(study, site),
        _about_protection(queries.own_noise, queries.delta, size, policy),
        _about_outcome(study, policy),
    )
    for refusal in itertools.chain(*rules):
        raise refusal


def is_held_out_disjoint(site: Site) -> bool:
    """Return whether the site declared that its training records and its held-out records share no
    patient; the ledger enforces this. site: the site's settings, with a table [evaluation]."""
    assert site.evaluation is not None
    data, held_out, apart = site.data.name, site.evaluation.name, disjoint_datasets(site)
    return data in apart.get(held_out, ()) or held_out in apart.get(data, ())


def plan_of_queries_beside(study: Study, site: Site) -> DpPlan | None:
    """Return the plan of the queries that this site would answer about its held-out records, if it
    did not declare them disjoint from those it trains on: a patient who is in both pays for the
    training and for the queries. Return None if there is no such plan."""
    asks = study.private_evaluation is not None and "evaluation" in site.policy.release
    if not asks or site.evaluation is None or is_held_out_disjoint(site):
        return None
    return query_plan(study)


def refusals(
    study: Study,
    site: Site,
    plan: DpPlan | None,
    coordinator: str = "",
    *,
    outline: bool = False,
) -> Iterator[PolicyRefused]:
    """Yield a refusal for every rule of the site that the study breaks, without reading any data.

    - study: the study that a coordinator asks this site to run
    - site: the settings of this site, with the policy that its file has now
    - plan: this site's plan for the training, whose figures are checked. None if privacy = "off",
      or if it is not computed yet; then the figures that the study states are checked instead
    - coordinator: the public key (hexadecimal) that signed the plan; "" if none did
    - outline: whether the study is a study.toml that has not started yet, in which some digests may
      be missing. If not, a missing digest is a reason to refuse"""
    yield from _about_study(study, site, coordinator, outline=outline)
    yield from privacy_refusals(study, site, plan)
    yield from _about_outcome(study, site.policy)


def _about_study(
    study: Study, site: Site, coordinator: str, *, outline: bool = False
) -> Iterator[PolicyRefused]:
    """Yield refusals about the study's plug-ins, base, coordinator, adapter and shared noise, and
    about how this site selects its records and runs.

    - study: the study that a coordinator asks this site to run
    - site: the settings of this site, with the policy that its file has now
    - coordinator: the public key (hexadecimal) that signed the plan; "" if none did
    - outline: whether the study has not started yet, so that some digests may be missing"""
    policy, listed = site.policy, list[tuple[str, str, Sequence[str]]]()
    yield from _about_plugins(study, policy)
    yield from _about_query(site)
    yield from _about_peers(study, policy)
    yield from _about_run(study, site)
    if policy.bases != "any" and not (outline and study.base.digest is None):
        listed.append(("bases", study.base.digest or "a base without digest", policy.bases))
    if policy.coordinators:
        listed.append(("coordinators", coordinator or "no coordinator", policy.coordinators))
    if study.lora:
        listed += [("modules", module, policy.modules) for module in study.lora.modules]
    for rule, value, allowed in listed:
        if value not in allowed:
            yield PolicyRefused(f"policy.{rule} does not list {value!r}")
    if study.lora:
        yield from _at_most("lora.rank", study.lora.rank, "max_rank", policy)
        if study.lora.a_digest is None and not outline:
            yield PolicyRefused("the plan does not pin lora.a_digest")
        if table := study.lora.preconditioner:  # its check takes time that grows with rank³
            yield from _at_most("lora.preconditioner.rank", table.rank, "max_rank", policy)
            if table.digest is None and not outline:
                yield PolicyRefused("the plan does not pin lora.preconditioner.digest")
        yield from _about_rank(study.lora, site.site.lora_rank)


def _about_outcome(study: Study, policy: PolicyTable) -> Iterator[PolicyRefused]:
    if policy.answers == "held" and not study.private:
        yield PolicyRefused(
            'policy.answers = "held", and an update without noise is never kept, so it cannot wait'
        )
    if may_resolve(study, policy):
        yield from _about_teacher(study, policy)


def sheet_refusals(study: Study, site: Site) -> Iterator[PolicyRefused]:
    """Yield a refusal for each required field of this site's data sheet that is empty. This depends
    only on what a person typed. It is checked when the site joins, not during a study. Errors:
    ConfigError."""
    asked = {
        "policy.data_sheet": site.policy.data_sheet,
        "study.data_sheet": study.study.data_sheet,
    }
    sheet = load_sheet(site) if any(asked.values()) else None
    for whose, fields in asked.items():
        for name in list_lacking(sheet, fields):
            yield PolicyRefused(
                f"{whose}: the data sheet lacks {name}",
                "a data sheet in which a person filled it",
                "`fedtune data describe SITE` at the site",
            )


def permit_plugins(study: Study, site: Site) -> None:
    """Check that the site's policy names every plug-in of the study, before one is imported.

    Errors: PolicyRefused."""
    for refusal in _about_plugins(study, site.policy):
        raise refusal


def may_resolve(study: Study, policy: PolicyTable) -> bool:
    """Return whether the study's objective may be imported: either it is part of this release, or
    the policy lists every plug-in of the study."""
    return study.objective.name in OBJECTIVES.release() or not any(_about_plugins(study, policy))


def _about_plugins(study: Study, policy: PolicyTable) -> Iterator[PolicyRefused]:
    """Yield a refusal for each plug-in of the study that the policy does not list. Only names are
    read: to import a plug-in of another distribution would run its code."""
    asked: list[tuple[Group[Any], str | None, Sequence[str]]] = [
        (OBJECTIVES, study.objective.name, policy.objectives),
        (STRATEGIES, study.strategy.name, policy.strategies),
        (MODALITIES, study.base.modality, policy.modalities),
    ]
    for group, name, listed in asked:
        allowed = [listed] if isinstance(listed, str) else list(listed)
        if RELEASE in allowed:
            allowed += group.release()
        if name is not None and name not in allowed:
            yield PolicyRefused(f"policy.{group.name} does not list {name!r}")


def _about_query(site: Site) -> Iterator[PolicyRefused]:
    """Yield a refusal if an SQL query or a view selects the site's records, unless the policy
    allows it. In such a selection one patient's rows may decide whether another's are read, which
    no ε covers."""
    if site.free_query and not site.policy.allow_free_query:
        yield PolicyRefused(
            "a query or a view selects this site's records, so that one patient's rows may decide "
            "whether another's are read, and policy.allow_free_query is not set",
            "a table of the database, with data.filter to select rows",
        )


def pin_others(site: Site, own: str) -> Site:
    """Return a copy of the site in which policy.peers lacks the site's own signing key `own`. A
    site whose file lists its own key would otherwise count its own noise as a peer's."""
    return site.with_peers(tuple(key for key in site.policy.peers if key != own))


def _about_peers(study: Study, policy: PolicyTable) -> Iterator[PolicyRefused]:
    """Yield a refusal of a study with shared noise if policy.peers lists fewer other sites than
    strategy.min_sites - 1. A person here has compared the fingerprint of each listed site. A site
    that is not listed may be the coordinator's own, which then knows that site's noise."""
    least = study.strategy.min_sites
    if study.secure_aggregation and len({*policy.peers}) < least - 1:
        yield PolicyRefused(
            f"policy.peers lists {len({*policy.peers})} sites besides this one, and the plan "
            f"shares its noise among {least} sites",
            f"the signing keys of at least {least - 1} other sites, without this site's own key",
            "`fedtune review` shows each peer's fingerprint: compare it with that hospital, then "
            "list its key",
        )


def _about_run(study: Study, site: Site) -> Iterator[PolicyRefused]:
    """Yield a refusal of a study with shared noise if this site starts a new vault for each
    request. The masking key of a draw is only in the vault's memory, and would be lost before the
    draw is masked."""
    if study.secure_aggregation and site.vault:
        yield PolicyRefused(
            "vault.run starts this site's vault for one request at a time, and a plan with shared "
            "noise needs a vault that keeps running until the noise is masked",
            "a plan without [secure_aggregation], or a site.toml without [vault]",
        )


def _about_rank(lora: LoraTable, most: int | None) -> Iterator[PolicyRefused]:
    """Yield a refusal if the LoRA rank that this site trains is below the plan's minimum. most:
    site.lora_rank; None: the site trains the plan's whole rank."""
    rank = lora.rank_at(most)
    least = lora.rank if lora.min_rank is None else lora.min_rank
    if rank >= least:
        return
    todo = "ask for lora.min_rank in the plan, or raise site.lora_rank"
    if lora.train == "AB":
        todo = (
            "sites of different ranks are averaged exactly only with A frozen, since a mean of "
            'products B·A is no product of means: ask for lora.train = "B" with lora.min_rank, or '
            "for a lower lora.rank at all sites"
        )
    yield PolicyRefused(
        f"this site trains at most {rank} of an adapter's ranks (site.lora_rank) and the plan "
        f"requires at least {least}",
        f"a plan that requires at most {rank}",
        todo,
    )


def _about_teacher(study: Study, policy: PolicyTable) -> Iterator[PolicyRefused]:
    """Yield a refusal if the study has a teacher (a model that sets each record's target) for which
    no person at this site vouches: it may have been trained on the records without noise. Only
    digests are compared. Whether the model is on this machine is looked up once the plan is
    admitted, so no plan can ask for models that the policy does not list."""
    spec = study.objective.resolved.teacher_spec
    if spec is None or spec.digest in policy.teachers:
        return
    trusted = BASES if policy.bases == "any" else policy.bases  # "any" does not extend to teachers
    if spec.digest not in trusted:
        yield PolicyRefused(
            f"nothing says that the teacher {spec.digest} never saw this site's records, or saw "
            "them only through noise",
            "its digest in policy.teachers or, if it is a base, in policy.bases",
            "a person at this site who knows how the teacher was trained lists its digest in "
            "policy.teachers; if it was fitted to this site's records without noise, each target "
            "that it sets would depend on all of these records",
        )


def _about_unit(study: Study, site: Site) -> Iterator[PolicyRefused]:
    """Yield a refusal of a study that protects single records if site.toml names a patient
    column."""
    tables = [table for table in (site.data, site.evaluation) if table]
    if study.unit == "record" and any(table.columns.patient for table in tables):
        yield PolicyRefused(
            "this site names a patient column and the study protects single records",
            'privacy.unit = "patient"',
            "change privacy.unit in the plan: ε would protect a patient of several records less",
        )


def _about_protection(
    sigma: float | None, delta: float, size: int, policy: PolicyTable
) -> Iterator[PolicyRefused]:
    """Yield up to three refusals: one if one release has too little noise, one if the site has too
    few units, and one if δ is too large.

    - sigma: the noise multiplier of the noise that this site itself adds, in multiples of C; None
      if it is not computed yet, and then it is not checked
    - delta: δ of the whole study
    - size: the site's declared number of units
    - policy: the site's policy, which has the limits"""
    if sigma is not None and sigma < policy.min_noise_multiplier:
        yield PolicyRefused(
            f"noise_multiplier {sigma} is below policy.min_noise_multiplier "
            f"{policy.min_noise_multiplier}"
        )
    if size < policy.min_units:
        yield PolicyRefused(
            f"site.declared_size {size} is below policy.min_units {policy.min_units}"
        )
    yield from _at_most("delta", delta, "max_delta", policy)
    if delta >= 1 / size:
        yield PolicyRefused(f"delta {delta} is not below 1 / site.declared_size ({size})")


def privacy_refusals(study: Study, site: Site, plan: DpPlan | None) -> Iterator[PolicyRefused]:
    """Yield a refusal for every rule about privacy that the study's training breaks. plan: this
    site's plan for the training, whose figures are checked; None if it is not computed yet, and
    then the figures that the study states are checked instead."""
    policy, size = site.policy, site.site.declared_size
    yield from _about_unit(study, site)
    if not isinstance(study.privacy, PrivacyTable):
        if not policy.allow_privacy_off:
            yield PolicyRefused(
                'privacy = "off" is not allowed here', "policy.allow_privacy_off = true at the site"
            )
        return
    stated = plan or _stated_figures(study, size)
    sigma = stated.noise_multiplier
    if sigma is not None:
        sigma = own_sigma(sigma, noise_shares(study))  # σ of the noise that this site adds
    yield from _about_protection(sigma, stated.delta, size, policy)
    yield from _at_most("max_grad_norm", stated.max_grad_norm, "max_grad_norm", policy)
    yield from _at_most("sampling_rate", stated.sampling_rate, "max_sampling_rate", policy)
    if stated.steps is not None:
        yield from _at_most("steps", stated.steps, "max_steps", policy)
    elif not study.continuous:
        yield PolicyRefused("the plan leaves training.rounds open", "a plan as a server sends it")
    if plan is None:
        yield from _about_cost(study, _stated_figures(study, size), policy)


class _StatedFigures(NamedTuple):
    """The figures of a private study that follow directly from the plan and the declared size,
    before σ is computed from ε.

    - noise_multiplier: σ; None if the plan gives ε
    - max_grad_norm: the clipping norm C
    - sampling_rate: the share of the rows that a step draws, on average
    - steps: the number of steps of all rounds together; None if the plan has no number of rounds
    - delta: the plan's δ"""

    noise_multiplier: float | None
    max_grad_norm: float
    sampling_rate: float
    steps: int | None
    delta: float


def _stated_figures(study: Study, size: int) -> _StatedFigures:
    privacy = study.privacy
    clipping = study.clipping
    training = study.training
    assert isinstance(privacy, PrivacyTable) and clipping is not None  # Study: required
    return _StatedFigures(
        privacy.noise_multiplier,
        clipping.max_grad_norm,
        sampling_rate(study, size),
        None if training.rounds is None else training.rounds * training.local_steps,
        privacy.delta,
    )


def _about_cost(
    study: Study, stated: _StatedFigures, policy: PolicyTable
) -> Iterator[PolicyRefused]:
    """Yield a refusal of a study if even a lower bound of its cost (`_least_cost`) is above
    policy.max_epsilon_per_study. This is checked before ε is computed, since the larger ε is, the
    longer its computation takes. stated: the figures that the study states."""
    if not study.continuous and _least_cost(study, stated) > policy.max_epsilon_per_study:
        yield _past_ceiling(policy)


def _least_cost(study: Study, stated: _StatedFigures) -> float:
    """Return the ε that the plan states or, if the plan gives σ and a number of steps, a lower
    bound on ε, whichever is larger. stated: the figures that the study states."""
    privacy, least = study.privacy, 0.0
    assert isinstance(privacy, PrivacyTable)
    if stated.noise_multiplier is not None and stated.steps is not None:
        k = study.records_per_draw
        steps = accountant.Steps(stated.noise_multiplier, stated.sampling_rate, stated.steps, k)
        least = accountant.at_least(steps, stated.delta)
    return max(privacy.epsilon or 0.0, least)


def _past_ceiling(policy: PolicyTable) -> PolicyRefused:
    return PolicyRefused(
        "the study would go past policy.max_epsilon_per_study",
        f"at most ε = {policy.max_epsilon_per_study} at this site",
        "lower epsilon or rounds, or ask the site to raise its ceiling",
    )


def _at_most(name: str, value: float, rule: str, policy: PolicyTable) -> Iterator[PolicyRefused]:
    """Yield a refusal if a value is above the policy's limit. name: what the refusal calls the
    value; rule: the key of [policy] that has the limit."""
    if value > (most := getattr(policy, rule)):
        yield PolicyRefused(f"{name} {value:g} is above policy.{rule} {most:g}")
