"""Check one plan's cost against a site's limits and the charges of a dataset.

Each charge of a private plan is checked here before it is entered in the ledger. A charge without
noise (σ = 0) is not checked here: policy.allow_privacy_off decides about it. Once a dataset has
such a charge, no private plan on it is admitted any more. The results depend only on the plan, the
policy and the charges, so a coordinator may see each refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedtune.core.config import PolicyTable
from fedtune.core.config.study import QUERIES
from fedtune.core.dp import accountant
from fedtune.core.dp.accountant import Steps
from fedtune.core.dp.filter import Total, best_order, total_epsilon
from fedtune.core.dp.plan import DpPlan
from fedtune.core.errors import BudgetExceeded
from fedtune.core.files.room import Room
from fedtune.core.ledger.entries import (
    EVERY,
    Charge,
    Spent,
    are_kinds_known,
    orders_of,
    samples_first,
)

OTHER_KIND = Steps(1e6, 1.0, 1)  # a step that costs nothing and is of another kind than any study's
QUERIES_NAME = " (evaluation)"  # after a study's name, in its queries' charges
MOST_ATTEMPTS = 8  # how often one round of a plan may be charged
QUERIES_TODO = (
    "raise private_evaluation.noise_multiplier, or have the site declare its held-out records "
    "disjoint from those it trains on"
)


@dataclass(frozen=True)
class Budget:
    """The budget of one dataset, as it stands for one plan that would spend from it.

    - policy: the site's policy, as its file is now
    - plan: the plan of a study's training or of its queries
    - charges: in the ledger's order, all charges against the dataset, or against one cohort if the
      study has no last round

    Guarantee: suppose that `check` passes before every charge (for a dataset other than the plan's
    own, `check_ceilings`). Then everything released from the dataset is (policy.ceiling, 2 ·
    policy.delta)-DP, provided that in studies with secure aggregation no more sites collude than
    the plan allows. However many collude, it is (policy.fallback_ceiling, 2 · policy.delta)-DP.
    Both hold even if later studies were chosen by earlier results (`fedtune.core.dp.filter`). If
    the memberships of a hospital share the ledger, both ceilings are the hospital's, and what this
    membership released stays within its own share (policy.max_epsilon,
    policy.max_fallback_epsilon)."""

    policy: PolicyTable
    plan: DpPlan
    charges: Sequence[Charge]

    @property
    def order(self) -> float:
        """The Rényi order that a charge of this plan has. It follows from the site's ceiling and δ,
        never from a plan (`core.dp.filter`). The first charge fixes it, before any result is known.

        If the memberships of a hospital share the ledger, the membership's own first charge fixes
        it. If another membership's charge did, and the ceiling was changed after that charge, the
        order would show that another membership had paid before."""
        own = self.share.charges
        return own[0].order if own else best_order(self.policy.ceiling, self.policy.delta)

    def total(self, ahead: int, beside: Sequence[Steps] = ()) -> Total:
        """Compute the dataset's ε after its charges and `ahead` more steps of the plan, at δ = 2 ·
        policy.delta. For studies with secure aggregation, assume that no more sites collude than
        their plans allow.

        beside: further steps that will be charged to the same records, such as those of the
        study's queries"""
        charged = [charge.event for charge in self.charges]
        return self._compose(charged, [*self.plan.events(ahead), *beside])

    def beside_others(self, ahead: int) -> Total:
        """Compute `total` as it becomes once the dataset also pays for a study whose steps are of
        another kind (another σ or sampling rate); the cost of that study is not counted. The result
        may be larger than `total`, since steps of several kinds are composed by another filter."""
        events = [charge.event for charge in self.charges]
        return self._compose(events, [*self.plan.events(ahead), OTHER_KIND])

    def fallback(self, ahead: int, beside: Sequence[Steps] = ()) -> Total:
        """Compute the dataset's fallback ε, the ε that this site's own noise alone gives, after its
        charges and `ahead` more steps of the plan, at δ = 2 · policy.delta. beside: as for `total`.

        It is accounted separately from `total`, at the same Rényi order."""
        charged = [charge.fallback for charge in self.charges]
        return self._compose(charged, [*self.plan.fallback_events(ahead), *beside])

    def _compose(self, charged: list[Steps], planned: list[Steps]) -> Total:
        events = charged + [event for event in planned if event.steps]
        if not self.charges:  # this plan's step comes first
            return total_epsilon(events, self.order, self.policy.delta, self.plan.sampling_rate < 1)
        orders, sampled = orders_of(self.charges), samples_first(self.charges)
        known = are_kinds_known(self.charges)
        return total_epsilon(events, orders, self.policy.delta, sampled, known)

    def remaining(self) -> int:
        """Return how many of the plan's steps are not charged yet, at least 0. If a round was
        charged twice, for example after a crash, both charges are subtracted, so that a study at
        its ceiling can go on, with fewer rounds."""
        paid = sum(charge.steps for charge in self.share._of_plan())
        return max(self.plan.steps - paid, 0)

    def ahead(self, round_: int | None = None) -> int:
        """Return how many steps are still to be charged: those that `remaining` counts, but at
        least the steps of one round if `round_` is about to run, since a round that is trained
        again is charged again. If the plan has no last round, return the steps of one round."""
        steps = self.plan.local_steps
        if self.plan.lifetime is not None:
            return steps
        return max(self.remaining(), 0 if round_ is None else steps)

    def check(self, round_: int | None = None, more: int = 0) -> None:
        """Check that the dataset's charges, together with all steps that are still to come, exceed
        none of the site's ceilings. In a plan without a last round, check the plan's lifetime ε of
        a unit too.

        - round_: the round that is about to run; None if none is
        - more: further steps to count, such as those of attempts that may fail

        Errors: BudgetExceeded."""
        ahead = self.ahead(round_) + more
        if self.share._exceeds_lifetime(ahead):
            raise BudgetExceeded(
                "the round would exceed privacy.epsilon, a patient's lifetime budget in this plan"
            )
        if self.policy.hospital and self._exceeds_lifetime(ahead):
            raise build_exceeds_hospital()
        self.check_ceilings(round_, more)

    def check_ceilings(self, round_: int | None = None, more: int = 0) -> None:
        """Check that the dataset's charges, together with all steps that are still to come, exceed
        none of the site's ceilings.

        - round_: the round that is about to run; None if none is
        - more: further steps to count, such as those of attempts that may fail

        If the plan's charges also count against a dataset that the plan does not train on, this is
        the only check for that dataset. The plan's lifetime ε does not apply there: it is for the
        units that the plan trains on. If a study's training and queries are charged to the same
        people, they count together against policy.max_epsilon_per_study, since a coordinator may
        order either first. Errors: BudgetExceeded."""
        self.check_alone()
        policy, share = self.policy, self.share
        ahead = self.ahead(round_) + more
        if share._exceeds_of_a_study(ahead):
            beside = any(charge.study != self.plan.study for charge in share._of_study())
            raise BudgetExceeded(
                f"{'training and queries together' if beside else 'the study'} would go past "
                "policy.max_epsilon_per_study",
                f"at most ε = {policy.max_epsilon_per_study} at this site",
                QUERIES_TODO
                if beside
                else "lower epsilon or rounds, or ask the site to raise this limit",
            )
        if share.total(ahead).epsilon > policy.max_epsilon:
            raise BudgetExceeded(
                "the study would take this dataset past policy.max_epsilon, other studies included",
                f"at most ε = {policy.max_epsilon} in total",
                "`fedtune ledger` at the site shows what was spent; lower epsilon or rounds",
            )
        if share.is_shared and share.fallback(ahead).epsilon > policy.max_fallback_epsilon:
            raise BudgetExceeded(
                "the study would take this dataset past policy.max_fallback_epsilon, the ε that "
                "holds even if secure aggregation does not",
                f"at most ε = {policy.max_fallback_epsilon} in total",
                "lower epsilon: the larger ε, which each site's own noise gives, falls with it",
            )
        if policy.hospital and (self._exceeds_of_a_study(ahead) or self._exceeds_ceiling(ahead)):
            raise build_exceeds_hospital()

    @property
    def share(self) -> Budget:
        """This budget with only the charges of this membership, or with all charges if the site has
        a ledger of its own. A charge that a restore of the ledger entered counts against the share
        of every membership."""
        if self.policy.hospital is None:
            return self
        mine = self.policy.own_memberships
        return replace(self, charges=[c for c in self.charges if c.is_paid_by(mine)])

    def _exceeds_lifetime(self, ahead: int) -> bool:
        """Return whether the plan's charges and `ahead` more steps exceed the plan's lifetime ε;
        False if it has none."""
        plan = self.plan
        if plan.lifetime is None:
            return False
        events = [*(charge.event for charge in self._of_plan()), *plan.events(ahead)]
        return accountant.epsilon(events, plan.delta) > plan.lifetime

    def _exceeds_of_a_study(self, ahead: int) -> bool:
        """Return whether the charges of the plan's study and `ahead` more steps exceed
        policy.max_epsilon_per_study."""
        events = [*(charge.event for charge in self._of_study()), *self.plan.events(ahead)]
        return accountant.epsilon(events, self.plan.delta) > self.policy.max_epsilon_per_study

    def _exceeds_ceiling(self, ahead: int) -> bool:
        """Return whether all charges of the dataset and `ahead` more steps exceed a ceiling of the
        hospital."""
        above = self.total(ahead).epsilon > self.policy.ceiling
        return above or (
            self.is_shared and self.fallback(ahead).epsilon > self.policy.fallback_ceiling
        )

    def check_alone(self) -> None:
        """Check that no other membership of this hospital takes part in the plan, if the plan's
        noise is shared. If one did, a patient could be in the noised sum twice, and change it by
        twice what each membership is charged for. Charges of this plan that a restore of the ledger
        entered count as another membership's, since nobody knows whose they are.

        Errors: BudgetExceeded, which does not name the other membership."""
        if self.policy.hospital is None or self.plan.sites == 1:
            return
        of_plan = (charge for charge in self.charges if charge.study == self.plan.study)
        if any(charge.membership not in self.policy.own_memberships for charge in of_plan):
            raise BudgetExceeded(
                "with shared noise a hospital takes part in a plan once, in one of its consortia",
                todo="leave this site out, or plan with each site's own noise",
            )

    def check_attempts(self, round_: int) -> None:
        """Check that the round `round_` of the plan may be charged once more; this is allowed
        MOST_ATTEMPTS times in all. A round is charged again if it was interrupted, or if the
        coordinator orders it again on another adapter. `fedtune review` states what a plan costs at
        most with all these attempts.

        Errors: BudgetExceeded."""
        paid = sum(charge.round == round_ for charge in self.share._of_plan())
        if paid >= MOST_ATTEMPTS:
            raise BudgetExceeded(
                f"round {round_} was paid for {MOST_ATTEMPTS} times, interrupted attempts included",
                f"at most {MOST_ATTEMPTS} payments for a round of a plan",
                "the coordinator continues from its newest checkpoint, or plans another study",
            )

    @property
    def is_shared(self) -> bool:
        """Whether the plan or a charge shares its noise among sites (secure aggregation). Then a
        second total ε is computed, by this site's own noise alone."""
        return self.plan.sites > 1 or any(charge.sites > 1 for charge in self.charges)

    def _of_plan(self) -> list[Charge]:
        return [charge for charge in self.charges if charge.study == self.plan.study]

    def _of_study(self) -> list[Charge]:
        """Return the charges of the plan's study, for training and for queries."""
        digest = self.plan.study.removesuffix(QUERIES)
        plans = digest, digest + QUERIES
        return [charge for charge in self.charges if charge.study in plans]


