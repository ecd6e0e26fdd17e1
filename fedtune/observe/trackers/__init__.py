"""Trackers receive a run's events. Each tracker is a frozen dataclass in its own file."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.core.errors import ConfigError
from fedtune.core.registry import Group
from fedtune.observe.trackers._interface import Tracker

__all__ = ["TRACKERS", "Tracker", "build"]

TRACKERS = Group("trackers", "tracker.name", __name__, Tracker)  # type: ignore[type-abstract]


def build(words: Sequence[str]) -> list[Tracker]:
    """Build the trackers that a command line names. words: one text for each tracker, NAME or
    NAME:OPTION=VALUE,OPTION=VALUE,…

    Errors: ConfigError if there is no such tracker or option, if an option has no value, or if the
    tracker's package is not installed."""
    return [_build_tracker(word) for word in words]


def _build_tracker(word: str) -> Tracker:
    name, _, rest = word.partition(":")
    options = dict(pair.partition("=")[::2] for pair in rest.split(",") if pair)
    if not all(options.values()):
        raise ConfigError(
            f"--tracker {word[:80]}: an option has no value", "NAME or NAME:OPTION=VALUE"
        )
    return TRACKERS.build(name, options)
