"""Who takes part, and what is accepted from them. Every field that a site sends is checked here."""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import Grid

from fedtune.config import Encoding, LoraTable, Study
from fedtune.errors import FedtuneError, Refused
from fedtune.flower import replies
from fedtune.flower.arrays import (
    Arrays,
    WireError,
    bodies,
    check_agreed,
    from_record,
    to_record,
)
from fedtune.flower.enrol import Member
from fedtune.server.bound import Terms
from fedtune.server.exchange import Reply, ask, clean, size
from fedtune.wire import codec
from fedtune.wire.keys import SigningKey
from fedtune.wire.protocol import OtherProtocol, check_peer, version_fields
from fedtune.wire.seal import Header, SealError, body_digest, opened, sign_plan

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NOT_ENROLLED = "it is not enrolled with this signing key, or was revoked"
KEY = re.compile(r"[0-9a-f]{64}")
MOST_UNITS = 10**10  # that a site may declare: more than there are people
SIGMA_SLACK = 0.02  # of σ: another version of the accountant may calibrate a little differently
REPEATS = 100  # times the plan's steps: rounds that were lost and trained again are logged too
Tell = Callable[[str, str, str], None]  # site, status, reason


def plan_message(study: Study, frozen: Arrays, key: SigningKey) -> RecordDict:
    """The plan as sites get it, signed; of the coordinator's paths only the last part is left."""
    changes = {}
    for table in (study.public, study.evaluation):
        if table is not None:
            which = "public" if table is study.public else "evaluation"
            changes[which] = table.model_copy(update={"path": Path(table.path.name)})
    sent = study.model_copy(update=changes)
    signed = sign_plan(key, study.digest)
    plan = ConfigRecord(
        {"study": sent.model_dump_json(), "digest": study.digest, **signed, **version_fields()}
    )
    return RecordDict({"plan": plan, "frozen": to_record(frozen)})


@dataclass
class Roster:
    """Nodes and the sites behind them.

    sizes, keys: site -> declared size and public key, fixed once heard; lora_ranks: likewise how
    many ranks it trains, where the plan lets sites choose; enrolled: who each node is, as of now
    (None: anybody); expect: told which nodes are asked, for an answer of how many bytes; refused:
    site -> why, for the rest of the run; absent: what failed or kept silent, asked again each
    round; down, up: bytes by site.

    Guarantee: what a node says changes nothing for any name but its own."""

    grid: Grid
    study: Study
    plan: RecordDict
    sizes: dict[str, int]
    keys: dict[str, str]
    tell: Tell
    enrolled: Callable[[], Mapping[int, Member]] | None = None
    expect: Callable[[Iterable[int], int], None] = lambda nodes, most: None
    lora_ranks: dict[str, int] = field(default_factory=dict)
    nodes: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    down: Counter[str] = field(default_factory=Counter)
    up: Counter[str] = field(default_factory=Counter)
    _asked: set[int] = field(default_factory=set)  # nodes that gave a final answer

    def __post_init__(self) -> None:
        self.named: Callable[[], Mapping[int, Member]] = getattr(self.grid, "members", None) or dict

    def willing(self) -> list[str]:
        """Admitted sites that have not refused since, by name."""
        return sorted(set(self.nodes) - set(self.refused))

    def join(self) -> None:
        """Ask every node that has not answered yet, so that a site may come late."""
        here = set(self.grid.get_node_ids())
        self.nodes = {name: node for name, node in self.nodes.items() if node in here}
        self._asked &= here
        self.absent = {}
        self.prepare(here - self._asked)
        for name in set(self.sizes) - set(self.nodes) - set(self.refused):
            self.absent.setdefault(name, "the site is not connected")

    def out(self) -> dict[str, str]:
        """Who cannot be asked now, and why."""
        found = {name: f"failed: {why}" for name, why in self.absent.items()}
        found |= {name: f"refused: {why}" for name, why in self.refused.items()}
        return dict(sorted(found.items()))

    def raise_if_refused(self) -> None:
        """Errors: Refused where refusals alone put strategy.min_sites out of reach."""
        possible = len(self.willing()) + len(self.absent)
        if self.refused and possible < self.study.strategy.min_sites:
            raise self.too_few(Refused)

    def too_few(self, kind: type[FedtuneError]) -> FedtuneError:
        """The error that says who is missing, and why."""
        out = self.out()
        reasons = "; ".join(f"{name}: {why}" for name, why in out.items())
        return kind(
            f"{len(self.willing())} sites take part" + (f" ({reasons})" if out else ""),
            f"at least strategy.min_sites = {self.study.strategy.min_sites}",
            "settle it with these sites" if out else "start the sites, then run again",
        )

    def prepare(self, nodes: Iterable[int]) -> None:
        """Send the plan to `nodes` and note who admits it."""
        contents = dict.fromkeys(sorted(nodes), self.plan)
        for reply in self.ask("query.prepare", contents, "prepare"):
            self._on_admission_reply(reply)

    def ask(
        self, kind: str, contents: Mapping[int, RecordDict], group: str, arrays: int = 0
    ) -> Iterator[Reply]:
        """Send each node its message and yield the replies, each at most `arrays` bytes of numbers
        and what surrounds them."""
        most, timeout = replies.WORDS + arrays, self.study.strategy.round_timeout
        self.expect(contents, most)
        return ask(self.grid, kind, contents, group, timeout, most)

    def stranger(self, node: int, name: str) -> bool:
        """Whether the node is not enrolled under this name and signing key, as of now."""
        if self.enrolled is None:
            return False
        return self.enrolled().get(node) != Member(name, self.keys.get(name, ""))

    def _on_admission_reply(self, reply: Reply) -> None:
        said, known = _admission(reply), set(self.nodes.values())
        name, status, reason = self._name_of(reply.node, said), said.status, said.reason
        rank = _lora_rank(reply, self.study.lora)
        if status == "admitted" and (objection := self._objection(reply.node, name, said, rank)):
            status, reason = "refused", objection
        self.down[name] += size(self.plan)
        self.up[name] += reply.size
        if status == "failed":
            self.absent[name] = reason
        else:
            self._asked.add(reply.node)
        if status == "refused":
            self.refused[name] = reason
        elif status == "admitted":
            self.sizes[name], self.keys[name] = said.declared, said.key
            if rank:
                self.lora_ranks[name] = rank
            self.nodes[name] = reply.node
        if reply.node not in known or status != "admitted":
            self.tell(name, status, reason)

    def _name_of(self, node: int, said: _Said) -> str:
        """Who the node is, whatever it says: by the registry, or by its site file in a simulation.
        Where nobody vouches for it, the name that it was first admitted with, if that was free."""
        vouched = (self.enrolled or self.named)().get(node)
        if vouched and self.enrolled:
            return vouched.name
        first = {at: name for name, at in self.nodes.items()}.get(node, "")
        name = vouched.name if vouched else first
        if not name and not self.enrolled and said.status == "admitted":
            name = said.name if self.keys.get(said.name, said.key) == said.key else ""
        return name if name and self.nodes.get(name, node) == node else f"node {node}"

    def _objection(self, node: int, name: str, said: _Said, rank: int | None) -> str:
        """Why a site that admits the plan may not take part; "" where it may."""
        if self.enrolled is not None and self.enrolled().get(node) != Member(name, said.key):
            return NOT_ENROLLED
        if said.name != name:
            return f"{said.name} is another node's name"
        if self.sizes.get(name, said.declared) != said.declared:
            return "its declared_size changed during the study"
        if self.keys.get(name, said.key) != said.key:
            return "its signing key changed during the study"
        if rank == 0:
            return "its lora_rank is not one that the plan allows"
        if rank and self.lora_ranks.get(name, rank) != rank:
            return "its lora_rank changed during the study"
        return ""


