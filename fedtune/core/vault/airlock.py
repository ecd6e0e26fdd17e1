"""Hold answers at a site until a person there releases them: policy.answers = "held".

    an update, a query's answer   charged → computed → stored in the ledger, held → released → sent
    a draw of shared noise        held → released → charged → computed → "ready" → masked → sent

A draw of shared noise waits before it is made. If it were made first and then refused, the attempt
would be void, and the other sites would have paid for draws that are of no use. A person releases
one stored answer, which is then sent with exactly the stored bytes, or permits one draw. A refusal
is final, and what was charged stays charged. The command for the site's people is in let_go.py."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, NoReturn

from fedtune.core.errors import FedtuneError, describe
from fedtune.core.files.writing import replace
from fedtune.core.ledger.entries import Charge, Slot
from fedtune.core.ledger.files import waiting_draw_path
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.vault.prepared import Held, Void

if TYPE_CHECKING:
    from fedtune.core.vault.worker import SiteWorker

log = logging.getLogger("fedtune.site")
MOST = 32  # waiting draws that are stored, at most
WAITS = 'policy.answers = "held" and nobody at the site has let this answer go'
LET_GO = "ask the site to run `fedtune let-go`"


def holds_answers(site: SiteWorker) -> bool:
    """Return whether the site's answers wait until a person releases them. In a simulation no
    answer waits: whoever simulates a study runs its sites too, and nothing leaves the machine."""
    return site.current().policy.answers == "held" and not site.simulated


def check_not_refused(ledger: Ledger, slot: Slot) -> None:
    """Check that no person at the site has refused to release this answer, which is final. slot:
    study, round and adapter, by which the ledger names the answer. Errors: Void if somebody refused
    it."""
    if ledger.is_refused(slot):
        raise Void("a person at the site refused to let this answer go")


def check_let_go(ledger: Ledger, slot: Slot) -> None:
    """Check that a stored answer may leave the site. slot: study, round and adapter, by which the
    ledger names the answer. Errors: Held if a person has yet to release it; Void if a person
    refused it."""
    check_not_refused(ledger, slot)
    if ledger.is_held(slot):
        raise Held(WAITS, todo=LET_GO)


def hold_draw(site: SiteWorker, slot: Slot, charge: Charge, size: int) -> NoReturn:
    """Store that a draw of shared noise, which is not made yet, waits for a person. This function
    never returns: it raises Held.

    - site: the SiteWorker of this site, with its settings and ledger
    - slot: study, round and adapter of the draw, by which the ledger charges it
    - charge: what the draw will cost
    - size: number of bytes of the masked words, for the person to see"""
    _store_waiting_draw(site, slot, charge, size)
    raise Held(WAITS, todo=LET_GO)


def _store_waiting_draw(site: SiteWorker, slot: Slot, charge: Charge, size: int) -> None:
    """Write a waiting draw to a file that `fedtune let-go` reads. If the draw's file exists
    already, it stays as it is, with the time of the first request.

    - site: the SiteWorker of this site, with its settings and ledger
    - slot: study, round and adapter of the draw, by which the ledger charges it
    - charge: what the draw will cost
    - size: number of bytes of the masked words

    At most MOST files are kept: the oldest are deleted first, since a coordinator may ask for any
    number of draws before one is charged. If all free space of the disk is reserved for the ledger,
    no file is written, and the site only logs a warning."""
    path = waiting_draw_path(site.ledger.folder, slot)
    if path.exists():
        return
    facts = {"charge": charge.fields(), "adapter": slot[2], "bytes": size}
    content = json.dumps(facts | {"since": int(time.time())}, indent=1).encode()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not site.room.has_space(len(content)):
            log.warning("%s: a draw that waits is not kept: the disk lacks free space", path)
            return
        others = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in others[: max(0, len(others) - MOST + 1)]:
            old.unlink()
        replace(path, content, private=True)
    except (OSError, FedtuneError) as error:
        log.warning("%s: a draw that waits is not kept (%s)", path, describe(error))
