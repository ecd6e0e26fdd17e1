"""Define the interface of a tracker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tracker(ABC):
    """An experiment tracker, to which the coordinator sends a run's figures, as it does to the log.

    Subclasses are frozen dataclasses whose fields are the options. A tracker receives only the
    fields that log.jsonl may hold (observe/log.py), and its errors never stop a study."""

    @abstractmethod
    def on_event(self, kind: str, data: Mapping[str, Any]) -> None:
        """Receive one event. kind: the event's name, such as "start", "round", "done" or "stopped".
        data: its fields, as in observe/log.py; the tracker must not change them."""

    def close(self) -> None:  # noqa: B027 - a hook that most leave empty
        """Close the tracker. Called once, after the run has ended."""
