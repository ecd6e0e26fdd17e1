"""Hostile and ordinary records of a ward, and what a site may live through with them, drawn."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from tests.guarantee.property_plans import (
    CLASSIFIES,
    COLUMNS,
    CONSENT,
    Case,
    Disk,
    Op,
    Place,
    Plan,
    Row,
)

WHAT: dict[str, dict[str, Any]] = {
    "text": {},
    "text, all blocks": {"lora": "whole"},
    "text, fewer ranks": {"lora": "narrow"},
    "text, from public text": {"public": True},
    "dpo, from public text": {"objective": "dpo", "public": True},
    "text, 64 positions": {"base": "opt", "lora": "whole"},
    "text, 64 positions, last block": {"base": "opt"},
    "classify, head": {"objective": "classify", "base": "bert", "lora": "none"},
    "classify, encoder": {"objective": "classify", "base": "bert", "lora": "whole"},
    "class statistics": {"objective": "prototypes", "base": "bert", "lora": "none"},
    "dpo": {"objective": "dpo"},
    "orpo": {"objective": "orpo"},
    "kto": {"objective": "kto"},
    "reward, head": {"objective": "reward", "lora": "none"},
    "reward": {"objective": "reward"},
    "distill": {"objective": "distill"},
    "distill, labels": {"objective": "distill", "teacher": CLASSIFIES},
    "image": {"base": "llava"},
    "audio": {"base": "whisper", "lora": "whole"},
}
DRAWN: dict[str, dict[str, Any]] = {
    "record": {"unit": "record"},
    "record, q": {"unit": "record", "q": 0.5},
    "patient": {},
    "patient, q": {"q": 0.5},
    "records of patients": {"drawn": "record"},
    "records of patients, q": {"drawn": "record", "q": 0.5},
}
LONG_TEMPLATE = "0" * 40 + "{text}"
AXES: dict[str, list[Any]] = {
    "what": list(WHAT),
    "drawn": list(DRAWN),
    "kind": [
        *("jsonl", "csv", "parquet", "arrow", "sqlite"),
        *("folder-jsonl", "folder-csv", "folder-parquet", "folder-arrow"),
    ],
    "story": ["rounds", "studies", "continuous", "queries", "two sets", "units change"],
    "length": [
        *((48, "reject"), (16, "truncate"), (64, "reject"), (64, "truncate")),
        (8192, "reject"),  # which a base of 64 positions is not asked to read
    ],
    "template": [None, "Question: {text}", LONG_TEMPLATE],
    "engine": ["auto", "opacus"],
    "steps": [1, 2],
    "cap": [1, 2, 3],
    "mode": ["flat", "normalised"],
    "rank": [None, 1],
    "consent": ["", *CONSENT],
    "processes": [1, 1, 1, 2],
    "disk": [
        *(None for _ in range(8)),  # each other one is lived through twice
        *(Disk("states"), Disk("states", -0.4), Disk("state"), Disk("both")),
    ],
    "sheet": [False, False, True],
    "shared": [False, False, True],
    "receipts": [False, False, True],
}
ON_THE_NEXT = ("drop", "hold", "kill")  # of what a hostile courier does
Axes = dict[str, Any]
CLIP = 0.02  # of most rows the gradient is longer
ADAPTERS = (0, 1, 1, 2, 3)  # of property_world.crafted


def possible(axes: Axes) -> bool:
    record = axes.get("drawn", "").startswith("record,") or axes.get("drawn") == "record"
    if record and axes.get("story") == "continuous":
        return False
    if axes.get("what") == "audio" and axes.get("template"):
        return False
    learnt = ("text, from public text", "dpo, from public text", "class statistics")
    if axes.get("what") in learnt and axes.get("template") == LONG_TEMPLATE:
        return False  # no public text is short enough
    if axes.get("sheet") and axes.get("story") == "two sets":  # a state folder has one sheet
        return False
    if axes.get("shared") and (
        axes.get("story") == "continuous"
        or axes.get("steps") == 2
        or axes.get("what") == "text, fewer ranks"
    ):
        return False
    return not (axes.get("what") != "text, fewer ranks" and axes.get("rank"))


def pairs() -> list[Axes]:
    """Axes of as many cases as it takes for every two values to meet that can."""
    left = {
        frozenset(pair)
        for one, other in itertools.combinations(AXES, 2)
        for pair in itertools.product(
            ((one, value) for value in AXES[one]), ((other, value) for value in AXES[other])
        )
        if possible(dict(pair))
    }
    found = []
    while left:
        axes: Axes = dict(min(map(sorted, left), key=repr))  # in every process the same
        for name in (name for name in AXES if name not in axes):
            fits = [value for value in AXES[name] if possible(axes | {name: value})]
            axes[name] = max(
                fits,
                key=lambda value: sum(
                    frozenset(((name, value), met)) in left for met in axes.items()
                ),
            )
        left -= {frozenset(pair) for pair in itertools.combinations(axes.items(), 2)}
        found.append(axes)
    return found


# ------------------------------------------------------------------------------------- records

BOILERPLATE = (
    "No acute findings.",
    "No acute findings. Discharged home with paracetamol and a follow-up in two weeks.",
    "Seen in the clinic.\nBlood pressure 120 over 80.",
    'Says "fine", height 5\'6", pain 8/10; no cough.',
)
OWNERS = "abcdef"
LONG = (*("cough and fever " * n for n in (3, 5, 8, 30)), "x" * 3000)
HOSTILE: dict[str, list[dict[str, Any]]] = {
    "long": [{key: text} for text in LONG for key in "qqb"],
    "nothing": [
        {key: nothing} for nothing in (None, "", "   ") for key in ("q", "a", "b", "l", "who")
    ],
    "another type": [
        {"a": 7},
        {"q": ["a list"]},
        {"q": float("nan")},
        {"l": "perhaps"},
    ],
    "characters": [{"q": "nul \0 inside"}, {"q": "\ud800"}, {"a": "maybe"}],
    "media": [
        {"file": None},
        {"file": "none.png"},
        {"file": "../../state/ledger.db"},
        {"file": ("raw", b"neither image nor sound")},
        {"file": ("image", 3, (1, 700))},
        {"file": ("image", 4, (900, 1))},
        {"file": ("image", 39_000_000, 1, "L")},
        {"file": ("audio", 6, 2.5)},
        {"file": ("audio", 7, 0.001)},
    ],
}
LINES = ("not JSON", "[]", "{", "null", '{"who": "b"}', '{"q": NaN, "a": "y", "who": "c"}', "")
MISSING = ("a", "q", "b", "who", "l", "file")
PLAIN = ("own", "own", "shared", "shared", "shared", "label")


@st.composite
def body(draw: st.DrawFn, owner: str, number: int, media: str | None, how: str) -> Any:
    """One row: ordinary (`how` in PLAIN), or as a hostile patient could have it."""
    shared = how != "own"
    q = (
        draw(st.sampled_from(BOILERPLATE[:1] * 3 + BOILERPLATE))
        if shared
        else f"fever, day {number} of {owner}"
    )
    key = draw(st.sampled_from((owner, owner, f" {owner} ")))  # the same patient
    found: dict[str, Any] = {"who": key, "q": q, "a": "n" if how == "label" else "y"}
    found |= {"b": "ny"[found["a"] == "n"], "l": 1}
    if media:
        found["file"] = (media, draw(st.integers(0, 3)))
    if how in HOSTILE:
        return found | draw(st.sampled_from(HOSTILE[how]))
    if how == "missing":
        gone = draw(st.sampled_from(MISSING))
        return {key: value for key, value in found.items() if key != gone}
    return draw(st.sampled_from(LINES)) if how == "line" else found


@st.composite
def rows(draw: st.DrawFn, media: str | None, owners: str, unit: str) -> list[Row]:
    """Of each owner some records, in one or several versions of the file, mixed; or in one file in
    which nothing but the unit's records changes, which alone may then be seen. What is hostile is
    the unit's more often than anybody's."""
    alone = draw(st.booleans())
    strange = [how for how in HOSTILE if media or how != "media"] + ["missing", "line"]
    theme = draw(st.sampled_from(("shared", "shared", *strange)))  # of the unit's records
    found: list[Row] = []
    for owner in owners:
        usual = st.sampled_from(PLAIN)
        hows = st.one_of(usual, st.just(theme), st.just(theme)) if owner == unit else usual
        if draw(st.integers(0, 19)) == 19:
            hows = st.sampled_from(strange)
        first = draw(st.sampled_from((0, 0, 0, 1, 2)))
        for number in range(draw(st.integers(1, 3))):
            line = draw(body(owner, number, media, draw(hows)))
            since = draw(st.sampled_from((first, first, 1, 2)))
            until = draw(st.sampled_from((99, 99, 99, since + 1)))
            if alone:
                since, until = (since or 1, until) if owner == unit and not number else (0, 99)
            found.append(Row(owner, line, since, until))
    return draw(st.permutations(found)) if draw(st.booleans()) else found


@dataclass(frozen=True)
class Ward:
    """Whose records there are, and of which one world lacks. media: what kind of file each has."""

    media: str | None
    unit: str
    processes: int

    def rows(self, owners: str = OWNERS) -> st.SearchStrategy[list[Row]]:
        return rows(self.media, owners, self.unit)


@dataclass(frozen=True)
class _Story:
    plans: tuple[Plan, ...]
    places: tuple[Place, ...]
    files: dict[str, tuple[Row, ...]]
    ops: tuple[Op, ...]


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """A case of these axes, the others drawn."""
    some = {name: [fixed[name]] if name in fixed else values for name, values in AXES.items()}
    drawn = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in some.items()})
    axes = draw(drawn.filter(possible))
    what, media = axes["what"], {"image": "image", "audio": "audio"}.get(axes["what"])
    length, overflow = axes["length"]
    plan = Plan(
        **WHAT[what],
        **DRAWN[axes["drawn"]],
        engine=axes["engine"],
        steps=axes["steps"],
        cap=axes["cap"],
        mode=axes["mode"],
        max_length=length,
        overflow=overflow,
        template=axes["template"],
        shared=axes["shared"],
        clip=CLIP,
    )
    columns = COLUMNS[media or ("classify" if plan.labelled else plan.objective)]
    patient = plan.unit == "patient" and axes["story"] != "units change"
    consent = (
        axes["consent"] if patient or axes["consent"] == "column" else ""
    )  # a list of patients
    place = Place(
        columns=columns,
        rank=axes["rank"],
        patient=plan.unit == "patient",
        consent=consent,
        sheet=axes["sheet"],
        memory=0.0 if axes["disk"] else None,
    )
    unit = draw(st.sampled_from(OWNERS[:4]))
    ward = Ward(media=media, unit=unit, processes=axes["processes"])
    story = draw(STORIES[axes["story"]](plan, place, ward))
    files = story.files
    if all(each.unit == "record" for each in story.plans):  # a unit is a row
        files = {
            data: tuple(replace(row, owner=f"{data[0]}{n}") for n, row in enumerate(every))
            for data, every in files.items()
        }
    mine = [
        files[data][n].owner
        for data, every in story.files.items()
        for n, row in enumerate(every)
        if row.owner == unit
    ]
    chosen = draw(st.sampled_from(mine)) if mine else unit
    spans = st.sampled_from(((0, 99), (1, 99), (2, 99), (0, 1), (1, 2), (99, 99)))
    return Case(
        plans=story.plans,
        files=files,
        # What receipts show of a folder that was put back, a test of the ledger's own holds.
        ops=tuple(op for op in story.ops if not (axes["receipts"] and op[0] == "put back")),
        unit=chosen,
        places=story.places,
        kinds=dict.fromkeys(files, axes["kind"]),
        processes=axes["processes"],
        disk=axes["disk"],
        receipts=axes["receipts"],
        opted={owner: draw(spans) for owner in (chosen, "b", "e")},
    )


ROUND = ("train", "train", "train", "again")
BETWEEN = ("files", "files", "withdraw", "restart", "start", "copy", "put back")


@st.composite
def living(
    draw: st.DrawFn,
    plan: int,
    life: Plan,
    ward: Ward,
    versions: tuple[int, ...] = (1, 2),
) -> list[Op]:
    """Some rounds of a study, with what happens between any two messages. plan: its number; life:
    the plan; versions: which ones its files have yet to become."""
    ops: list[Op] = [("prepare", plan)]
    round_, left = 1, list(versions)
    steps = (*ROUND, *BETWEEN, *(("a rank ends",) if ward.processes > 1 else ()))
    for _ in range(draw(st.integers(2, 6))):
        step = draw(st.sampled_from(steps))
        adapter = draw(st.sampled_from(ADAPTERS))
        if step == "train" and round_ <= life.rounds:
            ops += draw(one_round(plan, round_, adapter, life.shared, left))
            round_ += 1
        elif step == "again" and round_ > 1:
            ops += draw(one_round(plan, round_ - 1, adapter, life.shared, left))
        elif step == "files" and left:
            ops.append(("files", left.pop(0)))
        elif step == "withdraw":
            ops.append(("withdraw", draw(st.sampled_from([*OWNERS, "7", "0", "1"]))))
        elif step in ("restart", "start"):
            ops += [(step,), ("prepare", plan)]
        elif step == "put back":
            ops += [(step,), *draw(st.sampled_from(((), (("restart",), ("prepare", plan)))))]
        elif step in ("copy", "a rank ends"):
            ops.append((step,))
    if round_ <= life.rounds:
        ops += draw(one_round(plan, round_, 1, life.shared, left))
    return ops


@st.composite
def one_round(
    draw: st.DrawFn, plan: int, round_: int, adapter: int, shared: bool, left: list[int]
) -> list[Op]:
    """A round's messages; where its sum alone is opened, with what happens between the two, and a
    second set for the same draw."""
    if not shared:
        return [("train", plan, round_, adapter)]
    again: tuple[Op, ...] = (("restart",), ("prepare", plan))
    back: tuple[Op, ...] = (("put back",), *again)
    set_: Op = ("masked", plan, round_, draw(st.sampled_from((0, 1))))
    files: tuple[Op, ...] = (("files", left[0]),) if left else ()
    between, after = draw(
        st.sampled_from(
            (
                *(((), ()), ((), (set_,)), (again, ()), ((("withdraw", "e"),), (set_,))),
                *((files, ()), (files, (set_,)), ((("copy",),), (("put back",), set_))),
                *(((("copy",),), (*back, set_)), ((("copy",),), back), ((), back)),
            )
        )
    )
    if between and between == files:
        left.pop(0)
    attempt = draw(st.sampled_from((1, 1, 2)))
    ready: Op = ("ready", plan, round_, adapter, attempt)
    return [ready, *between, ("masked", plan, round_, 0), *after]


@st.composite
def _rounds(draw: st.DrawFn, plan: Plan, place: Place, ward: Ward) -> _Story:
    files = {"records": tuple(draw(ward.rows()))}
    return _Story((plan,), (place,), files, tuple(draw(living(0, plan, ward))))


@st.composite
def _studies(draw: st.DrawFn, plan: Plan, place: Place, ward: Ward) -> _Story:
    """A second study on the same, grown, file, with another cap or on the very same view of it, in
    the process of the first or in another; and the first one goes on."""
    second = replace(plan, name="two", cap=draw(st.sampled_from((1, 2, plan.cap))))
    files = {"records": tuple(draw(ward.rows()))}
    grown, again = draw(st.booleans()), draw(st.sampled_from(((), ("restart",), ("start",))))
    ops = draw(living(0, plan, ward, versions=(1,)))
    ops += [("files", 2)] if grown else []
    ops += [again, ("prepare", 0)] if again else []
    ops += draw(living(1, second, ward, versions=() if grown else (2,)))
    if draw(st.booleans()):
        ops += draw(one_round(0, plan.rounds, 1, plan.shared, []))
    return _Story((plan, second), (place,), files, tuple(ops))


@st.composite
def _continuous(draw: st.DrawFn, plan: Plan, place: Place, ward: Ward) -> _Story:
    """A life of two rounds, and rounds beyond it; who comes later has notes of who came first."""
    plan = replace(plan, life=2.2, sigma=2.5 * (plan.cap if plan.drawn == "record" else 1), steps=1)
    files = {"records": tuple(draw(ward.rows()))}
    between: list[tuple[Op, ...]] = [
        *((), (), (("withdraw", draw(st.sampled_from(OWNERS))),)),
        *((("start",), ("prepare", 0)), (("restart",), ("prepare", 0))),
        *(((("a rank ends",),),) if ward.processes > 1 else ()),
    ]
    ops: list[Op] = [("prepare", 0)]
    for version in range(3):
        first = 1 + 3 * version
        many = draw(st.integers(1, 3))
        ops += [("files", version)]
        ops += [("train", 0, round_, 1) for round_ in range(first, first + many)]
        ops += draw(st.sampled_from(between))
    return _Story((plan,), (replace(place, policy="max_epsilon = 2.6"),), files, tuple(ops))


@st.composite
def _queries(draw: st.DrawFn, plan: Plan, place: Place, ward: Ward) -> _Story:
    """Held-out records are asked about too, whose patients may be those of the training file."""
    plan = replace(plan, queries=True, apart=draw(st.booleans()))
    place = replace(place, held_out="held", held_apart=draw(st.booleans()))
    files = {"records": tuple(draw(ward.rows(OWNERS[:4])))}
    files["held"] = tuple(draw(ward.rows(draw(st.sampled_from(("abc", "cdef", "efgh"))))))
    ops: list[Op] = []
    for op in draw(living(0, plan, ward)):
        ops.append(op)
        if op[0] in ("train", "masked"):
            adapter = op[3] if op[0] == "train" else draw(st.sampled_from(ADAPTERS))
            ops.append(("query", 0, op[2], adapter))
    return _Story((plan,), (place,), files, tuple(ops))


@st.composite
def _two_sets(draw: st.DrawFn, plan: Plan, place: Place, ward: Ward) -> _Story:
    """Two datasets that were declared disjoint; texts or patients may be in both all the same."""
    policy = f"max_epsilon = {draw(st.sampled_from((1.6, 3.0, 1e6)))}"
    both = tuple(
        replace(place, data=name, apart=(other,) if said else (), policy=policy)
        for name, other, said in (
            ("first", "second", draw(st.booleans())),
            ("second", "first", True),
        )
    )
    files = {"first": tuple(draw(ward.rows(OWNERS[:4])))}
    files["second"] = tuple(draw(ward.rows(draw(st.sampled_from(("ghi", "cghi"))))))
    ops = [*draw(living(0, plan, ward)), ("files", 0), ("place", 1)]
    ops += draw(living(1, plan, ward))
    return _Story((plan, replace(plan, name="two")), both, files, tuple(ops))


@st.composite
def _units_change(draw: st.DrawFn, plan: Plan, place: Place, ward: Ward) -> _Story:
    """Records are protected first and patients later, or the other way round."""
    alone = replace(plan, unit="record", drawn="unit")
    patient = replace(plan, unit="patient")
    order = [(alone, False), (patient, True)]
    if draw(st.booleans()):
        order.reverse()
    plans = tuple(replace(p, name=n) for (p, _), n in zip(order, ("one", "two"), strict=True))
    places = tuple(replace(place, patient=named) for _, named in order)
    files = {"records": tuple(draw(ward.rows()))}
    ops = [*draw(living(0, plan, ward)), ("files", 1), ("place", 1)]
    ops += draw(living(1, plan, ward, versions=()))
    return _Story(plans, places, files, tuple(ops))


STORIES = {
    "rounds": _rounds,
    "studies": _studies,
    "continuous": _continuous,
    "queries": _queries,
    "two sets": _two_sets,
    "units change": _units_change,
}

# ----------------------------------------------------------------------------- a hostile courier

NUMBERS = st.integers(0, 2**16 - 1)
ASKED_AT_ANY_TIME = ("prepare", "train", "alone", "query", "ready", "masked", "end")
ODD_ROUNDS = (1, 1, 2, 3, 0, 4, -1, 10**9)
ODD_ATTEMPTS = (1, 2, 3, 0, -1, 10**7)


@st.composite
def hostile_cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """A case with a courier that is hostile (property_courier), between any two messages and in
    place of some, and with a coordinator who signs whatever it wants to ask."""
    case = draw(cases(**fixed))
    many = st.sampled_from((0, 0, 1, 1, 2))
    ops: list[Op] = []
    for op in case.ops:
        ops += [draw(_hostile_act(len(case.plans))) for _ in range(draw(many))]
        if op[0] in ASKED_AT_ANY_TIME:
            what = draw(st.sampled_from((None, None, *ON_THE_NEXT)))
            if what is not None:
                ops += [("courier", what, draw(NUMBERS)), op]
                ops += [("prepare", op[1])] if what == "kill" else []
        ops.append(op)
    ops += [draw(_hostile_act(len(case.plans))) for _ in range(3)]
    return replace(case, ops=tuple(ops))


@st.composite
def _hostile_act(draw: st.DrawFn, plans: int) -> Op:
    act = draw(st.sampled_from(("replay", "replay", "forge", "forge", "garble", "odd", "odd")))
    if act != "odd":
        return "courier", act, draw(NUMBERS)
    kind, plan = draw(st.sampled_from(ASKED_AT_ANY_TIME)), draw(st.integers(0, plans - 1))
    round_, adapter = draw(st.sampled_from(ODD_ROUNDS)), draw(st.sampled_from(ADAPTERS))
    given = {
        "prepare": (),
        "end": (),
        "masked": (round_, draw(st.sampled_from((0, 1, 2)))),
        "ready": (round_, adapter, draw(st.sampled_from(ODD_ATTEMPTS))),
    }
    return kind, plan, *given.get(kind, (round_, adapter))
