"""Leave a consortium from the site's own side, whether or not its coordinator still answers.

What was charged, released and entered stays. A consortium that is distrusted (its coordinator's key
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
from fedtune.core.errors import ConfigError, FedtuneError, NotGenuine, Refused
from fedtune.core.files import reading
from fedtune.core.ledger import audit_log
from fedtune.core.ledger.audit_log import AuditLog
from fedtune.core.ledger.files import traces
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.processes import alone
from fedtune.core.vault import studies
from fedtune.flower.link import link
from fedtune.flower.membership import keys_folder
from fedtune.officer.memberships import delete_keys, network_keys

DISTRUST = "--distrust"


@dataclass(frozen=True)
class Left:
    """The consortium that a site left ("" if its answer was never stored), the studies that were
    under way, and how many files of network keys were deleted."""

    consortium: str
    studies: dict[str, str]
    files: int


def leave(site: Site, *, distrust: bool = False) -> Left:
    """Delete a site's network keys, certificates and the coordinator's answer, and end the studies
    under way; ledger, receipts, audit log and stored updates stay, also while the ledger is frozen.

    distrust: whether no answer of this consortium is ever to be taken again. The audit log says so
    first; one that is damaged keeps nobody from leaving without it. Errors: ConfigError if the site
    has no keys, or --distrust has no stored answer that names the consortium; NotGenuine of a
    damaged audit log, after the site has left, or with --distrust before it, since nothing else
    would remember that; InfrastructureError if its client runs."""
    state = site.site.state
    keys = keys_folder(site)
    if not (traces(site.home) and network_keys(site)):
        raise ConfigError(f"{keys}: no network keys", "a site that was enrolled")
    consortium = consortium_of(site)
    if distrust and not consortium:
        raise ConfigError(
            f"{keys}: holds no coordinator's answer, so that nobody could be told from others",
            todo="leave without --distrust",
        )
    with alone(state / "flower", "fedtune client"), alone(state / "ranks", "the vault of a client"):
        book = Ledger(site.home)
        running, files = studies.under_way(state), len(network_keys(site))
        rule, whose = DISTRUST if distrust else "", site.policy.membership
        acts = AuditLog(book.folder, book.key)
        damaged = None
        try:
            acts.add("leave", rule, consortium=consortium, membership=whose, files=files)
        except NotGenuine as error:
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
    """Return the fingerprint of the consortium whose answer the site has; "" if it has none."""
    try:
        return link(site, site.file or Path("site.toml")).answer.fingerprint
    except FedtuneError:
        return ""


def check_trusted(folder: Path, consortium: str) -> None:
    """Check that no person here distrusts a consortium, by its fingerprint and the audit log in
    `folder`, before its answer is stored or used. Signatures are not looked at: a log that a crash
    cut short does not keep a site away, and a line that somebody added only does.

    Errors: Refused; InputError if the log cannot be read."""
    if consortium in (found := distrusted(folder)):
        raise Refused(
            f"this site left the consortium {consortium} on {found[consortium]} with {DISTRUST}: "
            "its keys are trusted no more",
            "an answer of another consortium",
            "a coordinator that lost its keys begins a new consortium, with another fingerprint",
        )


def distrusted(folder: Path) -> dict[str, str]:
    """Map the fingerprint of each consortium that a person distrusts, by the audit log in `folder`,
    to the day. Errors: InputError if the log cannot be read."""
    found = dict[str, str]()
    for entry in _entries(folder):
        facts = entry.get("facts")
        consortium = str(facts.get("consortium", "")) if isinstance(facts, dict) else ""
        is_left = (entry.get("event"), entry.get("rule")) == ("leave", DISTRUST)
        if is_left and consortium and audit_log.TEXT.fullmatch(consortium):
            found.setdefault(consortium, str(entry.get("time"))[:10])
    return found


def _entries(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of an audit log as far as they can be read."""
    for name in audit_log.files(folder):
        for line in reading.content(folder / name, "an audit log").splitlines():
            with suppress(ValueError, RecursionError):
                if isinstance(entry := json.loads(line), dict):
                    yield entry
