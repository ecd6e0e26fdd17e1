"""Hold answers at a site until a person there releases them: policy.answers = "held".

    trained, evaluated   charged → computed → in the ledger's outbox, held → let go → sealed, sent
    shared noise         held → let go → charged → computed → "ready" → masked → sent

A draw of shared noise waits before it is made, so that no other site is left with a draw that
nobody masks. A person releases one answer, with exactly the stored bytes, or one draw. A refusal
is final, and what was charged stays charged. The command for the site's people is in let_go.py.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, NoReturn

from fedtune.core.errors import FedtuneError, describe
from fedtune.core.files.writing import replace
from fedtune.core.ledger.entries import Charge, Slot
from fedtune.core.ledger.files import asked_path
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.vault.prepared import Held, Void

if TYPE_CHECKING:
    from fedtune.core.vault.worker import SiteWorker

log = logging.getLogger("fedtune.site")
MOST = 32  # waiting draws that are stored, at most
WAITS = 'policy.answers = "held" and nobody at the site has let this answer go'
LET_GO = "ask the site to run `fedtune let-go`"


def holds_answers(site: SiteWorker) -> bool:
    """Return whether the site's answers wait for a person. In a simulation none waits: whoever
    simulates a study runs its sites too, and nothing leaves the machine."""
    return site.current().policy.answers == "held" and not site.simulated


def check_not_refused(ledger: Ledger, slot: Slot) -> None:
    """Check that nobody at the site refused the answer of this slot (study, round and adapter) for
    good. Errors: Void if somebody did."""
    if ledger.is_refused(slot):
        raise Void("a person at the site refused to let this answer go")


def check_let_go(ledger: Ledger, slot: Slot) -> None:
    """Check that the stored answer of a slot (study, round and adapter) may leave the site. Errors:
    Held if a person has yet to let it go; Void if a person refused it."""
    check_not_refused(ledger, slot)
    if ledger.is_held(slot):
        raise Held(WAITS, todo=LET_GO)


def hold_draw(site: SiteWorker, slot: Slot, charge: Charge, size: int) -> NoReturn:
    """Store that a draw of shared noise, which is not made yet, waits for a person. Always raise
    Held.

    - site: the worker of this site
    - slot: study, round and adapter of the draw, as the ledger charges them
    - charge: what the draw will cost
    - size: number of bytes of the masked words, for the person to see"""
    _keep_asked(site, slot, charge, size)
    raise Held(WAITS, todo=LET_GO)


def _keep_asked(site: SiteWorker, slot: Slot, charge: Charge, size: int) -> None:
    """Write a waiting draw to a file that `fedtune let-go` reads. A file that exists stays as it
    is, with the time of the first request.

    - site: the worker of this site
    - slot: study, round and adapter of the draw
    - charge: what the draw will cost
    - size: number of bytes of the masked words

    Of more than MOST files the oldest are deleted, since a coordinator may ask for any number of
    draws before one is charged. A draw for which the disk has no space beside the ledger's reserve
    is only logged."""
    path = asked_path(site.ledger.folder, slot)
    if path.exists():
        return
    facts = {"charge": charge.fields(), "adapter": slot[2], "bytes": size}
    content = json.dumps(facts | {"since": int(time.time())}, indent=1).encode()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not site.room.has_space(len(content)):
            log.warning("%s: not kept: the disk has no space beside the ledger's room", path)
            return
        others = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in others[: max(0, len(others) - MOST + 1)]:
            old.unlink()
        replace(path, content, private=True)
    except (OSError, FedtuneError) as error:
        log.warning("%s: a draw that waits is not kept (%s)", path, describe(error))
