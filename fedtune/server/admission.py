"""Admit sites and validate their replies. Every field that a site sends is checked here."""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import Grid

from fedtune.core.config import Encoding, LoraTable, Study
from fedtune.core.errors import FedtuneError, Refused
from fedtune.core.registry.reasons import WAITING
from fedtune.core.run_folder import without_places
from fedtune.core.wire import codec, seal
from fedtune.core.wire.arrays import Arrays, WireError, bodies, check_agreed, unpack_arrays
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.protocol import OtherProtocol, check_peer, version_fields
from fedtune.core.wire.seal import Header, SealError, sign_plan
from fedtune.evidence import step_summary
from fedtune.flower import replies
from fedtune.flower.enrol import Member
from fedtune.flower.packing import size
from fedtune.flower.records import to_record
from fedtune.server.bound import Terms
from fedtune.server.exchange import Reply, ask, clean
from fedtune.server.too_few import too_few

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NOT_ENROLLED = "it is not enrolled with this signing key, or was revoked"
KEY = re.compile(r"[0-9a-f]{64}")
DECLARED = ("public", "generated")  # what a site may declare its data to be; else it is private
# Pause before a site that waits for a person's signature is asked again: a share of the time that
# it has waited so far, between two limits in seconds.
ASK_SECONDS = (5.0, 300.0)
ASK_SHARE = 0.1
# Pause before a site whose answer was a failure is asked again while the run waits: it doubles with
# each failure, between two limits in seconds.
FAILED_SECONDS = (2.0, 60.0)
MOST_UNITS = 10**10  # the largest declared size: more than there are people
OnStatus = Callable[[str, str, str], None]  # site, status, reason


def plan_message(study: Study, frozen: Arrays, key: SigningKey) -> RecordDict:
    """Build the message that carries the plan to the sites. It holds the plan, in which the
    coordinator's files are named without their folders, the coordinator's signature, and the arrays
    `frozen`, which sites receive and do not train. key: the coordinator's signing key."""
    sent, signed = without_places(study).model_dump_json(), sign_plan(key, study.digest)
    plan = ConfigRecord({"study": sent, "digest": study.digest, **signed, **version_fields()})
    return RecordDict({"plan": plan, "frozen": to_record(frozen)})


