"""Cases that broke the guarantee once, each in ordinary words of a ward, and what each showed."""

from __future__ import annotations

import base64
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fedtune.core.models.build import build
from fedtune.core.vault.worker import worker
from tests.guarantee.property_plans import (
    CLASSIFIES,
    COLUMNS,
    FHIR,
    Case,
    Crafted,
    Disk,
    Ids,
    Place,
    Plan,
    Row,
)
from tests.guarantee.property_world import World

X = "No acute findings. Discharged home."


def row(owner: str, q: str, a: str = "y", since: int = 0, until: int = 99, **more: Any) -> Row:
    """A patient's record with every column that any objective asks for."""
    return Row(
        owner, {"who": owner, "q": q, "a": a, "b": "ny"[a == "n"], "l": 1} | more, since, until
    )


def own(owners: str, since: int = 0) -> tuple[Row, ...]:
    """A note for each letter that nobody else has."""
    return tuple(
        row(o, f"fever, day {7 * ord(o) + since}", "yn"[n % 2], since) for n, o in enumerate(owners)
    )


def rounds(plan: int, first: int, last: int, adapter: int = 1) -> tuple[Any, ...]:
    return tuple(("train", plan, n, adapter) for n in range(first, last + 1))


HEAD: dict[str, Any] = {"objective": "classify", "base": "bert", "lora": "none"}
CLASSES = Place(columns=COLUMNS["classify"])
OTHERS = "bcdefghi"

# 6.99 C: which of a patient's notes were kept hung on whether anybody ever had them.
THE_CAP = Case(
    plans=(Plan(**HEAD), Plan("two", **HEAD)),
    files={
        "records": (
            row("a", X),
            *(row(o, f"fever, day {n}") for n, o in enumerate(OTHERS)),
            *(row(o, X, since=1) for o in OTHERS),
            *(row(o, f"cough, week {n}", "n", since=1) for n, o in enumerate(OTHERS)),
            *(row(o, f"rash, arm {n}", "n", since=1) for n, o in enumerate(OTHERS)),
        )
    },
    ops=(
        ("prepare", 0),
        *rounds(0, 1, 1),
        ("files", 1),
        ("restart",),
        ("prepare", 1),
        *rounds(1, 1, 1),
    ),
    unit="a",
    places=(CLASSES,),
)
# 7.42 C in rounds that a does not pay for: whoever came later with a's note was "there before".
A_LIFE = Plan(life=2.0, sigma=2.5, cap=3)
ARRIVALS = Case(
    plans=(A_LIFE,),
    files={
        "records": (
            row("a", X),
            *own("bcd"),
            *(row(o, X, "y", 1) for o in "mnopqrst"),
            *own("mnopqrst", 1),
        )
    },
    ops=(("prepare", 0), *rounds(0, 1, 4), ("files", 1), *rounds(0, 5, 7)),
    unit="a",
    places=(Place(policy="max_epsilon = 2.5"),),
)


def switched_off(kind: str, body: Any) -> Case:
    """24 C: one patient's row turned the others off."""
    return Case(
        plans=(Plan(**HEAD),),
        files={"records": (*(row(f"p{n}", f"fever, day {n}") for n in range(24)), Row("a", body))},
        ops=(("prepare", 0), *rounds(0, 1, 1)),
        unit="a",
        places=(CLASSES,),
        kinds={"records": kind},
    )


NO_ANSWER = {"who": "a", "q": "fever, day 1"}
OFF = {kind: switched_off(f"folder-{kind}", NO_ANSWER) for kind in ("jsonl", "csv", "parquet")}
LONG = "cough and fever " * 30


def too_long(**changes: Any) -> Case:
    """A record longer than the base has positions ended as `failed: RuntimeError`."""
    plan = Plan(**changes)
    return Case(
        plans=(plan,),
        files={"records": (*own("bcdef"), row("a", LONG))},
        ops=(("prepare", 0), *rounds(0, 1, 2)),
        unit="a",
        places=(Place(columns=COLUMNS[plan.objective]),),
    )


