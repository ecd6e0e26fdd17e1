"""The courier of a story's site, honest or hostile: all that reaches the vault goes through it, as
bytes, to the very loop that answers them in the vault's process (core/vault/process.serve).

What a hostile one does between the coordinator's messages, or in their place, each drawn from a
number that is the same in both worlds:

| replay         | sends an earlier request again, byte for byte                                 |
| drop           | delivers the coordinator's next message and keeps its answer                  |
| hold           | keeps the coordinator's next message; a replay delivers it later, out of order |
| forge          | changes one thing of an earlier request: a field, a key that signs, an array, |
|                | a statement, whose adapter it is, which kind of order                         |
| garble         | sends bytes that are no request: cut off, too long, of another form, with one |
|                | byte changed                                                                  |
| kill           | SIGKILL to the vault at a moment of the next request's work, or half way      |
|                | through its answer; what it wrote stays, what it only had in memory is gone   |

That it asks anything at any time, with a coordinator who signs it, are messages of the story like
others (property_cases.hostile_cases). Guarantee of each answer, beside what the two worlds compare:

| one that failed                            | says that it did, and nothing else               |
| any                                        | quotes no record, no file and no error           |
| to what the coordinator has not signed so  | brings no array, draws nothing and costs nothing |
| a masking key                              | is stated of one draw, and masks for one set     |
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, Metadata, RecordDict

from fedtune.core.dp.plan import DpPlan
from fedtune.core.errors import InfrastructureError
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.secagg import masks
from fedtune.core.secagg.draw import Draws
from fedtune.core.secagg.statement import Ready, parse, parse_set
from fedtune.core.training.selftest import MemoryLog
from fedtune.core.vault import answers, noted, process, rank_process, studies
from fedtune.core.vault.worker import SiteWorker
from fedtune.core.wire.arrays import Packed
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.requests import (
    FAILED,
    KINDS,
    MOST_ARRAYS,
    MOST_WORDS,
    Answer,
    Request,
    receive_answer,
    receive_request,
    send,
)
from fedtune.core.wire.seal import digest_beside, order, sign_plan
from fedtune.courier.app import ASKED, as_message
from fedtune.flower import api
from fedtune.flower.grid import RUN_ID
from tests.guarantee.property_cases import ON_THE_NEXT
from tests.guarantee.property_coupling import Coupling
from tests.guarantee.property_disk import LimitedDisk
from tests.guarantee.property_plans import COORDINATOR
from tests.guarantee.property_wire import facts

INTRUDER = SigningKey()
GIVEN = {"coordinator": COORDINATOR.public, "simulated": True}  # of answers.Place
STATUSES = {
    *("admitted", "finished", "trained", "ready", "masked", "answered"),
    *("refused", "failed", "unprepared", "void", "waiting"),
}
# What no answer says: words of a record, of a folder, or of an error of Python's or a library's.
PRIVATE = re.compile(r"fever, day|No acute|Blood pressure|cough|property-|/state|Error\b|Traceback")
Parts = list[bytes]


class Lost(InfrastructureError):
    """The coordinator gets no answer to this message."""


# ------------------------------------------------------------------------------------ the line


class Line:
    """The vault's end of its socket: what the courier has sent, and then nothing more."""

    def __init__(self, sent: bytes) -> None:
        self._files = (_file(sent), _file(b""))
        self._sent, self._answered = (Connection(os.dup(number)) for number in self._files)

    def recv_bytes(self, most: int) -> bytes:
        return self._sent.recv_bytes(most)

    def send_bytes(self, part: bytes) -> None:
        self._answered.send_bytes(part)

    def answered(self) -> Parts:
        """Return the parts that were sent back whole, and close."""
        found: Parts = []
        for end in (self._sent, self._answered):
            if not end.closed:
                end.close()
        sent, answered = self._files
        os.close(sent)
        os.lseek(answered, 0, os.SEEK_SET)
        with Connection(answered) as back:
            try:
                while True:
                    found.append(back.recv_bytes())
            except (EOFError, OSError):
                return found


def _file(content: bytes) -> int:
    number = os.memfd_create("line")
    view = memoryview(content)
    while view:
        view = view[os.write(number, view) :]
    os.lseek(number, 0, os.SEEK_SET)
    return number


