"""What is released is the champion, whole, whatever happens; and only what was better or chosen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.core.errors import DataError, InputError
from fedtune.core.files import writing
from fedtune.report.change_plan import Look
from fedtune.server import store, versions
from fedtune.server.continuous import Continuous
from fedtune.server.looks import Looked
from fedtune.server.schedule import SimulatedClock
from fedtune.server.versions import Version, Versions
from tests.continuous.fakes import START, Judge, alike, go, load, loss, parts, sites
from tests.server.test_resume import Killed, fail_at

ROUNDS = 6


def released(out: Path) -> dict[str, Any]:
    return load(out / "adapter")


def holds(out: Path) -> None:
    """The release folder is a version that the rule, or a person, let through."""
    if not (out / "adapter").exists():
        assert not (out / "versions" / "index.json").exists() or not (out / "adapter").is_symlink()
        return
    index = Versions(out).index()
    assert index is not None
    number = int((out / "adapter").resolve().name)
    assert number in index.rollback_targets
    arrays = released(out)
    for version in index.versions:
        if version.number == number and version.value is not None:
            assert loss(arrays) == pytest.approx(version.value)
    there = {path.name for path in (out / "versions").iterdir() if path.is_dir()}
    drafts = {name for name in there if name.endswith(".new")}
    newest = {str(index.judged + 1)}  # a crash between a version's files and the index
    assert there - drafts <= set(map(str, index.rollback_targets)) | newest


def test_only_what_is_better_is_released(trial: Any) -> None:
    run = trial(*sites())
    body = go(run, ROUNDS)
    out = run.folder / "out"
    index = Versions(out).index()
    assert index is not None
    decisions = [version.decision for version in index.versions]
    assert {"first", "released", "kept back"} <= set(decisions)  # the draw has both
    best = min((v.value for v in index.versions if v.value is not None), default=0.0)
    assert loss(released(out)) == pytest.approx(min(best, 0.0))
    assert body["quality"]["after"] == {"loss": pytest.approx(loss(released(out)))}
    holds(out)


def test_the_twin_that_releases_everything_is_caught(
    trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Yes(Judge):
        def look(self, champion: Any, challenger: Any) -> Look:
            return alike(loss(challenger) + 1, loss(challenger))

    run = trial(*sites())
    go(run, ROUNDS, evaluator=lambda study, frozen: Yes())
    index = Versions(run.folder / "out").index()
    assert index is not None
    values = [v.value for v in index.versions if v.value is not None]
    assert index.champion == ROUNDS and values[-1] > min(values)


KILLS = [
    ("a round kept", store, "save", 4),
    ("before it is judged", Continuous, "judge", 3),
    ("compared", Judge, "look", 3),
    ("what it saw", Looked, "keep", 3),
    ("entered", Versions, "add", 3),
    ("its files", Versions, "_put", 2),
    ("its files on disk", versions, "_sync", 2),
    ("the index", Versions, "_write", 4),
    ("the link", Versions, "_settle", 4),
    ("a file put in place", writing, "replace", 4),
    ("a rename", os, "replace", 15),
    ("the first version", Versions, "begin", 1),
    ("the first version's files", Versions, "_put", 1),
    ("the first index", Versions, "_write", 1),
    ("the first link", Versions, "_settle", 1),
    ("metrics", store, "write_metrics", 3),
]


@pytest.mark.parametrize(
    "phase, owner, name, call, after",
    [
        pytest.param(
            *(*kill, after),
            id=f"{kill[0].replace(' ', '-')}-{('before', 'after')[after]}",
            marks=() if at % 2 != after else pytest.mark.long,  # by default one of either
        )
        for at, kill in enumerate(KILLS)
        for after in (False, True)
    ],
)
def test_a_kill_loses_nothing_and_releases_nothing_else(
    trial: Any, monkeypatch: pytest.MonkeyPatch, phase: str, owner: Any, name: str, call: int,
    after: bool,
) -> None:  # fmt: skip
    whole = trial(*sites(), folder="whole")
    go(whole, ROUNDS)
    expected = Versions(whole.folder / "out").index()
    run = trial(*sites(), folder="killed")
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call, after)
        with pytest.raises(Killed):
            go(run, ROUNDS)
    holds(run.folder / "out")
    go(run, ROUNDS, SimulatedClock(START))
    holds(run.folder / "out")
    found = Versions(run.folder / "out").index()
    assert found is not None and expected is not None
    timeless = lambda index: [(v.number, v.decision, v.value) for v in index.versions]  # noqa: E731
    assert timeless(found) == timeless(expected) and found.champion == expected.champion


# ------------------------------------------------------------------------------- rolling back


def test_a_rollback_holds_over_restarts_until_it_is_undone(trial: Any) -> None:
    run = trial(*sites())
    go(run, ROUNDS)
    out = run.folder / "out"
    book = Versions(out)
    before = book.index()
    assert before is not None and before.champion != 0
    book.roll_back(0)
    assert loss(released(out)) == 0.0
    go(run, ROUNDS + 3, SimulatedClock(START + 1e6))
    index = book.index()
    assert index is not None and index.champion == 0 and loss(released(out)) == 0.0
    assert {v.decision for v in index.versions[ROUNDS + 1 :]} == {"pinned"}
    book.unpin()
    go(run, ROUNDS + 9, SimulatedClock(START + 2e6))
    index = book.index()
    assert index is not None and index.champion != 0
    holds(out)


def test_what_was_kept_back_cannot_be_rolled_back_to(trial: Any) -> None:
    run = trial(*sites())
    go(run, ROUNDS)
    book = Versions(run.folder / "out")
    index = book.index()
    assert index is not None
    (bad, *_) = (v.number for v in index.versions if v.decision == "kept back")
    for number in (bad, 99):
        with pytest.raises(InputError, match="never released"):
            book.roll_back(number)
    with pytest.raises(InputError, match="no versions here"):
        Versions(run.folder / "elsewhere").roll_back(0)
    assert not (run.folder / "elsewhere").exists()


def test_a_rollback_while_a_version_is_measured_is_not_undone(trial: Any) -> None:
    """The version was compared with a champion that is no longer in use: it is compared again."""
    run, seen = trial(*sites()), []
    out = run.folder / "out"

    class Slow(Judge):
        def look(self, champion: Any, challenger: Any) -> Look:
            seen.append(loss(champion))
            index = Versions(out).index()
            if index and index.judged == ROUNDS and not index.pinned:
                Versions(out).roll_back(0)
            return super().look(champion, challenger)

    go(run, ROUNDS)
    last = Versions(out).index()
    assert last is not None and last.champion != 0
    go(run, ROUNDS + 1, SimulatedClock(START + 1e6), evaluator=lambda study, frozen: Slow())
    index = Versions(out).index()
    assert index is not None and index.champion == 0 and len(seen) == 2
    assert index.versions[-1].champion == 0 and index.versions[-1].decision == "pinned"


def test_a_damaged_index_is_an_error_and_not_a_new_beginning(trial: Any) -> None:
    run = trial(*sites())
    go(run, 2)
    (run.folder / "out" / "versions" / "index.json").write_text("{")
    with pytest.raises(store.CheckpointError, match="damaged"):
        go(run, 3, SimulatedClock(START + 1e6))


# ------------------------------------------------------------------------------- the public set


def test_a_replaced_public_file_is_read_anew_and_a_broken_one_leaves_the_last(trial: Any) -> None:
    run, public, made = trial(*sites()), ["one"], []

    def evaluator(study: Any, frozen: Any) -> Judge:
        if public[0] == "broken":
            raise DataError("no such file")
        made.append(public[0])
        return Judge()

    def on_event(kind: str, data: dict[str, Any]) -> None:
        if kind == "round":
            public[0] = {1: "two", 2: "broken", 3: "three"}.get(data["round"], public[0])

    swapped = parts(4, evaluator=evaluator, fingerprint=lambda path: public[0])
    from tests.continuous.fakes import continuous

    run.run(continuous(), resume=True, parts=swapped, on_event=on_event)
    assert made == ["one", "two", "three"]
    index = Versions(run.folder / "out").index()
    assert index is not None
    assert [v.public for v in index.versions[1:]] == ["two", "two", "three", "three"]


# --------------------------------------------------------------------------------- the command


def test_the_command_lists_and_rolls_back(trial: Any) -> None:
    run = trial(*sites())
    go(run, ROUNDS)
    out = str(run.folder / "out")
    listed = CliRunner().invoke(app, ["versions", out])
    assert listed.exit_code == 0 and "kept back" in listed.stdout and "←" in listed.stdout
    back = CliRunner().invoke(app, ["versions", out, "--rollback", "0"])
    assert back.exit_code == 0 and "version 0" in back.stdout and "--unpin" in back.stdout
    assert loss(released(run.folder / "out")) == 0.0
    undone = CliRunner().invoke(app, ["versions", out, "--unpin"])
    assert undone.exit_code == 0 and "stays until" not in undone.stdout
    assert CliRunner().invoke(app, ["versions", out, "--rollback", "99"]).exit_code == 2
    assert CliRunner().invoke(app, ["versions", str(run.folder)]).exit_code == 2


def test_begin_settles_a_link_that_a_crash_left_behind(tmp_path: Path) -> None:
    book = Versions(tmp_path)
    write = lambda text: lambda folder: (folder.mkdir(), (folder / "x").write_text(text))  # noqa: E731
    book.begin(Version(0, "", "first"), write("0"))
    book.add(Version(1, "", "released", champion=0), write("1"))
    (tmp_path / "adapter").unlink()
    book.begin(Version(1, "", "first"), write("never"))
    assert (tmp_path / "adapter" / "x").read_text() == "1"
