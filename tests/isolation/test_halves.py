"""The halves of a site as `fedtune client` confines them, and what passes between them."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, suppress
from multiprocessing.connection import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtune.cli.status_view import confined_text
from fedtune.core import boot, isolation, system_calls
from fedtune.core.bases import find
from fedtune.core.config import AcceptanceTable, ConsentTable, SiteEvaluation, load_site
from fedtune.core.config.known_bases import KNOWN
from fedtune.core.errors import (
    ConfigError,
    FedtuneError,
    InfrastructureError,
    PolicyRefused,
    error_of,
    facts_of,
)
from fedtune.core.processes import Child, Program
from fedtune.core.vault import process as vault_process
from fedtune.core.wire import events, requests
from fedtune.core.wire.arrays import pack_arrays
from fedtune.core.wire.keys import SigningKey
from fedtune.core.wire.requests import Answer, Request, RequestError
from fedtune.courier import process
from fedtune.courier.process import (
    ELSEWHERE,
    describe_open_files,
    list_private,
    open_to_courier,
)
from fedtune.launch import site as launch_site
from fedtune.launch.site import Again, Halves, Shown
from fedtune.observe.from_courier import LONGEST
from fedtune.observe.status import StatusFile, read_status
from fedtune.officer.isolation_here import isolation_here
from fedtune.presets._sites import _isolation

ROOT = Path(__file__).resolve().parents[2]
CONFINES = pytest.mark.skipif(
    not isolation.landlock_version()
    or os.uname().machine not in system_calls.MACHINES
    or isolation.NO_VIEW in isolation.try_confinement()[1].missing,
    reason="this Linux has no Landlock, no namespaces, or another machine's system calls",
)


def a_site(folder: Path, data: str = 'path = "data.jsonl"', policy: str = "") -> Path:
    (folder / "data.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    state = folder / "state"
    for each in ("keys/renewed", "flower"):
        (state / each).mkdir(parents=True)
    SigningKey.at(state / "site.key")
    (state / "keys/node.key").write_text("a key")
    path = folder / "site.toml"
    path.write_text(
        f'[site]\nname = "north"\ndeclared_size = 20\nstate = "state"\n'
        f'[data]\n{data}\ncolumns = {{ text = "text" }}\n[policy]\n{policy}\n'
    )
    return path


@pytest.mark.parametrize(
    ("url", "families"),
    [
        ("sqlite:///records.db", []),
        ("duckdb:///records.duckdb", []),
        ("postgresql:///records?host=/run/postgresql", [socket.AF_UNIX]),
        ("postgresql://hub/records", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX]),
    ],
)
def test_a_vault_opens_the_sockets_that_its_database_needs(
    tmp_path: Path, url: str, families: list[int]
) -> None:
    data = f'url = "{url}"\noptions = {{ table = "n" }}'
    assert vault_process.families(load_site(a_site(tmp_path, data)), 1) == families


def confined(half: str, site: Path, *spool: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.isolation.halves", half, str(site), *map(str, spool)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@CONFINES
@pytest.mark.parametrize("place", ["a folder", "its state"])
def test_a_courier_reads_its_own_keys_and_writes_its_own_folders_and_no_more(
    tmp_path: Path, place: str
) -> None:
    """Also where its file lies in its state folder."""
    site = a_site(tmp_path)
    if place == "its state":
        site = site.rename(tmp_path / "state" / "site.toml")
        site.write_text(site.read_text().replace('state = "state"', 'state = "."'))
    found = confined("courier", site)
    assert found["reached"] == ["node.key", "site.toml", "writes flower"]
    assert found["missing"] == []


@CONFINES
def test_a_vault_reads_and_writes_what_it_did(tmp_path: Path) -> None:
    found = confined("vault", a_site(tmp_path))
    assert {"data.jsonl", "site.key", "writes state"} <= set(found["reached"])
    assert found["missing"] == [] and "seccomp" in found["means"]


@pytest.mark.parametrize("half", ["fedtune.core.vault.process", "fedtune.courier.process"])
def test_a_half_imports_no_library_that_starts_threads_before_it_is_confined(half: str) -> None:
    """A thread that runs already would not be confined: such a process refuses to go on."""
    look = f"import os, sys, {half}; print({{'numpy', 'torch', 'grpc', 'flwr'}} & {{*sys.modules}}"
    look += ", len(os.listdir('/proc/self/task')))"
    threads = {"OPENBLAS_NUM_THREADS": "4", "OMP_NUM_THREADS": "4"}
    done = subprocess.run(
        [sys.executable, "-c", look],
        cwd=ROOT,
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set() 1\n"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://hub.example/clinic", True),
        ("postgresql:///clinic?host=hub.example", True),
        ("postgresql:///clinic?hostaddr=10.0.0.1", True),
        ("postgresql:///clinic?host=/run/postgresql", False),
        ("postgresql:///clinic", False),
        ("sqlite:///clinic.db", False),
    ],
)
@CONFINES
def test_a_database_over_tcp_is_said_to_keep_the_vault_on_the_network(
    tmp_path: Path, url: str, says: bool
) -> None:
    found = confined("vault", a_site(tmp_path, f'url = "{url}"\noptions = {{ table = "n" }}'))
    kept = "a database over TCP keeps it on the network"
    assert (
        (kept in found["missing"]) == says == ("the vault can reach 127.0.0.1" in found["missing"])
    )


def test_records_where_a_courier_reads_its_code_are_said_to_be_open(tmp_path: Path) -> None:
    site = load_site(a_site(tmp_path))
    assert open_to_courier(site) == []
    inside = Path(isolation.__file__).parent / "records.jsonl"
    assert open_to_courier(site.changed(data={"path": inside})) == [inside]
    (said,) = describe_open_files(site.changed(data={"path": inside}))
    assert said == f"{inside} lies where the courier reads its code"


NAMED = """
import json, os, sys
from pathlib import Path
from fedtune.core import boot, isolation
from fedtune.core.config import load_site
from fedtune.courier.process import confine
boot.PACKAGES, images, view = sys.argv[2:]
if view == "the machine's":
    isolation.own_view = lambda *_: isolation.Confinement(missing=(isolation.NO_VIEW,))
