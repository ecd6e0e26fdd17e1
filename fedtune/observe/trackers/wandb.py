"""Define the tracker for Weights & Biases, which works offline."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.core.errors import ConfigError
from fedtune.observe.trackers._interface import Tracker
from fedtune.observe.trackers._names import about, figures


@dataclass(frozen=True)
class WeightsAndBiases(Tracker):
    """Writes metrics by round as an offline run of Weights & Biases, in `folder` on this machine.

    Nothing is sent until a person runs `wandb sync`. Nothing about the machine, the terminal or the
    code is recorded. A resumed run becomes a new run of Weights & Biases, in the same group."""

    project: str = "fedtune"
    folder: str = "."

    def __post_init__(self) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # must be set before wandb is imported
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "the tracker wandb needs the package wandb, which is not installed",
                todo="pip install 'fedtune[wandb]'",
            ) from None
        object.__setattr__(self, "_library", wandb)
        object.__setattr__(self, "_runs", [])

    def on_event(self, kind: str, data: Mapping[str, Any]) -> None:
        runs = self._runs  # type: ignore[attr-defined]
        if kind == "start":
            runs[:] = [self._run(about(data))]
        elif kind == "round" and runs:
            runs[0].log(figures(data), step=data["round"])
        elif kind in ("done", "stopped") and runs:
            runs.pop().finish(exit_code=0 if kind == "done" else 1)

    def _run(self, facts: dict[str, Any]) -> Any:
        library = self._library  # type: ignore[attr-defined]
        settings = library.Settings(
            console="off", disable_code=True, disable_git=True, silent=True,
            host="coordinator", x_save_requirements=False,
            x_disable_machine_info=True, x_disable_meta=True, x_disable_stats=True,
        )  # fmt: skip
        name = str(facts.get("study") or "study")
        return library.init(
            mode="offline",
            project=self.project,
            dir=str(Path(self.folder)),
            name=name,
            group=name,
            config=facts,
            settings=settings,
        )

    def close(self) -> None:
        for run in self._runs:  # type: ignore[attr-defined]
            run.finish(exit_code=1)
        self._runs.clear()  # type: ignore[attr-defined]
