"""What a tracker is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tracker(ABC):
    """Where the coordinator's figures of a run go besides its own folder: an experiment tracker.

    Subclasses are frozen dataclasses whose fields are the options. A tracker is told what log.jsonl
    may hold and nothing else (observe/log.py), and no error of its own stops a study."""

    @abstractmethod
    def on_event(self, kind: str, data: Mapping[str, Any]) -> None:
        """kind: "start", "round", "done", "stopped"; data: fields of observe/log.py, which the
        tracker leaves as they are."""

    def close(self) -> None:  # noqa: B027 - a hook that most leave empty
        """The run is over."""
