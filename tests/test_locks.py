"""Locks: one process at a time, let go however it ends; a pipe in their place is not waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedtune.core.config import load_site, load_study
from fedtune.core.errors import FedtuneError, InfrastructureError
from fedtune.core.files import locks
from fedtune.core.ledger.audit_log import AuditLog, signer_at, verify
from fedtune.core.wire.keys import SigningKey
from fedtune.launch import coordinator
from fedtune.launch import simulate as launch
from fedtune.observe import StatusFile
from fedtune.observe.log import JsonLog
from fedtune.observe.status import read_status
from fedtune.runs.choice import LOCK, hold_run
from fedtune.server.versions import Version, Versions
from tests.cli_kit import run as command
from tests.cli_kit import write_study
from tests.limits import wall_limit

KILLED = """
import os, signal, sys
from pathlib import Path
from fedtune.core.files import locks
path = Path(sys.argv[1])
with locks.hold_alone(path, "run", path.parent):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_lock_is_one_processs_and_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.hold_alone(path, "run", tmp_path) as killed:
        assert not killed
        said = rf"another run \(process {os.getpid()}\) uses {tmp_path}"
        with (
            pytest.raises(InfrastructureError, match=said),
            locks.hold_alone(path, "run", tmp_path),
        ):
            pass
    assert not list(tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL and path.exists()
    with locks.hold_alone(path, "run", tmp_path) as killed:
        assert killed
    with locks.hold_alone(path, "run", tmp_path) as killed:
        assert not killed


def test_a_folder_in_which_nothing_was_written_goes_again(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    with hold_run(run):
        assert (run / LOCK).exists()
    assert not run.parent.exists()
    with hold_run(run):
        (run / "plan.json").touch()
    assert [path.name for path in run.iterdir()] == ["plan.json"]


def test_two_processes_do_not_train_into_one_run(tmp_path: Path, tiny_base: Path) -> None:
    """Refused at once, before a record is read or a port is opened. Twin: once the first has let go
    the second trains."""
    study = load_study(write_study(tmp_path, tiny_base))
    sites = [load_site(tmp_path / name / "site.toml") for name in ("north", "south")]
    run, home = tmp_path / "run", tmp_path / "coordinator"
    heard: list[str] = []

    def on_event(event: str, data: dict[str, Any]) -> None:
        heard.append(event)

    with hold_run(run):
        for resume in (False, True):
            with pytest.raises(InfrastructureError, match="another run"):
                launch.simulate(study, sites, run, resume=resume, on_event=on_event)
            with pytest.raises(InfrastructureError, match="another run"):
                coordinator.serve(study, run, home=home, resume=resume, on_event=on_event)
    assert {*heard} <= {"step"}, "more than what the records have paid was said"
    assert not home.joinpath("ca.pem").exists()
    assert launch.simulate(study, sites, run).report["rounds"]
    assert not (run / LOCK).exists()


def test_the_status_of_a_running_process_is_its_own(tmp_path: Path) -> None:
    """Twin: when it has ended, the next one writes."""
    first, second = StatusFile(tmp_path), StatusFile(tmp_path)
    first("start", {"study": "gait", "done": 0, "rounds": 4})
    second("stopped", {"error": "InfrastructureError"})
    assert read_status(tmp_path).state == "running"
    first.close()
    second("stopped", {"error": "InfrastructureError"})
    assert read_status(tmp_path).state == "stopped"
    second.close()


PLACES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "an audit log that is read": (
        "audit.lock", lambda folder: verify(folder, signer_at(folder)),
    ),
    "an audit log that grows": (
        "audit.lock",
        lambda folder: AuditLog(folder, SigningKey.at(folder / "site.key")).add("purge"),
    ),
    "its newest file": (
        "audit.jsonl",
        lambda folder: AuditLog(folder, SigningKey.at(folder / "site.key")).add("purge"),
    ),
    "a run": ("lock", lambda folder: hold_run(folder).__enter__()),
    "versions": ("versions/lock", lambda folder: Versions(folder).unpin()),
    "a status that is written": (
        "status.lock", lambda folder: StatusFile(folder)("start", {"study": "a", "done": 0}),
    ),
    "a status that is read": ("status.lock", read_status),
    "a log": ("log.jsonl", lambda folder: JsonLog(folder / "log.jsonl")("done", {})),
}  # fmt: skip


@pytest.mark.parametrize("what", ["pipe", "folder", "link to a pipe"])
@pytest.mark.parametrize("place", PLACES)
def test_a_pipe_in_a_locks_place_is_not_waited_for(tmp_path: Path, place: str, what: str) -> None:
    name, use = PLACES[place]
    AuditLog(tmp_path, SigningKey.at(tmp_path / "site.key")).add("purge")
    (tmp_path / "status.json").write_text(json.dumps({"role": "site", "state": "running"}))
    versions = Versions(tmp_path)
    versions.folder.mkdir()
    versions.begin(Version(1, "2026-01-05T02:00:00Z", "first", "loss", 1.0), lambda to: to.mkdir())
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if what == "folder":
        path.mkdir()
    else:
        os.mkfifo(path if what == "pipe" else tmp_path / "pipe")
        if what != "pipe":
            path.symlink_to(tmp_path / "pipe")
    with wall_limit(60), suppress(FedtuneError, OSError):
        use(tmp_path)


def test_log_with_a_pipe_as_its_lock_says_so(tmp_path: Path) -> None:
    AuditLog(tmp_path, SigningKey.at(tmp_path / "site.key")).add("purge")
    (tmp_path / "audit.lock").unlink()
    os.mkfifo(tmp_path / "audit.lock")
    with wall_limit(60):
        done = command("log", tmp_path)
    assert done.exit_code == 2 and "audit.lock: cannot be locked" in done.stderr, done.stderr
