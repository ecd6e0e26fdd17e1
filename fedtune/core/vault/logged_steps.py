"""Check that a site knows every step that a plan ran there.

A site states to the coordinator how many noised steps a plan ran, by its step log, and limits what
one plan costs by the ledger's charges for it. If either lacks a step, the site would state and
count too few. Then the plan gets no answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from fedtune.core.config.study import QUERIES
from fedtune.core.dp.steplog import StepLog
from fedtune.core.errors import BudgetExceeded
from fedtune.core.ledger.entries import EVERY
from fedtune.core.ledger.files import RESTORE
from fedtune.core.ledger.ledger import Ledger, LedgerError
from fedtune.core.vault.budget import build_exceeds_hospital

Rounds = Counter[tuple[str, int]]  # (plan, round) -> how many noised steps


def check_none_lost(ledger: Ledger, digest: str, *, in_home: bool = False) -> None:
    """Check that no restore of the ledger may have lost rounds of a plan. If one may, the plan is
    refused for good, to every membership of a hospital.

    - ledger: the ledger that is charged for the plan
    - digest: the plan's digest
    - in_home: whether a hospital's memberships share the ledger. The error then does not say that
      the ledger knows the plan, since it may know it from another membership

    The result depends on the ledger's charges and signatures alone. Errors: BudgetExceeded."""
    if has_ended(ledger, digest):
        if in_home:
            raise build_exceeds_hospital()
        raise BudgetExceeded(
            "rounds of this plan may be missing from this site's ledger",
            "a ledger that has each of them under the plan's name",
            "go on without this site, which may take part in another study",
        )


def check_all_logged(
    ledger: Ledger, log: StepLog, digest: str, memberships: Collection[str]
) -> None:
    """Check that the step log has every noised step of a plan whose answer the ledger released, and
    that the ledger has the entry of every line of the log, whatever its plan. The ledger may have
    charged more: a round that was interrupted may have ended before its steps.

    - ledger: the ledger that is charged for the plan
    - log: the step log beside it
    - digest: the plan's digest
    - memberships: the names under which ledger and log hold this site's steps

    Errors: LedgerError if steps are missing, or the ledger lacks an entry: it was put back to an
    earlier state, and the log was not. InfrastructureError if the log cannot be read."""
    released, logged, plans = Rounds(), Rounds(), _plans(digest)
    for spent in ledger.spending():
        charge = spent.charge
        is_own = charge.study in plans and charge.is_paid_by(memberships)
        is_round = spent.dataset != EVERY and charge.noise_multiplier > 0  # of no restore
        if is_own and is_round and spent.released:
            released[charge.study, charge.round] += charge.steps
    for step, count in log.count_steps(memberships).items():
        logged[step.study, step.round] += count
    # A line of an older release names no entry.
    named = {line.entry for line in log.attempts() if line.entry}
    if named - ledger.charged_entries.keys():
        raise LedgerError(
            f"{log.path}: names charges that the ledger beside it lacks: the ledger was put back "
            "to an earlier state, or is that of another site",
            "a ledger with the charge of every step that ran",
            RESTORE,
        )
    if missing := released - logged:
        rounds = ", ".join(str(round_) for round_ in sorted({round_ for _, round_ in missing}))
        raise LedgerError(
            f"{log.path}: has no steps of round {rounds} of the plan {digest}, whose answers the "
            "ledger released: the step log was lost, or put back to an earlier state",
            "every step of the plan, since the site states their number with each answer",
            "put the newest copy of the file back; if there is none, the study goes on without "
            "this site: `fedtune purge SITE --study NAME` ends it here",
        )


def has_ended(ledger: Ledger, digest: str) -> bool:
    """Return whether a plan gets no further answer, since a restore may have lost rounds of it.
    digest: the plan's digest, or that of its queries."""
    return not ledger.ended_plans.isdisjoint(_plans(digest))


def _plans(digest: str) -> tuple[str, str]:
    """Return the names under which a plan's training and its queries are charged and logged.
    digest: the plan's digest, or that of its queries."""
    plan = digest.removesuffix(QUERIES)
    return plan, plan + QUERIES
