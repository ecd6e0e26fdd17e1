"""The command that writes the files of a new study."""

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
    """The tasks for which there is a recipe: the values of --task, with the names of
    fedtune.presets.TASKS."""

    CLASSIFY = "classify"
    ANSWER = "answer"
    INSTRUCT = "instruct"
    PREFERENCE = "preference"
    VISION = "vision"
    SPEECH = "speech"


class Declared(StrEnum):
    """The ways in which a person may declare records that hold no patient."""

    PUBLIC = "public"
    GENERATED = "generated"


class Role(StrEnum):
    """The role whose files `fedtune init` writes."""

    BOTH = "both"
    COORDINATOR = "coordinator"
    SITE = "site"


FOLDER = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="The folder for the files. It is created, or must hold no study yet.",
        show_default=False,
    ),
]
TASK = Annotated[
    Task | None,
    typer.Option(
        metavar="TASK",  # the names are below: click's list of them is wider than its column
        help="Fill in the settings that were measured for a task.  \nclassify: put "
        "texts into classes;  \nanswer: answer questions;  \ninstruct: write longer "
        "responses to instructions;  \npreference: prefer the better of two answers;  \n"
        "vision: answer questions about images;  \nspeech: transcribe recordings.",
        show_default=False,
    ),
]
DATA = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="A site's records: a .csv, .jsonl, .parquet or .arrow file; a folder of such "
        "files, of a Hugging Face data set, or of a FHIR bulk export; or a database "
        "table, URL#TABLE. Repeat it for each further site. Default: data.jsonl beside "
        "site.toml, which you add later.",
    ),
]
EVALUATION = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A file of public records with answers. From 40 records on they are divided: one "
        "part trains the model before the first round, at no cost in ε; one chooses how "
        "far each round moves the model, or whether the sites' result is kept; the rest "
        "evaluates. Fewer records only evaluate.",
        show_default=False,
    ),
]
PUBLIC = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A file of other public records, which train the model before the first round, "
        "at no cost in ε. No record of --evaluation is then trained on. Default: a part "
        "of --evaluation.",
        show_default=False,
    ),
]
TEXT = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="Column of the input text. Default by task: text, question, instruction or prompt.",
    ),
]
TARGET = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="Column of the target to learn. Default by task: label, answer, response, chosen or "
        "text.",
    ),
]
REJECTED = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN", help="Task preference: column of the worse answer. Default: rejected."
    ),
]
MEDIA = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="Tasks vision and speech: column that holds the path of an image or a recording, "
        "relative to the file of records. Default by task: image or audio.",
    ),
]
BASE = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The base model, as base.model in study.toml. Default: the base of the task's recipe, "
        "which is fetched as a Python package.",
        show_default=False,
    ),
]
DECLARED = Annotated[
    Declared | None,
    typer.Option(
        help="For a rehearsal: state that no patient is in the sites' records. Such runs "
        "cost no lifetime budget, and everything that they write says how the data was "
        "declared.",
        show_default=False,
    ),
]
PATIENT = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="Column that identifies the patient: all records of a patient are protected "
        "together. Default: none, so that each record is protected by itself.",
        show_default=False,
    ),
]
ALSO = Annotated[
    list[str] | None,
    typer.Option(
        "--also-label",
        metavar="TEXT",
        help="Task classify: add a class that the public records lack; may be repeated.",
    ),
]
LABELS = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        metavar="TEXT",
        help="Task classify: name a class; may be repeated. Default: the labels in --public "
        "and --evaluation.",
    ),
]
SIZE = Annotated[
    list[int] | None,
    typer.Option(
        "--size",
        min=10,
        metavar="N",
        help="Declared size: the number of patients (or records) that a site states in "
        "public. Give it once for all sites, or once for each in the order of "
        "--data. Default: 200.",
    ),
]
EPSILON = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        help="The most ε that the whole study costs a patient (or record). Default: 4.9, so that "
        "a site whose limit is 8 can also pay for a round that has to be repeated. With "
        "--colluding the default may be lower.",
        show_default=False,
    ),
]
COLLUDING = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Secure aggregation: let each site add only a part of the noise, so that the sum of "
        "all sites has less of it. The study's ε then holds if at most N sites collude with the "
        "coordinator; a larger ε holds in any case. Default: each site adds all of the noise that "
        "its own update needs.",
        show_default=False,
    ),
]
WHOSE = Annotated[
    Role,
    typer.Option(
        "--role",
        help="Whose files to write: the coordinator's (study.toml), a site's (site.toml), or both.",
    ),
]
SITES = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1000,
        metavar="N",
        help="Number of sites that take part. Default: one for each --data.",
        show_default=False,
    ),
]
NAME = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="With --role site: the name of the site. Default: the name of the folder, or "
        "my-hospital if that is no valid name.",
        show_default=False,
    ),
]
ENROLL = Annotated[
    bool,
    typer.Option(
        "--enroll",
        help="With --role site: also make the site's keys and its request, as `fedtune "
        "enroll` does.",
    ),
]
SERVE = Annotated[
    str | None,
    typer.Option(
        "--serve",
        metavar="NAME",
        help="With --role coordinator and --task: start the server at once, for sites that "
        "reach this machine as NAME or NAME:PORT (default port: 8443).",
        show_default=False,
    ),
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, panel=panel)(init)


