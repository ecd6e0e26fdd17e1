"""What every command that reads a study.toml is given: the file, and values in its place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedtune.config import Study

STUDY = Annotated[
    Path, typer.Argument(metavar="STUDY", help="The public plan, study.toml.", show_default=False)
]
TRACKER = Annotated[
    list[str] | None,
    typer.Option(
        "--tracker",
        metavar="NAME",
        help="tensorboard, mlflow or wandb (offline): also tell it each round's figures, as "
        "NAME or NAME:OPTION=VALUE; repeat it.",
        show_default=False,
    ),
]
METRICS = Annotated[
    int | None,
    typer.Option(
        "--metrics-port",
        min=1,
        max=65535,
        metavar="N",
        help="Prometheus metrics on 127.0.0.1:N.",
        show_default=False,
    ),
]
RESUME = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --out after its last whole round.")
]
SET = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A value in place of study.toml's, such as training.rounds=4; may be repeated.",
        show_default=False,
    ),
]


def load(study: Path, settings: list[str] | None) -> Study:
    """Read the study with the values of --set. Errors: ConfigError."""
    from fedtune.config import load_study

    return load_study(study, settings=settings or ())