class _Said(NamedTuple):
    """What a node says in reply to the plan; its name is a claim."""

    status: str
    reason: str = ""
    name: str = ""
    declared: int = 0
    key: str = ""


def _admission(reply: Reply) -> _Said:
    if reply.content is None:
        return _Said("failed", reply.reason)
    record = reply.content.get("admission")
    if not isinstance(record, ConfigRecord):
        return _Said("failed", "its answer to the plan is malformed")
    if record.get("admitted") is not True:
        status = "failed" if record.get("status") == "failed" else "refused"
        return _Said(status, clean(record.get("reason")) or "no reason given")
    try:
        check_peer("the site", record, "this coordinator")
    except OtherProtocol as refusal:
        return _Said("refused", str(refusal))
    name, declared, key = record.get("name"), record.get("declared_size"), record.get("key")
    named = isinstance(name, str) and NAME.fullmatch(name) is not None
    keyed = isinstance(key, str) and KEY.fullmatch(key) is not None
    if not named or not keyed or type(declared) is not int or not 1 <= declared <= MOST_UNITS:
        return _Said("failed", "its answer to the plan is malformed")
    return _Said("admitted", "", str(name), declared, str(key))


def _lora_rank(reply: Reply, lora: LoraTable | None) -> int | None:
    """How many ranks the site says that it trains; None where sites have no choice, 0 where it says
    what the plan does not allow."""
    if lora is None or lora.min_rank is None or reply.content is None:
        return None
    record = reply.content.get("admission")
    said = record.get("lora_rank") if isinstance(record, ConfigRecord) else None
    return said if type(said) is int and lora.min_rank <= said <= lora.rank else 0


@dataclass
class Tally:
    """One round in the making. failures: how often each site was asked in vain; counted: what was
    taken in, by its idempotency key: a retry is a new message, and so is a replay; largest: what
    one site may count for (0: not asked yet); weights: site -> that, where it declared more."""

    number: int
    participants: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    late: dict[str, str] = field(default_factory=dict)  # delivered when asked again: why so late
    failures: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)
    counted: set[tuple[str, int, str]] = field(default_factory=set)
    largest: int = 0
    weights: dict[str, int] = field(default_factory=dict)

    def has(self, study: str, name: str) -> bool:
        """Whether (study, round, site) is in already, whatever arrives again."""
        return (study, self.number, name) in self.counted

    def count(self, study: str, name: str) -> None:
        self.counted.add((study, self.number, name))
        self.participants.append(name)
        why = self.missing.pop(name, "")
        if why and not why.startswith("unprepared"):  # it was sent the plan again, at once
            self.late[name] = why


