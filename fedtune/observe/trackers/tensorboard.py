"""Define the tracker for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.core.errors import ConfigError
from fedtune.observe.trackers._interface import Tracker
from fedtune.observe.trackers._names import figures
from fedtune.runs.choice import folder_for


@dataclass(frozen=True)
class TensorBoard(Tracker):
    """Writes scalars by round for `tensorboard --logdir FOLDER`, in one folder per run inside
    `folder`.

    A resumed run continues in its own folder."""

    folder: str = "tensorboard"

    def __post_init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "the tracker tensorboard needs the package tensorboard, which is not installed",
                todo="pip install 'fedtune[tensorboard]'",
            ) from None
        object.__setattr__(self, "_open", SummaryWriter)
        object.__setattr__(self, "_writers", [])

    def on_event(self, kind: str, data: Mapping[str, Any]) -> None:
        writers: list[Any] = self._writers  # type: ignore[attr-defined]
        if kind == "start":
            done = int(data.get("done") or 0)
            name, parent = str(data.get("study") or "study"), Path(self.folder)
            run = folder_for(name, resume=done > 0, runs=parent)
            writer = self._open(str(run), purge_step=done + 1)  # type: ignore[attr-defined]
            writers[:] = [writer]
        elif kind == "round" and writers:
            for name, value in figures(data).items():
                writers[0].add_scalar(name, value, data["round"])
            writers[0].flush()

    def close(self) -> None:
        for writer in self._writers:  # type: ignore[attr-defined]
            writer.close()
