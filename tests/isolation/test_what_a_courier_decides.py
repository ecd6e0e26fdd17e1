"""What a hostile courier can decide of its site's disk and of the vault's time by what it tells."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from fedtune.core import isolation, processes
from fedtune.core.config import load_site
from fedtune.core.config.state_files import COUNTS
from fedtune.core.data.dataset import Dataset
from fedtune.core.files.room import Room
from fedtune.core.processes import AT_A_SITE, Child, Program
from fedtune.core.vault.rank_process import Workers
from fedtune.core.vault.reading import keep_counts
from fedtune.core.wire import events
from fedtune.launch.event_reader import EventReader
from fedtune.launch.site import RENEWED, Shown, keys_folder, take_events
from fedtune.observe import JsonLog
from fedtune.observe import log as log_module
from fedtune.observe.status import StatusFile
from tests.isolation.test_halves import a_site
from tests.server.fakes import make_study

EVENT = json.dumps(["joined", {"text": "connected"}]).encode()


def ends(open_: ExitStack) -> tuple[Connection, socket.socket]:
    """Our end of a courier's connection, and the courier's."""
    here, there = socket.socketpair()
    open_.enter_context(there)
    return Connection(here.detach()), there


# ---------------------------------------------------------------------------- the time of a vault


@pytest.mark.parametrize("waits", [False, True], ids=["as it is", "twin"])
def test_half_an_event_keeps_nobody_waiting(waits: bool) -> None:
    """Who shows what a courier tells also takes what the vault tells, and a vault of which nobody
    takes it stands still after so many orders as its records make events. Twin: a Connection waits
    for the rest."""
    seen: list[str] = []

    def show(event: str, _facts: dict[str, Any]) -> bool:
        seen.append(event)
        return False

    with ExitStack() as open_:
        connection, courier = ends(open_)
        read = connection if waits else EventReader(connection)
        courier.sendall(struct.pack("!i", len(EVENT)) + EVENT[:5])
        taking = Thread(target=take_events, args=(read, show), daemon=True)
        taking.start()
        taking.join(1.0 if waits else 60.0)
        assert taking.is_alive() is waits and seen == []
        courier.sendall(EVENT[5:])
        taking.join(60.0)
        take_events(read, show)
        assert seen == ["joined"]
        read.close()


@pytest.mark.parametrize("seed", range(20))
def test_events_arrive_whole_however_they_are_cut(seed: int) -> None:
    draw = random.Random(seed)
    sent = [draw.randbytes(draw.choice((0, 1, 3, 4, 5, 300))) for _ in range(8)]
    stream = b"".join(struct.pack("!i", len(event)) + event for event in sent)
    received = []
    with ExitStack() as open_:
        connection, courier = ends(open_)
        read = EventReader(connection)
        while stream or read.poll():
            size = draw.choice((1, 2, 5, 400))
            courier.sendall(stream[:size])
            stream = stream[size:]
            while read.poll():
                received.append(read.recv_bytes())
        assert received == sent
        courier.close()
        assert read.poll()
        with pytest.raises(EOFError):
            read.recv_bytes()
        read.close()


def told_to_nobody(tell: events.Teller, count: int) -> bool:
    """Tell events of which nobody takes any; return whether that ended."""
    telling = Thread(
        target=lambda: [tell("answered", {"number": number}) for number in range(count)],
        daemon=True,
    )
    telling.start()
    telling.join(20.0)
    return not telling.is_alive()


def test_a_screen_that_stands_still_keeps_no_half_waiting() -> None:
    """After how many orders a vault waited would follow from how many events its records make.
    What was left out is counted."""
    with ExitStack() as open_:
        connection, end = ends(open_)
        tell, read = events.Teller(Connection(end.detach())), EventReader(connection)
        assert told_to_nobody(tell, 20_000)
        seen = list(received(read))
        shown = [facts["number"] for event, facts in seen]
        assert shown == list(range(len(shown))) and 10 < len(shown) < 20_000
        tell("answered", {"number": -1})
        (missing, told), after = received(read)
        assert missing == "log" and after == ("answered", {"number": -1})
        assert int(told["text"].split()[0]) == 20_000 - len(shown)
        read.close()


@pytest.mark.parametrize("seed", range(10))
def test_events_of_any_length_are_told_whole_or_not_at_all(seed: int) -> None:
    """Also those that a connection takes in part, while nobody reads the rest."""
    draw, said, shown, missing = random.Random(seed), 0, 0, 0
    with ExitStack() as open_:
        connection, end = ends(open_)
        tell, read = events.Teller(Connection(end.detach())), EventReader(connection)
        for number in range(300):
            if draw.random() < 0.9:
                tell("failed", {"text": "x" * draw.choice((1, 300, 70_000, 900_000)), "n": number})
                said += 1
            else:
                for event, facts in received(read):
                    shown += event == "failed"
                    missing += int(facts["text"].split()[0]) if event == "log" else 0
        for _ in range(30):  # the rest of one, how many were left out, and the last
            tell("failed", {"text": "the last"})
            said += 1
            for event, facts in received(read):
                shown += event == "failed"
                missing += int(facts["text"].split()[0]) if event == "log" else 0
        assert shown + missing == said and shown > 30 and missing > 20
        read.close()


def received(read: EventReader) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what has arrived whole."""
    while read.poll():
        yield events.receive(read)


