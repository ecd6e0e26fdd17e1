"""Explain a plan in plain words to the person who signs for the site: which code runs, which data
leaves the site, and how much ε the plan costs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune import __version__
from fedtune.accounting.costs import privacy_of, query_lines, shared_lines
from fedtune.accounting.rounds import with_rounds
from fedtune.core.bases.find import known_digest
from fedtune.core.config import (
    CoordinatorTable,
    PolicyTable,
    ScheduleTable,
    Site,
    Study,
    format_duration,
    load_site,
    load_study,
    study_from_json,
)
from fedtune.core.config.checked import checked_file, load_checked
from fedtune.core.config.patient_columns import disjoint_datasets, patient_columns
from fedtune.core.dp.accountant import Steps, epsilon
from fedtune.core.dp.plan import DpPlan
from fedtune.core.dp.query import query_plan
from fedtune.core.errors import (
    BudgetExceeded,
    ConfigError,
    FedtuneError,
    NotGenuine,
    PolicyRefused,
    Refused,
)
from fedtune.core.files import reading
from fedtune.core.ledger.entries import Cohort
from fedtune.core.ledger.ledger import Ledger, signing_key
from fedtune.core.ledger.patient_column import check_column_stays
from fedtune.core.ledger.spending import find_heaviest_budget
from fedtune.core.objectives import describe
from fedtune.core.registry.rounding import percent, rounded_up
from fedtune.core.vault.budget import (
    MOST_ATTEMPTS,
    Budget,
    check_known,
    most_epsilon_of_study,
)
from fedtune.core.vault.logged_steps import check_none_lost
from fedtune.core.vault.policy import (
    compute_within_limits,
    may_resolve,
    permit_plugins,
    pin_others,
    plan_of_queries_beside,
    refusals,
    sheet_refusals,
)
from fedtune.evidence import fingerprints
from fedtune.flower import membership
from fedtune.flower.enrol import Answer
from fedtune.flower.link import link
from fedtune.homes.opening import find_ledger
from fedtune.observe.status import LOCK, held
from fedtune.officer.isolation_here import isolation_here
from fedtune.officer.known_plans import known_plan
from fedtune.report.claim import assumption, best_guess, protects, strength
from fedtune.report.delta import chance, warning

SENT = (".json", ".answer")  # suffixes of a plan as a coordinator sent it

NOT_COMPUTED = (
    "The plan's noise and ε were not computed, since the plan breaks a rule that bounds the "
    "computation. This rule is among those that refuse the plan."
)


@dataclass(frozen=True)
class Review:
    """The review of a plan.

    - digest: the plan's digest, which is signed; "" for an outline, whose digest is not final
    - sections: pairs (heading, lines)
    - refusals: the rules that refuse the plan
    - verdict: a sentence on what the site would do with the plan today, such as refuse it, wait for
      a signature, or take part"""

    digest: str
    sections: list[tuple[str, list[str]]]
    refusals: list[str]
    verdict: str


def load_running(site_file: Path) -> tuple[Site, bool]:
    """Return a site as it takes part now, and whether its file has changes that wait for a start.
    While the site runs, these are the settings with which it was started, and the policy that its
    file has now (`core/vault/declared.with_new_policy`): by these a plan would be charged.

    Errors: those of `load_site`; PolicyRefused if the file has a change for which the site answers
    no order until it is started again; ConfigError if the settings of the start cannot be read."""
    site = load_site(site_file)
    kept = checked_file(site)
    if not (held(site.site.state / LOCK) and kept.is_file()):
        return site, False
    from fedtune.core.vault.declared import with_new_policy  # imports what reads records

    running = with_new_policy(site, load_checked(kept, site_file))
    changed = any(getattr(running, name) != table for name, table in site if name != "policy")
    return running, changed


def read_plan(
    path: Path, site: Site, settings: Sequence[str] = (), *, whole: bool = False
) -> Study:
    """Read a plan from a study.toml, from the answer that a coordinator wrote for a site (.answer),
    or from JSON (.json), which a coordinator sent or a run folder holds.

    - path: the file; a suffix other than .answer and .json stands for a study.toml
    - site: the site that would take part; its policy names the plug-ins that may be imported
    - settings: for a study.toml, values in place of the file's, each "KEY=VALUE" as for `--set`
    - whole: for a study.toml, whether to compute also the parts that follow from its base and its
      public text (the adapter's frozen factor, the start), which may take an hour. Only a whole
      plan has the digest that a coordinator sends; rules and costs do not need it.

    Errors: ConfigError; ModelError if the base cannot be found; Refused if the answer is not the
    coordinator's; PolicyRefused if the plan names a plug-in that the site's policy does not name.
    Such a plug-in is not imported."""
    if path.suffix in SENT:
        if settings:
            raise ConfigError(f"--set cannot change {path}, a plan as it was sent", "a study.toml")
        if path.suffix == ".answer":
            return _in_answer(path, site)
        return study_from_json(reading.text(path, "a plan as JSON, or study.toml"))
    study = load_study(path, lambda study: permit_plugins(study, site), settings)
    if not whole:
        return known_plan(_fill_outline(study), site)
    from fedtune.public.start import start
    from fedtune.runs.teacher_admission import register_teacher

    register_teacher(study)
    return start(study).study


def _fill_outline(study: Study) -> Study:
    """Return `study`, as read from a study.toml, with those parts of the plan filled in that can be
    computed without its base: the number of rounds and, if this release of fedtune knows the base,
    the base's digest."""
    digest = study.base.digest or known_digest(study.base.model)
    base = study.base.model_copy(update={"digest": digest})
    return with_rounds(study.model_copy(update={"base": base}))


def is_outline(path: Path, study: Study) -> bool:
    """Return whether the plan is an outline: a study.toml without the digests that are filled in
    when the study starts. A plan that a coordinator sent is never an outline; if it lacks a digest,
    it is refused."""
    if path.suffix in SENT:
        return False
    lora = study.lora
    made = [study.base.digest, *([lora.a_digest] if lora else [])]
    made += [lora.preconditioner.digest] if lora and lora.preconditioner else []
    made += [study.start.digest] if study.start else []
    return not all(made)


def find_coordinator(site: Site, path: Path | None = None) -> str:
    """Return the public key of the coordinator that sends this site its plans. If the file `path`
    is a coordinator's answer (.answer), the key is read from it; if not, it is read from the answer
    with which the site joined a consortium. Return "" if the site has joined none.

    path: the file of a plan: the coordinator's answer, a study.toml, or JSON. Errors: ConfigError
    or Refused if `path` is an answer that is not for this site."""
    if path is not None and path.suffix == ".answer":
        return _read_answer(path, site).coordinator
    try:
        return link(site, site.file or site.home).answer.coordinator
    except FedtuneError:  # the site has not joined, or `fedtune doctor` says what is wrong
        return ""


def _read_answer(path: Path, site: Site) -> Answer:
    keys, table = membership.keys_folder(site), site.coordinator or CoordinatorTable()
    expected = table.fingerprint or ""
    return membership.read(path, membership.tls_key(keys), site.site.name, expected)


def _in_answer(path: Path, site: Site) -> Study:
    """Return the plan in the coordinator's answer. Errors: ConfigError, Refused."""
    study = membership.plan_of(_read_answer(path, site), path)
    if study is None:
        raise ConfigError(
            f"{path}: holds no plan",
            "an answer that `fedtune admit` wrote while `fedtune server` runs",
            "join without a plan: the plans that the coordinator sends afterwards lie in "
            f"{site.site.plan_file('').parent} until somebody signs them. Or ask the coordinator "
            "for a new answer",
        )
    return study


def review(
    study: Study, site: Site, ledger: Ledger, *, outline: bool = False, coordinator: str = ""
) -> Review:
    """Explain the plan `study` for `site`, without reading a record.

    - study: the plan, as `read_plan` returns it
    - site: the site that would take part
    - ledger: the site's ledger, with the charges so far and the signed plans
    - outline: whether the plan is an outline (`is_outline`), whose digest is not final
    - coordinator: the public key of the coordinator that sends the plan; by default, that of the
      coordinator whose consortium the site has joined, if any"""
    plan, limit = None, None
    try:
        plan = compute_within_limits(study, site) if study.private else None
    except PolicyRefused as refusal:
        limit = refusal
    coordinator = coordinator or find_coordinator(site)
    against = would_refuse(study, site, plan, ledger, outline=outline, coordinator=coordinator)
    refused = [str(refusal) for refusal in against]
    if limit and str(limit) not in refused:
        refused.append(str(limit))
    sections = [
        ("What would run", _runs(study, plan, site)),
        ("What would leave this site", _leaves(study, site)),
        *(
            [("Who shares the noise", _peers(plan, site, ledger))]
            if plan and plan.sites > 1
            else []
        ),
        (
            "What it costs",
            [
                *_describe_selection(site),
                *_describe_declared(site),
                *_costs(study, site, plan, ledger),
            ],
        ),
    ]
    digest = "" if outline else study.digest
    verdict = _verdict(study, site, plan, ledger, refused)
    if not refused and (unknown := unchecked(site, coordinator)):
        verdict += f". {unknown}"
    return Review(digest, sections, refused, verdict)


def _peers(plan: DpPlan, site: Site, ledger: Ledger) -> list[str]:
    """Return the lines about the sites that share the noise: this site's signing key and the key of
    each pinned peer, with the fingerprints that people compare.

    - plan: the site's part of a study of shared noise
    - site: the site, whose policy.peers pins the keys
    - ledger: the site's ledger. Its key is the site's signing key too, except for a membership of
      a hospital, which has a signing key of its own."""
    own = signing_key(site, ledger).public
    pinned = dict.fromkeys(pin_others(site, own).policy.peers)
    return [
        f"{plan.sites} sites share one dose of noise, and ε holds if "
        f"{assumption(plan.sites, plan.colluding)}.",
        f"This site: {own}, fingerprint {fingerprints.of_peer(own)}.",
        *(f"Peer: {key}, fingerprint {fingerprints.of_peer(key)}." for key in pinned),
        *([] if pinned else ["Peers: none; each sends you the key that its own review shows."]),
        "Compare each fingerprint by phone with the hospital that holds the key: a key that nobody "
        "compared may be the coordinator's own, which then knows that noise.",
    ]


def _describe_selection(site: Site) -> list[str]:
    if not site.free_query:
        return []
    return [
        "NOT COVERED: a query or a view selects this site's records. Where it counts, ranks, "
        "limits or averages over several patients, one patient's rows may change what is read of "
        "another, and no ε below holds for that."
    ]


def _describe_declared(site: Site) -> list[str]:
    if not site.data.declared:
        return []
    return [
        f"Nothing for life: this site declares its data {site.data.declared}, so a run pays from a "
        "ledger of its own. What follows is of one run."
    ]


def would_refuse(
    study: Study,
    site: Site,
    plan: DpPlan | None,
    ledger: Ledger | None,
    *,
    outline: bool = False,
    coordinator: str = "",
) -> list[Refused]:
    """List every rule and limit that refuses the plan today. A missing signature is not listed.

    - study: the plan
    - site: the site with its policy
    - plan: the site's part of the study; None if the study is not private, or if a rule refuses it
      before it is computed
    - ledger: the site's ledger; None if there is none yet
    - outline: whether the plan is an outline (`is_outline`), so that digests which are still
      missing are no reason
    - coordinator: the public key of the coordinator that sends the plan. If it is not known (""),
      no coordinator is refused: see `unchecked`"""
    if ledger and site.policy.peers:
        site = pin_others(site, signing_key(site, ledger).public)
    if not coordinator:
        anybody = site.policy.model_copy(update={"coordinators": ()})
        site = site.model_copy(update={"policy": anybody})
    broken = refusals(study, site, plan, coordinator, outline=outline)
    rules = [*broken, *sheet_refusals(study, site)]
    return [*rules, *_about_teacher(study, site), *cost_refusals(study, site, plan, ledger)]


def unchecked(site: Site, coordinator: str) -> str:
    """Return a sentence that names the rule which cannot be checked as long as the coordinator is
    not known: policy.coordinators. Return "" if the coordinator is known, or the policy has no such
    rule. coordinator: its public key, "" if it is not known."""
    if coordinator or not site.policy.coordinators:
        return ""
    return "Not checked yet: policy.coordinators, since no coordinator is known here"


def _about_teacher(study: Study, site: Site) -> list[Refused]:
    """Return a refusal, in a list, if the teacher is a run that was changed since it was signed; []
    in all other cases. The run is verified only here, for the person who reviews: a round only
    compares the teacher's digest with the plan's."""
    if not may_resolve(study, site.policy) or study.objective.resolved.teacher_spec is None:
        return []
    from fedtune.runs.teacher_admission import check_teacher

    try:
        check_teacher(study)
    except NotGenuine as error:
        return [PolicyRefused(error.happened, error.expected, error.todo)]
    return []


def cost_refusals(
    study: Study, site: Site, plan: DpPlan | None, ledger: Ledger | None
) -> list[Refused]:
    """List the refusals that the ledger causes: at most one for each of these two reasons.

    1. The study protects records, although a patient column told patients apart earlier
       (`check_column_stays`); or, if that is not so, the ε of earlier charges is not known.
    2. The study's cost, added to what was spent, exceeds a limit (`Budget.check`). In a study
       without a last round, only charges that count for a patient who arrives now are added. If no
       limit is exceeded: the ledger may have lost rounds of the study (`check_none_lost`).

    - study: the plan
    - site: the site, whose policy has the limits and whose [data] names the dataset that pays
    - plan: the site's part of the study; None if the study is not private, so that it has no ε
    - ledger: the site's ledger; None if there is none yet, so that nothing was spent"""
    refused, name = list[Refused](), site.data.name
    pays = find_paying(study, site, ledger)
    try:
        check_column_stays(pays, site, name, study.unit, at_site=True)
        unknown = pays.unknown(name, study.unit) if pays else []
        check_known(name, study.unit, unknown, at_site=True)
    except Refused as refusal:
        refused.append(refusal)
    charges = pays.charges(name) if pays else []
    if study.continuous:
        charges = pays.newcomer(name) if pays else []
    try:
        if plan:
            Budget(site.policy, plan, charges).check()
            if pays:
                check_none_lost(pays, study.digest)
    except Refused as refusal:
        refused.append(refusal)
    return refused


def find_paying(study: Study, site: Site, ledger: Ledger | None) -> Ledger | None:
    """Return the ledger that would be charged for a plan, as it will be once the site's files are
    declared: a charge first enters which datasets they state are disjoint, and their columns of
    patients. Only read from the result, and enter nothing in it. For data that is declared public
    or generated it is the ledger of the plan's own run. None if there is none yet.

    - study: the plan
    - site: the site, whose [data] names the dataset that pays
    - ledger: the site's ledger; None if there is none yet"""
    if site.data.declared:
        from fedtune.core.vault.declared import run_ledger  # loads what reads records

        ledger = find_ledger(run_ledger(site, study.digest))
    if ledger is None:
        return None
    return ledger.as_stated(site.data.name, disjoint_datasets(site), patient_columns(site))


def is_unsigned(study: Study, site: Site, ledger: Ledger | None) -> bool:
    """Return whether the site's policy asks for a signature under the plan and nobody has signed
    it. ledger: the site's ledger, which holds the signatures; None if there is none yet."""
    signed = ledger is not None and ledger.admitted(study.digest, site.policy.own_memberships)
    return site.policy.admission != "standing" and not signed


def _verdict(
    study: Study, site: Site, plan: DpPlan | None, ledger: Ledger, refused: list[str]
) -> str:
    """Say in a sentence what the site would do with the plan today: refuse it, train a round only
    if it is ordered again, wait for a signature, or take part.

    - study: the plan
    - site: the site with its policy
    - plan: the site's part of the study; None if the study is not private, or if a rule refuses it
      before it is computed
    - ledger: the site's ledger, with the charges so far and the signed plans
    - refused: the rules that refuse the plan"""
    if refused:
        return "This site refuses it"
    pays = find_paying(study, site, ledger)
    charges = pays.charges(site.data.name) if pays else []
    if plan and not study.continuous and not Budget(site.policy, plan, charges).remaining():
        return (
            "Every round of this study is paid for here. An update that was sent can be sent again "
            "and costs nothing; a round that the coordinator orders on another adapter is trained "
            "and paid for again, within the limits above"
        )
    if is_unsigned(study, site, ledger):
        joining = site.policy.admission == "reviewed"
        return "This site takes part as soon as somebody signs the plan: --sign" + (
            ", or joining with the answer that brings it" if joining else ""
        )
    return "This site would take part"


def _runs(study: Study, plan: DpPlan | None, site: Site) -> list[str]:
    where = "a head on the frozen base"
    if study.lora:
        lora = study.lora
        blocks = f"the last {lora.last_layers} blocks" if lora.last_layers else "all blocks"
        where = (
            f"a LoRA adapter of rank {lora.rank} on {', '.join(lora.modules)} of {blocks}"
            f" ({'B alone is trained' if lora.train == 'B' else 'A and B are trained'})"
        )
        if (rank := lora.rank_at(site.site.lora_rank)) < lora.rank:
            where += f", {rank} of its ranks each round here, in turn (site.lora_rank)"
    t = study.training
    lines = [
        f"Code: fedtune {__version__} as installed here. Nothing the coordinator sends is run.",
        f"Where: on this machine {isolation_here(site).text}.",
        f"Base: {study.base.model}, {study.base.digest or 'digest not pinned'}{_bits(study)}.",
        f"Trained: {where}; objective {study.objective.name}.",
        *_objective(study, site),
        f"{t.rounds} rounds of {t.local_steps} step{'s' if t.local_steps > 1 else ''} each.",
    ]
    if study.schedule and plan:
        lines[-1:] = _goes_on(study.schedule, t.local_steps, plan)
    if plan is None and study.private:
        return [*lines, NOT_COMPUTED]
    if plan is None:
        return [*lines, "NOT PRIVATE: no noise is added and nothing is promised."]
    drawn = "record" if plan.records > 1 else plan.unit
    sampled = (
        f"every {drawn} takes part in every step"
        if plan.sampling_rate == 1
        else f"each {drawn} takes part in each step with probability {plan.sampling_rate:.4g}"
    )
    return [
        *lines,
        f"In each step {sampled}; each {drawn}'s influence is clipped to {plan.max_grad_norm:g}, "
        f"and noise of {plan.own_noise:g} times that is added before anything is kept.",
    ]


def _bits(study: Study) -> str:
    table = study.base.quantisation
    return f", its weights rounded here to {table.method}" if table else ""


def _goes_on(schedule: ScheduleTable, steps: int, plan: DpPlan) -> list[str]:
    return [
        f"NO LAST ROUND: a round of {steps} step{'s' if steps > 1 else ''} every "
        f"{format_duration(schedule.every)}, counted from {schedule.start}, until the coordinator "
        "stops it or this site leaves. Rounds begin by the coordinator's clock, never because "
        "records arrived. This site does not check the time: a coordinator may order them sooner, "
        "within the same budget.",
        "Your records are read again before each round: whoever was added takes part from then "
        f"on. A patient takes part in at most {plan.rounds} rounds, fewer where this site's "
        "policy or other studies leave less, and is then left out for good. Nobody outside is "
        "told: batch, noise and divisor stay as they are.",
    ]


def _objective(study: Study, site: Site) -> list[str]:
    if not may_resolve(study, site.policy):
        return []
    lines = [describe(study.objective)]
    if teacher := study.objective.resolved.teacher_spec:
        lines.append(
            f"Teacher: {teacher.name}, {teacher.digest}. It sets every record's target, so it must "
            "never have seen these records without noise."
        )
    return lines


def _leaves(study: Study, site: Site) -> list[str]:
    what = "one noised update of the adapter" if study.private else "one update, WITHOUT noise"
    columns = study.objective.resolved.directions if may_resolve(study, site.policy) else 0
    if columns:
        what = (
            f"one table of {len(study.objective.labels)} × {columns + 1} numbers, "
            + ("noised: " if study.private else "WITHOUT noise: ")
            + "for each class the sum of its records' vectors in the plan's public basis, and how "
            "many they are"
        )
    facts = ["this site's name", "its declared size", "its public signing key"]
    facts += ["how many ranks it trains"] if study.lora and study.lora.min_rank else []
    facts += [f"that its data is declared {site.data.declared}"] if site.data.declared else []
    facts += ["that a query or a view selects its records"] if site.free_query else []
    if study.secure_aggregation:
        what = f"a statement that it is ready, then {what} as masked words, of which nobody opens "
        what += "more than all sites' sum"
        if not study.private:
            what += " (WITHOUT noise)"
    lines = [
        f"Each round: {what}, signed, with the noise, clipping and sampling figures that the plan "
        "already names, and the head of this site's ledger (a hash).",
        *_describe_held(study, site),
        *_queries(study),
        f"Once: {', '.join(facts)}.",
        "On refusal: the rule that said no. On an error: that there was one.",
        "Never without noise: records, counts, losses, gradients.",
        "Never at all: timings, or who was sampled.",
        *_describe_accepted(site),
    ]
    return lines


def _describe_accepted(site: Site) -> list[str]:
    """Return lines about what a person decides here with `fedtune accept` on a finished model, from
    figures without noise; [] if the site has no [acceptance]."""
    if site.acceptance is None:
        return []
    return [
        "By a person alone: what `fedtune accept` decides here of a finished model. It is an exact "
        "fact about held-out patients, outside this ε; nothing sends it, and no training or "
        "release of a coordinator may follow from it."
    ]


def _describe_held(study: Study, site: Site) -> list[str]:
    """Return lines that say what waits, before it leaves the site, until a person releases it; []
    if the site's policy lets answers leave by themselves."""
    if site.policy.answers != "held":
        return []
    what = "No answer leaves before a person here has let it go"
    if study.secure_aggregation:
        what = "Nothing is drawn or paid for before a person here has let it go"
    return [
        f"{what}: `fedtune let-go` (policy.answers). The coordinator waits for "
        f"{study.strategy.round_timeout / 3600:.3g} hours in a round, and then goes on without "
        "this site as the plan says. That somebody refused, and when, reaches it, and no ε covers "
        "that."
    ]


SCORES = {"likelihood": "answers' likelihoods", "accuracy": "right answers, of the labels"}


def _describe_axes(study: Study) -> str:
    """Return a text that names the classes and groups by which the plan's queries group the
    held-out units; "" if the plan does not group them."""
    axes = [f"{axis} ({', '.join(values)})" for axis, values in study.query_axes.items()]
    if not axes:
        return ""
    return (
        f"; also of each {', of each '.join(axes)}. A column of groups is read only where "
        "[evaluation] groups in site.toml names it"
    )


def _queries(study: Study) -> list[str]:
    if study.private_evaluation is None:
        return []
    return [
        f'After {len(study.queries)} of the rounds, if policy.release lists "evaluation": '
        f"{2 * len(study.query_cells)} noised numbers about the held-out records (the sum of their "
        f"{SCORES[study.private_evaluation.score]}, and how many units there are"
        f"{_describe_axes(study)}), noise {study.private_evaluation.noise_multiplier:g} times one "
        "unit's largest share in all of them, paid from the held-out records' own budget: "
        f"ε = {rounded_up(query_plan(study).epsilon)}.",
        *query_lines(study, study.strategy.min_sites),
    ]


def _costs(study: Study, site: Site, plan: DpPlan | None, ledger: Ledger) -> list[str]:
    """Return lines that say what the plan costs the site's dataset: ε of the study and in total,
    and what these ε mean for one unit.

    - study: the plan
    - site: the site with its ceilings
    - plan: the site's part of the study; None if the study is not private, or if a rule refuses it
      before it is computed
    - ledger: the site's ledger, with the charges so far"""
    if plan is None and study.private:
        return [NOT_COMPUTED]
    if plan is None:
        return [
            "Everything: after a run without privacy no ε can be stated for this dataset, and "
            "private studies on it are refused."
        ]
    policy, pays = site.policy, find_paying(study, site, ledger)
    budget = Budget(policy, plan, pays.charges(site.data.name) if pays else [])
    facts = privacy_of(plan)
    if study.continuous:
        return _costs_for_life(site, plan, pays, facts)
    queries = plan_of_queries_beside(study, site)
    before = budget.total(ahead=0)
    after = budget.total(budget.remaining(), _steps_of_queries(queries, budget))
    together = "this study and its queries" if queries else "this study"
    return [
        f"This study: ε = {rounded_up(plan.epsilon)} at δ = {plan.delta:g}, for "
        f"{protects(plan.unit)}; by ε alone the protection "
        f"is {strength(plan.epsilon)}.",
        *_delta(site, plan),
        f"Somebody who knows everything else and sees all that leaves can tell whether one "
        f"{plan.unit} was in the data with at most {percent(best_guess(facts))} certainty "
        "(a coin: 50 %).",
        *_state_cost_with_queries(plan, queries),
        *_state_cost_of_repeats(plan, queries, policy),
        f"Dataset {site.data.name!r} in total, at δ = {2 * policy.delta:g}: "
        f"ε = {rounded_up(before.epsilon)} so far, {rounded_up(after.epsilon)} with {together} "
        f"({after.how}); the policy's ceiling is {policy.ceiling:g}.",
        *_not_known(site, plan, pays),
        *_beside_others(budget, after.epsilon),
        *_share(budget, queries),
        *_describe_fallback(budget, queries),
        *shared_lines(study, [site.site.declared_size]),
    ]


def _not_known(site: Site, plan: DpPlan, ledger: Ledger | None) -> list[str]:
    """Return a line that says for how many rounds it is not known what they cost one unit, although
    the total counts them, also if a person accepted this; [] if it is known for all. ledger: the
    ledger that pays; None if there is none yet."""
    spent = ledger.spending(site.data.name) if ledger else []
    rounds = sum(not each.is_known_for(plan.unit) for each in spent)
    if not rounds:
        return []
    return [
        f"NOT KNOWN: what {rounds} of the rounds so far cost one {plan.unit}. The totals here "
        "count them as if it were, and may be too small: `fedtune ledger` says why."
    ]


def _beside_others(budget: Budget, after: float) -> list[str]:
    """Return a line that states how large the dataset's ε becomes once a study of another kind
    follows, since steps of several kinds are added up by a coarser bound. Return [] if it is hardly
    larger than `after`, the ε with this study. The ε of rarely sampled steps with little noise may
    be almost 0 and yet leave nothing for other studies."""
    beside = budget.beside_others(ahead=budget.remaining()).epsilon
    if beside <= after + 0.1:
        return []
    ceiling = budget.policy.ceiling
    says = "so none can be paid then" if beside > ceiling else f"of {ceiling:g}, for all studies"
    return [
        "If a study with other noise, another sampling rate or other records per patient follows, "
        f"what is spent until then counts as ε = {rounded_up(beside)}, {says}: steps of several "
        "kinds are added up by a coarser bound."
    ]


def _steps_of_queries(queries: DpPlan | None, budget: Budget) -> list[Steps]:
    """Return the steps that the study's queries are still to charge. queries: their plan, if they
    are charged to the same records as the training; None for no steps. budget: the dataset's."""
    if queries is None:
        return []
    return queries.events(Budget(budget.policy, queries, budget.charges).remaining())


def _share(budget: Budget, queries: DpPlan | None) -> list[str]:
    """Return a line that says how much a membership has spent of its own share of the hospital's
    ceiling, and will have spent after this study. Return [] for a site that is no membership.
    queries: the plan of the study's queries, if they are charged to the same records."""
    if budget.policy.hospital is None:
        return []
    own, asked = budget.share, _steps_of_queries(queries, budget)
    before, after = own.total(ahead=0), own.total(budget.remaining(), asked)
    return [
        f"That ceiling is of all the hospital's memberships together. The share of this one, "
        f"{budget.policy.membership}: ε = {rounded_up(before.epsilon)} so far, "
        f"{rounded_up(after.epsilon)} with this study; at most {budget.policy.max_epsilon:g}."
    ]


def _delta(site: Site, plan: DpPlan) -> list[str]:
    """Return one line, in a list: what δ allows in the worst case or, if δ is too large for this
    site's size, a warning. plan: the site's part of the study, with δ."""
    size = site.site.declared_size
    warned = warning(plan.delta, plan.unit, size)
    return [warned or f"What δ is: {chance(plan.delta, plan.unit, size)}."]


def _state_cost_with_queries(plan: DpPlan, queries: DpPlan | None) -> list[str]:
    """Return a line that states what the training and the queries of the study cost a patient who
    is in both files of the site; [] if nobody is charged for both.

    - plan: the site's part of the study
    - queries: the plan of the study's queries; None if nobody is charged for them and the training
    """
    if queries is None:
        return []
    events = [*plan.events(plan.steps), *queries.events(queries.steps)]
    both = epsilon(events, plan.delta)
    guess = percent(best_guess({"epsilon": both, "delta": plan.delta}))
    return [
        "Both are of the training alone. This site also answers the plan's queries of held-out "
        f"records, which it does not declare disjoint from these: a {plan.unit} in both files pays "
        f"ε = {rounded_up(both)} for the study, which allows at most {guess} certainty. Whatever "
        "would go past a limit of this site is refused, a query or a round, whichever comes last."
    ]


def _state_cost_of_repeats(plan: DpPlan, queries: DpPlan | None, policy: PolicyTable) -> list[str]:
    """Return a line that states the ε of the study if its coordinator orders each round as often as
    this site answers; the figures before it are of one answer to each round. Return [] if the sites
    share noise: `_room_for_attempts` then says it.

    - plan: the site's part of the study
    - queries: the plan of the study's queries, if they are charged to the same records
    - policy: the site's policy, which limits what one study costs"""
    if plan.sites > 1:
        return []
    most = most_epsilon_of_study(policy, [plan, queries] if queries else [plan])
    of = (
        "These are of one answer to each round and query"
        if queries
        else ("Both are of one answer to each round")
    )
    return [
        f"{of}. A coordinator may order a round again, after an "
        "interruption or on another adapter, and each answer is paid: this site answers a round at "
        f"most {MOST_ATTEMPTS} times, and this study at most up to ε = {rounded_up(most)}."
    ]


def _describe_fallback(budget: Budget, queries: DpPlan | None) -> list[str]:
    """If the plan or an earlier charge uses secure aggregation, return lines that state the total ε
    which this site's own noise alone gives, so far and with this study. Return [] otherwise.
    queries: the plan of the study's queries, if they are charged to the same records."""
    if not budget.is_shared:
        return []
    before = budget.fallback(ahead=0)
    after = budget.fallback(budget.remaining(), _steps_of_queries(queries, budget))
    return [
        f"The same whatever happens, by this site's own noise alone: ε = "
        f"{rounded_up(before.epsilon)} so far, {rounded_up(after.epsilon)} with this study "
        f"({after.how}); the ceiling, policy.max_fallback_epsilon, is "
        f"{budget.policy.fallback_ceiling:g}.",
        *_room_for_attempts(budget),
    ]


def _room_for_attempts(budget: Budget) -> list[str]:
    """Return a line that says for how many failed attempts at a round the site's limits leave room.
    Attempts are counted up to the plan's number of rounds; if more would fit, the line says "at
    least". Return [] if the plan shares no noise, or has no round left."""
    plan, ahead = budget.plan, budget.remaining()
    if plan.sites == 1 or not ahead:
        return []

    def fits(more: int) -> bool:
        try:
            budget.check(more=more * plan.local_steps)
        except BudgetExceeded:
            return False
        return True

    room = bisect_left(range(1, plan.rounds + 1), True, key=lambda more: not fits(more))
    at_least = "at least " if room == plan.rounds else ""
    return [
        f"The ceilings leave room for {at_least}{room} attempt{'s' * (room != 1)} at a round that "
        f"come{'s' * (room == 1)} to nothing, beside the plan's {plan.rounds} rounds; past that "
        "this site refuses what is left of the study."
    ]


def _costs_for_life(
    site: Site, plan: DpPlan, ledger: Ledger | None, facts: dict[str, float]
) -> list[str]:
    """Return lines, for a study without a last round, that state the ε which one patient pays in
    all, and the most that any patient has paid so far.

    - site: the site with its ceilings and its dataset
    - plan: the site's part of the study, whose rounds are the most in which one patient takes part
    - ledger: the ledger that pays, with the charges so far; None if there is none yet
    - facts: what the study costs the site, as `privacy_of` returns it"""
    policy = site.policy
    cohorts = ledger.cohorts(site.data.name) if ledger else [Cohort(0, "first", 0, 0, [])]
    spent = find_heaviest_budget(site.data.name, cohorts, policy)
    most = min(plan.lifetime or 0.0, policy.max_epsilon_per_study)
    one = epsilon(plan.events(plan.local_steps), plan.delta)
    return [
        f"Each round: ε = {rounded_up(one)} at δ = {plan.delta:g} for a patient who takes part. "
        f"In all rounds together, and for life: at most ε = {most:g}, for "
        f"{protects(plan.unit)}; by ε alone the protection is {strength(most)}.",
        f"Somebody who knows everything else and sees all that leaves can tell whether one "
        f"{plan.unit} was in the data with at most {percent(best_guess(facts))} certainty "
        "(a coin: 50 %).",
        "A patient pays from the first round after the records arrived, whether drawn or not.",
        f"Whoever has spent most of dataset {site.data.name!r} so far, at δ = "
        f"{2 * policy.delta:g}: ε = {rounded_up(spent.epsilon)} ({spent.how}); a patient at "
        f"the policy's ceiling of {policy.ceiling:g} is left out, and the study goes on with "
        "the others.",
        *_not_known(site, plan, ledger),
    ]