@dataclass
class Roster:
    """The sites of a run and their nodes.

    - sizes: site -> its declared size, fixed by its first admission
    - keys: site -> its public signing key, fixed by its first admission
    - lora_ranks: site -> the rank that it trains, if the plan lets sites choose
    - declared: site -> the kind of data that it declares, one of DECLARED; "" for private data
    - free_query: the sites whose records a query or a view selects
    - enrolled: returns node -> the member enrolled for it now; with None nobody needs to be
      enrolled
    - expect: called before each exchange with the nodes that are asked, and the number of bytes
      that an answer may have
    - pause: waits for a number of seconds between two messages
    - nodes: site -> its node, for sites that have admitted the plan
    - refused: site -> reason, for the rest of the run
    - absent: site -> reason, for sites that failed or did not answer; they are asked again each
      round
    - waiting: site -> message, for sites where nobody has signed the plan yet; they are asked again
      later
    - down: site -> bytes sent to it since the newest saved round
    - up: site -> bytes received from it since the newest saved round

    Guarantee: a node's reply changes the state of its own site only."""

    grid: Grid
    study: Study
    plan: RecordDict
    sizes: dict[str, int]
    keys: dict[str, str]
    on_status: OnStatus
    enrolled: Callable[[], Mapping[int, Member]] | None = None
    expect: Callable[[Iterable[int], int], None] = lambda nodes, most: None
    pause: Callable[[float], None] = time.sleep
    lora_ranks: dict[str, int] = field(default_factory=dict)
    declared: dict[str, str] = field(default_factory=dict)
    free_query: set[str] = field(default_factory=set)  # a site stays in it for the whole run
    nodes: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    down: Counter[str] = field(default_factory=Counter)
    up: Counter[str] = field(default_factory=Counter)
    _asked: set[int] = field(default_factory=set)  # nodes that gave a final answer
    _unsigned: dict[int, _Unsigned] = field(default_factory=dict)  # nodes that wait for a person
    _failing: dict[int, _Failing] = field(default_factory=dict)  # nodes whose last answer failed

    def __post_init__(self) -> None:
        self.named: Callable[[], Mapping[int, Member]] = getattr(self.grid, "members", None) or dict

    def list_willing(self) -> list[str]:
        """Return the names of the sites that have admitted the plan and have not refused since,
        sorted."""
        return sorted(set(self.nodes) - set(self.refused))

    def join(self, *, waits: bool = False) -> None:
        """Send the plan to every connected node that has not given a final answer to it, so that a
        site may join late. A node that waits for a person's signature is left out until its pause
        is over. waits: whether the caller looks again and again; a node whose answer was a failure
        is then left out for a growing pause, since each question carries the plan and costs the
        site an attempt to prepare it."""
        connected, now = set(self.grid.get_node_ids()), time.monotonic()
        self.nodes = {name: node for name, node in self.nodes.items() if node in connected}
        self._asked &= connected
        self._unsigned = {node: one for node, one in self._unsigned.items() if node in connected}
        self._failing = {node: one for node, one in self._failing.items() if node in connected}
        early = {node for node, one in self._unsigned.items() if now < one.again}
        failing = {node: one for node, one in self._failing.items() if node not in self._asked}
        spared = {node: one for node, one in failing.items() if waits and now < one.again}
        self.absent = {one.name: one.reason for one in spared.values()}
        self.prepare(connected - self._asked - early - set(spared))
        for name in set(self.sizes) - set(self.nodes) - set(self.refused) - set(self.waiting):
            self.absent.setdefault(name, "the site is not connected")

    @property
    def waiting(self) -> dict[str, str]:
        """Return site -> message, for the sites where nobody has signed the plan yet."""
        return {one.name: one.reason for one in self._unsigned.values()}

    @property
    def longest_wait(self) -> float:
        """Return the longest time in seconds that one of the `waiting` sites has waited; 0 if none
        waits."""
        now = time.monotonic()
        return max((now - one.since for one in self._unsigned.values()), default=0.0)

    def out(self) -> dict[str, str]:
        """Return site -> reason, for the sites that cannot be asked now."""
        reasons = {name: f"failed: {why}" for name, why in self.absent.items()}
        reasons |= {name: f"waiting: {why}" for name, why in self.waiting.items()}
        reasons |= {name: f"refused: {why}" for name, why in self.refused.items()}
        return dict(sorted(reasons.items()))

    def raise_if_refused(self) -> None:
        """Raise Refused if a site refused, and fewer than strategy.min_sites sites would take part
        even if every other known site did."""
        reachable = len({*self.list_willing(), *self.absent, *self.waiting})
        if self.refused and reachable < self.study.strategy.min_sites:
            raise self.too_few(Refused)

    def too_few(self, kind: type[FedtuneError]) -> FedtuneError:
        """Build the error of a study in which too few sites take part. It is of the class `kind`,
        and lists the sites that cannot be asked now, with the reasons."""
        least = self.study.strategy.min_sites
        return too_few(kind, len(self.list_willing()), self.out(), least)

    def prepare(self, nodes: Iterable[int]) -> None:
        """Send the plan to `nodes`, and note for each site whether it admits the plan, refuses,
        waits for a person, or failed."""
        contents = dict.fromkeys(sorted(nodes), self.plan)
        for reply in self.ask("query.prepare", contents, "prepare"):
            self._on_admission_reply(reply)

    def ask(
        self, kind: str, contents: Mapping[int, RecordDict], group: str, arrays: int = 0
    ) -> Iterator[Reply]:
        """Send each node its message and yield one reply for each node, in order of arrival, until
        strategy.round_timeout seconds have passed.

        - kind: the messages' type in Flower, such as "train"
        - contents: node -> the message that it is sent
        - group: a text that the messages of this exchange share (their group in Flower)
        - arrays: the number of bytes that a reply's arrays may have; the rest of the reply may have
          replies.WORDS bytes

        A node that does not answer yields a reply without content. Errors: InfrastructureError if
        Flower's Grid fails."""
        most, timeout = replies.WORDS + arrays, self.study.strategy.round_timeout
        self.expect(contents, most)
        return ask(self.grid, kind, contents, group, timeout, most)

    def is_stranger(self, node: int, name: str) -> bool:
        """Return whether a node has no right to answer for the site `name`: at present it is not
        enrolled under this name and with the signing key with which the site was admitted."""
        if self.enrolled is None:
            return False
        return self.enrolled().get(node) != Member(name, self.keys.get(name, ""))

    def _on_admission_reply(self, reply: Reply) -> None:
        claim, earlier_nodes = _parse_admission(reply), set(self.nodes.values())
        name = self._name_of(reply.node, claim)
        status = claim.status
        reason = claim.reason
        rank = _lora_rank(reply, self.study.lora)
        if status == "admitted" and (objection := self._objection(reply.node, name, claim, rank)):
            status, reason = "refused", objection
        self.down[name] += size(self.plan)
        self.up[name] += reply.size
        known, failing = self._unsigned.pop(reply.node, None), self._failing.pop(reply.node, None)
        if status == "failed":
            self.absent[name] = reason
            self._failing[reply.node] = _Failing.after(failing, name, reason)
        elif status == WAITING:
            self._unsigned[reply.node] = _Unsigned.after(known, name, reason)
            self._asked.discard(reply.node)
            self.nodes = {other: node for other, node in self.nodes.items() if node != reply.node}
        else:
            self._asked.add(reply.node)
        if status == "refused":
            self.refused[name] = reason
        elif status == "admitted":
            self.sizes[name], self.keys[name] = claim.declared, claim.key
            if rank:
                self.lora_ranks[name] = rank
            self.declared[name] = claim.what
            self.free_query |= {name} if claim.free_query else set()
            self.nodes[name] = reply.node
        told = known and status == WAITING and known.reason == reason
        if not told and (reply.node not in earlier_nodes or status != "admitted"):
            self.on_status(name, status, reason)

    def _name_of(self, node: int, claim: _Claim) -> str:
        """Return the name by which a node's site is known. The registry gives the name or, in a
        simulation, the site file; the node's claim never overrides it. Without registry and site
        file, a node keeps the name that it claimed when it was first admitted. A node has the name
        "node N" if it has no other, or if another node or signing key has that name already."""
        vouched = (self.enrolled or self.named)().get(node)
        if vouched and self.enrolled:
            return vouched.name
        first = {node_of: name for name, node_of in self.nodes.items()}.get(node, "")
        name = vouched.name if vouched else first
        if not name and not self.enrolled and claim.status == "admitted":
            name = claim.name if self.keys.get(claim.name, claim.key) == claim.key else ""
        return name if name and self.nodes.get(name, node) == node else f"node {node}"

    def _objection(self, node: int, name: str, claim: _Claim, rank: int | None) -> str:
        """Return why a site that admits the plan may not take part; "" if it may.

        - node: the node that answered
        - name: the name of the node's site (`_name_of`)
        - claim: the node's answer. Its name, size, key and kind of data are compared with those
          that are enrolled, or with those of the site's earlier admission.
        - rank: the rank that the site trains; 0 if the plan does not allow it, None if the plan
          leaves no choice"""
        if self.enrolled is not None and self.enrolled().get(node) != Member(name, claim.key):
            return NOT_ENROLLED
        if claim.name != name:
            return f"{claim.name} is another node's name"
        if self.sizes.get(name, claim.declared) != claim.declared:
            return "its declared_size changed during the study"
        if self.keys.get(name, claim.key) != claim.key:
            return "its signing key changed during the study"
        if self.declared.get(name, claim.what) != claim.what:
            return "what it declares of its data changed during the study"
        if rank == 0:
            return "its lora_rank is not one that the plan allows"
        if rank and self.lora_ranks.get(name, rank) != rank:
            return "its lora_rank changed during the study"
        return ""


