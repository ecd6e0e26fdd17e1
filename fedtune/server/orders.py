"""Send signed orders to the sites, for training and for queries, and receive their replies."""

from __future__ import annotations

import itertools
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, RecordDict

from fedtune.core.errors import FedtuneError
from fedtune.core.progress import stage
from fedtune.core.registry.reasons import WAITING
from fedtune.core.wire import codec, seal
from fedtune.core.wire.arrays import bodies
from fedtune.core.wire.keys import SigningKey
from fedtune.flower import replies
from fedtune.flower.packing import size
from fedtune.flower.records import to_record
from fedtune.server.admission import Roster, before_asking
from fedtune.server.exchange import Reply, ask
from fedtune.server.store import Progress

TOLD_SECONDS = 10.0  # time for the sites to confirm that they know of the study's end


@dataclass(frozen=True)
class Order:
    """An order to sites: the work that the coordinator asks of them.

    - kind: the messages' type in Flower, such as "train"
    - plan: the plan's digest, with a suffix for queries and for the two parts of a round with
      secure aggregation; the site enters the work in its ledger under this text
    - round: the number of the round
    - group: a text that the messages of this order share (their group in Flower)
    - receipt: returns, for a site's name, the receipt that is sent with its order, or None
    - arrays: the number of bytes that the arrays of an answer may have
    - attempt: the number of the attempt at the round; 0 if a round has only one attempt
    - said: further records that are sent with the order, by name
    - adapter: whether the newest adapter is sent with the order"""

    kind: str
    plan: str
    round: int
    group: str
    receipt: Callable[[str], dict[str, Any] | None]
    arrays: int = 0
    attempt: int = 0
    said: Mapping[str, ConfigRecord] = field(default_factory=dict)
    adapter: bool = True


class Answer(NamedTuple):
    """One site's reply to an order.

    - name: the site
    - reply: the reply, not checked yet
    - expected: the context that the reply's seal must state
    - sent: the number of bytes that were sent to the site"""

    name: str
    reply: Reply
    expected: seal.Header
    sent: int


def exchange(
    progress: Progress,
    roster: Roster,
    key: SigningKey,
    names: list[str],
    order: Order,
    take: Callable[[Answer], str],
) -> None:
    """Send an order to sites, and pass on each reply as it arrives. For a site that sends nothing
    for strategy.round_timeout seconds, a reply without content is passed on.

    - progress: the run's state, whose newest adapter is sent if the order says so
    - roster: the sites and their nodes
    - key: the coordinator's signing key, which signs each site's order
    - names: the sites to ask; each must be among roster.nodes
    - order: the order
    - take: called with each site's reply; checks the reply and returns its status

    The status decides whether a site is asked again. At "unprepared" the site is sent the plan and
    asked once more. At WAITING (for a person's approval) the site is asked again, at growing
    intervals, for strategy.round_timeout seconds.

    Errors: InfrastructureError if Flower's Grid fails."""
    shared = RecordDict(dict(order.said))
    if order.adapter:
        shared["adapter"] = to_record(codec.encode(progress.adapter, progress.study.wire.adapter))
    shared_bytes, beside = size(shared), _digest_beside(shared)
    began, wait = time.monotonic(), progress.study.strategy.round_timeout
    told, held = list[str](), list[str]()  # sites just sent the plan again; sites that wait
    while True:
        nonce, named = secrets.token_hex(16), {roster.nodes[name]: name for name in names}
        orders = {
            node: _sign_order(key, order, name, nonce, beside) for node, name in named.items()
        }
        contents = {
            node: RecordDict({"order": record, **shared}) for node, record in orders.items()
        }
        unprepared = list[str]()
        answers = roster.ask(order.kind, contents, order.group, order.arrays)
        for reply in _count_answers(answers, len(contents)):
            name = named[reply.node]
            sent = shared_bytes + size(RecordDict({"order": orders[reply.node]}))
            expected = _header(progress, key, order.round, name, nonce)
            status = take(Answer(name, reply, expected, sent))
            if status == "unprepared" and name not in told:
                unprepared.append(name)
            elif status == WAITING:
                held.append(name)
        if told := unprepared:
            roster.prepare(roster.nodes[name] for name in unprepared)
            names = [name for name in unprepared if name in roster.list_willing()]
            continue
        waited = time.monotonic() - began
        if not held or waited + before_asking(waited) >= wait:
            return
        roster.pause(before_asking(waited))
        roster.join()
        there = roster.list_willing()
        names = [name for name in held if name in there]
        held = [name for name in held if name not in there and name not in roster.refused]


def _count_answers(answers: Iterator[Reply], sites: int) -> Iterator[Reply]:
    """Yield the answers unchanged. While the next answer is awaited, give this process's progress
    reports the label "site N of M", where M is `sites`: in a simulation the sites may work in this
    process."""
    for number in itertools.count(1):
        with stage(f"site {number} of {sites}"):
            reply = next(answers, None)
        if reply is None:
            return
        yield reply


def tell_finished(roster: Roster, key: SigningKey) -> None:
    """Send the sites a signed statement that the study has ended, so that no site waits for another
    round. A site that cannot be reached within TOLD_SECONDS continues to wait. roster: the sites
    and their nodes. key: the coordinator's signing key."""
    plan = dict(roster.plan.config_records["plan"])
    said = ConfigRecord(plan | seal.sign_end(key, str(plan["digest"])))
    contents = dict.fromkeys(sorted(roster.nodes.values()), RecordDict({"plan": said}))
    roster.expect(contents, replies.WORDS)
    with suppress(FedtuneError):
        for _ in ask(roster.grid, "query.prepare", contents, "end", TOLD_SECONDS, replies.WORDS):
            pass


def _digest_beside(shared: RecordDict) -> str:
    """Compute the digest of what is sent to the sites together with an order: the adapter and, in a
    round with secure aggregation, the set of sites. `shared` may lack either. A site computes the
    digest from the same bytes, and compares it with the one that the order states."""
    adapter = shared.array_records.get("adapter")
    return seal.digest_beside(bodies(adapter) if adapter else {}, shared.config_records.get("set"))


def _sign_order(key: SigningKey, order: Order, name: str, nonce: str, beside: str) -> ConfigRecord:
    """Sign the copy of an order for one site, and return it as a record of the message.

    - key: the coordinator's signing key
    - order: the order
    - name: the site, whose receipt the copy carries
    - nonce: a random text that the site's seal must repeat
    - beside: the digest of what is sent with the order (`_digest_beside`)"""
    receipt = order.receipt(name)
    text = json.dumps(receipt) if receipt else ""
    signed = seal.order(key, order.plan, order.round, nonce, text, order.attempt, beside=beside)
    return ConfigRecord(signed)


def _header(progress: Progress, key: SigningKey, round_: int, name: str, nonce: str) -> seal.Header:
    """Return the context that a site's seal must state in its answer to an order. The fields `body`
    and `ledger` are empty, since they follow from the answer.

    - progress: the run's state, which gives the digests of plan and base
    - key: the coordinator's signing key, whose public half is the receiver
    - round_: the round of the order
    - name: the site
    - nonce: the order's nonce"""
    return seal.Header(
        plan=progress.study.digest,
        round=round_,
        base=progress.study.base.digest or "",
        site=name,
        receiver=key.public,
        nonce=nonce,
        body="",
        ledger={},
    )