class _Parts:
    """Parts in memory, as a way for a request or an answer."""

    def __init__(self, parts: Iterable[bytes] = ()) -> None:
        self.parts = [*parts]

    def send_bytes(self, part: bytes, /) -> None:
        self.parts.append(part)

    def recv_bytes(self, most: int, /) -> bytes:
        if not self.parts:
            raise EOFError
        return self.parts.pop(0)


def parts_of(request: Request) -> Parts:
    way = _Parts()
    send(way, request)
    return way.parts


def framed(parts: Sequence[bytes]) -> bytes:
    """Return parts as a Connection writes them."""
    number = os.memfd_create("framed")
    with Connection(number) as connection:
        for part in parts:
            connection.send_bytes(part)
        size = os.lseek(number, 0, os.SEEK_CUR)
        return os.pread(number, size, 0)


# ---------------------------------------------------------------------------------- the courier


class Courier:
    """One world's. ended: whether the vault has, so that the site's client starts it again."""

    def __init__(self, coupling: Coupling, disk: LimitedDisk) -> None:
        self.ended = False
        self._coupling, self._disk = coupling, disk
        self._history: list[Parts] = []  # what the coordinator asked, delivered or not
        self._next, self._number, self._how = "", 0, ""  # what is done with the next message
        self._said: list[dict[str, Any]] = []
        self._found: Exception | None = None
        self._stated: set[str] = set()  # masking keys
        self._sets: dict[str, str] = {}  # by masking key: the set that was masked for

    def said(self) -> dict[str, Any]:
        """Return what the vault has answered since this was asked last, by number and field.
        Errors: what was found wrong with an answer, which Flower takes for a failure of the app."""
        if self._found:
            raise self._found
        said, self._said = self._said, []
        return {
            f"vault {number}: {key}": value
            for number, answered in enumerate(said)
            for key, value in answered.items()
        }

    def ask(self, context: Context, request: Request, _: float) -> Answer:
        """Pass a message of the coordinator's on, as far as this courier does. Errors: Lost."""
        act, self._next = self._next, ""
        parts = parts_of(request)
        self._history.append(parts)
        if act == "hold":
            raise Lost("held")
        site = Path(str(context.node_config["site"]))
        try:
            moment = self._moment(request) if act == "kill" else ""
            answer = self._deliver(site, framed(parts), request, moment)
        except Exception as error:
            self._found = error
            raise
        if answer is None or act == "drop":
            raise Lost("no answer")
        return answer

    def do(self, site: Path, act: str, number: int, how: str = "") -> bool:
        """Do something hostile; return whether what was sent is not what a coordinator signed.

        number: which earlier request it is about, and what is drawn; how: a moment's or a forgery's
        name, drawn where none is given."""
        draw = random.Random(number)
        if act in ON_THE_NEXT:
            self._next, self._number, self._how = act, number, how
            return False
        if not self._history:
            return True
        earlier = self._history[number % len(self._history)]
        request = receive_request(_Parts(earlier))
        if act == "forge":
            forged = self._forged(request, draw, how)
            if forged is None:
                return True
            request = forged
            sent = framed(parts_of(request))
        else:
            sent = framed(earlier) if act == "replay" else garbled(earlier, draw)
        moment = self._moment(request) if self._next == "kill" else ""
        self._next = "" if moment else self._next
        before = len(self._coupling.sums)
        answer = self._deliver(site, sent, request, moment)
        if act == "replay":
            return False
        assert len(self._coupling.sums) == before, f"{act}: noise was drawn for it"
        assert answer is None or not answer.arrays, f"{act}: arrays are answered"
        return True

    def _moment(self, request: Request) -> str:
        """Return when the vault is killed that answers a request."""
        return self._how or random.Random(self._number).choice(MOMENTS_OF[request.kind])

    def _forged(self, request: Request, draw: random.Random, how: str) -> Request | None:
        """Change one thing of a request so that it is none that the coordinator signed; None where
        it has nothing of that kind."""
        other = receive_request(_Parts(draw.choice(self._history)))
        return FORGERIES[how or draw.choice([*FORGERIES])](request, draw, other)

    def _deliver(self, site: Path, sent: bytes, request: Request, moment: str) -> Answer | None:
        """Have the vault read some bytes, and return what it answers; None where it ends."""
        line, before = Line(sent), len(self._coupling.sums)
        if moment:
            self._killed(site, line, moment)
        else:
            serve(site, line)
        parts = line.answered()
        self.ended = self.ended or bool(moment) or not parts
        said: dict[str, Any] = {"sizes": [len(part) for part in parts]}
        self._said.append(said)
        try:
            answer = receive_answer(_Parts(parts))
        except EOFError:  # of a vault that ended before, or while it answered
            return None
        said |= facts(as_message(answer, message_of(request)))
        self._check(request, answer, len(self._coupling.sums) > before)
        return answer

    def _killed(self, site: Path, line: Line, moment: str) -> str:
        """Have a fork of this process answer, and end by SIGKILL; what it drew is seen here.
        Returns when it ended: as `moment` says, or after its answer where that never came."""
        if torch.cuda.is_available():  # a fork has no GPU: it is killed before it reads
            return ""
        seen = os.memfd_create("seen")
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # a fork has none of the threads of a pool

                def kill(when: str = moment) -> None:
                    made = self._coupling.sums, self._coupling.noised, self._disk.needed, when
                    with open(seen, "wb", closefd=False) as file:
                        pickle.dump(made, file)
                    os.kill(os.getpid(), signal.SIGKILL)

                with pytest.MonkeyPatch.context() as patch:
                    MOMENTS[moment](patch, kill)
                    serve(site, line)
                    kill("answered")
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "it was not killed"
        os.lseek(seen, 0, os.SEEK_SET)
        with open(seen, "rb") as file:
            sums, noised, needed, when = pickle.load(file)
        self._coupling.sums, self._coupling.noised, self._disk.needed = sums, noised, needed
        return str(when)

    def _check(self, request: Request, answer: Answer, drew: bool) -> None:
        """Hold an answer to what every answer is. Errors: AssertionError."""
        status, reason = answer.status, answer.fields["reason"]
        assert status in STATUSES, f"{request.kind}: a status of its own: {status!r}"
        if status == "failed":
            assert reason == FAILED, f"{request.kind}: a failure's own words: {reason!r}"
        said = PRIVATE.search(json.dumps(dict(answer.fields)))
        assert said is None, f"{request.kind}: an answer quotes {said and said[0]!r}"
        if status == "ready":
            masking = parse(answer.fields["ready"]).masking
            is_new = masking not in self._stated
            assert is_new or not drew, "one masking key is stated of two draws"
            assert drew or not is_new, "a draw that nobody made is stated"
            self._stated.add(masking)
        if status == "masked":
            mine = [r for r in _statements(request) if r.masking in self._stated]
            for ready in mine:
                asked = str(answer.fields["set"])
                first = self._sets.setdefault(ready.masking, asked)
                assert first == asked, "one draw is masked for two sets"