class _Unsigned(NamedTuple):
    """A node that waits because nobody at its site has signed the plan yet.

    - name, reason: the site's name, and its message
    - since: when the node first answered that it waits
    - again: when the node is asked again

    Both times are in seconds on the monotonic clock."""

    name: str
    reason: str
    since: float
    again: float

    @classmethod
    def after(cls, known: _Unsigned | None, name: str, reason: str) -> _Unsigned:
        """Return the state of a node that has just answered that it waits for a person. known: its
        state before this answer, None if it is the node's first such answer. name: the site's name.
        reason: its message."""
        now = time.monotonic()
        since = known.since if known else now
        return cls(name, reason, since, now + before_asking(now - since))


class _Failing(NamedTuple):
    """A node whose last answer to the plan was a failure, or that did not answer.

    - name, reason: the site's name, and what failed
    - pause: the seconds after which it is asked again
    - again: when it is asked again, in seconds on the monotonic clock"""

    name: str
    reason: str
    pause: float
    again: float

    @classmethod
    def after(cls, known: _Failing | None, name: str, reason: str) -> _Failing:
        """Return the state of a node that has just failed. known: its state before, None if its
        last answer was no failure. name, reason: the site's name, and what failed."""
        first, longest = FAILED_SECONDS
        pause = min(2 * known.pause, longest) if known else first
        return cls(name, reason, pause, time.monotonic() + pause)


