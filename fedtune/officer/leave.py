"""Leave a consortium from the site's own side, whether or not its coordinator still answers.

Charges, releases and ledger entries stay. A consortium that is distrusted (its coordinator's key
was lost or stolen, or the coordinator lied) is never joined again: whoever has its keys could say
anything in its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.core.config import Site
from fedtune.core.errors import (
    ConfigError,
    FedtuneError,
    InfrastructureError,
    NotGenuine,
    Refused,
)
from fedtune.core.files import reading
from fedtune.core.ledger import audit_log
from fedtune.core.ledger.audit_log import AuditLog
from fedtune.core.ledger.files import traces
from fedtune.core.processes import alone
from fedtune.core.vault import studies
from fedtune.flower.link import link
from fedtune.flower.membership import keys_folder
from fedtune.homes.opening import open_ledger
from fedtune.officer.memberships import delete_keys, network_keys

DISTRUST = "--distrust"
TAKEN_AWAY, LIFTED = ("cut", "missing"), ("lift", "--lift")  # event and rule of an entry
DECIDE_AGAIN = (
    "put the log back in its place; if it is lost, move what is left of it away, but not "
    "audit.lock, and find out which consortia are not to be trusted; "
    f"if this site is in one of them, leave it with `fedtune leave SITE {DISTRUST}`; then say that "
    "this was done: `fedtune ledger SITE --freeze`, then `fedtune ledger SITE --lift`"
)


@dataclass(frozen=True)
class Left:
    """The result of leaving a consortium.

    - consortium: its fingerprint; "" if the site never stored the coordinator's answer
    - studies: digest → name of the studies that were under way
    - files: how many files with network keys were deleted"""

    consortium: str
    studies: dict[str, str]
    files: int


def leave(site: Site, *, distrust: bool = False) -> Left:
    """Delete a site's network keys, certificates and the coordinator's answer, and end the studies
    under way. Ledger, receipts, audit log and stored updates stay. A frozen ledger does not prevent
    this.

    distrust: whether to refuse every later answer of this consortium. This decision is entered in
    the audit log before anything is deleted, and is stored nowhere else. Without `distrust`, the
    site leaves even if the audit log is damaged or cannot be written.
    Errors:
    - ConfigError: the site has no keys or, with `distrust`, has stored no answer that names the
      consortium
    - NotGenuine: the audit log is damaged. With `distrust` it is raised before anything is deleted,
      without it after the site has left
    - InfrastructureError: the audit log cannot be written; raised at the same moment as NotGenuine
      for a damaged one
    - InfrastructureError too if the site's client or vault runs; then nothing is done"""
    state = site.site.state
    keys = keys_folder(site)
    if not (traces(site.home) and network_keys(site)):
        raise ConfigError(f"{keys}: no network keys", "a site that has enrolled, and has not left")
    consortium = consortium_of(site)
    if distrust and not consortium:
        raise ConfigError(
            f"{keys}: holds no coordinator's answer, which would name the consortium to distrust",
            todo="leave without --distrust",
        )
    with alone(state / "flower", "fedtune client"), alone(state / "ranks", "the vault of a client"):
        book = open_ledger(site.home)
        running, files = studies.under_way(state), len(network_keys(site))
        rule, whose = DISTRUST if distrust else "", site.policy.membership
        acts = AuditLog(book.folder, book.key)
        damaged: FedtuneError | None = None
        try:
            acts.add("leave", rule, consortium=consortium, membership=whose, files=files)
        except (NotGenuine, InfrastructureError) as error:
            if distrust:
                raise
            damaged = error
        for digest in running:
            studies.end(state, digest)
        delete_keys(site)
    if damaged:
        raise damaged
    return Left(consortium, running, files)


def consortium_of(site: Site) -> str:
    """Return the fingerprint of the consortium that the site has joined, that is, whose answer the
    site has stored; "" if it has stored none."""
    try:
        return link(site, site.file or Path("site.toml")).answer.fingerprint
    except FedtuneError:
        return ""


def check_trusted(folder: Path, consortium: str) -> None:
    """Check, before a consortium's answer is stored or used, that no person here declared the
    consortium distrusted. folder: the folder of the audit log, which holds such declarations.
    consortium: the consortium's fingerprint.

    Errors: Refused if a person did; Refused or NotGenuine if the log may have lost such a
    declaration (`check_remembered`); InputError if the log cannot be read."""
    if consortium in (found := distrusted(folder)):
        raise Refused(
            f"this site left the consortium {consortium} on {found[consortium]} with {DISTRUST}: "
            "its keys are trusted no more",
            "an answer of another consortium",
            "a coordinator that lost its keys begins a new consortium, with another fingerprint",
        )
    check_remembered(folder)


def check_remembered(folder: Path) -> None:
    """Check that the audit log in `folder` has lost no entry, since nothing else says which
    consortia are distrusted. A log that was begun in place of one that was taken away also passes
    if, after that, a person froze the ledger and lifted the freeze: the lift says that a person has
    looked into the loss, and no other act says so. A last line that a crash cut short is no loss.

    Errors: Refused if a log was begun in place of one that was taken away; NotGenuine if entries
    are missing or were changed."""
    if not audit_log.was_begun(folder):
        return
    try:
        genuine = audit_log.verify(folder, audit_log.signer_at(folder), torn=True).entries
    except NotGenuine as error:
        raise NotGenuine(
            f"{error.happened}; so nobody knows which consortia were left with {DISTRUST}",
            error.expected or "the log as it was",
            DECIDE_AGAIN,
        ) from None
    acts = [(entry["event"], entry["rule"]) for entry in genuine]
    if TAKEN_AWAY in [act for act in acts if act in (TAKEN_AWAY, LIFTED)][-1:]:
        raise Refused(
            f"{folder / audit_log.FILE}: an earlier log was taken away, and with it the consortia "
            f"that were left with {DISTRUST}",
            "the earlier log, or a person's word that the loss was looked into",
            DECIDE_AGAIN,
        )


def distrusted(folder: Path) -> dict[str, str]:
    """Return the consortia that a person here left and declared distrusted, from the audit log in
    `folder`: fingerprint → day of the first such entry (YYYY-MM-DD). Errors: InputError if the log
    cannot be read."""
    found = dict[str, str]()
    for entry in _entries(folder):
        facts = entry.get("facts")
        consortium = str(facts.get("consortium", "")) if isinstance(facts, dict) else ""
        is_left = (entry.get("event"), entry.get("rule")) == ("leave", DISTRUST)
        if is_left and consortium and audit_log.TEXT.fullmatch(consortium):
            found.setdefault(consortium, str(entry.get("time"))[:10])
    return found


def _entries(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of the audit log in `folder`. Lines that are not JSON are passed over."""
    for name in audit_log.files(folder):
        for line in reading.content(folder / name, "an audit log").splitlines():
            with suppress(ValueError, RecursionError):
                if isinstance(entry := json.loads(line), dict):
                    yield entry
