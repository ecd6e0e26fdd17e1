"""The command that starts a study of one's own."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli.exit_codes import command

if TYPE_CHECKING:
    from fedtune.presets import Records


ALLOWED = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # as config.types.Name


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
        help="A site's records: .csv, .jsonl, .parquet, .arrow, or a folder of them; repeat it for "
        "more sites.",
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
    int | None,
    typer.Option(
        min=10,
        metavar="N",
        help="Patients (or records) of a site, as it states in public. Without it: 200.",
    ),
]
EPSILON = Annotated[
    float | None,
    typer.Option(
        min=0.01, help="ε of the whole study. Without it: the recipe's.", show_default=False
    ),
]
WHOSE = Annotated[Role, typer.Option("--role", help="Whose files to write.")]
SITES = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1000,
        metavar="N",
        help="How many sites take part. Without it: one for each --data.",
        show_default=False,
    ),
]
NAME = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A site's own name, with --role site. Without it: the folder's.",
        show_default=False,
    ),
]
ENROLL = Annotated[
    bool,
    typer.Option("--enroll", help="With --role site: also make its keys and request, as enroll."),
]


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
    size: SIZE = None,
    epsilon: EPSILON = None,
    role: WHOSE = Role.BOTH,
    sites: SITES = None,
    name: NAME = None,
    enroll: ENROLL = False,
) -> dict[str, Any]:
    """Write the files that start a study of your own.

    With --task: a recipe that was measured, for your files and their columns; on a terminal you are
    asked for what is missing. Without: study.toml and site.toml with every key, commented line by
    line. Each role gets its own files alone."""
    from fedtune.errors import ConfigError

    for option, given in (("--enroll", enroll), ("--name", name is not None)):
        if given and role is not Role.SITE:
            raise ConfigError(f"{option} is for a site", "--role site")
    if role is Role.SITE:
        name = name or (folder.name if re.fullmatch(ALLOWED, folder.name) else "my-hospital")
    if task is None:
        from fedtune.config import templates

        paths = templates.init(
            folder, role=role.value, name=name or "my-hospital", sites=sites or 1
        )
        if role is not Role.SITE:
            paths.append(folder / templates.PUBLIC)
        told = _of_templates(folder, role, sites or 1)
    else:
        from fedtune import presets

        columns = _columns(text, target, size, presets.TASKS[task.value].COLUMNS)
        records = presets.Records(
            data=tuple(data or ()), evaluation=evaluation, public=public, patient=patient,
            labels=tuple(labels or ()), epsilon=epsilon or 0.0, role=role.value, name=name,
            expected=sites, **columns,
        )  # fmt: skip
        records = _complete(records, task)
        paths, told = presets.write(folder, task.value, records), _next(folder, records, task)
    for path in paths:
        typer.echo(f"wrote {path}")
    if enroll:
        from fedtune.cli.network import ask

        return {"wrote": paths, **ask(folder / "site.toml")}
    typer.echo(told)
    return {"wrote": paths}


def _columns(
    text: str | None, target: str | None, size: int | None, names: tuple[str, str]
) -> dict[str, Any]:
    """What nobody gave is asked for on a terminal; elsewhere the defaults hold."""
    asking = sys.stdin.isatty()

    def given(value: Any, words: str, default: Any) -> Any:
        if value is not None:
            return value
        return typer.prompt(words, default) if asking else default

    return {
        "prompt": given(text, f"column of the {names[0]}", names[0]),
        "target": given(target, f"column of the {names[1]}", names[1]),
        "size": given(size, "patients (or records) of a site, as it states in public", 200),
    }


def _complete(records: Records, task: Task) -> Records:
    """On a terminal, ask for the files, the classes and the number of sites that a study of this
    role needs."""
    if not sys.stdin.isatty():
        return records
    changes: dict[str, Any] = {}
    if records.role != "site" and not (records.evaluation or records.labels):
        file = typer.prompt(
            "public records with answers, a file (Enter: none)", "", show_default=False
        )
        changes["evaluation"] = Path(file) if file else None
        if not file and task is Task.CLASSIFY:
            classes = typer.prompt("the classes, with commas between them")
            changes["labels"] = tuple(label for c in classes.split(",") if (label := c.strip()))
    if records.role == "coordinator" and records.expected is None:
        changes["expected"] = typer.prompt("how many sites take part", 3, type=int)
    if records.role != "coordinator" and not records.data:
        whose = "this site's records, a file" if records.role == "site" else "each site's file"
        files = typer.prompt(f"{whose} (Enter: data.jsonl, later)", "", show_default=False)
        changes["data"] = tuple(Path(name) for f in files.split(",") if (name := f.strip()))
    return replace(records, **changes)


def _of_templates(folder: Path, role: Role, sites: int) -> str:
    if role is Role.COORDINATOR:
        return (
            f"\nnext   fedtune plan {folder}/study.toml --size 200     what it costs in ε\n"
            f"       fedtune server {folder}/study.toml              wait for sites, and train"
        )
    if role is Role.SITE:
        return _of_site(folder)
    place, own = ("", "") if sites == 1 else ("sites/site-*/", f" --sites {folder}/sites")
    return (
        f"\nnext   put records into {folder}/{place}data.jsonl and {folder}/evaluation.jsonl, each "
        "line\n"
        '       {"prompt": "…", "completion": "…"}; then\n'
        f"       fedtune plan {folder}/study.toml --size 200     what it costs in ε\n"
        f"       fedtune simulate {folder}/study.toml{own}            the whole study, on this "
        "machine"
    )


def _of_site(folder: Path) -> str:
    return (
        f"\nnext   fedtune doctor {folder}/site.toml   what is ready, and what is missing\n"
        f"       fedtune enroll {folder}/site.toml   ask a coordinator to take part"
    )


def _next(folder: Path, records: Records, task: Task) -> str:
    if records.role == "coordinator":
        return (
            f"\nnext   fedtune server {folder}/study.toml --host 0.0.0.0 --name NAME   wait for "
            "sites, and train;\n       NAME: what sites call this machine by"
        )
    if records.role == "site":
        return _of_site(folder)
    many = bool(records.data) or records.sites > 1
    sites = f" --sites {folder}/sites" if many else ""
    place = f"{folder}/sites/site-*" if many else f"{folder}"
    put = "" if records.data else f"put records into {place}/data.jsonl; then\n       "
    run = f"runs/{folder.name}"
    use = {
        Task.CLASSIFY: f"       fedtune predict {run} --data FILE   labels for new texts\n"
        f"       fedtune export {run} --out {folder.name}-model   for transformers' pipeline",
        Task.ANSWER: f'       fedtune generate {run} --prompt "…"   the base beside the adapter\n'
        f"       fedtune export {run} --out {folder.name}-model   for transformers, Ollama, vLLM",
    }
    simulate = f"fedtune simulate {folder}/study.toml{sites}"
    return f"\nnext   {put}{simulate}   the whole study, here\n{use[task]}"
