"""The command that starts a study of one's own."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.exit_codes import command

if TYPE_CHECKING:
    from fedtune.presets import Records


class Task(StrEnum):
    """The presets of fedtune.presets.TASKS."""

    CLASSIFY = "classify"
    ANSWER = "answer"


class Role(StrEnum):
    """Whose files are written."""

    BOTH = "both"
    COORDINATOR = "coordinator"
    SITE = "site"


FOLDER = Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.", show_default=False)]
TASK = Annotated[
    Task | None,
    typer.Option(
        help="A measured recipe: classify, classes of texts; answer, answers to questions.",
        show_default=False,
    ),
]
DATA = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="A site's records: .csv, .jsonl, .parquet; repeat it for more sites.",
    ),
]
EVALUATION = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Public records with answers: a part chooses each step (answer: and half are learnt "
        "from for no ε), the others judge.",
        show_default=False,
    ),
]
PUBLIC = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Task answer: other public records to learn from, for no ε; then none of "
        "--evaluation are.",
        show_default=False,
    ),
]
TEXT = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="What is read. Without it: text or question.")
]
TARGET = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="What is learnt. Without it: label or answer.")
]
PATIENT = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="Whose record it is: all of a patient's are protected together.",
        show_default=False,
    ),
]
LABELS = Annotated[
    list[str] | None,
    typer.Option(
        "--label", metavar="TEXT", help="A class; repeat it. Without it: those of --evaluation."
    ),
]
SIZE = Annotated[
    int, typer.Option(min=10, help="Patients (or records) of a site, as it states in public.")
]
EPSILON = Annotated[
    float | None,
    typer.Option(
        min=0.01, help="ε of the whole study. Without it: the recipe's.", show_default=False
    ),
]
WHOSE = Annotated[Role, typer.Option("--role", help="Whose files to write.")]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`."""
    command(app, panel=panel)(init)


def init(
    folder: FOLDER,
    task: TASK = None,
    data: DATA = None,
    evaluation: EVALUATION = None,
    public: PUBLIC = None,
    text: TEXT = None,
    target: TARGET = None,
    patient: PATIENT = None,
    labels: LABELS = None,
    size: SIZE = 200,
    epsilon: EPSILON = None,
    role: WHOSE = Role.BOTH,
) -> None:
    """Write the files that start a study of your own.

    With --task: a recipe that was measured, for your files and their columns. Without: study.toml
    and site.toml with every key, commented line by line."""
    if task is None:
        return _templates(folder)
    from fedtune import presets

    asking = sys.stdin.isatty()
    columns = presets.TASKS[task.value].COLUMNS
    text = text or (typer.prompt(f"column of the {columns[0]}", columns[0]) if asking else None)
    target = target or (typer.prompt(f"column of the {columns[1]}", columns[1]) if asking else None)
    records = presets.Records(
        prompt=text or "",
        target=target or "",
        patient=patient,
        data=tuple(data or ()),
        evaluation=evaluation,
        public=public,
        labels=tuple(labels or ()),
        size=size,
        epsilon=epsilon or 0.0,
        role=role.value,
    )
    for path in presets.write(folder, task.value, records):
        typer.echo(f"wrote {path}")
    typer.echo(_next(folder, records, task))


def _templates(folder: Path) -> None:
    from fedtune.config import templates

    for path in templates.init(folder):
        typer.echo(f"wrote {path}")
    typer.echo(
        f"\nnext   put records into {folder}/data.jsonl and {folder}/evaluation.jsonl, each line\n"
        '       {"prompt": "…", "completion": "…"}; then\n'
        f"       fedtune plan {folder}/study.toml --size 200     what it costs in ε\n"
        f"       fedtune simulate {folder}/study.toml            the whole study, on this machine"
    )


def _next(folder: Path, records: Records, task: Task) -> str:
    if records.role == "coordinator":
        return f"\nnext   fedtune server {folder}/study.toml   wait for sites, and train"
    if records.role == "site":
        return (
            f"\nnext   fedtune doctor {folder}/site.toml   what is ready, and what is missing\n"
            f"       fedtune enroll {folder}/site.toml   ask a coordinator to take part"
        )
    sites = f" --sites {folder}/sites" if records.data else ""
    put = "" if records.data else f"put records into {folder}/data.jsonl; then\n       "
    run = f"runs/{folder.name}"
    use = {
        Task.CLASSIFY: f"       fedtune predict {run} --data FILE   labels for new texts\n"
        f"       fedtune export {run} --out {folder.name}-model   for transformers' pipeline",
        Task.ANSWER: f'       fedtune generate {run} --prompt "…"   the base beside the adapter\n'
        f"       fedtune export {run} --out {folder.name}-model   for transformers, Ollama, vLLM",
    }
    simulate = f"fedtune simulate {folder}/study.toml{sites}"
    return f"\nnext   {put}{simulate}   the whole study, here\n{use[task]}"