@pytest.mark.parametrize("length", [-1, events.MOST + 1, 2**31 - 1])
def test_what_no_event_can_be_is_not_read(length: int) -> None:
    with ExitStack() as open_:
        connection, courier = ends(open_)
        read = EventReader(connection)
        courier.sendall(struct.pack("!i", length) + b"x")
        with pytest.raises(OSError, match="longer than any event may be"):
            read.poll()
        with pytest.raises(EOFError):
            read.recv_bytes()
        read.close()


# ---------------------------------------------------------------------------- the disk of a ledger


def test_how_the_halves_are_confined_is_told_once_and_entered_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each telling would be an entry of the audit log, when the courier likes, without end."""
    seen: list[str] = []
    site = load_site(a_site(tmp_path))
    shown = Shown(site, lambda event, facts: seen.append(event))
    acts = site.site.state / "audit.jsonl"
    shown.from_vault("isolation", {"means": ["namespace"], "missing": []})
    for number in range(5):
        shown.from_courier("isolation", {"means": [f"made up {number}"], "missing": []})
        shown.from_courier("joined", {"address": "hub:1", "text": "connected"})
    assert len(acts.read_text().splitlines()) == 1 and seen.count("isolation") == 1
    assert "a second time" in caplog.text
    shown.begin()  # the halves are started again
    shown.from_vault("isolation", {"means": ["namespace"], "missing": []})
    shown.from_courier("isolation", {"means": ["made up 0"], "missing": ["Landlock"]})
    assert len(acts.read_text().splitlines()) == 2 and seen.count("isolation") == 2


def test_no_entry_is_made_where_the_ledgers_room_would_give_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A courier that somebody else starts may come and go, and say something else each time. Words
    that no audit log may hold end nothing either. Twin: with space beside it there is one."""
    site = load_site(a_site(tmp_path))
    acts, entered = site.site.state / "audit.jsonl", []
    shown = Shown(site, lambda event, facts: None)
    for has_space, word in ((True, "seen"), (False, "other"), (True, "x" * 300), (True, "again")):
        monkeypatch.setattr(Room, "has_space", lambda *_, has=has_space: has)
        shown.from_vault("isolation", {"means": ["namespace"], "missing": []})
        shown.from_courier("isolation", {"means": [word]})
        shown.begin()
        entered.append(len(acts.read_text().splitlines()))
    assert entered == [1, 1, 1, 2]
    assert "no space" in caplog.text and "the words of" in caplog.text


