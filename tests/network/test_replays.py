"""A coordinator that sends messages of secure aggregation again over the wire, as they were or for
another set or attempt: a site answers with the same bytes, not at all, or with a draw that it paid
for anew."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from fedtune.flower.ports import free_port
from tests.network import remains
from tests.network.kit import PRIVATE, SECURE, SITES, Consortium, consortium, end, until

ROUNDS = 2
# Words of one draw for two sets of sites would open what lies between them.
REPLAYS = """
import dataclasses, hashlib, json
from pathlib import Path
from flwr.app import ConfigRecord
from fedtune.core.secagg.statement import parse_set, set_text
from fedtune.server import secure_round
honest, sent = secure_round.exchange, {}

def also_again(progress, roster, key, names, order, take):
    honest(progress, roster, key, names, order, take)
    number, kind = order.round, order.kind
    sent[number, kind] = order, dataclasses.replace(progress)
    if kind != "train.masked":
        return
    statements = parse_set(str(order.said["set"]["statements"]))
    fewer = {"set": ConfigRecord({"statements": set_text(statements[:2])})}
    ready, as_it_was = sent[number, "train.ready"]
    first, at_first = sent[1, "train.masked"]
    for what, other, then in (
        ("masked again", order, progress),
        ("masked of the first round", first, at_first),
        ("for fewer sites", dataclasses.replace(order, said=fewer), progress),
        ("for another attempt", dataclasses.replace(order, attempt=order.attempt + 1), progress),
        ("for another round", dataclasses.replace(order, round=3 - number), progress),
        ("ready again", ready, as_it_was),
        ("ready of the first round", *sent[1, "train.ready"]),
    ):
        def note(answer):
            site = answer.reply.content["site"]
            record = next(name for name in answer.reply.content if name != "site")
            arrays = answer.reply.content[record]
            body = "".join(hashlib.sha256(a.data).hexdigest() for a in arrays.values())
            fields = {"what": what, "round": number, "site": answer.name, "body": body}
            fields |= {"status": site["status"], "ready": site.get("ready", "")}
            with Path("replays.jsonl").open("a") as file:
                file.write(json.dumps(fields) + chr(10))
            return "noted"
        honest(then, roster, key, names, other, note)

secure_round.exchange = also_again
"""
ANSWERS = {  # to what is sent again in each round: the status of every site's answer
    "masked again": ("masked", "masked"),
    # Words that the coordinator gave a receipt for are kept by nobody.
    "masked of the first round": ("masked", "void"),
    "for fewer sites": ("void", "void"),
    "for another attempt": ("void", "void"),
    "for another round": ("void", "void"),
    "ready again": ("ready", "ready"),
    # In the second round: a new draw, of which nothing was ever masked, and paid for as one.
    "ready of the first round": ("ready", "ready"),
}


@pytest.mark.long
def test_what_a_coordinator_sends_again_opens_nothing_more(tmp_path: Path, tiny_base: Path) -> None:
    with consortium(tmp_path, "127.0.0.1", free_port()) as made:
        made.lay_out(tiny_base, PRIVATE, ROUNDS, tables=SECURE)
        made.broken = {"hub": REPLAYS}
        server = made.server()
        until(made.listens, 120, made.told)
        for name in SITES:
            made.join(name)
        made.pin_peers()
        for name in SITES:
            made.client(name)
        assert server.wait(600) == 0, made.told()
        for process in made.running:
            end(process)
        remains.check_run(made)
        check_answers(made)
        for name in SITES:
            charged = Counter(each.charge.round for each in made.spending(name))
            assert charged == made.noised(name) == {1: 2, 2: 1}


def check_answers(made: Consortium) -> None:
    """Check the answers to all that was sent again: their status, and that words of one draw, and
    its statement, are the same bytes each time."""
    rows = [json.loads(row) for row in (made.hub / "replays.jsonl").read_text().splitlines()]
    assert len(rows) == len(ANSWERS) * len(SITES) * ROUNDS
    same: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in rows:
        status = ANSWERS[row["what"]][row["round"] - 1]
        assert row["status"] == status, row
        if row["round"] == 1 and status != "void":
            same[row["site"], status].add(row["body"] + row["ready"])
    assert len(same) == 2 * len(SITES) and all(len(seen) == 1 for seen in same.values())
