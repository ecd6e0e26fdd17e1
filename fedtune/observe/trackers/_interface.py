"""Define the interface of a tracker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tracker(ABC):
    """An experiment tracker, to which the coordinator also sends a run's figures.

    Subclasses are frozen dataclasses whose fields are the options. A tracker gets what log.jsonl
    may hold and nothing else (observe/log.py), and its errors never stop a study."""

    @abstractmethod
    def on_event(self, kind: str, data: Mapping[str, Any]) -> None:
        """Take one event. kind: "start", "round", "done", "stopped"; data: fields of
        observe/log.py, which the tracker must not change."""

    def close(self) -> None:  # noqa: B027 - a hook that most leave empty
        """Close the tracker: the run is over."""