def serve(site: Path, line: Line) -> None:
    """Answer what is on the line as the vault does; the story has begun its team."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_process, "team", lambda *_: nullcontext())
        process.serve(site, line, lambda *_: None, 1, GIVEN)  # type: ignore[arg-type]


def message_of(request: Request) -> Message:
    """Make a message of the coordinator's of this request's kind, to which an answer replies."""
    kind = next(name for name, (kind, _) in ASKED.items() if kind == request.kind)
    metadata = Metadata(
        run_id=RUN_ID,
        message_id="1",
        src_node_id=1,
        dst_node_id=2,
        reply_to_message_id="",
        group_id="1",
        created_at=1.7e9,
        ttl=1e12,
        message_type=kind,
    )
    return api.make_message(metadata, RecordDict())


def _statements(request: Request) -> list[Ready]:
    return parse_set(request.tables["set"]["statements"])


# ---------------------------------------------------------------------------------- its forgeries

Forgery = Callable[[Request, random.Random, Request], Request | None]
TURNED = {"0": "1"}  # a character that takes another's place, whatever it was: "0"


def turned(text: str, draw: random.Random) -> str:
    """Change one character, at the same place of texts that are equally long."""
    at = draw.randrange(len(text))
    return text[:at] + TURNED.get(text[at], "0") + text[at + 1 :]


def with_table(request: Request, name: str, **fields: Any) -> Request:
    table = {**request.tables[name], **fields}
    return replace(request, tables={**request.tables, name: table})


def a_field(request: Request, draw: random.Random, _: Request) -> Request | None:
    """A character of a text, or another number, of an order, a set of statements or a plan."""
    texts = [
        (name, field)
        for name, table in sorted(request.tables.items())
        for field, value in sorted(table.items())
        if value != "" and not isinstance(value, bool)
    ]
    if not texts:
        return None
    name, field = draw.choice(texts)
    value = request.tables[name][field]
    other = turned(value, draw) if isinstance(value, str) else value + draw.choice((-2, -1, 1, 98))
    return with_table(request, name, **{field: other})


def an_odd_field(request: Request, draw: random.Random, _: Request) -> Request | None:
    """A field of an order or a plan of another type, of any length, or none."""
    name = "plan" if request.kind == "prepare" else "order"
    table = dict(request.tables[name])
    field = draw.choice(sorted(table))
    odd = draw.choice(("gone", "", -1, 2**80, 1.5, True, "x" * 200_000, "\ud800", "NaN"))
    if odd == "gone":
        del table[field]
    elif type(table[field]) is type(odd) and table[field] == odd:
        return None
    else:
        table[field] = odd
    return replace(request, tables={**request.tables, name: table})


def a_key(request: Request, _: random.Random, __: Request) -> Request | None:
    """Signed by somebody else, for whom it is otherwise as it must be."""
    if request.kind == "prepare":
        return with_table(request, "plan", **sign_plan(INTRUDER, request.tables["plan"]["digest"]))
    said = request.tables["order"]
    given = said["plan"], said["round"], said["nonce"], said["receipt"], said.get("attempt", 0)
    if not isinstance(given[1], int) or not isinstance(given[4], int):
        return None
    return with_table(request, "order", **order(INTRUDER, *given, beside=said["beside"]))


def an_end(request: Request, draw: random.Random, _: Request) -> Request | None:
    """That its study has ended, by nobody's word."""
    if request.kind != "prepare" or "finished" in request.tables["plan"]:
        return None
    by = draw.choice(("", "0" * 128, request.tables["plan"]["signature"]))
    return with_table(request, "plan", finished=True, finished_signature=by)


