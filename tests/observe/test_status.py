"""`fedtune status` tells the truth about a run: where it is, and whether it still lives."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fedtune.cli.status import add_to
from fedtune.core.errors import InfrastructureError, InputError, PolicyRefused
from fedtune.observe import StatusFile, observer
from fedtune.observe import status as status_module
from fedtune.observe.log import STRICT
from fedtune.observe.status import held, read_status
from fedtune.officer.site_files import sites_in
from tests.guarantee.world import lay_out, patients
from tests.observe.test_log import NOTE, ROUND, lines
from tests.simulated import simulate

app = typer.Typer()
app.callback()(lambda: None)
add_to(app, "Use a run")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["status", *map(str, arguments)])


def test_a_whole_study_leaves_a_log_and_a_status_without_a_word_of_a_record(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    rows = [{"who": f"p{n}", "q": f"{NOTE} {n}", "a": "y"} for n in range(12)]
    study, out = lay_out(tmp_path, tiny_base, rows, patients(12)), tmp_path / "run"
    heard: list[str] = []
    with observer("coordinator", out, then=lambda kind, data: heard.append(kind)) as seen:
        simulate(study, sites_in(tmp_path), out, on_event=seen)
    assert [line["event"] for line in lines(out / "log.jsonl") if line["event"] != "site"] == [
        "start", "planned", *["round"] * 3, "done",
    ]  # fmt: skip
    # Before the run: each site's records, and what they have paid.
    of_run = heard[heard.index("start") :]
    assert {*heard[: heard.index("start")]} <= {"records", "step"}
    assert of_run[0] == "start" and of_run[-1] == "done"
    kept = read_status(out)
    assert (kept.state, kept.status["round"], kept.status["rounds"]) == ("done", 3, 3)
    north = kept.status["sites"]["north"]
    assert (
        0 < north["epsilon"] <= north["planned"] + 1e-6
        and north["bytes_up"] > 0
        and north["status"] == "trained"
    )
    for file in ("log.jsonl", "status.json"):
        text = (out / file).read_text()
        assert "Ackroyd" not in text and "patient-" not in text
    shown = run(out)  # no terminal: printed once
    assert shown.exit_code == 0, shown.output
    for word in ("inventory", "done", "round 3/3", "north", "south", "trained"):
        assert word in shown.output
    at_site = run(tmp_path / "site-north.toml", "--once")
    assert at_site.exit_code == 2 and "no status.json" in at_site.stderr


def test_a_site_shows_its_budget_beside_its_last_events(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    study = lay_out(tmp_path, tiny_base, patients(12))
    site = tmp_path / "site-north.toml"
    with observer("site", tmp_path / "state-north") as seen:
        seen("joined", {"text": "connected; waiting for work"})
        none = run(site, "--once")
        assert "running" in none.output and "no ledger yet" in none.output
        simulate(study, sites_in(tmp_path), tmp_path / "run")
        seen("answered", {"kind": "train", "text": "train: done; waiting for work"})
        shown = run(site, "--once")
    assert shown.exit_code == 0, shown.output
    for word in ("running", "answered", "budget of records", "remains"):
        assert word in shown.output
    assert "stopped" in run(site, "--once").output


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError), observer("coordinator", tmp_path / "run") as seen:
        seen("step", {"text": "preparing"})
        raise InfrastructureError("no site came")
    assert not (tmp_path / "run").exists()


def test_a_run_that_breaks_off_says_so(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError), observer("coordinator", tmp_path / "run") as seen:
        seen("start", {"study": "inventory", "rounds": 8, "done": 0})
        raise InfrastructureError(NOTE)
    kept = read_status(tmp_path / "run")
    assert (kept.state, kept.status["error"]) == ("stopped", "InfrastructureError")
    assert lines(tmp_path / "run" / "log.jsonl")[-1]["error"] == "InfrastructureError"
    assert "Ackroyd" not in (tmp_path / "run" / "status.json").read_text()
    failed = run(tmp_path / "run", "--check")
    assert failed.exit_code == 4 and "stopped" in failed.stderr


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (KeyboardInterrupt(), "stopped (Ctrl-C)"),
        (InfrastructureError("stopped by SIGTERM before it was done"), "stopped (SIGTERM)"),
        (PolicyRefused(f"{NOTE} policy.max_delta {NOTE}"), "PolicyRefused  policy.max_delta"),
    ],
)
def test_what_stopped_a_run_is_said_and_a_persons_ctrl_c_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, shown: str
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    with suppress(BaseException), observer("coordinator", tmp_path, early=True) as seen:
        seen("start", {"study": "inventory", "rounds": 8, "done": 0})
        raise error
    said = run(tmp_path, "--once").output
    assert shown in said and "Ackroyd" not in (tmp_path / "status.json").read_text()
    assert "InfrastructureError" not in said and "KeyboardInterrupt" not in said


def test_a_coordinator_shows_its_address_who_is_connected_and_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    with observer("coordinator", tmp_path / "run", more=[StatusFile(tmp_path)]) as seen:
        where = {"address": "hub.example:8443", "fingerprint": "ab12 cd34"}
        seen("listening", {"text": NOTE, "participants": ["north", "west"], **where})
        said = run(tmp_path, "--once").output
        assert "waiting" in said and said.count("not connected") == 2
        assert "at hub.example:8443, consortium ab12 cd34" in said
        seen("connected", {"name": "north", "text": NOTE})
        seen("start", {"study": "inventory", "rounds": 8, "done": 0})
        seen("planned", {"study": "inventory", "participants": ["north"],
                         "planned": {"north": 2.0000001}})  # fmt: skip
        seen("round", {"round": 1, "rounds": 8, "participants": ["north"], "seconds": 90.0})
        said = run(tmp_path, "--once").output
        assert "round 1/8" in said and "left" not in said  # it read the records, once
        seen("round", {"round": 2, "rounds": 8, "participants": ["north"], "seconds": 15.0,
                       "epsilon": {"north": 0.5}})  # fmt: skip
        said = run(tmp_path, "--once").output
        assert "15 s a round, about 90 s left" in said and "0.5 of 2.001" in said
        assert said.count("not connected") == 1
        seen("disconnected", {"name": "north", "text": NOTE})
        assert "trained, not connected" in run(tmp_path, "--once").output
    assert "Ackroyd" not in (tmp_path / "run" / "status.json").read_text()
    assert lines(tmp_path / "run" / "log.jsonl")[0]["event"] == "listening"


def test_a_site_whose_study_is_finished_says_what_it_waits_for(tmp_path: Path) -> None:
    with observer("site", tmp_path) as seen:
        seen("joined", {"address": "hub.example:8443"})
        facts = {
            "site": "north",
            "study": "inventory",
            "rounds": 2,
            "round": 2,
            "status": "trained",
        }
        seen("answered", facts)
        assert "finished" not in run(tmp_path, "--once").output
        seen("waiting", {"address": "hub.example:8443", "study": "inventory", "done": 2})
        said = run(tmp_path, "--once").output
        assert "finished; waiting for another study" in said
        assert "coordinator at hub.example:8443" in said
        seen("waiting", {"address": "hub.example:8443"})
        assert "finished" not in run(tmp_path, "--once").output


def test_a_site_whose_last_answer_failed_is_not_well(tmp_path: Path) -> None:
    with observer("site", tmp_path) as seen:
        seen("answered", {"kind": "prepare", "status": "admitted"})
        assert run(tmp_path, "--check").output == "ok\n"
        for event in ("answered", "failed"):  # answered with a failure; or not at all
            seen(event, {"kind": "train", "status": "failed", "error": "LedgerError"})
            failed = run(tmp_path, "--check")
            assert failed.exit_code == 4 and "failed here (LedgerError)" in failed.output
            assert "the last request failed here (LedgerError)" in run(tmp_path, "--once").output
        seen("answered", {"kind": "train", "status": "ok"})
        assert run(tmp_path, "--check").output == "ok\n"
        assert "failed here" not in run(tmp_path, "--once").output


CHILD = """
import sys, time
from pathlib import Path
from fedtune.observe import StatusFile, observer
home = Path(sys.argv[1])
seen = observer("coordinator", home / "run", more=[StatusFile(home)]).__enter__()
seen("start", {"study": "inventory", "rounds": 8, "done": 0})
print("ready", flush=True)
time.sleep(600)
"""


def killed(folder: Path) -> None:
    """A coordinator that is killed: running before, gone after."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout and child.stdout.readline() == "ready\n"
        for place in (folder, folder / "run"):
            assert read_status(place).state == "running"
            assert run(place, "--check").output == "ok\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    for place in (folder, folder / "run"):
        assert read_status(place).state == "gone"
        assert run(place, "--check").exit_code == 4
        assert "its process is no more" in run(place, "--once").output


