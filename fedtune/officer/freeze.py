"""Freeze a site's ledger, so that nothing is charged, answered or deleted until a person lifts it.

The freeze is an entry of the ledger. Every vault of the site reads it before it charges a round and
again before an answer leaves; in a hospital's home it stops every membership. A coordinator learns
only that a person froze the ledger. If the person froze it because of what a record says, even that
tells something which no ε covers."""

from __future__ import annotations

from pathlib import Path

from fedtune.core.config import Site
from fedtune.core.errors import ConfigError, FedtuneError, NotGenuine, Refused
from fedtune.core.ledger import audit_log
from fedtune.core.ledger.audit_log import AuditLog, login
from fedtune.core.ledger.entries import Freeze, Standing
from fedtune.core.ledger.files import traces
from fedtune.core.ledger.ledger import Ledger
from fedtune.officer.withdraw import in_reserved_space, withdrawn_by_receipts

FREEZE, LIFT = "freeze", "lift"  # events of the audit log


def freeze(site: Site, why: str) -> None:
    """Freeze the ledger. The freeze is entered in the audit log first, so that a restore can freeze
    the ledger again; a damaged audit log does not prevent the freeze. An answer that was sent
    cannot be called back. A round under way is charged and not answered.

    Errors: ConfigError if there is no ledger (none is made); NotGenuine of a damaged audit log,
    after the freeze; LedgerError; InfrastructureError, also on a full disk whose reserve is used
    up."""
    if not traces(site.home):
        raise ConfigError(f"{site.home}: no ledger yet", todo="there is nothing to freeze")

    def enter() -> None:
        book = Ledger(site.home)
        try:
            AuditLog(book.folder, book.key).add(FREEZE, "--freeze", once=1)
        finally:
            book.freeze(login(), why)

    in_reserved_space(site, enter)


def lift(site: Site, why: str) -> None:
    """End a freeze. The lift is entered in the audit log first. A damaged audit log does not
    prevent it, since the ledger's own entry says who lifted the freeze and why. Errors: InputError
    if the ledger is not frozen; NotGenuine of a damaged audit log, after the lift; LedgerError;
    InfrastructureError."""
    book, damaged = Ledger(site.home), None
    if book.frozen:
        try:
            AuditLog(book.folder, book.key).add(LIFT, "--lift")
        except NotGenuine as error:
            damaged = error
    book.lift(login(), why)
    if damaged:
        raise damaged


def standing(home: Path, public: str) -> Standing:
    """Return the withdrawals and the freeze that a restored ledger in `home` must hold, by those
    receipts and the audit log beside it that the key `public` signed."""
    return Standing(withdrawn_by_receipts(home, public), _freeze_by_log(home, public))


def _freeze_by_log(folder: Path, public: str) -> Freeze | None:
    """Return the freeze in an audit log that nobody lifted, or None. An audit log that does not
    verify counts as a freeze, since its newest entries may be gone."""
    why = "restored: the audit log has a freeze that nobody lifted"
    if not audit_log.files(folder):
        return None
    try:
        entries = audit_log.verify(folder, public).entries
    except (FedtuneError, OSError):
        return Freeze(login(), "restored: the audit log is damaged, and may have lost a freeze", 0)
    acts = [entry["event"] for entry in entries if entry["event"] in (FREEZE, LIFT)]
    return Freeze(login(), why, 0) if acts[-1:] == [FREEZE] else None


def check_not_frozen(home: Path, what: str) -> None:
    """Check that a person did not freeze the ledger in `home`, before files are deleted or moved
    that may be evidence. Errors: Refused; LedgerError."""
    if traces(home) and Ledger(home).frozen:
        raise frozen(home, what)


def frozen(home: Path, what: str) -> Refused:
    """Build the refusal of an act that would delete or move files beside a frozen ledger. what: the
    act, as in "deleted"."""
    return Refused(
        f"{home}: the ledger is frozen, so that nothing is {what}",
        "a ledger that is not frozen",
        "once the incident is over, a person lifts it: fedtune ledger SITE --lift",
    )