POSITIONS = {
    "head": too_long(objective="classify", base="bert", lora="none", max_length=8192),
    "adapter": too_long(objective="classify", base="bert", lora="whole", max_length=8192),
    "causal": too_long(base="opt", lora="whole", max_length=8192),
    "template": too_long(base="opt", lora="whole", max_length=8192, template="0" * 20 + "{text}"),
}
# The teacher reads fewer tokens than the student, and its refusal of a record was an exception.
TEACHER = Case(
    plans=(Plan(objective="distill", teacher=CLASSIFIES, max_length=48),),
    files={"records": (*own("bcdef"), row("a", "cough and fever " * 3))},
    ops=(("prepare", 0), *rounds(0, 1, 2)),
    unit="a",
    places=(Place(columns=COLUMNS["classify"]),),
)
# An image of one pixel's height: its short side was brought to size, and memory ended.
IMAGE = Case(
    plans=(Plan(base="llava"),),
    files={
        "records": (
            *(row(o, "a mass?", "yn"[n % 2], file=("image", n)) for n, o in enumerate("bcdef")),
            row("a", "a mass?", file=("image", 39_000_000, 1, "L")),
        )
    },
    ops=(("prepare", 0), *rounds(0, 1, 2)),
    unit="a",
    places=(Place(columns=COLUMNS["image"]),),
)
# A study on records, then patients are named: what a patient's five records moved was forgotten.
UNITS = Case(
    plans=(Plan("one", unit="record", **HEAD), Plan("two", **HEAD)),
    files={"records": (*own(OTHERS), *(row("a", f"note {n} of many", since=0) for n in range(5)))},
    ops=(
        ("prepare", 0),
        *rounds(0, 1, 3),
        ("place", 1),
        ("prepare", 1),
        *rounds(1, 1, 1),
    ),
    unit="a",
    places=(replace(CLASSES, patient=False), CLASSES),
)
# Two datasets declared disjoint: a text in both turned "admitted" into "refused".
APART = Case(
    plans=(Plan("one", sigma=2.0), Plan("two", sigma=2.0)),
    files={
        "first": (*own(OTHERS), row("a", X + " Follow-up in two weeks.")),
        "second": (*own("nopqrs"), row("n", X + " Follow-up in two weeks.")),
    },
    ops=(
        ("prepare", 0),
        *rounds(0, 1, 3),
        ("place", 1),
        ("prepare", 1),
        *rounds(1, 1, 3),
    ),
    unit="a",
    places=(
        Place(data="first", apart=("second",), policy="max_epsilon = 4.0"),
        Place(data="second", apart=("first",), policy="max_epsilon = 4.0"),
    ),
)
# A patient in both of them pays in one.
BOTH = replace(
    APART,
    files={
        "first": (*own(OTHERS), row("a", "fever, day 1")),
        "second": (*own("nopqrs"), row("a", "fever, day 2")),
    },
)
# Patient "7" withdrew; later rows are the unit, and the seventh was left out in that name.
ROW_7 = Case(
    plans=(Plan("one", **HEAD), Plan("two", unit="record", **HEAD)),
    files={
        "records": (
            row("a", "fever, day 40", "y", since=1),
            *(row(str(n), f"cough, week {n}", "yn"[n == 6]) for n in range(9)),
        )
    },
    ops=(
        ("prepare", 0),
        *rounds(0, 1, 1),
        ("withdraw", "7"),
        ("files", 1),
        ("place", 1),
        ("prepare", 1),
        *rounds(1, 1, 1),
    ),
    unit="a",
    places=(CLASSES, replace(CLASSES, patient=False)),
)

# Who opts out between rounds, while others' records come in and say what the unit's say.
OPTS_OUT = Case(
    plans=(Plan(**HEAD, q=0.5, rounds=4),),
    files={
        "records": (
            row("a", X),
            row("a", "fever, day 40", "n"),
            *own("bcdef"),
            *(row(o, X, since=1) for o in "bcdgh"),
        )
    },
    ops=(
        ("prepare", 0),
        *rounds(0, 1, 1),
        ("files", 1),
        *rounds(0, 2, 2),
        ("files", 2),
        *rounds(0, 3, 3),
        ("restart",),
        ("prepare", 0),
        *rounds(0, 4, 4),
    ),
    unit="a",
    places=(replace(CLASSES, consent="column"),),
    opted={"a": (1, 99), "c": (2, 99)},
)
# With q = 1 nobody's round passes by chance, as one in which the unit is not drawn.
OPT_OUTS = {
    kind: replace(
        OPTS_OUT,
        places=(replace(CLASSES, consent=kind),),
        plans=(replace(OPTS_OUT.plans[0], q=q),),
    )
    for kind, q in (("column", 0.5), ("list", 1.0), ("salted list", 0.5))
}


