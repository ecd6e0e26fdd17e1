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
    """Compare the ledger and the audit log with the receipt that came with an order, and store the
    receipt if it is the newest. receipt: as JSON; "" if the order has none. An audit log that lacks
    the receipt's entry gets an entry that says so.

    Errors: LedgerError if the receipt is not for this ledger, or the ledger lacks its entry."""
    if receipt:
        own = site.site.policy.own_memberships
        head = site.home.accept_receipt(json.loads(receipt), coordinator, own)
        acts(site).check(head)