missing = confine(load_site(Path(sys.argv[1]))).missing
try:
    names = os.listdir(images)
except OSError:
    names = []
print(json.dumps({"missing": missing, "names": names}))
"""


@CONFINES
def test_a_courier_reads_no_names_of_files_beside_its_code(tmp_path: Path) -> None:
    """Such as of a site in a checkout: an image may be called after a patient. Twin: without a view
    of its own it reads them, and says what it lacks."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "ann.png").touch()
    site = a_site(tmp_path, 'path = "images"')
    for view in ("its own", "the machine's"):
        command = [sys.executable, "-c", NAMED, str(site), str(tmp_path), str(images), view]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        found = json.loads(done.stdout)
        own = view == "its own"
        assert found["names"] == ([] if own else ["ann.png"])
        assert (found["missing"] == []) is own is (isolation.NO_VIEW not in found["missing"])


# ------------------------------------------------------------------------------ what is required


def told(site: Path, missing: list[str]) -> list[str]:
    """What a person at the site is told where the courier lacks something."""
    said: list[str] = []
    shown = Shown(load_site(site), lambda event, facts: said.append(facts["text"]))
    shown.from_vault("isolation", {"means": ["namespace", "seccomp"], "missing": []})
    shown.from_courier("isolation", {"means": ["seccomp"], "missing": missing})
    return said


def test_what_is_required_and_lacking_ends_the_client(tmp_path: Path) -> None:
    """Twin: where it is preferred, it is said and the client goes on."""
    site = a_site(tmp_path, policy='isolation = "required"')
    with pytest.raises(PolicyRefused, match="no Landlock"):
        told(site, ["no Landlock"])
    assert "OPEN" not in told(site, [])[0]
    site.write_text(site.read_text().replace("required", "preferred"))
    assert "OPEN: courier: no Landlock" in told(site, ["no Landlock"])[0]


WALLS = {"vault": ["namespace", "seccomp"], "courier": ["landlock 7", "seccomp"]}


def come_up(site: Path, courier: list[str], *reasons: str) -> None:
    """Have both halves say how they are confined, as a client that runs hears and keeps it."""
    loaded = load_site(site)
    with closing(StatusFile(loaded.site.state, role="site")) as status:
        shown = Shown(loaded, status)
        shown.from_vault("isolation", {"means": WALLS["vault"], "missing": []})
        told = {"means": courier, "missing": [], "reasons": [*reasons]}
        shown.from_courier("isolation", told)