def test_a_process_that_was_killed_is_gone_and_a_health_check_fails(tmp_path: Path) -> None:
    killed(tmp_path)


def test_twin_a_status_that_believes_its_file_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_module, "held", lambda path: True)
    with pytest.raises(AssertionError):
        killed(tmp_path)


def test_a_reader_never_sees_half_a_status(tmp_path: Path) -> None:
    sink, seen = StatusFile(tmp_path), 0
    sink.write()
    reader = subprocess.Popen(
        [sys.executable, "-c", "import sys,json\nwhile not sys.stdin.closed:\n"
         "  try: json.load(open(sys.argv[1]))\n  except FileNotFoundError: pass\n"
         "  print('.', end='', flush=True)", str(tmp_path / "status.json")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        sink("round", ROUND)
        seen += 1
    alive = reader.poll() is None
    reader.kill()
    out, err = reader.communicate()
    sink.close()
    assert alive and len(out) > 10 and seen > 10, err.decode()
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".new")] == []
    assert read_status(tmp_path).status["sites"]["west"]["missed"] == seen


LIVE = """
import sys, typer
from fedtune.cli.status import add_to
app = typer.Typer()
app.callback()(lambda: None)
add_to(app, "Use a run")
app(["status", sys.argv[1]])
"""


def test_in_a_terminal_it_follows_the_run_and_leaves_when_it_is_done(tmp_path: Path) -> None:
    shown, terminal = os.openpty()
    with observer("coordinator", tmp_path, more=[StatusFile(tmp_path)]) as seen:
        seen("start", {"study": "inventory", "rounds": 8, "done": 0})
        child = subprocess.Popen(
            [sys.executable, "-c", LIVE, str(tmp_path)],
            stdin=terminal, stdout=terminal, stderr=terminal,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        )  # fmt: skip
        os.close(terminal)
        text = until(shown, b"round 0/8")
        seen("round", ROUND)
        text += until(shown, b"round 2/8")
        assert child.poll() is None
        seen("done", {"out": str(tmp_path)})
        text += until(shown, b"done")
    assert child.wait(20) == 0
    os.close(shown)
    assert b"no answer in time" in text and b"running" in text


