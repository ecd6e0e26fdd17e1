"""Freeze a site's ledger, so that nothing is charged, answered or deleted until a person lifts it.

The freeze is an entry of the ledger, which every vault of the site reads before it charges a round
and again before an answer leaves; in a hospital's home it stops every membership. A coordinator is
told that a person froze the ledger, and no more: whoever freezes because of what a record says
tells something that no ε covers."""

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
    """Freeze the ledger. The audit log says so first, by which a restore freezes it again; one that
    is damaged keeps nobody from freezing. An answer that has left stays away; a round under way is
    paid and not answered.

    Errors: ConfigError if there is no ledger, which is not made; LedgerError; InfrastructureError,
    also on a full disk whose reserve is used up."""
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
    """End a freeze. The audit log says so first; one that is damaged keeps nobody from lifting,
    since the ledger's own entry says who did and why, and is told all the same. Errors: InputError
    if the ledger is not frozen; NotGenuine, after the lift; LedgerError; InfrastructureError."""
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
    """Say what a restored ledger in `home` must hold, by the receipts and the audit log beside it,
    which the key `public` signed."""
    return Standing(withdrawn_by_receipts(home, public), _freeze_by_log(home, public))


def _freeze_by_log(folder: Path, public: str) -> Freeze | None:
    """Return the freeze that an audit log has and that nobody lifted. One that does not verify
    counts as such a freeze: its newest entries may be gone."""
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
    """Build the refusal of what would delete or move files beside a frozen ledger."""
    return Refused(
        f"{home}: the ledger is frozen, so that nothing is {what}",
        "a ledger that is not frozen",
        "once the incident is over, a person lifts it: fedtune ledger SITE --lift",
    )
