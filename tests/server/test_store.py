"""A checkpoint is the old one or the new one, whole, wherever the disk was cut off or touched."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.core.errors import InfrastructureError
from fedtune.core.files import writing
from fedtune.server import store
from fedtune.server.store import DATABASE, FOLDER, FROZEN, CheckpointError, Phase, Progress
from tests.dp.powercut import Disk, Recorder, images, put
from tests.server.fakes import make_study

STUDY = make_study(min_sites=2)
K = Phase  # the phases of a run of two rounds, with a query after the first
RUN = (K.ASKED, K.KEPT, K.QUERIED, K.ASKED, K.KEPT, K.FINISHED)


def begun() -> Progress:
    rng = np.random.default_rng(0)
    return Progress(
        STUDY.digest,
        STUDY,
        adapter={"a": rng.standard_normal((2, 3)).T.astype(np.float32)},  # not contiguous
        frozen={"f": np.float32(2.5).reshape(()), "g": rng.standard_normal(5).astype(np.float32)},
        before={"loss": 9.0},
        admission={"x": "admitted", "z": "refused: no"},
        sizes={"x": 5, "y": 7},
        keys={"x": "aa", "y": "bb"},
    )


def moved(progress: Progress, phase: Phase) -> None:
    """What a run changes on its way into `phase`."""
    progress.enter(phase)
    if phase is Phase.KEPT:
        progress.round += 1
        progress.adapter = {n: a + 1 for n, a in progress.adapter.items()}
        progress.strategy = {"m/a": np.full(4, float(progress.round))}
        progress.history.append({"round": progress.round, "participants": ["x"], "é": 1.5})
        progress.events["x"] = [{"sigma": 1.1, "steps": 3 * progress.round}]
        progress.receipts["x"] = {"token": f"t{progress.round}"}
    if phase is Phase.QUERIED:
        progress.queries["x"] = [{"steps": 1}]
        progress.history[-1]["private_quality"] = {"likelihood": 0.5}


def run(out: Path, done: Callable[[Progress], None] = lambda progress: None) -> Progress:
    """Save as a run does; `done` hears of each save that has returned."""
    progress = begun()
    store.save(out, progress)
    done(progress)
    for phase in RUN:
        moved(progress, phase)
        store.save(out, progress)
        done(progress)
    return progress


def flat(progress: Progress | None) -> Any:
    """Everything in it, comparable."""
    if progress is None:
        return None
    fields = {f.name: getattr(progress, f.name) for f in dataclasses.fields(progress)}
    for group in ("adapter", "frozen", "strategy"):
        named = sorted(fields.pop(group).items())
        fields[group] = [(n, a.dtype.str, a.shape, a.tolist()) for n, a in named]
    return repr(sorted(fields.items()))


def test_what_is_saved_is_what_is_loaded_after_every_phase(tmp_path):
    seen = []

    def done(progress: Progress) -> None:
        assert flat(store.load(tmp_path, STUDY)) == flat(progress)
        names = {FROZEN, DATABASE, f"round-{progress.round}.safetensors"}
        assert {p.name for p in (tmp_path / FOLDER).iterdir()} == names
        seen.append((progress.phase, (tmp_path / FOLDER / FROZEN).stat().st_ino))

    run(tmp_path, done)
    assert [phase for phase, _ in seen] == [K.STARTED, *RUN]
    assert len({inode for _, inode in seen}) == 1  # frozen was written once


@pytest.mark.parametrize("phase", [K.KEPT, K.QUERIED, K.FINISHED])
def test_a_phase_does_not_follow_any_other(phase):
    with pytest.raises(AssertionError, match="does not follow started"):
        begun().enter(phase)


# ---------------------------------------------------------------------- cut off at any operation


def recorded(
    out: Path, patch: pytest.MonkeyPatch, pragmas: Any = store.PRAGMAS
) -> tuple[Disk, list[Any]]:
    """The disk under a whole run, and each state that was saved."""
    out.mkdir()
    disk, states = Disk(out, pragmas), [None]

    def done(progress: Progress) -> None:
        disk.log.append(("saved", len(states)))
        states.append(flat(progress))

    with patch.context() as inner:
        inner.setattr(store, "connect", disk.connect)
        recorder = Recorder(disk)
        for module in (writing, store):
            inner.setattr(module, "os", recorder)
        run(out, done)
    return disk, states


def outcomes(disk: Disk, states: list[Any], to: Path) -> Counter[str]:
    """What is found after a cut at each operation: the old state, the new one, or a loss."""
    found = Counter[str]()
    for number, (log, image) in enumerate(images(disk, random.Random(1))):
        saved = max((op[1] for op in log if op[0] == "saved"), default=0)
        put(image, to / str(number))
        try:
            here = flat(store.load(to / str(number), STUDY))
        except CheckpointError:
            here = "damaged"
        shutil.rmtree(to / str(number), ignore_errors=True)
        expected = {"old": states[saved], "new": states[min(saved + 1, len(states) - 1)]}
        found[next((name for name, state in expected.items() if state == here), "lost")] += 1
    return found


def test_a_cut_at_any_operation_leaves_the_old_state_or_the_new(tmp_path, monkeypatch):
    disk, states = recorded(tmp_path / "out", monkeypatch)
    kinds = {op[0] for op in disk.log}
    assert kinds >= {"create", "write", "sync", "syncdir", "rename", "unlink"}
    found = outcomes(disk, states, tmp_path / "images")
    assert set(found) == {"old", "new"} and min(found.values()) > 10, found


def late(patch: pytest.MonkeyPatch) -> None:
    """A store that commits first and writes the arrays afterwards."""
    real, held = store.replace, list[tuple[Path, bytes]]()

    def hold(path: Path, body: bytes) -> None:
        if path.suffix == ".safetensors":
            held.append((path, body))
        else:
            real(path, body)

    def write(*_: Any) -> None:
        while held:
            real(*held.pop())

    patch.setattr(store, "replace", hold)
    patch.setattr(store, "_prune", write)


def unsynced(patch: pytest.MonkeyPatch) -> None:
    """A store whose arrays are in place, but not on disk, when it commits."""
    real = store.replace

    def replace(path: Path, body: bytes) -> None:
        if path.suffix != ".safetensors":
            real(path, body)
            return
        path.parent.mkdir(exist_ok=True)
        descriptor = writing.os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        writing.os.write(descriptor, memoryview(body))
        writing.os.close(descriptor)

    patch.setattr(store, "replace", replace)


def pruned_first(patch: pytest.MonkeyPatch) -> None:
    """A store that removes the old arrays before the new ones are named."""
    real = store._commit

    def commit(path: Path, rows: Any) -> None:
        if path.exists():
            keep = {f"round-{rows[0][2]}.safetensors", FROZEN}
            store._prune(path.parent, dict.fromkeys(keep, ""))
        real(path, rows)

    patch.setattr(store, "_commit", commit)


@pytest.mark.parametrize("broken", [late, unsynced, pruned_first])
def test_a_store_in_another_order_is_caught(tmp_path, monkeypatch, broken):
    with monkeypatch.context() as patch:
        broken(patch)
        disk, states = recorded(tmp_path / "out", patch)
    assert outcomes(disk, states, tmp_path / "images")["lost"] > 0


def test_a_database_that_does_not_sync_is_caught(tmp_path, monkeypatch):
    disk, states = recorded(tmp_path / "out", monkeypatch, ["synchronous = OFF"])
    assert outcomes(disk, states, tmp_path / "images")["lost"] > 0


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    progress = begun()
    store.save(tmp_path, progress)
    before, real = flat(progress), store.connect

    def full(path: Path) -> sqlite3.Connection:
        connection = real(path)
        connection.execute("PRAGMA max_page_count = 1")  # at least what is there: no page more
        return connection

    moved(progress, Phase.ASKED)
    moved(progress, Phase.KEPT)
    progress.history[0]["missing"] = {"y": "away" * 10_000}
    with monkeypatch.context() as patch:
        patch.setattr(store, "connect", full)
        with pytest.raises(InfrastructureError, match="full"):
            store.save(tmp_path, progress)
    assert flat(store.load(tmp_path, STUDY)) == before
    store.save(tmp_path, progress)  # once there is room
    assert flat(store.load(tmp_path, STUDY)) == flat(progress)


# ---------------------------------------------------------------------------- touched afterwards


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    out = tmp_path_factory.mktemp("saved")
    yield out, flat(run(out))


def copy(saved: tuple[Path, Any], to: Path) -> Path:
    shutil.copytree(saved[0], to / "out")
    return to / "out"


def found_after(path: Path, at: int, bit: int, out: Path) -> Any:
    body = bytearray(path.read_bytes())
    body[at] ^= bit
    path.write_bytes(bytes(body))
    try:
        return flat(store.load(out, STUDY))
    except (CheckpointError, InfrastructureError):
        return "noticed"
    finally:
        body[at] ^= bit
        path.write_bytes(bytes(body))
        for name in ("-wal", "-shm", "-journal"):
            path.with_name(path.name + name).unlink(missing_ok=True)


@pytest.mark.parametrize("name", [FROZEN, "round-2.safetensors"])
def test_a_flipped_byte_of_the_arrays_is_noticed_wherever_it_is(saved, tmp_path, name):
    out = copy(saved, tmp_path)
    path = out / FOLDER / name
    found = {found_after(path, at, 0x10, out) for at in range(path.stat().st_size)}
    assert found == {"noticed"}


def used(path: Path) -> int:
    """The last byte of the database that is not zero, and one."""
    return len(path.read_bytes().rstrip(b"\0"))


def test_a_flipped_byte_of_the_database_is_noticed_or_harmless(saved, tmp_path):
    """SQLite's pages have bytes that nothing reads; whatever is read is what was saved."""
    out = copy(saved, tmp_path)
    path = out / FOLDER / DATABASE
    places = [*range(100), *range(100, used(path), 11)]
    found = Counter(found_after(path, at, 0x10, out) for at in places)
    assert set(found) <= {"noticed", saved[1]} and found["noticed"] > 100


