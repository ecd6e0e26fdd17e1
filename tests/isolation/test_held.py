"""A held answer has no byte that a hostile courier finds before it is let go."""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fedtune.core.processes import Child
from fedtune.core.vault.process import HOME
from fedtune.core.wire.requests import Request
from fedtune.officer.let_go import decide
from tests.client.airlock_kit import Asked, a_site
from tests.isolation.test_halves import CONFINES, ROOT

PIECE = 48  # bytes


@contextmanager
def a_vault(asked: Asked) -> Iterator[socket.socket]:
    """Run the site's vault in a process of its own; the courier's end of its socket."""
    asks, answers = socket.socketpair()
    tells, told = socket.socketpair()
    with asks, answers, tells, told:
        state = asked.site.site.state
        options = [str(asked.path), str(answers.fileno()), str(told.fileno()), "1", "{}"]
        options.append(asked.checked)
        keep = [answers.fileno(), told.fileno()]
        with Child("vault", options, home=state / HOME, log=state / "vault.log", keep=keep):
            answers.close()
            yield asks


def hostile(asked: Asked) -> list[Request]:
    """What a courier may send that has every order of the coordinator's, and changes some."""
    train = asked.request()
    forged = {"order": {**train.tables["order"], "nonce": "1" * 32}}
    other = asked.request(round_=9)  # not in the plan; a later one that is removes the answer
    return [
        asked.plan(),
        *(train, train, replace(train, kind="evaluate"), replace(train, kind="masked")),
        *(replace(train, kind="ready"), replace(train, tables=forged), replace(train, arrays={})),
        *(other, Request("train", {}), asked.plan(), train),
    ]


def pieces(asked: Asked) -> list[bytes]:
    """Pieces of the trained update, of each array that is long enough."""
    (kept,) = (asked.site.site.state / "outbox").glob("*-1-*.bin")
    arrays = [array.tobytes()[:PIECE] for array in load_file(kept).values()]
    return [piece for piece in arrays if len({*piece}) > PIECE // 2]


def search(
    how: str, asks: socket.socket, asked: Asked, folder: Path, looked_for: list[bytes]
) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.isolation.search", how, str(asked.path)]
    command += [str(asks.fileno()), str(folder)]
    done = subprocess.run(
        command,
        input=pickle.dumps((hostile(asked), looked_for)),
        capture_output=True,
        cwd=ROOT,
        pass_fds=[asks.fileno()],
    )
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.long
@CONFINES
def test_a_courier_finds_no_byte_of_a_held_answer_before_it_is_let_go(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Twins: afterwards it is on the socket; and who is not confined finds it on the disk."""
    asked = a_site(tmp_path, tiny_base)
    for folder in ("keys/renewed", "flower"):
        (asked.site.site.state / folder).mkdir(parents=True)
    assert asked.train().status == "waiting"
    looked_for = pieces(asked)
    assert looked_for and all(len(piece) == PIECE for piece in looked_for)
    with a_vault(asked) as asks:
        before = search("courier", asks, asked, tmp_path, looked_for)
        assert before["found"] == [] and before["missing"] == [], before
        assert before["statuses"].count("waiting") == 3 and "trained" not in before["statuses"]
        assert search("open", asks, asked, tmp_path, looked_for)["found"] == ["outbox"]
        decide(asked.site, [], refuse=False, every=True)
        after = search("courier", asks, asked, tmp_path, looked_for)
    assert after["found"] == ["the socket"] and "trained" in after["statuses"]