def before_asking(waited: float) -> float:
    """Return the pause in seconds before a site that has waited `waited` seconds for a person is
    asked again. The pause grows with the wait, between a smallest and a largest pause
    (ASK_SECONDS)."""
    return min(max(waited * ASK_SHARE, ASK_SECONDS[0]), ASK_SECONDS[1])


class _Claim(NamedTuple):
    """What a node's reply to the plan says, before it is compared with what is known of the site:
    status and reason, name, declared size, signing key, what it declares its data to be, and
    whether a query or a view of a database selects its records."""

    status: str
    reason: str = ""
    name: str = ""
    declared: int = 0
    key: str = ""
    what: str = ""  # what it declares its data to be: public or generated; "": private
    free_query: bool = False


def _parse_admission(reply: Reply) -> _Claim:
    if reply.content is None:
        return _Claim("failed", reply.reason)
    record = reply.content.get("admission")
    if not isinstance(record, ConfigRecord):
        return _Claim("failed", "its answer to the plan is malformed")
    if record.get("admitted") is not True:
        said = record.get("status")
        status = str(said) if said in ("failed", WAITING) else "refused"
        return _Claim(status, clean(record.get("reason")) or "no reason given")
    try:
        check_peer("the site", record, "this coordinator")
    except OtherProtocol as refusal:
        return _Claim("refused", str(refusal))
    name = record.get("name")
    declared = record.get("declared_size")
    key = record.get("key")
    named = isinstance(name, str) and NAME.fullmatch(name) is not None
    keyed = isinstance(key, str) and KEY.fullmatch(key) is not None
    if not named or not keyed or type(declared) is not int or not 1 <= declared <= MOST_UNITS:
        return _Claim("failed", "its answer to the plan is malformed")
    what, free = record.get("declared", ""), record.get("free_query", False)
    if what not in ("", *DECLARED) or type(free) is not bool:
        return _Claim("failed", "its answer to the plan is malformed")
    return _Claim("admitted", "", str(name), declared, str(key), str(what), free)


def _lora_rank(reply: Reply, lora: LoraTable | None) -> int | None:
    """Read from a site's reply to the plan the rank of LoRA that the site trains. Return 0 if the
    plan does not allow the stated rank, and None if the plan leaves sites no choice, or the reply
    has no content. lora: the plan's [lora] table, None if it has none."""
    if lora is None or lora.min_rank is None or reply.content is None:
        return None
    record = reply.content.get("admission")
    rank = record.get("lora_rank") if isinstance(record, ConfigRecord) else None
    return rank if type(rank) is int and lora.min_rank <= rank <= lora.rank else 0


