"""What a plan still has to pay, and against which limit each dataset of a site is held."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune.core.config import PolicyTable
from fedtune.core.config.site import ShareTable
from fedtune.core.dp.accountant import Steps, epsilon
from fedtune.core.dp.filter import total_epsilon
from fedtune.core.dp.plan import DpPlan
from fedtune.core.errors import BudgetExceeded, Refused
from fedtune.core.ledger import spending
from fedtune.core.ledger.entries import EVERY, Charge, Spent, orders_of, samples_first
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.vault.budget import Budget
from fedtune.officer.review import _beside_others
from tests.dp.conftest import make_plan

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
DELTA = 1e-4
PLAN = make_plan(noise_multiplier=8.0, rounds=10, delta=DELTA)
POLICY = PolicyTable(max_epsilon=2.5, max_epsilon_per_study=2.4, max_delta=DELTA)


def charge(plan: DpPlan, round_: int, charges: list[Charge]) -> Charge:
    return Charge(
        study=plan.study,
        name="s",
        round=round_,
        noise_multiplier=plan.noise_multiplier,
        sampling_rate=plan.sampling_rate,
        steps=plan.local_steps,
        records=plan.records,
        max_grad_norm=plan.max_grad_norm,
        unit=plan.unit,
        cohort="first",
        order=Budget(POLICY, plan, charges).order,
    )


def paid(plan: DpPlan, *rounds: int) -> list[Charge]:
    return [charge(plan, round_, []) for round_ in rounds]


def test_what_is_ahead_is_what_is_not_charged_yet_and_at_least_the_round_that_runs() -> None:
    for plan in (PLAN, replace(PLAN, local_steps=3)):
        other = replace(plan, study="sha256:" + "6e" * 32)
        for charged, left in (([], 10), ([1, 2, 2, 7], 6), ([1] * 8, 2), ([*range(1, 11), 3], 0)):
            budget = Budget(POLICY, plan, [*paid(plan, *charged), *paid(other, 1, 2)])
            assert budget.remaining() == budget.ahead() == left * plan.local_steps
            assert budget.ahead(1) == max(left, 1) * plan.local_steps


def test_a_ledger_that_was_adopted_is_held_at_the_order_that_it_had_fixed() -> None:
    """And at the hospital's, which may have been chosen when its results were known. Twins: the
    same charges of one membership; and what a membership does later changes nothing."""
    plain = charge(PLAN, 1, [])
    other = replace(plain, study="sha256:" + "6e" * 32, noise_multiplier=3.0, sampling_rate=0.1)

    def total(*charges: Charge) -> float:
        return Budget(POLICY, PLAN, charges).total(0).epsilon

    def of(membership: str, what: Charge, order: float) -> Charge:
        return replace(what, membership=membership, order=order, adopted=membership == "onco")

    def at(order: float, samples_first: bool = True) -> float:
        events = [plain.event, other.event]
        return total_epsilon(events, order, DELTA, samples_first).epsilon

    low, high = sorted((8.0, 64.0), key=at)
    assert at(low) < at(high)
    for home, adopted in ((low, high), (high, low)):
        charges = of("cardio", plain, home), of("onco", other, adopted)
        assert total(*charges) == at(high)
        alone = [replace(one, membership="cardio", adopted=False) for one in charges]
        assert total(*alone) == at(home, samples_first=False)
        shown = spending.budget("records", [spent(one) for one in charges], POLICY)
        assert shown.epsilon == at(high)
    later = of("onco", replace(other, round=2, steps=0), high)
    assert total(of("cardio", plain, low), of("onco", other, low), later) == at(low)


def spent(charged: Charge) -> Spent:
    return Spent(0, "reserve", "records", charged, "", 0, released=True)


def test_a_study_at_its_ceiling_goes_on_after_a_crash_as_far_as_its_budget_lasts() -> None:
    """And no further: the round that a repeated one took the place of is refused."""
    fits = epsilon([Steps(8.0, 1.0, 10)], DELTA)
    policy = POLICY.model_copy(update={"max_epsilon_per_study": fits})
    rounds = [1, 2, 2, *range(3, 11)]
    charges: list[Charge] = []
    for round_ in rounds:
        budget = Budget(policy, PLAN, charges)
        if _refuses(budget, round_):
            break
        charges.append(charge(PLAN, round_, charges))
        assert epsilon([one.event for one in charges], DELTA) <= fits
    assert [one.round for one in charges] == rounds[:10]


def _refuses(budget: Budget, round_: int) -> bool:
    try:
        budget.check(round_)
    except BudgetExceeded:
        return True
    return False


def test_a_tiny_ceiling_refuses_by_number_and_only_what_is_above_it() -> None:
    """Where no order of the Rényi filter leaves a budget: one kind of step is composed exactly."""
    policy = PolicyTable(max_epsilon=0.02, max_delta=1e-6)
    plan = replace(PLAN, noise_multiplier=2000.0, rounds=4, delta=1e-6)
    Budget(policy, plan, []).check()
    charges = [charge(plan, 1, [])]
    Budget(policy, plan, charges).check(2)
    with pytest.raises(BudgetExceeded, match=r"policy\.max_epsilon,"):
        Budget(policy, replace(plan, noise_multiplier=100.0), []).check()
    sampled = replace(plan, study="sha256:" + "6e" * 32, sampling_rate=0.5)
    Budget(policy, sampled, charges).check()  # at most what it would cost without sampling
    with pytest.raises(BudgetExceeded, match=r"policy\.max_epsilon,"):
        Budget(policy, replace(sampled, noise_multiplier=300.0), charges).check()


# ---------------------------------------------------------------------- several studies, one budget

LATER = PolicyTable(max_delta=1e-3)
STUDY = replace(PLAN, noise_multiplier=0.701, rounds=1, delta=1e-3)  # ε = 4.9 at δ = 10⁻³
TINY = replace(
    STUDY, study="sha256:" + "6e" * 32, noise_multiplier=20.0, sampling_rate=0.5
)  # ε = 0.03


def test_a_step_that_samples_with_much_noise_costs_no_second_study() -> None:
    """At a ceiling of 8, ε = 4.9 can be paid twice, whatever tiny study came between."""
    first = charge(STUDY, 1, [])
    between = charge(TINY, 1, [first])
    for charges in ([first], [first, between]):
        assert 7.6 < Budget(LATER, STUDY, charges).total(1).epsilon < 7.7


def test_the_order_follows_from_the_policy_and_never_from_a_plan() -> None:
    """Or a plan of almost no ε could choose one at which every later study costs more, and one
    membership of a hospital could tell by its own ε which plan another one paid first."""
    rare = replace(TINY, noise_multiplier=0.3, sampling_rate=1e-5)
    assert epsilon(rare.events(1), 1e-3) < 0.01
    assert {Budget(LATER, plan, []).order for plan in (STUDY, TINY, rare)} == {2.8}


def test_review_says_what_a_plan_of_almost_no_epsilon_leaves_to_other_studies() -> None:
    rare = replace(TINY, noise_multiplier=0.6, sampling_rate=1e-4, records=4)
    for plan, least, most in ((STUDY, 4.89, 4.91), (rare, 7.0, 50.0)):
        budget = Budget(LATER, plan, [])
        after = budget.total(1).epsilon
        assert least < budget.beside_others(1).epsilon < most
        assert (after < 0.01) == bool(_beside_others(budget, after))
    (line,) = _beside_others(budget, after)
    assert "other noise" in line and f"ε = {rounded_up(budget.beside_others(1).epsilon)}" in line


def test_an_entry_that_does_not_say_whether_it_was_adopted_may_have_been() -> None:
    """As of an earlier release, or of a restore."""
    north = replace(charge(STUDY, 1, []), membership="north", order=4.0)
    sampled = replace(charge(TINY, 1, []), membership="south", order=9.0)
    for adopted in (True, False):
        fields = replace(sampled, adopted=adopted).fields()
        later = Charge.read(fields, "south")
        assert later == replace(sampled, adopted=adopted)
        assert orders_of([north, later]) == ((4.0, 9.0) if adopted else (4.0,))
        assert samples_first([north, later]) is adopted
        del fields["adopted"]
        assert samples_first([north, Charge.read(fields, "south")])
    assert samples_first([north, Charge.read(charge(STUDY, 1, []).fields(), EVERY)])
    assert not samples_first([charge(STUDY, 1, []), charge(TINY, 1, [])])


@pytest.mark.parametrize("who", ["north", "south"])
def test_what_was_checked_is_what_the_ledger_then_says(who: str) -> None:
    """Also if another membership pays for the first sampled step: its later charges are no first
    ones. A membership of almost no share could else shut another out."""
    first = replace(charge(STUDY, 1, []), membership="north")
    checked = Budget(LATER, TINY, [first]).total(1).epsilon
    paid = [first, replace(charge(TINY, 1, [first]), membership=who)]
    assert spending.budget("records", [spent(one) for one in paid], LATER).epsilon == checked
    assert Budget(LATER, STUDY, paid).total(1).epsilon < 7.7


def test_a_changed_ceiling_does_not_show_that_another_membership_paid_before() -> None:
    ceilings = {"max_epsilon": 20.0, "max_fallback_epsilon": 20.0, "max_delta": 1e-3}
    names = {"membership": "south", "memberships": ("north", "south"), "disjoint_from": {}}
    sizes = {"declared_size": 100, "max_rounds": 100, "earlier": False}
    hospital = ShareTable.model_validate(ceilings | names | sizes)
    policy = LATER.model_copy(update={"hospital": hospital})
    north = replace(charge(STUDY, 1, []), membership="north")
    assert north.order != Budget(policy, STUDY, [north]).order == Budget(policy, STUDY, []).order


def test_the_order_of_the_first_charge_stays_when_the_ceiling_is_changed() -> None:
    """By then results are known."""
    raised = LATER.model_copy(update={"max_epsilon": 20.0})
    paid_first = replace(charge(STUDY, 1, []), order=2.8)
    assert Budget(raised, STUDY, []).order != 2.8 == Budget(raised, STUDY, [paid_first]).order


# ------------------------------------------------------------------- a study without a last round

LIFE = 3  # rounds of one patient's life
OF_LIFE = epsilon([Steps(4.0, 1.0, LIFE)], DELTA)
FOR_LIFE = replace(PLAN, noise_multiplier=4.0, lifetime=OF_LIFE, rounds=LIFE)
OTHER = replace(PLAN, study="sha256:" + "6e" * 32, noise_multiplier=5.0, rounds=2)
OTHERS = ("held-out", "later")


class Site:
    """A ledger with a continuous study on "records", and one with a last round on "held-out"."""

    def __init__(self, folder: Path) -> None:
        self.book, self.patients, self.made = Ledger(folder), 0, 0

    def arrive(self) -> None:
        self.patients += 1
        keys = [f"patient {n}".encode() for n in range(self.patients)]
        self.book.declare("records", [], "hash", keys, "later", keys)

    def permits(self, plan: DpPlan, charges: list[Charge], life: bool = True) -> None:
        budget = Budget(POLICY, plan, charges)
        (budget.check if life else budget.check_ceilings)(self.made + 1)

    def runs(self) -> bool:
        """Whether a round of the continuous study ran, charged as SiteWorker.reserve does it."""
        one = charge(FOR_LIFE, self.made + 1, self.book.charges("records"))
        try:
            self.book.reserve_for(
                "records",
                one,
                "a",
                lambda charges: self.permits(FOR_LIFE, charges),
                lambda charges: self.permits(FOR_LIFE, charges, life=False),
            )
        except Refused:
            return False
        self.made += 1
        return True

    def runs_other(self) -> bool:
        one = charge(OTHER, self.made + 1, self.book.charges("held-out"))
        try:
            self.book.reserve("held-out", one, "a", lambda paid: self.permits(OTHER, paid))
        except Refused:
            return False
        self.made += 1
        return True

    def total(self, charges: list[Charge], more: Steps | None = None) -> float:
        events = [one.event for one in charges] + ([more] if more else [])
        return total_epsilon(events, charges[0].order if charges else 2.0, DELTA).epsilon

    def room_for_all_others(self) -> bool:
        """Whether each dataset that is not the study's own stays below every ceiling with one
        round more; and so does whoever arrives now."""
        (step,) = FOR_LIFE.events(1)
        others = [name for name in self.book.datasets if name != "records"]
        counted = [self.book.charges(name) for name in others if not self.apart(name)]
        counted.append(self.book.newcomer("records"))
        return all(
            self.total(charges, step) <= POLICY.max_epsilon
            and epsilon([*events_of(FOR_LIFE, charges), step], DELTA)
            <= POLICY.max_epsilon_per_study
            for charges in counted
        )

    def apart(self, name: str) -> bool:
        return ("records", name) in self.book.disjoint or (name, "records") in self.book.disjoint


def events_of(plan: DpPlan, charges: list[Charge]) -> list[Steps]:
    return [one.event for one in charges if one.study == plan.study]


STEPS = (
    *("round",) * 4,
    *("held-out",) * 2,
    "arrive",
    "declare held-out",
    "declare later",
    "apart",
)


@given(st.lists(st.sampled_from(STEPS), max_size=40))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_life_ends_with_its_cohort_and_no_dataset_goes_past_a_ceiling(steps: list[str]) -> None:
    """In any order of arrivals, rounds of two studies and declarations of other datasets: nothing
    is charged less, no dataset or cohort goes past its limits, and a continuous study is refused
    for everybody only where another dataset's ceiling, or a newcomer's, would be passed."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        site = Site(Path(folder))
        site.arrive()
        for step in steps:
            ran = False
            if step == "arrive":
                site.arrive()
            elif step == "round":
                expected = site.room_for_all_others()
                assert (ran := site.runs()) == expected
            elif step == "held-out" and "held-out" in site.book.datasets:
                ran = site.runs_other()
            elif step == "apart":
                site.book.declare("later", ["records"])
            elif step.startswith("declare "):
                site.book.declare(step.removeprefix("declare "), [])
            _check_limits(site, ran)


