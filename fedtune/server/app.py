"""Define the ServerApp that `flwr run` starts at the coordinator; rounds.py runs the study."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.core.config import load_study
from fedtune.core.errors import ConfigError
from fedtune.server import rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a study at the coordinator, for a run that `flwr run` started. The run's run_config in
    `context` names the study: it holds study (the path of study.toml), out (the folder of fedtune's
    run) and resume (true or false). grid: connects to the sites.

    Errors: ConfigError if a key is missing, and all errors of `fedtune.server.rounds.run`."""
    settings = context.run_config
    for key in ("study", "out"):
        if not settings.get(key):
            raise ConfigError(
                f"the run's config has no {key!r}", todo=f"flwr run . -c '{key}=\"PATH\"'"
            )
    rounds.run(
        grid,
        load_study(Path(str(settings["study"]))),
        Path(str(settings["out"])),
        resume=settings.get("resume") is True,
    )
