"""Freeze a site's ledger, so that nothing is charged, answered or deleted until a person lifts the
freeze.

The freeze is an entry of the ledger. Every process that answers for the site (a vault) reads this
entry before it charges a round and again before an answer leaves. If several memberships of a
hospital share the ledger, the freeze stops all of them. A coordinator learns only that a person
froze the ledger. If the person froze it because of what a record says, even that tells something
which no ε covers."""

from __future__ import annotations

import logging
from pathlib import Path

from fedtune.core.config import Site
from fedtune.core.errors import (
    ConfigError,
    FedtuneError,
    InfrastructureError,
    NotGenuine,
    Refused,
)
from fedtune.core.ledger import audit_log
from fedtune.core.ledger.audit_log import AuditLog, login
from fedtune.core.ledger.entries import Freeze, Standing
from fedtune.core.ledger.files import KEY, LedgerError, NoRoom, traces
from fedtune.core.wire.keys import SigningKey
from fedtune.homes.known_homes import check_ledger_there
from fedtune.homes.opening import find_ledger, open_ledger
from fedtune.officer.withdraw import in_reserved_space, withdrawn_by_receipts

FREEZE, LIFT, CUT = "freeze", "lift", "cut"  # events of the audit log
REFUSE = "refuse"  # another event: a refused answer if it names an adapter, else a refused plan

log = logging.getLogger("fedtune.site")


def freeze(site: Site, why: str) -> None:
    """Freeze the ledger. An answer that was sent cannot be called back. A round that is under way
    stays charged, but is not answered. why: the person's reason, which the ledger's entry states.

    The freeze is entered in the audit log first, so that a restore can freeze the ledger again. If
    the audit log is damaged or cannot be written, the ledger is frozen all the same, and the error
    says so. If the ledger is damaged, only the audit log gets the entry. No round is answered with
    a damaged ledger, and when it is restored, that entry freezes it.

    Errors:
    - ConfigError: there is no ledger (none is made), or the ledger that was there is gone
    - NotGenuine: the audit log is damaged; raised after the freeze
    - LedgerError: the ledger is damaged; raised after the entry in the audit log
    - NoRoom: the disk is full, and the reserved space is used up; the ledger is not frozen
    - InfrastructureError: the audit log cannot be written; raised after the freeze"""
    check_ledger_there(site.home)
    if not traces(site.home):
        raise ConfigError(f"{site.home}: no ledger yet, so there is nothing to freeze")

    def enter() -> None:
        try:
            book = open_ledger(site.home)
        except NoRoom:
            raise
        except LedgerError:
            if (site.home / KEY).exists():
                AuditLog(site.home, SigningKey.at(site.home / KEY)).add(FREEZE, "--freeze", once=1)
                log.warning("only the audit log has the freeze: a restored ledger will be frozen")
            raise
        try:
            AuditLog(book.folder, book.key).add(FREEZE, "--freeze", once=1)
        finally:
            book.freeze(login(), why)

    try:
        in_reserved_space(site, enter)
    except LedgerError:
        raise
    except (NotGenuine, InfrastructureError) as error:
        if open_ledger(site.home).frozen is None:
            raise
        raise _build_log_error(error, "the ledger is frozen all the same") from None


def lift(site: Site, why: str) -> None:
    """End a freeze. The end is entered first in the ledger, then in the audit log, so that a
    restore after an interruption freezes the ledger again. If the disk has no room for the ledger,
    a warning says that no order is answered in spite of this. why: the person's reason, which the
    ledger's entry states.

    Errors:
    - InputError: the ledger is not frozen
    - NotGenuine: the audit log is damaged; raised after the end of the freeze
    - InfrastructureError: the audit log cannot be written; raised after the end of the freeze
    - LedgerError"""
    book = open_ledger(site.home)
    acts = AuditLog(book.folder, book.key)
    in_reserved_space(site, lambda: book.lift(login(), why))
    if not site.room.has_space():
        log.warning(
            "%s: no room for the ledger: no order is answered until space is free", book.folder
        )
    try:
        in_reserved_space(site, lambda: acts.add(LIFT, "--lift"))
    except (NotGenuine, InfrastructureError) as error:
        raise _build_log_error(error, "the freeze is lifted all the same") from None


def _build_log_error(error: FedtuneError, done: str) -> FedtuneError:
    """Build the error which says that something was done, but could not be entered in the audit
    log. error: why it could not be entered. done: what was done, for the error's text."""
    return type(error)(f"{error.happened}; {done}", error.expected, error.todo)


def read_decisions(home: Path, public: str) -> Standing:
    """Return what a restored ledger in `home` must hold: the withdrawals, the refused answers and
    the freeze. They are read from the receipts and the audit log beside the ledger; only what the
    key `public` signed counts. An audit log that does not verify, was taken away or was begun anew
    counts as a freeze, since its newest entries may be gone."""
    withdrawn = withdrawn_by_receipts(home, public)
    try:
        entries = audit_log.verify(home, public).entries if audit_log.was_begun(home) else []
    except (FedtuneError, OSError):
        why = "restored: the audit log is damaged, and may have lost a freeze"
        return Standing(withdrawn, Freeze(login(), why, 0))
    acts = [entry["event"] for entry in entries if entry["event"] in (FREEZE, LIFT, CUT)]
    reason = {
        FREEZE: "restored: the audit log has a freeze that nobody lifted",
        CUT: "restored: the audit log was cut off, and may have lost a freeze",
    }.get(acts[-1] if acts else LIFT)
    frozen = Freeze(login(), reason, 0) if reason else None
    facts = [entry["facts"] for entry in entries if entry["event"] == REFUSE]
    refused = {(f["plan"], f["round"], f["adapter"]) for f in facts if "adapter" in f}
    return Standing(withdrawn, frozen, refused)


def check_not_frozen(home: Path, what: str) -> None:
    """Check that no person froze the ledger in `home`, before files that may be evidence are
    deleted or moved. what: what would be done to the files, as a participle for the error's text,
    such as "deleted". Errors: Refused if the ledger is frozen; ConfigError if the ledger that was
    in `home` is gone; LedgerError."""
    if (book := find_ledger(home)) and book.frozen:
        raise frozen(home, what)


def frozen(home: Path, what: str) -> Refused:
    """Build the error that refuses to delete or move files beside a frozen ledger. what: what would
    be done to the files, as a participle, such as "deleted"."""
    return Refused(
        f"{home}: the ledger is frozen, so that nothing is {what}",
        "a ledger that is not frozen",
        "once the incident is over, a person lifts it: fedtune ledger SITE --lift",
    )
