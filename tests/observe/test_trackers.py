"""A tracker is told what the log may hold, and stops nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedtune.observe import observer
from fedtune.observe.log import NotLoggable
from fedtune.observe.trackers import TRACKERS, Tracker

SECRET = "Zaphod-Beeblebrox-1979 was seen on ward 4"


@dataclass(frozen=True)
class Kept(Tracker):
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def on_event(self, kind: str, data: Mapping[str, Any]) -> None:
        self.told.append((kind, dict(data)))


@dataclass(frozen=True)
class Broken(Tracker):
    def on_event(self, kind: str, data: Mapping[str, Any]) -> None:
        raise OSError(SECRET)

    def close(self) -> None:
        raise OSError(SECRET)


def test_the_release_brings_none() -> None:
    assert TRACKERS.release() == []


def test_a_tracker_is_told_what_the_log_may_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTUNE_STRICT", raising=False)
    kept = Kept()
    with observer("coordinator", tmp_path, trackers=[kept]) as seen:
        seen("start", {"study": "s", "rounds": 1, "note": SECRET})
        seen("step", {"text": SECRET})
        seen("round", {"round": 1, "reason": SECRET})
        seen("done", {})
    assert [kind for kind, _ in kept.told] == ["start", "round", "done"]
    assert SECRET not in str(kept.told) and kept.told[0][1]["rounds"] == 1


def test_what_may_not_be_logged_raises_in_strict_mode(tmp_path: Path) -> None:
    with (
        pytest.raises(NotLoggable),
        observer("coordinator", tmp_path, trackers=[Kept()]) as seen,
    ):
        seen("start", {"note": SECRET})


def test_a_tracker_that_raises_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("FEDTUNE_STRICT", raising=False)
    kept = Kept()
    with (
        caplog.at_level(logging.WARNING),
        observer("coordinator", tmp_path, trackers=[Broken(), kept]) as seen,
    ):
        seen("start", {"study": "s"})
        seen("done", {})
    assert [kind for kind, _ in kept.told] == ["start", "done"]
    assert caplog.text.count("Broken: OSError; the study goes on") == 1
    assert "Broken: OSError when it was closed" in caplog.text and SECRET not in caplog.text