@dataclass(frozen=True, repr=False)
class Outcome:
    """What one site made of a round, or of a query after it. status: trained, answered, refused,
    unprepared, failed or dropped."""

    status: str
    reason: str = ""
    update: Arrays = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    ledger: dict[str, Any] = field(default_factory=dict)  # the site's statement of its head


def outcome(
    reply: Reply,
    like: Arrays,
    private: bool,
    steps_before: int,
    key: str,
    wanted: Header,
    *,
    record: str = "update",
    done: str = "trained",
    encoding: Encoding = "float32",
    terms: Terms | None = None,
    longest: float = math.inf,
) -> Outcome:
    """Judge a reply to train, or to another order (`record` and `done` as it names them). In this
    order, each with a reason of its own:

    | the seal    | by `key`, for this plan, round, base, site, receiver and nonce        |
    | the arrays  | names, shapes, type and bytes as `like` in `encoding`, before any is read |
    | the numbers | of that type by their own header; finite, as are the scales; a norm of |
    |             | at most `longest`, by as much more as `encoding` may add to it         |
    | the log     | noised with the `terms` that the plan sets, and a step for this update |
    """
    if reply.content is None:
        return Outcome(reply.status, reply.reason)
    site, arrays = reply.content.get("site"), reply.content.get(record)
    if not isinstance(site, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        return Outcome("failed", "its answer is malformed")
    if set(reply.content) != {"site", record}:
        return Outcome("failed", "its answer holds more than was asked for")
    status = site.get("status")
    if status != done:
        known = status if status in ("refused", "unprepared") else "failed"
        return Outcome(str(known), clean(site.get("reason")) or "no reason given")
    try:
        ledger = _opened(site, arrays, key, wanted)
        agreed = codec.shapes(like)
        check_agreed(arrays, codec.layout(agreed, encoding))
        update = codec.decode(from_record(arrays), agreed)
        _check_numbers(update, longest * codec.GROWTH[encoding])
        events = _events(site.get("events")) if private else []
        _check_log(events, steps_before, terms)
    except _Unfit as unfit:
        return Outcome("dropped", str(unfit))
    except SealError as error:
        return Outcome("dropped", str(error))
    except WireError as error:
        return Outcome("dropped", clean(f"its update is not as agreed: {error}"))
    return Outcome(done, "", update, events, ledger)


class _Unfit(Exception):
    """Why an update is dropped."""


def _opened(site: ConfigRecord, arrays: ArrayRecord, key: str, wanted: Header) -> dict[str, Any]:
    """The ledger statement of a sealed update. Errors: SealError."""
    return opened(site, key, replace(wanted, body=body_digest(bodies(arrays), site)))


def _check_numbers(update: Arrays, longest: float) -> None:
    """Errors: _Unfit."""
    found = codec.length(update)
    if not math.isfinite(found):
        raise _Unfit("its update has a value that is not finite")
    if found > longest:
        raise _Unfit(
            f"its update is longer ({found:.3g}) than the plan's noise, clipping and "
            f"rates allow ({longest:.3g})"
        )


def _check_log(events: list[dict[str, Any]], steps_before: int, terms: Terms | None) -> None:
    """Errors: _Unfit where the log is not that of this plan, or shows no new step."""
    if terms is None:
        return
    for event in events:
        same = (
            math.isclose(event["q"], terms.sampling_rate, rel_tol=1e-9)
            and math.isclose(event["max_grad_norm"], terms.max_grad_norm, rel_tol=1e-9)
            and event["records"] == terms.records
        )
        ratio = event["sigma"] / terms.noise_multiplier
        if not same or not 1 - SIGMA_SLACK <= ratio <= 1 + SIGMA_SLACK:
            raise _Unfit("its step log shows other noise than the plan's")
    steps = sum(event["steps"] for event in events)
    if steps <= steps_before:
        raise _Unfit("its step log shows no new noised step for this update")
    if steps > REPEATS * terms.steps:
        raise _Unfit("its step log shows far more steps than the plan has")


def _events(text: Any) -> list[dict[str, Any]]:
    """The site's step log summary. Errors: _Unfit."""
    try:
        return _parsed(text)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        raise _Unfit("its step log is malformed") from None


def _parsed(text: Any) -> list[dict[str, Any]]:
    if not isinstance(text, str) or len(text) > 100_000:
        raise ValueError("events")
    found = []
    for raw in json.loads(text):
        event = {key: float(raw[key]) for key in ("sigma", "q", "max_grad_norm")}
        finite = all(math.isfinite(value) and value > 0 for value in event.values())
        counts = {key: raw[key] for key in ("records", "steps")}
        whole = all(type(n) is int and 0 < n < 10**9 for n in counts.values())
        if not finite or event["q"] > 1 or not whole:
            raise ValueError("events")
        found.append({**event, **counts})
    return found