@dataclass
class Tally:
    """The updates that the coordinator has received in the round in progress.

    - number: the number of the round
    - participants: the sites whose update was counted, in order of arrival
    - missing: site -> the reason why it has not delivered
    - failures: site -> how often it failed to deliver
    - counted: (study, round, site) of the accepted updates. A retry and a replay are new messages,
      so a message's id would not show that an update was counted already.
    - largest: the largest weight in the mean that a site may have, in units; 0 until it is computed
    - weights: site -> its weight, for sites that declared more than `largest`
    - evidence: site -> the seal, digest and signed texts of its update"""

    number: int
    participants: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    late: dict[str, str] = field(default_factory=dict)  # site -> why it delivered on a retry
    failures: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)
    counted: set[tuple[str, int, str]] = field(default_factory=set)
    evidence: dict[str, dict[str, Any]] = field(default_factory=dict)
    largest: int = 0
    weights: dict[str, int] = field(default_factory=dict)

    def has(self, study: str, name: str) -> bool:
        """Return whether an update of site `name` was counted in this round. study: the plan's
        digest."""
        return (study, self.number, name) in self.counted

    def note_missing(self, name: str, result: Outcome) -> bool:
        """Note why a site delivered nothing. Return True if the site waits for a person, and the
        same reason was noted before, so that it need not be reported twice. name: the site. result:
        its reply, after it was validated."""
        before, why = self.missing.get(name), f"{result.status}: {result.reason}"
        self.missing[name] = why
        return result.status == WAITING and why == before

    def count(self, study: str, name: str, evidence: dict[str, Any]) -> None:
        self.counted.add((study, self.number, name))
        self.evidence[name] = evidence
        self.participants.append(name)
        why = self.missing.pop(name, "")
        # A site that lacked the plan was sent it and asked again at once: that is not late.
        if why and not why.startswith("unprepared"):
            self.late[name] = why


@dataclass(frozen=True, repr=False)
class Outcome:
    """A site's reply after it was validated.

    - status: "trained", "ready", "masked" or "answered" if the reply counts. Else "failed",
      "refused", "dropped" (a check failed), "unprepared" (the site lacks the plan), "void" (the
      site will not send words for this attempt) or WAITING (for a person at the site).
    - reason: why the reply does not count; "" if it does
    - update: the site's arrays by name, decoded
    - events: the site's step log"""

    status: str
    reason: str = ""
    update: Arrays = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    ledger: dict[str, Any] = field(default_factory=dict)  # the site's statement of its newest entry
    evidence: dict[str, Any] = field(default_factory=dict)  # what it signed, without the arrays