def visited(owner: str, number: int, site: str = "here", visit: str = "", old: str = "") -> Any:
    """A document of a bulk export, and the encounter that it is from; old: what it replaces."""
    visit = visit or f"visit-{owner}-{number}"
    subject = {"reference": f"Patient/{owner}"}
    text = base64.b64encode(f"fever, day {7 * ord(owner) + number}".encode()).decode()
    target = {"reference": f"DocumentReference/{old}"}
    written = {
        "resourceType": "DocumentReference",
        "id": f"{owner}-{number}",
        "status": "current",
        "subject": subject,
        "type": {"text": "yn"[number % 2]},
        "context": {"encounter": [{"reference": f"Encounter/{visit}"}]},
        "content": [{"attachment": {"contentType": "text/plain", "data": text}}],
        "relatesTo": [{"code": "replaces", "target": target}] if old else [],
    }
    provider = {"reference": f"Organization/{site}"}
    been = {"resourceType": "Encounter", "id": visit, "subject": subject}
    lines = (json.dumps(written), json.dumps(been | {"serviceProvider": provider}))
    return tuple(Row(owner, line) for line in lines)


# One patient's documents say that they replace everybody's, and name everybody's visits; and a
# patient's whose visit nobody else has seen names one of that patient.
BULK = Case(
    plans=(Plan(**HEAD),),
    files={
        "records": (
            *(line for n, o in enumerate("bcdefg") for line in visited(o, n)),
            *(
                line
                for n, o in enumerate("bcdefg")
                for line in visited("a", n, "elsewhere", f"visit-{o}-{n}", f"{o}-{n}")
            ),
            *visited("a", 9),
            *visited("h", 1, visit="visit-a-9")[:1],
            Row("a", "not JSON"),
        )
    },
    ops=(("prepare", 0), *rounds(0, 1, 2)),
    unit="a",
    places=(Place(columns='text = "text", label = "type"', who="patient"),),
    kinds={"records": FHIR},
)

# Nothing but ordinary notes.
ORDINARY = Case(
    plans=(Plan(**HEAD),),
    files={
        "records": tuple(row(o, f"fever, day {n}", "yn"[n == 6]) for n, o in enumerate("abcdefg"))
    },
    ops=(("prepare", 0), *rounds(0, 1, 2)),
    unit="a",
    places=(CLASSES,),
)
SHARED = replace(ORDINARY, plans=(Plan(**HEAD, shared=True),))
SUMS: dict[str, Any] = HEAD | {"objective": "prototypes"}  # class statistics
STATISTICS = replace(ORDINARY, plans=(Plan(**SUMS, rate=1.0), Plan("two", **SUMS, shared=True)))
GROWING = replace(
    ORDINARY,
    files={
        "records": (
            *ORDINARY.files["records"],
            *(row(o, X, "yn"[n % 2], since=1) for n, o in enumerate("abdfh")),
        )
    },
    ops=(
        ("prepare", 0),
        *rounds(0, 1, 1),
        ("files", 1),
        *rounds(0, 2, 2),
        ("withdraw", "c"),
        *rounds(0, 3, 3),
    ),
)


# A record that came after rank 0 had read, and before the other ranks did, ended every round.
ARRIVED = (row("a", X, since=1), *own("bcdefg"))
RANKS = Case(
    plans=(Plan(**HEAD),),
    files={"records": ARRIVED},
    ops=(("prepare", 0), ("files", 1), *rounds(0, 1, 2)),
    unit="a",
    places=(CLASSES,),
    processes=2,
)
# The same between two plans of one process, and where a rank is started anew.
RANKS_LATER = replace(
    RANKS,
    plans=(Plan(**HEAD), Plan("two", **HEAD)),
    ops=(
        ("prepare", 0),
        *rounds(0, 1, 1),
        ("files", 1),
        ("prepare", 1),
        *rounds(1, 1, 1),
        *rounds(0, 2, 2),
    ),
)
RANKS_ENDED = replace(
    RANKS,
    ops=(
        ("prepare", 0),
        *rounds(0, 1, 1),
        ("files", 1),
        ("a rank ends",),
        *rounds(0, 2, 3),
    ),
)
# Rank 0 left out who had no budget left, which was the unit alone, and the other ranks did not.
RANKS_FOR_LIFE = replace(
    ARRIVALS,
    files={"records": (row("a", X), *own("bcd", 1))},
    ops=(("prepare", 0), *rounds(0, 1, 1), ("files", 1), *rounds(0, 2, 3)),
    processes=2,
)

