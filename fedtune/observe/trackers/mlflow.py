"""Define the tracker for MLflow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedtune.core.errors import ConfigError
from fedtune.observe.trackers._interface import Tracker
from fedtune.observe.trackers._names import about, figures

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
ENDS = {"done": "FINISHED", "stopped": "FAILED"}


@dataclass(frozen=True)
class MLflow(Tracker):
    """Sends metrics by round to MLflow: one experiment per study, one MLflow run per run.

    uri: a database on this machine, or an MLflow server's address. MLflow's own telemetry is
    switched off. A resumed run continues in the newest MLflow run of its plan."""

    uri: str = "sqlite:///mlflow.db"

    def __post_init__(self) -> None:
        os.environ.update(QUIET)  # must be set before mlflow is imported
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise ConfigError(
                "the tracker mlflow needs the package mlflow-skinny, which is not installed",
                todo="pip install 'fedtune[mlflow]'",
            ) from None
        object.__setattr__(self, "_client", MlflowClient(tracking_uri=self.uri))
        object.__setattr__(self, "_runs", [])

    def on_event(self, kind: str, data: Mapping[str, Any]) -> None:
        client, runs = self._client, self._runs  # type: ignore[attr-defined]
        if kind == "start":
            runs[:] = [self._run(data)]
        elif kind == "round" and runs:
            for name, value in figures(data).items():
                client.log_metric(runs[0], name, value, step=data["round"])
        elif kind in ENDS and runs:
            client.set_terminated(runs.pop(), ENDS[kind])

    def _run(self, data: Mapping[str, Any]) -> str:
        """Return the id of the MLflow run to which this run's figures go: a new one or, if the run
        is resumed, the newest MLflow run of its plan. A resumed run that MLflow does not know gets
        a new one too.

        data: the fields of the run's "start" event. The run is resumed if "done" is not zero and
        the plan's digest is given."""
        client, facts = self._client, about(data)  # type: ignore[attr-defined]
        name, plan = str(facts.get("study") or "study"), str(facts.get("plan_digest") or "")
        known = client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else client.create_experiment(name)
        if data.get("done") and plan:
            same = f"tags.plan_digest = '{plan}'"
            order = ["attributes.start_time DESC"]
            for run in client.search_runs([experiment], same, max_results=1, order_by=order):
                client.update_run(run.info.run_id, status="RUNNING")
                return str(run.info.run_id)
        tags = {key: str(value) for key, value in facts.items()}
        return str(client.create_run(experiment, tags=tags, run_name=name).info.run_id)

    def close(self) -> None:
        for run in self._runs:  # type: ignore[attr-defined]
            self._client.set_terminated(run, "KILLED")  # type: ignore[attr-defined]
        self._runs.clear()  # type: ignore[attr-defined]