def taken(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def test_a_sites_log_takes_its_space_at_its_first_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: a coordinator's grows with what is told."""
    for name, size in (("OF_SITE", 2**14), ("OF_A_LINE", 2**13), ("LIMIT", 2**14)):
        monkeypatch.setattr(log_module, name, size)
    grew = {}
    for role in ("site", "coordinator"):
        log = JsonLog(tmp_path / role / "log.jsonl", role=role)  # type: ignore[arg-type]
        log("waiting", {"text": "first"})
        first = taken(tmp_path / role)
        sizes = set()
        for _ in range(1000):
            log("joined", {"address": "hub.example.org:8443", "text": "again"})
            sizes.add(taken(tmp_path / role) - first)
        grew[role] = max(sizes) > 0
        assert min(sizes) >= 0
    assert grew == {"site": False, "coordinator": True}


def fill(log: JsonLog, lines: int) -> None:
    for _ in range(lines):
        log("joined", {"address": "hub.example.org:8443", "text": "again"})


@pytest.mark.parametrize("begun", [False, True], ids=["first event", "moves aside"])
def test_a_sites_log_takes_no_space_while_an_order_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Twin: after the order it does, and goes on."""
    for name, size in (("OF_SITE", 2**14), ("OF_A_LINE", 2**12)):
        monkeypatch.setattr(log_module, name, size)
    log, room = JsonLog(tmp_path / "log.jsonl", role="site"), Room(tmp_path, 1)
    if begun:
        while not log.path.exists() or log.path.stat().st_size <= 2**14:
            fill(log, 1)
    with room.give_up():
        before = taken(tmp_path)
        fill(log, 100)
        assert taken(tmp_path) == before and log.path.exists() is begun
        assert not begun or 2**14 < log.path.stat().st_size <= 2**14 + 2**12
    fill(log, 1)
    assert 0 < log.path.stat().st_size < 2**10, "a new one"
    assert log.path.with_name("log.jsonl.1").exists()


def test_a_log_whose_disk_has_not_its_space_asks_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Asking takes what is free for a moment. Twin: with space it is kept."""
    kept = []
    for has_space in (True, False):
        asked: list[int] = []

        def reserve(_file: int, size: int, has: bool = has_space, to: Any = asked) -> bool:
            to.append(size)
            return has

        monkeypatch.setattr(log_module, "reserve", reserve)
        log = JsonLog(tmp_path / str(has_space) / "log.jsonl", role="site")
        fill(log, 50)
        kept.append(log.path.exists() and log.path.stat().st_size > 0)
        assert len(asked) == (2 if has_space else 1)
    assert kept == [True, False] and caplog.text.count("events are not logged") == 1


def test_a_sites_status_is_written_while_no_order_is_answered(tmp_path: Path) -> None:
    """And takes as much of the disk whatever it says. Twin: a coordinator's."""
    seen = {}
    for role in ("site", "coordinator"):
        folder = tmp_path / role
        status, room = StatusFile(folder, role=role), Room(folder, 1)  # type: ignore[arg-type]
        file, lengths = folder / "status.json", []
        status("waiting", {"text": "first"})
        lengths.append(file.stat().st_size)
        with room.give_up():
            before = file.read_text()
            status("joined", {"address": "hub.example.org:8443", "text": "again"})
            changed = file.read_text() != before
        for _ in range(20):
            status("joined", {"address": "hub.example.org:8443", "text": "again"})
        lengths.append(file.stat().st_size)
        assert "joined" in file.read_text()
        seen[role] = (changed, len(set(lengths)) == 1)
        status.close()
    assert seen == {"site": (False, True), "coordinator": (True, False)}


def test_a_renewed_certificate_is_kept_while_no_order_is_answered(tmp_path: Path) -> None:
    """Twin: as soon as it has been."""
    site = load_site(a_site(tmp_path))
    key, shown = ec.generate_private_key(ec.SECP256R1()), Shown(site, lambda *_: None)
    kept = keys_folder(site) / RENEWED / "tls.crt"
    told = {"certificate": certificate_of(key)}
    with Room(site.site.state, 1).give_up():
        shown.from_courier("renewed", told)
        shown.flush(60)
        assert not kept.exists()
    shown.flush(60)
    assert kept.read_text() == told["certificate"]


def certificate_of(key: ec.EllipticCurvePrivateKey) -> str:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a")])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    return made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()


@pytest.mark.parametrize("event", ["log", "waiting", "answered", "no event", ""])
def test_what_a_courier_tells_is_shown_up_to_a_length(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, event: str
) -> None:
    """A screen may be a container's log, on the disk of the ledger. What was left out is counted,
    and what the vault tells is shown. Twin: little of it is."""
    seen: list[dict[str, Any]] = []
    shown = Shown(load_site(a_site(tmp_path)), lambda _, facts: seen.append(facts))
    lengths = []
    for most in (3, 5_000):
        for number in range(most):
            shown.from_courier(event, {"level": "WARNING", "text": f"{number:<2000}", "kind": "x"})
        lengths.append(sum(len(json.dumps(facts)) for facts in seen) + len(caplog.text))
    assert 0 < lengths[0] < 20_000 and lengths[1] < 2**17
    before = len(seen)
    shown.from_vault("answered", {"site": "a", "text": "round 1"})
    shown.from_courier("answered", {"bytes_up": 1})
    assert len(seen) == before + 1
    shown._allowance._since -= 3600
    shown.from_courier("waiting", {"text": "again"})
    assert "events of the courier were not shown" in caplog.text


def test_the_logs_of_a_sites_ranks_take_no_space_while_an_order_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They start in the midst of the first. Twin: the log of another process does."""
    asked: list[str] = []
    honest = processes.reserve

    def reserve(file: int, size: int) -> bool:
        asked.append(os.readlink(f"/proc/self/fd/{file}").rpartition("/")[2])
        return honest(file, size)

    monkeypatch.setattr(processes, "reserve", reserve)
    with Workers(a_site(tmp_path), 2) as ranks:
        log = ranks._log_of(1)
        assert asked == [log.name]
        asked.clear()
        started: tuple[Program, ...] = ("rank", "checks")
        for program in started:
            path = log if program == "rank" else log.with_name("checks.log")
            with Child(program, ["nonsense"], home=tmp_path / "home", log=path) as child:
                child._process.wait()
                deadline = time.monotonic() + 60
                while not path.stat().st_size and time.monotonic() < deadline:
                    time.sleep(0.05)
            assert path.stat().st_size, "what it said"
    assert asked == ["checks.log"]


WARNS = """
import sys, types, warnings
from fedtune.core import processes
def main(_words):
    warnings.warn("of one record")
    print("said", sys.dont_write_bytecode)
sys.modules["warns"] = types.SimpleNamespace(main=main)
processes.PROGRAMS = dict.fromkeys(processes.PROGRAMS, ("warns", "a program"))
processes._main(sys.argv[1])
"""


@pytest.mark.parametrize("program", AT_A_SITE)
def test_a_librarys_warning_is_in_no_log_of_a_site(program: str) -> None:
    """And it makes no file of byte code, whose name a courier could list. Twin: a program that
    holds no records says it."""
    said = {}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    for each in (program, "superlink"):
        with subprocess.Popen(
            [sys.executable, "-c", WARNS, each],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=environment,
        ) as started:  # fmt: skip
            assert started.stdout
            said[each] = started.stdout.read()
    assert said[program] == "said True\n"
    assert "of one record" in said["superlink"] and "said False\n" in said["superlink"]


def test_nothing_behind_a_link_is_brought_into_a_view(tmp_path: Path) -> None:
    (tmp_path / "site.key").write_text("a key")
    (folder := tmp_path / "flower").mkdir()
    (folder / "tls.crt").write_text("a certificate")
    (folder / "link").symlink_to("../site.key")
    assert isolation._files_in(folder) == {"tls.crt": b"a certificate"}


def test_counts_of_records_take_as_much_whatever_they_are(tmp_path: Path) -> None:
    """They are written in the midst of an order, on the ledger's disk."""
    site, study = load_site(a_site(tmp_path)), make_study()
    sizes = set()
    for number in (0, 10, 10**6):
        rejected = Counter({f"reason {n}": number for n in range(20 if number else 0)})
        keep_counts(site, site.data, study, Dataset([], number, rejected))
        found = site.site.state / COUNTS
        assert json.loads(found.read_text())[site.data.name]["units"] == number
        sizes.add(found.stat().st_size)
    assert len(sizes) == 1