# A disk that takes the states of all the others, and not the unit's: an error of its own.
STATES = Case(
    plans=(Plan(clip=0.01),),  # which each row is longer than
    files={"records": own("abcdef")},
    ops=(("prepare", 0), *rounds(0, 1, 2)),
    unit="a",
    places=(Place(memory=0.0),),
    disk=Disk("states"),
)
STATES_ASKED = replace(
    STATES,
    plans=(Plan(**HEAD, queries=True),),
    files={"records": own("bcdef"), "held": own("aghi")},
    ops=(("prepare", 0), ("query", 0, 1, 1), ("query", 0, 2, 1)),
    places=(replace(CLASSES, held_out="held", memory=0.0),),
)
STATES_OF_RANKS = replace(STATES, processes=2)
# The ledger's members grow with the records.
MEMBERS = replace(
    STATES,
    plans=(Plan(cap=30, clip=0.01),),
    files={"records": (*own("bcdef"), *(row("a", f"note {n} of many") for n in range(30)))},
    disk=Disk("state"),
)

# Who was read takes part, and pays, until the site reads its file again: after a restart not.
LEAVING = replace(
    ORDINARY,
    files={"records": (*own("bcdef"), row("a", X, until=1))},
    ops=(
        ("prepare", 0),
        *rounds(0, 1, 1),
        ("files", 1),
        *rounds(0, 2, 2),
        ("restart",),
        ("prepare", 0),
        *rounds(0, 3, 3),
    ),
    unit="a",
)

# Nobody could attest to an empty file; who attested to an earlier one is there, and stays.
ATTESTED_BEFORE = replace(
    LEAVING,
    files={"records": (row("a", X), *own("bcdef", since=1))},
    ops=(("prepare", 0), *rounds(0, 1, 1), ("files", 1), ("start",), *rounds(0, 2, 2)),
    places=(replace(ORDINARY.places[0], sheet=True),),
)

# What two other patients took away counted those who withdrew between them.
RECEIPTS = replace(
    ORDINARY,
    ops=(
        ("prepare", 0),
        *rounds(0, 1, 1),
        ("withdraw", "b"),
        ("withdraw", "a"),
        ("withdraw", "c"),
        *rounds(0, 2, 2),
    ),
)

# A folder put back to before a draw was masked: masked again, for another set.
PUT_BACK = replace(
    SHARED,
    ops=(
        ("prepare", 0),
        ("ready", 0, 1, 1, 1),
        ("copy",),
        ("masked", 0, 1, 0),
        ("put back",),
        ("restart",),
        ("prepare", 0),
        ("masked", 0, 1, 1),
    ),
)
PUT_BACK_AT_WORK = replace(
    PUT_BACK,
    ops=(*PUT_BACK.ops[:5], ("masked", 0, 1, 1)),
)

# After a restart in mid-study the site was there or not, by one row since its records were
# attested, or by one of two patients.
ATTESTED = replace(
    ORDINARY,
    files={"records": (*own("bcdefg"), row("a", X, since=1))},
    ops=(
        ("prepare", 0),
        *rounds(0, 1, 1),
        ("files", 1),
        ("start",),
        ("prepare", 0),
        *rounds(0, 2, 2),
    ),
    places=(replace(CLASSES, sheet=True),),
)
TWO_PATIENTS = replace(
    ATTESTED,
    files={"records": (row("a", X), row("b", "fever, day 3"))},
    places=(CLASSES,),
)