def init(
    folder: FOLDER,
    task: TASK = None,
    data: DATA = None,
    evaluation: EVALUATION = None,
    public: PUBLIC = None,
    text: TEXT = None,
    target: TARGET = None,
    rejected: REJECTED = None,
    media: MEDIA = None,
    patient: PATIENT = None,
    labels: LABELS = None,
    also: ALSO = None,
    base: BASE = None,
    size: SIZE = None,
    epsilon: EPSILON = None,
    colluding: COLLUDING = None,
    declared: DECLARED = None,
    role: WHOSE = Role.BOTH,
    sites: SITES = None,
    name: NAME = None,
    enroll: ENROLL = False,
    serve: SERVE = None,
) -> dict[str, Any]:
    """Write the files of a new study.

    With --task, fill in a measured recipe for your files and their columns; on a terminal you are
    asked for missing values. Without --task, write study.toml and site.toml with every key and a
    comment on each line. With --role, only the files of that role are written."""
    from fedtune import presets
    from fedtune.cli import server
    from fedtune.presets.places import place_of

    _check(role, enroll, name, serve, task is not None)
    address = server.address(serve) if serve is not None else None
    if role is Role.SITE and not name:
        name = folder.name if re.fullmatch(ALLOWED, folder.name) else "my-hospital"
    records = presets.Records(
        prompt=text or "", target=target or "", rejected=rejected or "", media=media or "",
        patient=patient, data=tuple(map(place_of, data or ())), evaluation=evaluation,
        public=public, labels=tuple(labels or ()), also_labels=tuple(also or ()),
        base=base or "", epsilon=epsilon or 0.0,
        declared=declared.value if declared else None, role=role.value, name=name, expected=sites,
        colluding=colluding,
    )  # fmt: skip
    if task is None:
        paths, told, following = _templates(folder, records, size)
    else:
        records = _complete(_ask_for_missing(records, task, size), task)
        paths = presets.write(folder, task.value, records)
        told = presets.notes(task.value, records)
        noise = _describe_shared_noise(folder, records)
        told = "\n".join([told, records.delta_note, *noise, *_time(folder, records)])
        following = _next(folder, records, task)
    for path in (path for path in paths if path.suffix in (".toml", ".jsonl")):
        typer.echo(f"wrote {path}")
    typer.echo()
    for line in told.splitlines():
        warned = line.startswith("WARNING: ")
        typer.secho(line, fg="yellow" if warned else None, bold=warned or None)
    if enroll:
        from fedtune.cli.network import ask

        typer.echo()
        return {"wrote": paths, **ask(folder / "site.toml")}
    if address:
        return server.start(folder / "study.toml", *address)
    typer.echo(following)
    return {"wrote": paths}


def _describe_shared_noise(folder: Path, records: Records) -> list[str]:
    """Describe the ε of a study whose sites share noise, both if few enough sites collude and
    whatever happens, and what the sites must do. Return [] if the sites do not share noise. folder:
    the new study's folder. records: what `fedtune init` was told of the study."""
    if records.colluding is None:
        return []
    from fedtune.accounting.costs import shared_lines
    from fedtune.core.config import load_study

    study = load_study(folder / "study.toml")
    lines = shared_lines(study, records.declared_sizes)[:2]
    return [
        *lines,
        "Each hospital compares the other hospitals' keys by phone before it trains: "
        "docs/secure-aggregation.md.",
    ]


def _time(folder: Path, records: Records) -> list[str]:
    """Describe how long the new study will take on this machine. Return [] if only the files of a
    site were written, or if the time cannot be estimated. folder: the new study's folder. records:
    what `fedtune init` was told of the study."""
    from fedtune.core.config import load_study
    from fedtune.presets.duration import forecast

    if records.role == "site":
        return []
    found = forecast(load_study(folder / "study.toml"), records.declared_sizes)
    return found.lines(sites_here=records.role == "both") if found else []


def _check(role: Role, enroll: bool, name: str | None, serve: str | None, recipe: bool) -> None:
    from fedtune.core.errors import ConfigError

    for option, given in (("--enroll", enroll), ("--name", name is not None)):
        if given and role is not Role.SITE:
            raise ConfigError(f"{option} is for a site", "--role site")
    if serve is not None and not (role is Role.COORDINATOR and recipe):
        raise ConfigError(
            "--serve is for a coordinator with a recipe", "--role coordinator and --task TASK"
        )


