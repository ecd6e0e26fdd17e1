"""Open the ledger of a home (a folder with a privacy ledger). Every command outside the vault
opens ledgers by these functions. Before a command starts a vault, it checks that the ledger is
there. A folder whose volume is not mounted is empty, and a ledger begun there would know of no
charge, no withdrawal and no freeze.

Guarantee: if this account's notes know the ledger of a home, no other ledger is begun or opened in
the home's folder."""

from __future__ import annotations

from pathlib import Path

from fedtune.core.config import Site
from fedtune.core.ledger.adopted import check_has_adopted
from fedtune.core.ledger.files import traces
from fedtune.core.ledger.ledger import Ledger
from fedtune.homes.known_homes import check_head, check_not_put_back


def open_ledger(home: Path) -> Ledger:
    """Open the ledger in the folder `home`. If there is no ledger, and none is known to have been
    there, a new one is begun. Errors: ConfigError if the ledger that was there is not there now;
    LedgerError, also if it was put back to an earlier copy of itself."""
    check_not_put_back(home)
    return Ledger(home)


def find_ledger(home: Path) -> Ledger | None:
    """Open the ledger in the folder `home`, and return it. Return None if there is no ledger, and
    none is known to have been there; no new one is begun. Errors: ConfigError if the ledger that
    was there is not there now; LedgerError."""
    check_not_put_back(home)
    return Ledger(home) if traces(home) else None


def open_paying_ledger(site: Site) -> Ledger:
    """Open the ledger from which a site pays for private records, and which knows who withdrew.
    Errors: those of `open_ledger`; LedgerError if the site is a membership of a hospital whose
    ledger lost what it adopted from this site: it would not know who had withdrawn here."""
    ledger = open_ledger(site.site.ledger or site.home)
    if site.hospital:
        check_has_adopted(site.site.state, ledger)
    return ledger


def check_ledger_stands(home: Path) -> None:
    """Check that the ledger in the folder `home`, if there is one, was not put back to an earlier
    copy of itself, as far as this machine's notes show it (`check_head`). Errors: ConfigError if
    the ledger that was there is not there now; LedgerError."""
    if ledger := find_ledger(home):
        check_head(ledger)