def a_kind(request: Request, draw: random.Random, _: Request) -> Request | None:
    """An order for one kind of work as one for another."""
    return replace(request, kind=draw.choice([k for k in KINDS if k != request.kind]))


def an_array(request: Request, draw: random.Random, _: Request) -> Request | None:
    """An array of another content, shape, type or name, one too few or one too many."""
    if not request.arrays:
        return None
    arrays = {
        n: Packed(a.dtype, tuple(a.shape), a.data, a.stype) for n, a in request.arrays.items()
    }
    name = draw.choice(sorted(arrays))
    array, how = arrays[name], draw.randrange(8)
    at = draw.randrange(max(1, len(array.data)))
    one = bytes([array.data[at] ^ 1]) if array.data else b"x"
    changes: Mapping[int, Packed] = {
        0: replace(array, data=array.data[:at] + one + array.data[at + 1 :]),
        1: replace(array, data=array.data[:at]),
        2: replace(array, data=array.data + bytes(64)),
        3: replace(array, shape=(*array.shape, 1)),
        4: replace(array, dtype="float64" if draw.random() < 0.5 else "int8"),
        5: replace(array, stype="pickle"),
    }
    if how in changes:
        return replace(request, arrays={**arrays, name: changes[how]})
    del arrays[name]
    return replace(request, arrays=arrays if how == 6 else {**arrays, f"{name}.other": array})


def a_companion(request: Request, _: random.Random, other: Request) -> Request | None:
    """An order with what came with another: its adapter, or its statements."""
    if request.kind == "prepare" or other.kind == "prepare":
        return None
    changed = replace(request, arrays=other.arrays)
    if "set" in request.tables and "set" in other.tables:
        changed = replace(changed, tables={**request.tables, "set": other.tables["set"]})
    return None if parts_of(changed) == parts_of(request) else changed


def a_statement(request: Request, draw: random.Random, _: Request) -> Request | None:
    """A set of statements without one, with one twice, or with an intruder's for a peer's; the
    order over it is the coordinator's own."""
    if request.kind != "masked":
        return None
    said, table = request.tables["order"], dict(request.tables["set"])
    texts = json.loads(table["statements"])
    at, how = draw.randrange(len(texts)), draw.randrange(3)
    if how == 2:
        stated = replace(parse(texts[at]), signing=INTRUDER.public).signed(INTRUDER)
        texts[at] = stated.text()
    else:
        texts = texts[:at] + texts[at + 1 :] if how == 0 else [*texts, texts[at]]
    table["statements"] = json.dumps(texts)
    given = said["plan"], said["round"], said["nonce"], said["receipt"], said.get("attempt", 0)
    about = order(COORDINATOR, *given, beside=digest_beside({}, table))
    return replace(request, tables={"order": about, "set": table})