def _templates(
    folder: Path, records: Records, size: list[int] | None
) -> tuple[list[Path], str, str]:
    """Write the commented files of a study without a recipe. Return their paths, a text that says
    what the unit is, and a text with the next commands. size: the values of --size, which only a
    recipe has.

    Errors: ConfigError for an option of a recipe, DataError for a column or a file that does not
    exist."""
    from fedtune import presets
    from fedtune.core.errors import ConfigError
    from fedtune.presets import templates

    own = {**presets.OPTIONS, "evaluation": "--evaluation", "public": "--public"}
    own |= {
        "labels": "--label",
        "also_labels": "--also-label",
        "base": "--base",
        "epsilon": "--epsilon",
        "colluding": "--colluding",
    }
    given = [option for field, option in own.items() if getattr(records, field)]
    if given := given + ["--size"] * bool(size):
        raise ConfigError(
            f"{given[0]} without --task",
            "--task, or the value in study.toml or site.toml",
            "leave the option out: without a recipe `init` writes every key with a comment, to "
            "fill in",
        )
    note = presets.unit_note(None, records)
    paths = templates.init(
        folder, role=records.role, name=records.name or "my-hospital", sites=records.sites,
        data=records.data, patient=records.patient, declared=records.declared,
    )  # fmt: skip
    if records.role != "site":
        paths.append(folder / templates.PUBLIC)
    return paths, note, _of_templates(folder, records)


def _ask_for_missing(records: Records, task: Task, sizes: list[int] | None) -> Records:
    """Return `records` with missing column names and sizes filled in. On a terminal a person is
    asked for them. Elsewhere the columns stay unnamed, so that the task's own names hold, and the
    size is 200.

    - records: what `fedtune init` was told of the study
    - task: the value of --task
    - sizes: the values of --size"""
    from fedtune import presets

    asking = sys.stdin.isatty()
    given: dict[str, Any] = {}
    for field, (_, name) in presets.TASKS[task.value].COLUMNS.items():
        if asking and not getattr(records, field):
            given[field] = typer.prompt(f"column of the {name}", name)
    if not sizes:
        words = "patients (or records) of a site, as it states in public"
        sizes = [typer.prompt(words, 200, type=int) if asking else 200]
    each = tuple(sizes) if len(sizes) > 1 else ()
    return replace(records, **given, size=sizes[0], sizes=each)


def _complete(records: Records, task: Task) -> Records:
    """Return `records` with what its role needs and the user did not give: files, classes, and the
    number of sites. A person is asked for them on a terminal; elsewhere `records` is returned
    unchanged.

    - records: what `fedtune init` was told of the study
    - task: the value of --task"""
    if not sys.stdin.isatty():
        return records
    from fedtune.presets.places import place_of

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
        changes["data"] = tuple(place_of(name) for f in files.split(",") if (name := f.strip()))
    return replace(records, **changes)


def _of_templates(folder: Path, records: Records) -> str:
    if records.role == "coordinator":
        return (
            f"\nnext   fedtune plan {folder}/study.toml --size 200     what it costs in ε\n"
            f"       fedtune server {folder}/study.toml              wait for sites, and train"
        )
    if records.role == "site":
        return _of_site(folder)
    sites = records.sites
    place, own = ("", "") if sites == 1 else ("sites/site-*/", f" --sites {folder}/sites")
    files = "" if records.data else f"{folder}/{place}data.jsonl and "
    return (
        f"\nnext   put records into {files}{folder}/evaluation.jsonl, each line\n"
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
    plan = f"fedtune plan {folder}/study.toml"
    told = "what it costs, and what the sites' records may add to public ones"
    if records.role == "coordinator":
        sizes = "".join(f" --size {size}" for size in records.declared_sizes)
        return (
            f"\nnext   {plan}{sizes}   {told}\n"
            f"       fedtune server {folder}/study.toml --host 0.0.0.0 --name NAME   wait for "
            "sites, and train;\n       NAME: what sites call this machine by"
        )
    if records.role == "site":
        return _of_site(folder)
    many = bool(records.data) or records.sites > 1
    sites = f" --sites {folder}/sites" if many else ""
    place = f"{folder}/sites/site-*" if many else f"{folder}"
    put = "" if records.data else f"put records into {place}/data.jsonl; then\n       "
    run = f"runs/{folder.name}"
    # A study without public records does not name its columns.
    column = "" if records.evaluation else f' --column text="{records.prompt}"'
    predict = f"       fedtune predict {run} --data FILE{column}   labels for new "
    export = f"       fedtune export {run} --out {folder.name}-model   for "
    generate = f'       fedtune generate {run} --prompt "…"   the base beside the adapter\n'
    use = {
        Task.CLASSIFY: f"{predict}texts\n{export}transformers' pipeline",
        Task.VISION: f"{predict}questions, where the answers are a few",
        Task.SPEECH: f"{predict}recordings, where what is said is one of a few",
    }.get(task, f"{generate}{export}transformers, Ollama, vLLM")
    simulate = f"fedtune simulate {folder}/study.toml{sites}"
    return f"\nnext   {put}{plan}{sites}   {told}\n       {simulate}   the whole study, here\n{use}"