PINNED = {
    "the-cap-knew-others": THE_CAP,
    "a-newcomer-was-there-before": ARRIVALS,
    "a-file-of-ones-own-jsonl": OFF["jsonl"],
    "a-file-of-ones-own-csv": OFF["csv"],
    "a-file-of-ones-own-parquet": OFF["parquet"],
    "too-long-for-a-head": POSITIONS["head"],
    "too-long-for-an-encoder": POSITIONS["adapter"],
    "too-long-for-a-causal-base": POSITIONS["causal"],
    "too-long-by-a-template": POSITIONS["template"],
    "too-long-for-the-teacher": TEACHER,
    "an-image-of-one-line": IMAGE,
    "records-then-patients": UNITS,
    "a-text-in-two-datasets": APART,
    "a-patient-in-two-datasets": BOTH,
    "patient-7-and-row-7": ROW_7,
    "opts-out-by-a-column": OPT_OUTS["column"],
    "opts-out-by-a-list": OPT_OUTS["list"],
    "opts-out-by-a-salted-list": OPT_OUTS["salted list"],
    "a-bulk-export": BULK,
    "opts-out-in-a-database": replace(OPT_OUTS["list"], kinds={"records": "sqlite"}),
    "a-bad-cell-in-a-database": switched_off("sqlite", {"who": "a", "q": 7.5, "a": ["x"]}),
    "class-statistics": replace(
        STATISTICS, ops=(*ORDINARY.ops, ("prepare", 1), *rounds(1, 1, 2)), kinds={"records": "csv"}
    ),
    "ranks-read-later": RANKS,
    "ranks-read-for-a-later-plan": RANKS_LATER,
    "a-rank-ended-and-read-anew": RANKS_ENDED,
    "ranks-of-a-study-for-life": RANKS_FOR_LIFE,
    "a-disk-full-of-states": STATES,
    "a-disk-full-of-states-asked-about": STATES_ASKED,
    "a-disk-full-of-the-ranks-states": STATES_OF_RANKS,
    "a-disk-full-of-members": MEMBERS,
    "receipts-of-two-others": RECEIPTS,
    "a-folder-put-back": PUT_BACK,
    "a-folder-put-back-at-work": PUT_BACK_AT_WORK,
    "a-restart-after-a-new-row": ATTESTED,
    "a-restart-with-two-patients": TWO_PATIENTS,
    "a-unit-whose-rows-leave-the-file": LEAVING,
    "a-file-that-nobody-could-attest-to": ATTESTED_BEFORE,
}


def beside(others: int, *ops: Any) -> Case:
    return Case(
        plans=(Plan(**HEAD | {"base": "wide"}),),
        files={"records": (*(row(f"p{n}", X) for n in range(others)), row("a", "fever", "n"))},
        ops=(("prepare", 0), *ops),
        unit="a",
        places=(CLASSES,),
    )


def teetering(bases: Ids, scale: float) -> Case | None:
    """A head whose logits of X change in the last bit when there is one row less, multiplied until
    that decides what is learnt: at 1e10 all that are beside a move, 6.00 C with five of them.

    Which numbers of rows this happens at is the matrix library's affair; None: at none here."""
    states = pooled(bases, beside(1))
    draw = np.random.default_rng(0)
    for others in range(12, 0, -1):
        rows = torch.cat([states[:1].expand(others, -1), states[1:]])
        for _ in range(50):
            weight = np.zeros((2, rows.shape[1]), np.float32)
            weight[0] = draw.normal(size=rows.shape[1]) * scale
            with torch.no_grad():
                known = torch.from_numpy(weight), torch.zeros(2)
                whole = functional.linear(rows, *known)[:-1, 0]
                alone = functional.linear(rows[:-1].clone(), *known)[:, 0]
            if (whole > alone.max()).all():
                bias = np.array([0.0, float(alone.max())], np.float32)
                arrays = {"head.weight": weight, "head.bias": bias}
                return beside(others, ("train", 0, 1, Crafted(arrays)))
    return None


def pooled(bases: Ids, case: Case) -> torch.Tensor:
    """What the head sees of the records of `case`, (records, H) fp32."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder), case, bases, None)
        study = world.begun[0].study
        network = build(study)
        site = worker(str(world.folder / "site-0.toml"))
        data = site.data_for(study, network, site.site.data)
        (batch,) = data.batches(range(len(data.dataset.examples)))
        return batch.prefix[batch.index.argsort(), 0].float()