FORGERIES: dict[str, Forgery] = {
    "field": a_field,
    "odd field": an_odd_field,
    "key": a_key,
    "end": an_end,
    "kind": a_kind,
    "array": an_array,
    "companion": a_companion,
    "statement": a_statement,
}


def garbled(parts: Parts, draw: random.Random) -> bytes:
    """Bytes that are no request, or one of which a single byte is another."""
    header, rest = json.loads(parts[0]), parts[1:]
    long = {"arrays": [["x", "float32", [1], "x"]] * (MOST_ARRAYS + 1)}
    forms: list[Any] = [
        *({}, [], None, 7, "x" * 1000, {"arrays": 7}, {"arrays": [[]]}, {"arrays": [["x"]]}),
        *(header | {"kind": odd} for odd in ("", "stop", None, ["train"], {"train": 1})),
        *(header | {"tables": odd} for odd in ([], None, {"order": []}, {"order": {"x": None}})),
        *(header | {"arrays": [["x", "float32", odd, "x"]]} for odd in (None, "1", [1e999], [[]])),
        *({**header, "tables": {}}, header | {"arrays": []}, header | long),
    ]
    how = draw.randrange(6)
    whole = framed(parts)
    if how == 0:
        return whole[: draw.randrange(len(whole))]
    if how == 1:
        at = draw.randrange(len(whole))
        return whole[:at] + (b"1" if whole[at : at + 1] == b"0" else b"0") + whole[at + 1 :]
    if how == 2:
        lengths = (MOST_WORDS + 1, -2, -(2**31), 2**31 - 1)
        return draw.choice(lengths).to_bytes(4, "big", signed=True) + whole
    if how == 3:
        first = draw.choice((b"", b"\0", b"{", b"[" * 100_000, b"\xff\xfe", b"1" * 10_000))
        return framed([first, *rest])
    return framed([json.dumps(draw.choice(forms)).encode(), *rest])


# ------------------------------------------------------------------- moments at which it is killed

Kill = Callable[[], None]
Moment = Callable[[pytest.MonkeyPatch, Kill], None]


def at(owner: Any, name: str, *, before: bool = False) -> Moment:
    """When a function of the vault begins, or when it has done its work; not in a self-test, which
    one world alone may need."""

    def patched(patch: pytest.MonkeyPatch, kill: Kill) -> None:
        honest = getattr(owner, name)

        def called(*given: Any, **named: Any) -> Any:
            is_real = not any(isinstance(value, MemoryLog) for value in given)
            if before and is_real:
                kill()
            found = honest(*given, **named)
            if is_real:
                kill()
            return found

        patch.setattr(owner, name, called)

    return patched


def any_of(*moments: Moment) -> Moment:
    def patched(patch: pytest.MonkeyPatch, kill: Kill) -> None:
        for moment in moments:
            moment(patch, kill)

    return patched


MOMENTS: dict[str, Moment] = {
    "order verified": at(answers, "check_order"),
    "receipt taken": at(noted, "accept"),
    "model built": at(SiteWorker, "_prepare_model"),
    "admission to be noted": at(studies, "begin", before=True),
    "study begun": at(studies, "begin"),
    "records read": at(SiteWorker, "data_in_study"),
    "charged": any_of(at(Ledger, "reserve"), at(Ledger, "reserve_for")),
    "summed": at(DpPlan, "_add_noise_to", before=True),
    "noised": at(DpPlan, "_add_noise_to"),
    "draw kept": at(Draws, "keep"),
    "masked": at(masks, "mask"),
    "answer written, not entered": at(Ledger, "_store_bytes"),
    "answer entered": at(Ledger, "release"),
    "sealed": at(SiteWorker, "sealed"),
    "half answered": at(Line, "send_bytes"),
    "answered": lambda _, __: None,
}
_ORDER = ("order verified", "receipt taken")
_PAID = ("records read", "charged", "summed", "noised")
_KEPT = ("answer written, not entered", "answer entered")
_SENT = ("sealed", "half answered", "answered")
MOMENTS_OF: dict[str, tuple[str, ...]] = {
    "prepare": ("model built", "admission to be noted", "study begun", *_SENT[1:]),
    "train": (*_ORDER, *_PAID, *_KEPT, *_SENT),
    "ready": (*_ORDER, *_PAID, "draw kept", *_SENT),
    "masked": (*_ORDER, "masked", *_KEPT, *_SENT),
    "evaluate": (*_ORDER, *_PAID, *_KEPT, *_SENT),
}