def until(terminal: int, word: bytes) -> bytes:
    text, deadline = b"", time.monotonic() + 20
    while word not in text and time.monotonic() < deadline:
        ready, _, _ = select.select([terminal], [], [], 0.2)
        text += os.read(terminal, 65_536) if ready else b""
    assert word in text, text
    return text


def test_what_is_not_a_status_is_said(tmp_path: Path) -> None:
    for body in ("{", "[]", json.dumps({"role": "site"})):
        (tmp_path / "status.json").write_text(body)
        assert run(tmp_path, "--once").exit_code == 2
    with pytest.raises(InputError):
        read_status(tmp_path / "nowhere")
    assert run(tmp_path / "nowhere").exit_code == 2
    assert not held(tmp_path / "nowhere")


def test_a_sink_that_fails_warns_once_and_does_not_stop_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[str] = []
    seen = observer("coordinator", tmp_path / "run", then=lambda kind, data: heard.append(kind))
    bad: dict[str, Any] = {"rounds": 8, "note": NOTE}
    with pytest.raises(TypeError):
        seen("start", bad)
    monkeypatch.delenv(STRICT)

    def broken(event: str, data: dict[str, Any]) -> None:
        raise ValueError(NOTE)

    seen = observer("coordinator", tmp_path / "run", then=lambda kind, data: heard.append(kind))
    seen._sinks.append(broken)
    with caplog.at_level(logging.WARNING), seen:
        for _ in range(3):
            seen("start", bad)
    assert heard == ["start"] * 3
    assert len(caplog.records) == 1 and "Ackroyd" not in caplog.text
    assert lines(tmp_path / "run" / "log.jsonl")[0]["dropped"] == ["note"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("study", "\x1b[31mtiny"),
        ("state", ["done"]),
        ("sites", {"north": {"status": "trained", "note": NOTE}}),
        ("sites", {"north": {"epsilon": "1"}}),
        ("last", [{"event": "[/x]"}]),
        ("last", {"event": "done"}),
        ("quality", {"[/x]": 1.0}),
        ("rounds", -1),
        ("seconds", 10**400),
        ("note", NOTE),
    ],
)
def test_a_status_that_fedtune_did_not_write_is_not_shown(
    tmp_path: Path, key: str, value: object
) -> None:
    body = {"role": "site", "state": "done", "sites": {}, "last": [], "quality": {"loss": None}}
    (tmp_path / "status.json").write_text(json.dumps(body))
    assert run(tmp_path, "--once").exit_code == 0
    (tmp_path / "status.json").write_text(json.dumps(body | {key: value}))
    with pytest.raises(InputError, match="not the status of a run"):
        read_status(tmp_path)
