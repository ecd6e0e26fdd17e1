"""Do a site's part in a round of shared noise, of which only the sum over the sites is opened. The
coordinator sends two orders, and for each the site takes these steps:

    ready    charge → noised sum and a masking key, in memory → send a signed statement
    masked   check the set → store masked words in the ledger → destroy the key → send words

A repeated order gets the same bytes; for masked words this holds after a restart, too. A draw that
is not masked yet is lost when this process ends, and the attempt is then void; see
docs/secure-aggregation.md."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from safetensors.numpy import load, save

from fedtune.core.dp.shared_noise import bits_of
from fedtune.core.errors import PolicyRefused
from fedtune.core.models.lora import Arrays
from fedtune.core.models.lora import digest as arrays_digest
from fedtune.core.models.rank_slice import ALL
from fedtune.core.secagg import masks
from fedtune.core.secagg.draw import Waiting
from fedtune.core.secagg.statement import (
    Draw,
    Ready,
    StatementError,
    check_pinned,
    check_set,
    check_work,
    parse,
    parse_set,
    set_digest,
)
from fedtune.core.training.local_round import local_sum
from fedtune.core.vault import airlock
from fedtune.core.vault.own_loss import kept
from fedtune.core.vault.prepared import Prepared, Update, Void, metadata_of
from fedtune.core.wire.codec import VALUES

if TYPE_CHECKING:
    from fedtune.core.ledger.entries import Slot
    from fedtune.core.vault.worker import SiteWorker

log = logging.getLogger("fedtune.site")


def draw_sum(
    site: SiteWorker,
    digest: str,
    round_: int,
    attempt: int,
    adapter: Arrays,
    receipt: str,
    asked: list[str],
) -> Update:
    """Draw this site's noised sum for an attempt at a round, and return the signed statement that
    the site is ready. If the draw was made already, return its statement again.

    - site: the SiteWorker of this site, with its settings and ledger
    - digest: the plan's digest
    - round_, attempt: the round of the plan, and the attempt at it, both from 1
    - adapter: the adapter that came with the order, fp32 by the tensors' names
    - receipt: the coordinator's receipt for this site's ledger that came with the order, as JSON;
      "" if it has none
    - asked: public signing keys (hexadecimal) of the sites that are asked to take part, this one
      included. If this site pins too few of them, the attempt is void before anything is charged

    The update has no arrays; `said` holds the statement as "ready".
    Errors: Unprepared, Void, BudgetExceeded, PolicyRefused, ModelError, LedgerError; Held, before
    anything is charged, if a person at the site must release the draw first."""
    prepared = _prepare_draw(site, digest, round_, attempt, receipt)
    draw = Draw(digest, round_, attempt, arrays_digest(adapter))
    if (answered := site.ledger.released(*_slot(site, draw))) is not None:
        return _build_statement(metadata_of(answered)["ready"], metadata_of(answered)["events"])
    waiting = site.draws.find(draw)
    if waiting is None:
        _check_asked(site, prepared, asked)
        _check_let_go(site, prepared, draw)
        waiting = _draw_masked(site, prepared, draw, adapter)
    return _build_statement(waiting.ready.text(), waiting.events)


def mask_sum(
    site: SiteWorker, digest: str, round_: int, attempt: int, statements: str, receipt: str
) -> Update:
    """Mask this site's draw for a set of sites, and return an Update with the masked words. For the
    same set these are always the same bytes.

    - site: the SiteWorker of this site, with its settings and ledger
    - digest: the plan's digest
    - round_, attempt: the round of the plan, and the attempt at it, both from 1
    - statements: the signed statements of all sites of the set, as a JSON list (`set_text`)
    - receipt: the coordinator's receipt for this site's ledger that came with the order, as JSON;
      "" if it has none

    In the Update the masked words are named VALUES, and its `said` has the set's digest as "set".
    Guarantee: the words leave for one set of sites only; the ledger's entry fixes this set under
    the write lock. At least strategy.min_sites of the set's sites, this one counted, are pinned in
    policy.peers.
    Errors: Unprepared, PolicyRefused, LedgerError; Void if the attempt is over for this site."""
    prepared = _prepare_draw(site, digest, round_, attempt, receipt)
    try:
        asked = parse_set(statements)
        mine = next((r for r in asked if r.signing == site.key.public), None)
        if mine is None:
            raise StatementError("this site is not in the set of ready sites")
        draw = Draw(digest, round_, attempt, mine.draw.adapter)
        answered = site.ledger.released(*_slot(site, draw))
        if answered is None:
            answered = _mask(site, prepared, draw, asked)
        if metadata_of(answered)["set"] != set_digest(asked):
            raise StatementError(
                "this site's noised sum (its draw) was masked for another set of sites before"
            )
    except StatementError as error:
        log.warning("attempt %s of round %s: %s", attempt, round_, error)
        raise Void(error.happened, error.expected, error.todo) from None
    site.draws.destroy(digest, (round_, attempt))
    return _words(answered)


def _mask(site: SiteWorker, prepared: Prepared, draw: Draw, asked: list[Ready]) -> bytes:
    """Mask this site's noised sum (its draw), which waits in memory. Store the masked words in the
    ledger (in its outbox), and return them as the bytes of a safetensors file.

    - site: the SiteWorker of this site, with its settings and ledger
    - prepared: the study, as this site admitted it
    - draw: which noised sum to mask: its plan, round, attempt and adapter
    - asked: the statements of all sites of the set, already verified

    Errors: StatementError if this set is not allowed, or this process does not have this noised
    sum; LedgerError."""
    waiting, study = site.draws.find(draw), prepared.study
    if waiting is None:
        raise StatementError(
            "this site has no draw for this attempt",
            "an attempt that was not abandoned, at a site that has not restarted "
            "since it was ready",
        )
    pinned, numbers = site.current().policy.peers, len(waiting.total)
    check_set(asked, waiting.ready, pinned, study.strategy.min_sites, numbers)
    sigma = prepared.private.noise_multiplier if prepared.private else None
    bits = bits_of(study, sigma, [r.size for r in asked], len(waiting.total))
    words = masks.mask(waiting.total, waiting.key, waiting.ready, asked, bits)
    facts = {"events": waiting.events, "ready": waiting.ready.text(), "set": set_digest(asked)}
    payload = save({VALUES: words}, facts)
    site.ledger.release(waiting.reservation, payload, keeps_all=site.keeps_all)
    return payload


def _prepare_draw(
    site: SiteWorker, digest: str, round_: int, attempt: int, receipt: str
) -> Prepared:
    """Check that an order about a draw fits the plan, and compare the ledger with the receipt.
    Return the study as this site admitted it.

    - site: the SiteWorker of this site, with its settings and ledger
    - digest: the plan's digest
    - round_, attempt: the round of the plan, and the attempt at it, both from 1
    - receipt: the coordinator's receipt that came with the order, as JSON; "" if it has none

    Errors: Unprepared, PolicyRefused, LedgerError."""
    prepared = site.begin(digest, round_, receipt)
    if prepared.study.secure_aggregation is None:
        raise PolicyRefused("the plan has no [secure_aggregation]")
    if not 1 <= attempt <= 10**6:
        raise PolicyRefused(
            f"the order is for attempt {attempt} at a round, which is out of range",
            "a number from 1 to 1000000",
        )
    return prepared


def _check_asked(site: SiteWorker, prepared: Prepared, asked: list[str]) -> None:
    pinned, least = site.current().policy.peers, prepared.study.strategy.min_sites
    try:
        check_pinned(asked, site.key.public, pinned, least)
        check_work(asked, site.key.public, pinned, _numbers_of(prepared))
    except StatementError as error:
        raise Void(error.happened, error.expected, error.todo) from None


def _numbers_of(prepared: Prepared) -> int:
    """Return how many numbers an update of the study has, which is also how many a round's sum
    has."""
    return sum(values.numel() for values in prepared.network.update_parameters().values())


def _check_let_go(site: SiteWorker, prepared: Prepared, draw: Draw) -> None:
    """Check, if the site's policy requires it, that a person at the site has permitted this draw,
    which is not made yet. Before a person is asked, the budget is checked. Errors: Held while
    nobody has decided; Void if a person refused; BudgetExceeded; PolicyRefused."""
    slot = _slot(site, draw)
    airlock.check_not_refused(site.ledger, slot)
    if not airlock.holds_answers(site) or site.ledger.is_let_go(slot):
        return
    study, plan = prepared.study, prepared.private
    current = site.permit(study, plan, prepared.coordinator, draw.round)
    charge = site.charge_of(study, plan, current, draw.round)
    numbers = _numbers_of(prepared)
    sizes = [site.site.site.declared_size] * study.strategy.min_sites
    bits = bits_of(study, plan.noise_multiplier if plan else None, sizes, numbers)
    airlock.hold_draw(site, slot, charge, numbers * bits // 8)


def _draw_masked(site: SiteWorker, prepared: Prepared, draw: Draw, adapter: Arrays) -> Waiting:
    """Charge a draw, compute its noised sum, and keep the sum and a new masking key in memory until
    the draw's set of sites is fixed. Return what is kept.

    - site: the SiteWorker of this site, with its settings and ledger
    - prepared: the study, as this site admitted it
    - draw: plan, round, attempt and adapter of the draw
    - adapter: the adapter that the draw starts from, fp32 by the tensors' names

    Errors: Unprepared, BudgetExceeded, PolicyRefused, ModelError, LedgerError."""
    study = prepared.study
    data, reserved = site.reserve(prepared, draw.round, adapter, _slot(site, draw)[2])
    recompute = site.site.site.gradient_checkpointing
    with site.step_plan(prepared, data, ALL) as plan, kept(site.site, study, draw.round) as own:
        given = (study, data, plan, site.log, draw.round, adapter, recompute)
        total = local_sum(*given, own)
    key, (name, size) = masks.new_key(), (site.site.site.name, site.site.site.declared_size)
    noise = prepared.private.own_noise if prepared.private else 0.0
    stated = Ready(draw, name, size, site.key.public, masks.public_of(key), noise).signed(site.key)
    waiting = Waiting(total, key, stated, reserved, json.dumps(site.events(prepared)))
    site.draws.keep(waiting)
    # The coordinator gave earlier attempts up. Their keys go, so that nothing masks those draws.
    site.draws.destroy(draw.plan, (draw.round, draw.attempt - 1))
    return waiting


def _slot(site: SiteWorker, draw: Draw) -> Slot:
    return site.slot(draw.plan, draw.round, draw.label)


def _build_statement(text: str, events: str) -> Update:
    return Update({}, json.loads(events), {"ready": parse(text).text()})


def _words(payload: bytes) -> Update:
    facts = metadata_of(payload)
    return Update(load(payload), json.loads(facts["events"]), {"set": facts["set"]})