def outcome(
    reply: Reply,
    like: Arrays,
    private: bool,
    before: Sequence[Mapping[str, Any]],
    key: str,
    expected: Header,
    *,
    record: str = "update",
    done: str = "trained",
    encoding: Encoding = "float32",
    terms: Terms | None = None,
    longest: float = math.inf,
    read: Callable[[ArrayRecord], Arrays] | None = None,
) -> Outcome:
    """Validate a site's reply with these checks, in this order. A reply that fails one of them is
    dropped, and the first that fails is the reason. A reply in which the site reports that it did
    no work is not checked.

    | checked     | what must be true                                                           |
    | the seal    | signed by `key`, for the plan, round, base, site, receiver and nonce in     |
    |             | `expected`; what it signed beside the arrays names that site, too           |
    | the arrays  | names, shapes, type and bytes of `like` in `encoding`, before any is decoded |
    | the numbers | finite, as are their scales; a norm of at most `longest` times the growth   |
    |             | that `encoding` may cause; each array's own header states the agreed type   |
    | the log     | its steps had the plan's noise (`terms`); they are those of `before`, and   |
    |             | more                                                                        |

    - reply: the node's reply, as `exchange.ask` yields it
    - like: arrays with the names and shapes that the update must have; not used if `read` is given
    - private: whether the plan adds noise, so that the reply has a step log
    - before: the site's step log in its last reply that counted; empty if there is none
    - key: the site's public signing key, in hexadecimal
    - expected: the context that the seal must state. Its `ledger` is ignored, and its `body` is
      replaced by the digest of the reply.
    - record: the name of the reply's array record
    - done: the status of a site that did the work
    - encoding: how the update is encoded on the wire
    - terms: the plan's requirements for the noised steps; None to check no step log
    - longest: the largest norm of an honest update
    - read: checks and decodes the arrays in place of the second and third check, and raises
      WireError; None to make these two checks

    Returns an Outcome of the status `done`, with update, step log and evidence, if all checks pass.
    Otherwise its status says why not, and its reason gives the details."""
    if reply.content is None:
        return Outcome(reply.status, reply.reason)
    site, arrays = reply.content.get("site"), reply.content.get(record)
    if not isinstance(site, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        return Outcome("failed", "its answer is malformed")
    if set(reply.content) != {"site", record}:
        return Outcome("failed", "its answer holds more than was asked for")
    status = site.get("status")
    if status != done:
        reported = status if status in ("refused", "unprepared", "void", WAITING) else "failed"
        return Outcome(str(reported), clean(site.get("reason")) or "no reason given")
    try:
        ledger, evidence = _open_update(site, arrays, key, expected)
        update = read(arrays) if read else _numbers(arrays, like, encoding, longest)
        events = _events(site.get("events")) if private else []
        _check_log(events, before, terms)
    except (_DroppedUpdate, SealError) as error:
        return Outcome("dropped", str(error))
    except WireError as error:
        return Outcome("dropped", clean(f"its update is not as agreed: {error}"))
    return Outcome(done, "", update, events, ledger, evidence)


class _DroppedUpdate(Exception):
    """A site's reply fails a check and is not counted. The message is the reason."""


def _open_update(
    site: ConfigRecord, arrays: ArrayRecord, key: str, expected: Header
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Verify the site's seal over an update.

    - site: the texts of the reply, with the seal
    - arrays: the arrays of the reply, which the seal covers
    - key: the site's public signing key, in hexadecimal
    - expected: the context that the seal must state (plan, round, base, site, receiver, nonce)

    Returns the site's statement of its ledger, and the evidence (seal, digest of the arrays, signed
    texts) that later proves that the site sent it. Errors: SealError if the seal is not valid;
    _DroppedUpdate if the signed texts name another site."""
    digest = seal.arrays_digest(bodies(arrays))
    ledger = seal.open_seal(site, key, replace(expected, body=seal.digest_of(digest, site)))
    if site.get("name") != expected.site:
        raise _DroppedUpdate("its update names another site than the one that signed it")
    sealed = {name: site[name] for name in seal.OUTSIDE}
    return ledger, sealed | {"arrays": digest, "said": seal.texts_of(site)}


def _numbers(arrays: ArrayRecord, like: Arrays, encoding: Encoding, longest: float) -> Arrays:
    """Check that a site's encoded update is as agreed, and decode it.

    - arrays: the arrays of the reply, in their encoded form
    - like: arrays with the names and shapes that the update must have
    - encoding: how the update is encoded
    - longest: the largest norm of an honest update before it is encoded

    Returns name -> fp32 array. Errors: WireError if names, shapes, types or sizes are not as
    agreed; _DroppedUpdate if a number is not finite, or the norm is larger than allowed."""
    agreed = codec.shapes(like)
    check_agreed(arrays, codec.layout(agreed, encoding))
    update = codec.decode(unpack_arrays(arrays), agreed)
    _check_numbers(update, longest * codec.GROWTH[encoding])
    return update


def _check_numbers(update: Arrays, longest: float) -> None:
    """Check that an update, name -> array, has finite numbers and a norm of at most `longest`.
    Errors: _DroppedUpdate if not."""
    norm = codec.length(update)
    if not math.isfinite(norm):
        raise _DroppedUpdate("its update has a value that is not finite")
    if norm > longest:
        raise _DroppedUpdate(
            f"its update is longer ({norm:.3g}) than the plan's noise, clipping and "
            f"rates allow ({longest:.3g})"
        )


def _check_log(
    events: list[dict[str, Any]], before: Sequence[Mapping[str, Any]], terms: Terms | None
) -> None:
    """Check that the step log `events` agrees with the plan, has every step of the site's earlier
    step log `before`, and has at least one more. terms: the plan's requirements; with None nothing
    is checked. Errors: _DroppedUpdate."""
    if terms is None:
        return
    if why := step_summary.objection(events, terms):
        raise _DroppedUpdate(why)
    if not step_summary.has_grown(before, events):
        raise _DroppedUpdate(
            "its step log shows no new noised step for this update, or lacks an earlier one"
        )


def _events(text: Any) -> list[dict[str, Any]]:
    """Parse the summary of its step log that a site sent, and return its entries. Errors:
    _DroppedUpdate if it is malformed."""
    try:
        return step_summary.parse(text)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        raise _DroppedUpdate("its step log is malformed") from None