def most_epsilon_of_study(policy: PolicyTable, plans: Sequence[DpPlan]) -> float:
    """Return the largest ε, at the plans' δ, to which a study may come at this site: each of its
    rounds and queries is answered MOST_ATTEMPTS times, up to policy.max_epsilon_per_study. A
    coordinator may order a round again after an interruption, or on another adapter.

    plans: the plan of the study's training and, if they are charged to the same records, that of
    its queries."""
    limit, delta = policy.max_epsilon_per_study, plans[0].delta
    events = [event for plan in plans for event in plan.events(MOST_ATTEMPTS * plan.steps)]
    if max(accountant.at_least(event, delta) for event in events) >= limit:
        return limit
    return min(limit, accountant.epsilon(events, delta))


def build_exceeds_hospital() -> BudgetExceeded:
    """Build the error for a limit that other consortia's charges decide. It names no figure, since
    this coordinator must not learn what other consortia spent."""
    return BudgetExceeded(
        "the study does not fit into the budget of this hospital, of all its consortia together",
        todo="ask the site; `fedtune ledger` there shows what was spent",
    )


def check_known(
    dataset: str,
    unit: str,
    unknown: Sequence[Spent],
    *,
    in_home: bool = False,
    at_site: bool = False,
) -> None:
    """Check that the cost of every charge of a dataset is known for `unit`, or that a person at the
    site accepted the charges of unknown cost.

    - dataset: the dataset's name, for the error
    - unit: the unit that the study protects: "patient" or "record"
    - unknown: the charges of unknown cost that nobody accepted, from `Ledger.unknown`
    - in_home: whether a hospital's memberships share the ledger. The error then says nothing that
      this membership's coordinator must not know, such as the unit that another membership's study
      protects
    - at_site: whether only a person at the site reads the error, and no coordinator. The error then
      names the dataset and the columns of patients, which are the site's own settings

    The result depends on charges, which are public. Errors: BudgetExceeded if `unknown` is not
    empty."""
    if not unknown:
        return
    other = sorted({spent.charge.unit for spent in unknown} - {unit, "any"})
    why = f"they were charged per {other[0]}" if other else "an earlier release charged them"
    either = "they were charged for another unit, or by an earlier release"
    restored = [spent for spent in unknown if spent.dataset == EVERY]
    otherwise = [spent for spent in unknown if spent.has_other_column]
    if restored or otherwise:  # a coordinator learns neither, nor the names of a site's columns
        why = either
    if at_site and otherwise:
        why = describe_other_columns(otherwise)
    elif at_site and restored:
        why = describe_restored(restored)
    if in_home:  # this coordinator must not know what another membership's study protects
        why = either
    raise BudgetExceeded(
        f"the cost of earlier rounds on this dataset is unknown for one {unit}: {why}",
        "a dataset whose charges are all for the study's unit, by this release's rules",
        "a person at the site reads `fedtune ledger` and, to accept this, runs it "
        f"with --accept {dataset if at_site else 'DATASET'}",
    )