def test_without_the_sums_an_edited_database_would_pass(saved, tmp_path, monkeypatch):
    """The twin: SQLite itself does not see a changed letter."""
    out = copy(saved, tmp_path)
    path = out / FOLDER / DATABASE
    at = path.read_bytes().rindex(b"participants") + len(b'participants": ["')
    assert found_after(path, at, 0x02, out) == "noticed"
    monkeypatch.setattr(store, "_sha256", lambda rows: table(path, "SELECT sha256 FROM run")[0][0])
    assert found_after(path, at, 0x02, out) not in ("noticed", saved[1])


def table(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as sql:
        return list(sql.execute(query))


def swapped(out: Path) -> None:
    """Arrays of an earlier round under the newest one's name."""
    other = out.parent / "other"
    progress = begun()
    store.save(other, progress)
    shutil.copy(other / FOLDER / "round-0.safetensors", out / FOLDER / "round-2.safetensors")


def edited(statement: str) -> Callable[[Path], None]:
    def edit(out: Path) -> None:
        with closing(sqlite3.connect(out / FOLDER / DATABASE)) as sql, sql:
            sql.execute(statement)

    return edit


def written(name: str, body: bytes) -> Callable[[Path], Any]:
    return lambda out: (out / FOLDER / name).write_bytes(body)


def cut(name: str) -> Callable[[Path], Any]:
    return lambda out: os.truncate(out / FOLDER / name, (out / FOLDER / name).stat().st_size - 3)


def gone(name: str) -> Callable[[Path], Any]:
    return lambda out: (out / FOLDER / name).unlink()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "arrays of another round": swapped,
    "arrays gone": gone("round-2.safetensors"),
    "frozen gone": gone(FROZEN),
    "database gone": gone(DATABASE),
    "arrays cut": cut("round-2.safetensors"),
    "database cut": cut(DATABASE),
    "database empty": written(DATABASE, b""),
    "not a database": written(DATABASE, b"hello" * 1000),
    "a pickle": written("round-2.safetensors", b"\x80\x04\x95pickle"),
    "a round deleted": edited("DELETE FROM rounds WHERE round = 1"),
    "a site deleted": edited("DELETE FROM sites WHERE name = 'x'"),
    "no run": edited("DELETE FROM run"),
    "two runs": edited("INSERT INTO run SELECT * FROM run"),
    "an earlier phase": edited("UPDATE run SET phase = 'kept'"),
    "another version": edited("UPDATE run SET format = 'fedtune-run-9'"),
    "a table gone": edited("DROP TABLE sites"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_never_a_silent_restart(saved, tmp_path, what):
    out = copy(saved, tmp_path)
    DAMAGE[what](out)
    with pytest.raises(CheckpointError, match="damaged"):
        store.load(out, STUDY)


def test_a_checkpoint_of_an_earlier_version_is_not_a_new_run(tmp_path):
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "run.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="this version"):
        store.load(tmp_path, STUDY)


def test_a_checkpoint_of_a_newer_version_says_so_and_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "FORMAT", "fedtune-run-9")
    store.save(tmp_path, begun())
    monkeypatch.undo()
    before = (tmp_path / FOLDER / DATABASE).read_bytes()
    with pytest.raises(CheckpointError, match=r"another release of fedtune.*fedtune-run-9"):
        store.load(tmp_path, STUDY)
    assert (tmp_path / FOLDER / DATABASE).read_bytes() == before