def test_status_and_audit_log_say_how_the_halves_are_confined_and_which_wall_is_not_there(
    tmp_path: Path,
) -> None:
    site = a_site(tmp_path)
    why = "no view of its own: unshare: EPERM"
    come_up(site, WALLS["courier"], why)
    state = load_site(site).site.state
    told = read_status(state).status
    assert told["confined"] == WALLS | {"courier": [*WALLS["courier"], why]} and told["open"] == 0
    assert f"courier: landlock 7, seccomp, {why}; vault: namespace, seccomp" in confined_text(told)
    assert f"landlock 7, seccomp, {why}" in (state / "audit.jsonl").read_text()


def test_a_courier_does_not_choose_the_words_of_a_log(tmp_path: Path) -> None:
    site = a_site(tmp_path)
    come_up(site, ["seccomp", "Mrs Ackroyd, 71"], "no view of its own: unshare: Mrs Ackroyd")
    told = read_status(load_site(site).site.state).status
    assert told["confined"]["courier"] == ["seccomp", "other", "other"]


def test_doctor_tries_for_a_courier_that_is_elsewhere_nothing_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a vault's container what it would be given is neither here nor there: `doctor` refused a
    site that ran. Twin: a courier that runs beside the records."""
    site = a_site(tmp_path)
    none = isolation.Confinement(missing=(isolation.NO_VIEW,))
    monkeypatch.setattr(
        isolation, "try_confinement", lambda: (isolation.Confinement(("seccomp",)), none)
    )
    assert isolation_here(load_site(site)).lacks == (isolation.NO_VIEW,)
    come_up(site, ["landlock 7", "seccomp"])
    assert isolation_here(load_site(site)).lacks == (isolation.NO_VIEW,)
    come_up(site, ["seccomp", ELSEWHERE])
    here = isolation_here(load_site(site))
    assert here.lacks == () and f"courier: seccomp, {ELSEWHERE}" in here.text


# ------------------------------------------------------------------------- what passes between them


def passed(sent: Request | Answer, receive: Callable[[Any], Any]) -> Any:
    here, there = Pipe()
    with here, there:
        requests.send(here, sent)
        return receive(there)


def test_requests_and_answers_pass_whole() -> None:
    arrays = pack_arrays({"b": np.arange(6, dtype=np.int8), "a": np.ones((2, 3), np.float32)})
    asked = Request("train", {"order": {"round": 3, "late": False, "plan": "ä"}}, arrays)
    assert passed(asked, requests.receive_request) == asked
    said = Answer("site", {"status": "trained", "reason": "", "size": 3}, "update", arrays)
    assert passed(said, requests.receive_answer) == said


@pytest.mark.parametrize(
    "header",
    [
        {"kind": "read", "tables": {}, "arrays": []},
        {"kind": "train", "tables": {"order": {"x": []}}, "arrays": []},
        {"kind": "train", "tables": [], "arrays": []},
        {"tables": {}, "arrays": []},
    ],
)
def test_what_is_no_request_is_named_and_the_next_one_is_read(header: dict[str, Any]) -> None:
    here, there = Pipe()
    with here, there:
        here.send_bytes(json.dumps(header).encode())
        requests.send(here, Request("train", {}))
        with pytest.raises(RequestError):
            requests.receive_request(there)
        assert requests.receive_request(there).kind == "train"


@pytest.mark.parametrize(
    "sent",
    [
        *(b"[]", b"\xff", b"null", b"[" * 100_000),
        *(b'{"arrays": [["a"]]}', b'{"arrays": 3}', b'{"arrays": [["a", "f", [1e999], "n"]]}'),
    ],
)
def test_what_announces_nothing_ends_the_conversation(sent: bytes) -> None:
    here, there = Pipe()
    with here, there:
        here.send_bytes(sent)
        with pytest.raises(OSError, match="header"):
            requests.receive_request(there)


def test_a_request_longer_than_any_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MOST_WORDS", 1000)
    here, there = Pipe()
    with here, there:
        here.send_bytes(b"x" * 1001)
        with pytest.raises(OSError):
            requests.receive_request(there)


def test_the_arrays_of_a_request_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = pack_arrays({name: np.ones(8, np.float32) for name in "ab"})
    asked, both = Request("train", {}, arrays), 2 * len(arrays["a"].data)
    monkeypatch.setattr(requests, "MOST_BYTES", both)
    assert passed(asked, requests.receive_request).arrays == arrays
    here, there = Pipe()
    with here, there:
        requests.send(here, asked)
        monkeypatch.setattr(requests, "MOST_BYTES", both - 1)
        with pytest.raises(OSError):
            requests.receive_request(there)


@pytest.mark.parametrize(
    "told", [b"3", b"[1]", b'{"a": 1}', b"[" * 100_000, b'["log", 3]', b"\xff"]
)
def test_what_is_no_event_is_named(told: bytes) -> None:
    here, there = Pipe()
    with here, there:
        here.send_bytes(told)
        with pytest.raises(ValueError):
            events.receive(there)


def test_a_librarys_words_stay_in_the_vaults_own_log() -> None:
    """A library's warning may quote a record; fedtune's own are for the person at the screen."""
    told: list[str] = []
    ours, every = logging.getLogger("fedtune"), logging.getLogger()
    before = [*ours.handlers], [*every.handlers]
    events.pass_warnings_on(lambda event, facts: told.append(facts["text"]))
    try:
        logging.getLogger("a_library.tokens").warning("longer than 512: a secret")
        logging.getLogger("fedtune.site").warning("a record cannot be read (MemoryError)")
    finally:
        ours.handlers, every.handlers = before
    assert told == ["a record cannot be read (MemoryError)"]


def test_a_courier_is_kept_from_all_that_is_private(tmp_path: Path) -> None:
    """Held-out records, a model of the site's alone, a database's file, a run's ledger, who opted
    out and the salt, too."""
    site = load_site(a_site(tmp_path))
    held_out = SiteEvaluation(path=tmp_path / "held.jsonl", columns=site.data.columns)
    accepted = AcceptanceTable(
        path=tmp_path / "judged.jsonl",
        columns=site.data.columns,
        thresholds={"loss": 1.0},
        alone=tmp_path / "own-run",
    )
    consent = ConsentTable(
        opt_outs=tmp_path / "out.txt", hashing="salted-sha256", salt_file=tmp_path / "salt.txt"
    )
    url = f"sqlite:///{tmp_path}/clinic.db"
    data = site.data.model_copy(update={"url": url, "consent": consent})
    table = site.site.model_copy(update={"ledger": tmp_path / "book"})
    tables = {"data": data, "site": table, "evaluation": held_out, "acceptance": accepted}
    names = {path.name for path in list_private(site.model_copy(update=tables))}
    kept_from = {"state", "book", "clinic.db", "out.txt", "salt.txt", "held.jsonl"}
    assert names == kept_from | {"judged.jsonl", "own-run"}


SECRET = "a-password-of-the-records"


def test_a_courier_does_not_get_the_databases_password_with_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: the vault, which reads the database, has it."""
    for name in ("CLINIC_PASSWORD", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("NO_PROXY", "hub.example")
    site, found = str(a_site(tmp_path)), dict[str, bytes]()
    halves: tuple[Program, ...] = ("courier", "vault")
    for half in halves:
        with Child(half, [site], home=tmp_path / half, log=tmp_path / f"{half}.log") as child:
            environment = Path(f"/proc/{child.pid}/environ")
            while not (inherited := environment.read_bytes()) and child.alive:
                pass  # for a moment a new program has none yet
            found[half] = inherited
    assert SECRET.encode() not in found["courier"]
    assert b"NO_PROXY=hub.example" in found["courier"]
    assert found["vault"].count(SECRET.encode()) == 3


@pytest.mark.parametrize("by", ["option", "url", "environment", "home"])
def test_a_password_where_a_courier_reads_is_said_to_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """Such as below /etc; here below what stands for it. Twin: a password elsewhere is not."""
    shared, elsewhere = tmp_path / "etc", tmp_path / "elsewhere"
    monkeypatch.setattr(process, "SYSTEM", (str(shared),))
    monkeypatch.delenv("PGPASSFILE", raising=False)
    for folder in (shared, elsewhere):
        folder.mkdir()
        (folder / ".pgpass").write_text(SECRET)
        url, options = "postgresql:///clinic", 'table = "notes"'
        if by == "option":
            options += f', password_file = "{folder}/.pgpass"'
        elif by == "url":
            url += f"?passfile={folder}/.pgpass"
        elif by == "environment":
            monkeypatch.setenv("PGPASSFILE", f"{folder}/.pgpass")
        else:
            monkeypatch.setenv("HOME", str(folder))
        text = f'url = "{url}"\noptions = {{ {options} }}'
        (tmp_path / folder.name / "site").mkdir()
        site = load_site(a_site(tmp_path / folder.name / "site", text))
        said = [path for path in open_to_courier(site) if path.name == ".pgpass"]
        assert said == ([shared / ".pgpass"] if folder is shared else [])


def test_halves_that_last_are_started_again_and_those_that_do_not_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, waited = [0.0], list[float]()
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=waited.append)
    monkeypatch.setattr(launch_site, "time", clock)
    again = Again(Shown(load_site(a_site(tmp_path)), lambda *_: None))
    ended = InfrastructureError("the vault ended by itself")
    for _ in range(10):  # as often as needed
        now[0] += 2 * launch_site.LONG
        assert again.after(ended)
    for _ in range(launch_site.FEW):
        assert again.after(ended)
    with pytest.raises(InfrastructureError, match="ended by itself"):
        again.after(ended)
    assert waited[-launch_site.FEW :] == [1, 2, 3]
    assert not again.after(None)