def describe_restored(spent: Sequence[Spent]) -> str:
    """Say to a person at the site why the cost of charges that a restore entered is not known.
    spent: these charges; at least one."""
    return (
        f"{len(spent)} charges stand for rounds whose own entries were lost before the ledger was "
        "restored, so nobody can tell for which unit and by which column of patients they were "
        "made. If all these rounds were charged for the unit that is protected now, and by the "
        "column that columns.patient names now, their ε holds"
    )


def describe_other_columns(spent: Sequence[Spent]) -> str:
    """Say to a person at the site by which columns the patients of `spent` were told apart, and by
    which they are now. spent: charges that another column told apart; at least one."""
    earlier = ", ".join(sorted({repr(each.patient) for each in spent}))
    now = ", ".join(sorted({repr(each.patient_now) for each in spent}))
    return (
        f"{len(spent)} rounds were charged when the column {earlier} told patients apart, and now "
        f"{now} does (columns.patient), so one patient may have counted as several then. If the "
        "column was only renamed, and a patient is the same by both, the ε of these rounds holds"
    )


def check_rounds(charges: Sequence[Charge], policy: PolicyTable, room: Room) -> None:
    """Check that the ledger may be charged for one more round of any study: neither
    policy.max_rounds nor the number of rounds for which disk space is reserved (files.room) may be
    reached. A coordinator of a study without a last round could otherwise order rounds without end,
    since they cost nothing once every unit's budget is used up.

    charges: all charges of the ledger; room: the space that was reserved when this process started;
    a policy.max_rounds that was raised since does not change it. Errors: BudgetExceeded."""
    most = min(policy.max_rounds, room.rounds)
    own = [charge for charge in charges if charge.is_paid_by(policy.own_memberships)]
    if len(charges) >= room.rounds and policy.hospital:
        raise BudgetExceeded(
            "this hospital's ledger pays for no further round, of all its consortia together",
            todo="ask the site; `fedtune ledger` there shows what was spent",
        )
    if len(own) >= most:
        raise BudgetExceeded(
            "this site's ledger has paid for policy.max_rounds rounds of all studies together",
            f"at most {most}",
            "the site may raise policy.max_rounds, and start again; each further round needs 8 KiB "
            "more of the disk, unless a hospital's memberships share the ledger",
        )
