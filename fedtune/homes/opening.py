"""Open the ledger of a home. Every command outside the vault opens a ledger here, and looks whether
it is there before a vault is started. A folder whose volume is not mounted is empty, and a ledger
begun there would know of no charge, no withdrawal and no freeze.

Guarantee: if this account knows that a home has a ledger, no other one is begun or opened in the
home's folder."""

from __future__ import annotations

from pathlib import Path

from fedtune.core.ledger.files import traces
from fedtune.core.ledger.ledger import Ledger
from fedtune.homes.known_homes import check_ledger_there


def open_ledger(home: Path) -> Ledger:
    """Open the ledger in the folder `home`. A new one is begun if the folder has none, and none is
    known to have been there. Errors: ConfigError if the ledger that was there is not there now;
    LedgerError."""
    check_ledger_there(home)
    return Ledger(home)


def find_ledger(home: Path) -> Ledger | None:
    """Open the ledger in the folder `home`, and return it; None if there is none, and none is known
    to have been there. No ledger is begun. Errors: ConfigError if the ledger that was there is not
    there now; LedgerError."""
    check_ledger_there(home)
    return Ledger(home) if traces(home) else None
