"""Compare a site's ledger and audit log with the receipts that a coordinator returned."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fedtune.core.ledger.adopted import check_has_adopted, is_for_adopted
from fedtune.core.ledger.audit_log import AuditLog

if TYPE_CHECKING:
    from fedtune.core.vault.worker import SiteWorker


def acts(site: SiteWorker) -> AuditLog:
    """Return this site's audit log (who did what, when and under which rule), which lies beside its
    lifetime ledger and is signed with the ledger's key."""
    return AuditLog(site.home.folder, site.home.key)


def accept(site: SiteWorker, receipt: str, coordinator: str) -> None:
    """Check that a hospital's ledger still has what it adopted from this site (`adopted.py`). Then
    compare the ledger and the audit log with the coordinator's receipt that came with an order, and
    store this receipt if it is the newest. If the audit log lacks the entry that the receipt
    names, add an entry to the audit log that says so.

    - site: the SiteWorker of this site, with its settings and ledger
    - receipt: the receipt as JSON; "" if the order has none, and then nothing is compared. Nothing
      is stored of a receipt for the ledger that this membership had before the hospital adopted it
    - coordinator: the public key that signed the plan, and must have signed the receipt

    Errors: LedgerError if the receipt is not for this ledger, or the ledger lacks the entry that it
    names, or what it adopted."""
    state, is_in_home = site.site.site.state, site.site.hospital is not None
    if is_in_home:
        check_has_adopted(state, site.home)
    if not receipt:
        return
    given = json.loads(receipt)
    if is_in_home and is_for_adopted(state, given, coordinator):
        return  # of a ledger with an audit log of its own, which stays in the copy
    acts(site).check(site.home.accept_receipt(given, coordinator, site.site.policy.own_memberships))
