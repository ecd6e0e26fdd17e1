"""Check, before a site takes part, that its step log has what the ledger released."""

from __future__ import annotations

from fedtune.core.config import Site
from fedtune.core.dp.steplog import StepLog
from fedtune.core.ledger.files import DATABASE, STEPS
from fedtune.core.vault.declared import run_ledger
from fedtune.core.vault.logged_steps import check_all_logged, has_ended
from fedtune.core.vault.studies import under_way
from fedtune.homes.opening import find_ledger


def check_step_log(site: Site) -> None:
    """Check for each study that is under way that the step log has every step whose answer the
    ledger released. The site would answer no order of such a study. No record is read. Errors:
    LedgerError, also if the log was lost or put back to an earlier state; InfrastructureError if
    the log cannot be read."""
    for digest in under_way(site.site.state):
        home = run_ledger(site, digest) if site.data.declared else site.home
        ledger = find_ledger(home) if (home / DATABASE).exists() else None
        if ledger and not has_ended(ledger, digest):
            log = StepLog(home / STEPS)
            check_all_logged(ledger, log, digest, site.policy.own_memberships)
