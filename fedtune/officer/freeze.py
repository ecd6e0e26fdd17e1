"""Freeze a site's ledger, so that nothing is charged, answered or deleted until a person lifts it.

The freeze is an entry of the ledger, which every vault of the site reads before it charges a round
and again before an answer leaves; in a hospital's home it stops every membership. A coordinator is
told that a person froze the ledger, and no more: whoever freezes because of what a record says
tells something that no ε covers."""

from __future__ import annotations

from pathlib import Path

from fedtune.core.config import Site
from fedtune.core.errors import ConfigError, InputError, Refused
from fedtune.core.ledger import audit_log
from fedtune.core.ledger.audit_log import AuditLog, login
from fedtune.core.ledger.files import traces
from fedtune.core.ledger.ledger import Ledger
from fedtune.officer.withdraw import in_reserved_space

FREEZE, LIFT = "freeze", "lift"  # events of the audit log


def freeze(site: Site, why: str) -> None:
    """Freeze the ledger, and enter it in the audit log. An answer that has left stays away; a round
    under way is paid and not answered.

    Errors: ConfigError if there is no ledger, which is not made; LedgerError; InfrastructureError,
    also on a full disk whose reserve is used up."""
    if not traces(site.home):
        raise ConfigError(f"{site.home}: no ledger yet", todo="there is nothing to freeze")

    def enter() -> None:
        book = Ledger(site.home)
        book.freeze(login(), why)
        AuditLog(book.folder, book.key).add(FREEZE, "--freeze", once=1)

    in_reserved_space(site, enter)


def lift(site: Site, why: str) -> None:
    """End a freeze. The audit log says so first: a lift that nobody can read about is none.
    Errors: InputError if the ledger is not frozen; LedgerError; InfrastructureError."""
    book = Ledger(site.home)
    if book.frozen:
        AuditLog(book.folder, book.key).add(LIFT, "--lift")
    book.lift(login(), why)


def freeze_again(ledger: Ledger) -> bool:
    """Freeze a restored ledger that has lost a freeze, by the audit log beside it, and return
    whether that was needed. A log that does not verify counts as frozen where it ever was: its
    newest entries may be gone. Errors: LedgerError."""
    if ledger.frozen or not _was_frozen(ledger.folder, ledger.key.public):
        return False
    ledger.freeze(login(), "restored: the audit log has a freeze that nobody lifted")
    return True


def _was_frozen(folder: Path, public: str) -> bool:
    try:
        entries = audit_log.verify(folder, public).entries
    except InputError:  # no log, or one that was changed
        content = b"".join((folder / name).read_bytes() for name in audit_log.files(folder))
        return b'"event":"freeze"' in content
    acts = [entry["event"] for entry in entries if entry["event"] in (FREEZE, LIFT)]
    return acts[-1:] == [FREEZE]


def check_not_frozen(home: Path, what: str) -> None:
    """Check that a person did not freeze the ledger in `home`, before files are deleted or moved
    that may be evidence. Errors: Refused; LedgerError."""
    if traces(home) and Ledger(home).frozen:
        raise Refused(
            f"{home}: the ledger is frozen, so that nothing is {what}",
            "a ledger that is not frozen",
            "once the incident is over, a person lifts it: fedtune ledger SITE --lift",
        )