def test_the_newest_entry_is_noted_each_time_that_both_halves_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short they ran, so that a home that is put back before the next start is noticed."""
    site, happened = load_site(path := a_site(tmp_path)), list[str]()

    class Half(AbstractContextManager[None]):
        def __init__(self, name: str, *_: Any, **more: Any) -> None:
            self.name = name

        def __exit__(self, *_: object) -> None:
            happened.append(self.name)

    monkeypatch.setattr(launch_site, "Child", Half)
    monkeypatch.setattr(launch_site, "note_head", lambda home: happened.append(f"noted {home}"))
    link: Any = SimpleNamespace(keys=tmp_path / "state" / "link")
    for _ in range(2):
        with Halves(site, path, {}, link, processes=1, once=False, patience=0.0):
            happened.append("run")
    assert happened == 2 * ["run", "courier", "vault", f"noted {site.home}"]


@pytest.mark.parametrize(
    ("halves", "up", "again"),
    [
        (("vault", "courier"), "vault courier", True),
        (("vault", "courier"), "courier", False),
        (("vault", "courier"), "vault", False),
        (("vault",), "vault", True),
        (("vault",), "", False),
        (("courier",), "courier", True),
        (("courier",), "", False),
    ],
)
def test_halves_that_were_up_are_started_again_however_often_a_message_ends_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    halves: tuple[str, ...],
    up: str,
    again: bool,
) -> None:
    """The pause grows to a minute. Twin: halves of which one never came up."""
    waited, seen = list[float](), list[float]()
    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=waited.append)
    monkeypatch.setattr(launch_site, "time", clock)

    def notify(event: str, facts: dict[str, Any]) -> None:
        if event == "reconnecting":
            seen.append(facts["seconds"])

    shown = Shown(load_site(a_site(tmp_path)), notify, halves)
    decides, ended = Again(shown), InfrastructureError("the vault ended by itself")
    with suppress(InfrastructureError):
        for _ in range(70):
            if "vault" in up:
                shown.from_vault("ready", {})
            if "courier" in up:
                shown.from_courier("joined", {"text": "connected" * 1000})  # shown a few times
            assert decides.after(ended)
    assert waited == seen == ([*range(1, 60), *[60] * 11] if again else [1, 2, 3])


def test_a_courier_shows_only_what_it_may(tmp_path: Path) -> None:
    """A hostile one tries to show escapes, another's events, and figures that are none."""
    seen: list[tuple[str, dict[str, Any]]] = []
    shown = Shown(load_site(a_site(tmp_path)), lambda *told: seen.append(told))
    shown.from_courier("round", {"text": "forged"})
    shown.from_courier("refused", {"text": "\x1b[2J", "kind": 3, "epsilon": {"north": 0.1}})
    shown.from_courier("answered", {"text": "t" * 10_000, "bytes_up": -1, "bytes_down": 10**400})
    assert [event for event, _ in seen] == ["refused", "answered"]
    assert seen[0][1] == {"text": "?[2J"}
    assert set(seen[1][1]) == {"kind", "text"} and len(seen[1][1]["text"]) == LONGEST


