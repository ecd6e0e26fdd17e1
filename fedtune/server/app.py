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
    """Run the study. run_config: study (path of study.toml), out (folder), resume (true or false).

    Errors: as fedtune.server.rounds.run; ConfigError if a key is missing."""
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
