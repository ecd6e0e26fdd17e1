"""Trackers: frozen dataclasses that are told the events of a run. This release brings none."""

from __future__ import annotations

from fedtune.observe.trackers._interface import Tracker
from fedtune.registry import Group

__all__ = ["TRACKERS", "Tracker"]

TRACKERS = Group("trackers", "tracker.name", __name__, Tracker)  # type: ignore[type-abstract]