def _check_limits(site: Site, ran: bool) -> None:
    """ran: whether a round was charged just now, past whose ceilings no dataset may then be; one
    that was declared when more had been spent already has no round."""
    assert len(site.book.spending()) == site.made
    for name in site.book.datasets:
        if name != "records" and not site.apart(name):
            charges = site.book.charges(name)
            assert len(charges) == site.made  # of either dataset, whoever was in the round
            assert not ran or site.total(charges) <= POLICY.max_epsilon
            for plan in (FOR_LIFE, OTHER):
                mine = epsilon(events_of(plan, charges), DELTA)
                assert not ran or mine <= POLICY.max_epsilon_per_study
    for cohort in site.book.cohorts("records"):
        assert epsilon(events_of(FOR_LIFE, cohort.charges), DELTA) <= OF_LIFE
        assert site.total(cohort.charges) <= POLICY.max_epsilon


@pytest.mark.parametrize("declared", [(), OTHERS[:1], OTHERS])
def test_a_study_goes_on_for_newcomers_whatever_other_datasets_are_declared(
    tmp_path: Path, declared: tuple[str, ...]
) -> None:
    site = Site(tmp_path)
    site.arrive()
    for name in declared:
        site.book.declare(name, [])
    assert [site.runs() for _ in range(LIFE + 1)] == [True] * (LIFE + 1)
    site.arrive()
    assert site.runs()
    assert [len(cohort.charges) for cohort in site.book.cohorts("records")] == [LIFE, 1]
    assert [len(site.book.charges(name)) for name in declared] == [LIFE + 2] * len(declared)