def test_facts_of_an_answer_are_the_vaults_and_what_it_weighed_the_couriers(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    shown = Shown(load_site(a_site(tmp_path)), lambda event, facts: seen.append(facts))
    shown.from_vault("answered", {"site": "north", "status": "trained", "text": "trained"})
    assert seen == []
    moved = {"kind": "train", "bytes_up": 5, "bytes_down": 7, "text": "other", "status": "refused"}
    shown.from_courier("answered", moved)
    assert seen[0]["status"] == "trained" and seen[0]["text"] == "trained"
    assert seen[0]["bytes_up"] == {"north": 5} and seen[0]["kind"] == "train"
    shown.from_vault("answered", {"site": "north", "text": "waits"})
    shown.flush(0)  # a courier that says nothing cannot hide it
    assert seen[1]["text"] == "waits"


def test_an_error_is_made_anew_as_one_of_ours() -> None:
    error = ConfigError("one", "two", "three")
    again = error_of(facts_of(error))
    assert isinstance(again, ConfigError) and str(again) == str(error)
    for name in ("SystemExit", "printable", ""):
        made = error_of({"error": name, "happened": "x"})
        assert isinstance(made, InfrastructureError) and isinstance(made, FedtuneError)


def test_a_childs_log_is_not_written_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A courier may leave a link where its next log goes: it is taken away, and no log kept."""
    ledger, log = tmp_path / "ledger.db", tmp_path / "flower" / "courier.log"
    ledger.write_text("entries")
    log.parent.mkdir()
    log.symlink_to(ledger)
    monkeypatch.setattr(boot, "command", lambda *_: [sys.executable, "-c", "print('said')"])
    before = set(threading.enumerate())
    with Child("courier", [], home=log.parent, log=log) as child:
        writes = set(threading.enumerate()) - before
        with suppress(InfrastructureError):  # nobody may read what it says
            child.wait()
    for thread in writes:
        thread.join(60)
    assert ledger.read_text() == "entries" and [*log.parent.iterdir()] == []


# ----------------------------------------------------------------------- bases, without a network


def test_a_vault_asks_for_a_base_that_is_not_here_and_for_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twin: without who would fetch it, it is looked for here as ever."""
    asked: list[str] = []
    name, digest = next((n, entry.digest) for n, entry in KNOWN.items())
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(find, "find_base", lambda model, digest=None: model)
    with find.fetching_elsewhere(asked.append):
        assert find.base_of_plan(digest, None, [digest]) == f"pypi:{name}"
        assert asked == [f"pypi:{name}"]
        find.base_of_plan(digest, str(tmp_path))  # a folder
        find.base_of_plan(digest, "org/model")  # what a hub calls so
        assert asked[1:] == ["org/model"]
        with pytest.raises(PolicyRefused, match="does not have"):
            find.base_of_plan(digest, None, [])  # not listed by the site
    find.base_of_plan(digest, None, [digest])
    assert len(asked) == 2


def test_only_what_the_site_names_or_lists_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(find, "find_base", lambda model, digest=None: fetched.append(model))
    path = a_site(tmp_path, policy="bases = []")
    listed = next(iter(KNOWN))
    for base in ("org/model", f"pypi:{listed}", "pypi:nothing", "/etc"):
        assert launch_site._fetch(path, base)["error"] == "PolicyRefused"
    path.write_text(path.read_text().replace("[data]", 'base = "org/model"\n[data]', 1))
    assert launch_site._fetch(path, "org/model") == {}
    path.write_text(path.read_text().replace("bases = []", 'bases = "any"'))
    assert launch_site._fetch(path, f"pypi:{listed}") == {}
    assert fetched == ["org/model", f"pypi:{listed}"]


@pytest.mark.parametrize("place", ["postgresql://hub.example/clinic#notes", "notes.csv"])
def test_init_requires_what_the_machine_and_the_records_allow(place: str) -> None:
    line = _isolation(place if "://" in place else Path(place))
    wanted = "preferred" if "://" in place or not isolation.landlock_version() else "required"
    assert line.startswith(f'isolation = "{wanted}"')
