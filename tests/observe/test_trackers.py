"""A tracker is told what the log may hold, and stops nothing."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.core.errors import ConfigError
from fedtune.observe import observer
from fedtune.observe.log import NotLoggable
from fedtune.observe.trackers import TRACKERS, Tracker, build

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


def test_each_of_the_release_says_which_package_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in TRACKERS.release():
        for module in ("tensorboard", "torch.utils.tensorboard", "mlflow", "wandb"):
            monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        with pytest.raises(ConfigError, match=rf"fedtune\[{name}\]"):
            build([name])


def test_what_a_command_line_names_is_a_tracker_or_an_error() -> None:
    for word in ("none", "tensorboard:folder", "tensorboard:colour=red"):
        with pytest.raises(ConfigError):
            build([word])


ROUNDS = [
    {"round": 1, "quality": {"loss": 2.0}, "epsilon": {"north": 0.5, "south": 0.25}},
    {
        "round": 2,
        "quality": {"loss": 1.5, "preference": 0.75},
        "bytes_up": {"north": 7, "south": 8},
    },
]


def tracked(name: str, under: Path, done: int = 0, **options: str) -> None:
    """A run's events, through the observer, to a tracker that the command line named."""
    words = ",".join(f"{key}={value}" for key, value in options.items())
    with observer("coordinator", under / "run", trackers=build([f"{name}:{words}"])) as seen:
        seen("start", {"study": "gait", "plan_digest": "sha256:" + "5d" * 32, "done": done})
        for entry in ROUNDS[done:]:
            seen("round", entry)
        seen("done", {})


def test_tensorboard_holds_every_round_under_trls_names(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="fedtune[tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked("tensorboard", tmp_path, folder=str(tmp_path / "board"))
    events = EventAccumulator(str(tmp_path / "board" / "gait"))
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in scalar_tags(events)}
    assert scalars["eval/loss"] == [(1, 2.0), (2, 1.5)]
    assert scalars["eval/rewards/accuracies"] == [(2, 0.75)]
    assert scalars["epsilon"] == [(1, 0.5)] and scalars["bytes/up"] == [(2, 15.0)]
    tracked("tensorboard", tmp_path, done=1, folder=str(tmp_path / "board"))
    assert [path.name for path in (tmp_path / "board").iterdir()] == ["gait"]
    tracked("tensorboard", tmp_path, folder=str(tmp_path / "board"))
    assert (tmp_path / "board" / "gait-2").is_dir()


def scalar_tags(events: Any) -> list[str]:
    tags: list[str] = events.Tags()["scalars"]
    return tags


def test_mlflow_holds_every_round_and_goes_on_where_a_run_is_resumed(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="fedtune[mlflow] is not installed")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracked("mlflow", tmp_path, uri=uri)
    tracked("mlflow", tmp_path, done=1, uri=uri)
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("gait").experiment_id
    (run,) = client.search_runs([experiment])
    history = client.get_metric_history(run.info.run_id, "eval/loss")
    assert {(m.step, m.value) for m in history} == {(1, 2.0), (2, 1.5)}
    assert run.info.status == "FINISHED" and run.data.tags["study"] == "gait"


def test_wandb_is_offline_and_records_nothing_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="fedtune[wandb] is not installed")
    monkeypatch.setattr(socket, "getaddrinfo", None)  # a name that is looked up raises
    monkeypatch.setattr(socket, "gethostname", lambda: "machine-of-north")
    tracked("wandb", tmp_path, folder=str(tmp_path))
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    content = log.read_bytes()
    assert b"eval/loss" in content and b"eval/rewards/accuracies" in content
    assert b"machine-of-north" not in content and str(Path.cwd()).encode() not in content
    assert not [*run.glob("files/*")]


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


def test_a_runs_rounds_are_a_table_as_csv_and_as_parquet(signed: Any, tmp_path: Path) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    run = fedtune.Run(signed[0])
    with pytest.raises(ConfigError, match="unsupported suffix"):
        run.write_metrics(tmp_path / "metrics.xls")
    tables = {
        "csv": pyarrow.csv.read_csv(run.write_metrics(tmp_path / "metrics.csv")),
        "parquet": pyarrow.parquet.read_table(run.write_metrics(tmp_path / "metrics.parquet")),
    }
    for name, table in tables.items():
        assert table.column("round").to_pylist() == [1, 2], name
        for column in ("quality.loss", "epsilon.north", "bytes_up.south"):
            assert table.column(column).to_pylist() == run.metrics[column], (name, column)
