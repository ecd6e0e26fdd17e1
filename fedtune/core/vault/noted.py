"""Compare a site's ledger and audit log with the receipts that a coordinator returned."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fedtune.core.ledger.audit_log import AuditLog

if TYPE_CHECKING:
    from fedtune.core.vault.worker import SiteWorker


def acts(site: SiteWorker) -> AuditLog:
    """Return the audit log of a site's own acts."""
    return AuditLog(site.home.folder, site.home.key)


def accept(site: SiteWorker, receipt: str, study: str, coordinator: str) -> None:
    """Compare the ledger, and the audit log, with the receipt in an order; "" if there is none.

    Errors: LedgerError."""
    if receipt:
        own = site.site.policy.own_memberships
        head = site.home.accept_receipt(json.loads(receipt), coordinator, own)
        acts(site).check(head)
