"""Show the officer the answers that wait at a site, and release or refuse them.

The officer sees facts of the plan, a length and a cost, but not the content of an answer or the
site's messages about a round. The reason is that a refusal reaches the coordinator: if it depended
on the records, it would reveal something about them that no ε covers.

If several memberships of a hospital share the ledger, a person decides only about the answers of
the membership whose site file is given."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fedtune.core.config import Site
from fedtune.core.errors import FedtuneError, InputError
from fedtune.core.files import reading
from fedtune.core.ledger.audit_log import AuditLog, login
from fedtune.core.ledger.entries import Charge, Slot, owner_of
from fedtune.core.ledger.files import ASKED, DATABASE, RUNS, name_of, waiting_draw_path
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.registry.rounding import rounded_up
from fedtune.homes.opening import find_ledger, open_ledger

ANSWER, DRAW = "answer", "draw of shared noise"


@dataclass(frozen=True)
class Waiting:
    """An answer that waits for a person, as plan and ledger describe it.

    - name: the name by which `decide` selects it
    - membership: the hospital's membership that paid for the answer; "" if the site is no
      membership, or if the answer waited before the site became one
    - kind: ANSWER or DRAW. A draw is a site's noised sum in a round whose noise several sites
      share; it is not charged yet
    - size: length in bytes
    - epsilon: ε of this round alone, as text, at the δ of the site's ledger: policy.max_delta, or
      for a membership the hospital's
    - fallback: with shared noise, the ε that this site's own noise alone gives, as text; else ""
    - since: the time since which it waits, UTC, as text"""

    name: str
    membership: str
    kind: str
    study: str
    plan: str
    round: int
    size: int
    epsilon: str
    fallback: str
    since: str


@dataclass(frozen=True)
class _Found:
    """A waiting answer and the ledger that has it.

    - slot: (study, round, adapter), by which the ledger identifies the answer
    - ledger: the site's ledger or, for a run on data that is declared public or generated, the
      ledger of the run"""

    waiting: Waiting
    slot: Slot
    ledger: Ledger


def list_waiting(site: Site) -> list[Waiting]:
    """List the answers that wait at a site, oldest first. If the site is a membership of a
    hospital, answers of other memberships are left out. Return [] if there is no ledger, and make
    none. Errors: ConfigError if the site's ledger was there and is gone; LedgerError."""
    return [found.waiting for found in _find(site)]


def decide(site: Site, names: list[str], *, refuse: bool, every: bool = False) -> list[Waiting]:
    """Release the answers that wait under `names`, or refuse them for good. Each decision is
    entered in the audit log, then in the ledger.

    - site: the site where the answers wait; answers of a hospital's other memberships stay
    - names: names of answers, as `list_waiting` gives them
    - refuse: whether the answers are refused, in place of being released
    - every: decide about all answers that wait now, also those that `names` does not list

    Returns: the decided answers.

    Errors: InputError if nothing waits under a name, or another person was faster; LedgerError;
    InfrastructureError."""
    found = _find(site)
    chosen = [one for one in found if every or one.waiting.name in names]
    if unknown := set(names) - {one.waiting.name for one in found}:
        raise InputError(
            f"nothing waits here under {', '.join(sorted(unknown))[:200]}",
            "names as `fedtune let-go SITE` lists them",
            "list them again: an answer that was released or refused no longer waits",
        )
    if not chosen:
        return []
    home = open_ledger(site.home)
    acts, event = AuditLog(home.folder, home.key), "refuse" if refuse else "let-go"
    for one in chosen:
        shown, how = one.waiting, "--all" if every else "by name"
        about: dict[str, Any] = {"plan": shown.plan, "study": shown.study, "round": shown.round}
        about |= {"membership": shown.membership} if shown.membership else {}
        about |= {"adapter": one.slot[2]} if refuse else {}  # by which a restore refuses it again
        acts.add(event, "--refuse" if refuse else how, kind=shown.kind, **about)
        if refuse:
            one.ledger.refuse(one.slot, login(), keeps=home.frozen is not None)
        else:
            one.ledger.let_go(one.slot, login())
        if not home.frozen:
            waiting_draw_path(one.ledger.folder, one.slot).unlink(missing_ok=True)
    return [one.waiting for one in chosen]


def _find(site: Site) -> list[_Found]:
    of_runs = sorted((site.site.state / RUNS).glob(f"*/{DATABASE}"))
    folders = [site.site.ledger or site.home, *(path.parent for path in of_runs)]
    found = list[tuple[int, _Found]]()
    for folder in folders:
        if ledger := find_ledger(folder):
            found += _find_answers(site, ledger)
            found += _find_draws(site, ledger)
    own = site.policy.own_memberships
    found = [(since, one) for since, one in found if one.waiting.membership in own]
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def _find_answers(site: Site, ledger: Ledger) -> Iterator[tuple[int, _Found]]:
    for held in ledger.list_held():
        shown = _describe(site, held.slot, held.charge, ANSWER, held.size, held.since)
        yield held.since, _Found(shown, held.slot, ledger)


def _find_draws(site: Site, ledger: Ledger) -> Iterator[tuple[int, _Found]]:
    for path in (ledger.folder / ASKED).glob("*.json"):
        with suppress(FedtuneError, KeyError, TypeError, ValueError):
            facts: dict[str, Any] = reading.json_in(path, "a draw that waits")
            charge, since = Charge.read(facts["charge"]), int(facts["since"])
            slot = charge.study, charge.round, str(facts["adapter"])
            if not (ledger.is_let_go(slot) or ledger.is_refused(slot)):
                shown = _describe(site, slot, charge, DRAW, int(facts["bytes"]), since)
                yield since, _Found(shown, slot, ledger)


def _describe(site: Site, slot: Slot, charge: Charge, kind: str, size: int, since: int) -> Waiting:
    """Describe a waiting answer by facts of the plan, its length and its cost.

    - site: the site; ε is computed at the δ of its policy or, for a membership, of the hospital
    - slot: the study, round and adapter that are answered
    - charge: what the answer costs or, for a draw, what it would cost
    - kind: ANSWER or DRAW
    - size: the length of the answer in bytes
    - since: the time since which it waits, UTC seconds"""
    from fedtune.core.dp import (
        accountant,  # it takes a second to import, and most often nothing waits
    )

    delta = site.policy.delta
    fallback = charge.fallback if charge.sites > 1 else None
    return Waiting(
        name=name_of(slot),
        membership=owner_of(slot),
        kind=kind,
        study=charge.name,
        plan=charge.study,
        round=charge.round,
        size=size,
        epsilon=rounded_up(accountant.epsilon([charge.event], delta)),
        fallback=rounded_up(accountant.epsilon([fallback], delta)) if fallback else "",
        since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(since)),
    )
