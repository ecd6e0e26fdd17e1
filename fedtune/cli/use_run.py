"""Commands that use a finished run: evaluate, predict, generate, and choose its version."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console

from fedtune.cli.columns import named_columns
from fedtune.cli.exit_codes import command
from fedtune.cli.personalise import AT_SITE, run_at
from fedtune.core.registry.metrics import MetricName

RUN_FOLDER = Annotated[
    Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the commands on `app`. panel: the heading under which --help lists them."""
    for function in (evaluate, predict, versions, generate, answers):
        command(app, panel=panel)(function)


def evaluate(
    run: RUN_FOLDER,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Your records: a .jsonl, .csv, .parquet or .arrow file, or a folder of such "
            "files.",
        ),
    ],
    metric: Annotated[
        MetricName | None,
        typer.Option(
            metavar="METRIC",
            help=f"One of {', '.join(get_args(MetricName))}. Default: the metric of the study.",
            show_default=False,
        ),
    ] = None,
    choices: Annotated[
        list[str] | None,
        typer.Option(
            "--choice",
            metavar="TEXT",
            help="With the metrics accuracy and f1: a possible completion; may be repeated.",
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="KEY=NAME",
            help="Name the column of the file that holds a part of a record, such as "
            "prompt=question; may be repeated. Default: the columns of the study.",
        ),
    ] = None,
    site: AT_SITE = None,
) -> dict[str, Any]:
    """Measure a run's model on your own records, with 95 % intervals.

    The model is compared with the base alone and with what public text alone gives, if the run's
    folder holds that."""
    from fedtune.cli.console import evaluation_table, print_verdict

    with Console().status("measuring the model, and what it is compared with"):
        from fedtune.evaluation.run import evaluate as measure

        file, model = named_columns(data, columns) if columns else data, run_at(run, site)
        result = measure(model, file, metric, choices or [])
    Console().print(evaluation_table(result))
    print_verdict(Console(), result)
    about = "" if model.mark else "of the run, by its report: "
    for line in result["of the run"]:
        Console().print(f"  {about}{line}", highlight=False, markup=False)
    return result


PREDICT_OUT = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help="Write all predictions to FILE, one row each: .csv, .jsonl or .parquet. Default: "
        "a short table on the screen.",
        show_default=False,
    ),
]


PREDICT_IDS = Annotated[
    list[str] | None,
    typer.Option(
        "--id",
        metavar="COLUMN",
        help="Copy this column of the file into each prediction, such as a key to join them "
        "by; may be repeated.",
    ),
]


def predict(
    run: RUN_FOLDER,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="A file of records: .jsonl, .csv, .parquet or .arrow, or .txt with one text per "
            "line. Labels are not read.",
        ),
    ],
    out: PREDICT_OUT = None,
    choices: Annotated[
        list[str] | None,
        typer.Option(
            "--choice",
            metavar="TEXT",
            help="For a run without a head: a completion to choose from; may be repeated. "
            "Default: the choices of the study.",
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="KEY=NAME",
            help="Name the column of the file that holds a part of a record, such as "
            "text=note; may be repeated. Default: the columns of the study.",
        ),
    ] = None,
    ids: PREDICT_IDS = None,
    site: AT_SITE = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON instead of the table.")
    ] = False,
) -> None:
    """Predict the label of each record, or a reward's score, with a run's head or choices.

    The output has one row for each record of the file, in order: its number, the columns named by
    --id, the label, the probability of each label, and the reason if a record cannot be used."""
    from fedtune.cli.console import predictions_table
    from fedtune.core.errors import ConfigError
    from fedtune.evaluation.predictions import check_out

    if out and check_out(out).resolve() == data.resolve():
        raise ConfigError(
            f"{out}: is the file of the records", "another file", "choose another --out"
        )
    with Console(stderr=as_json).status("predicting"):
        from fedtune.evaluation.predict import predict as compute

        file, model = named_columns(data, columns) if columns else data, run_at(run, site)
        made = compute(model, file, choices or [], ids=ids or [])
    if model.mark:
        typer.echo(model.mark, err=True)
    if out:
        made.write(out)
    if as_json:
        body = {"labels": made.labels, "rejected": made.rejected, "predictions": made.rows()}
        typer.echo(json.dumps(body, ensure_ascii=False))
        return
    Console().print(predictions_table(made, 0 if out else 20))
    if out:
        typer.echo(f"wrote {out}: {len(made)} rows, in the order of {data}")


def versions(
    run: RUN_FOLDER,
    rollback: Annotated[
        int | None,
        typer.Option(
            "--rollback",
            min=0,
            metavar="N",
            help="Release version N again, and no other version until --unpin.",
            show_default=False,
        ),
    ] = None,
    unpin: Annotated[
        bool,
        typer.Option("--unpin", help="After a rollback: let better versions be released again."),
    ] = False,
) -> dict[str, Any]:
    """List the versions of a study with a [schedule], and choose which one is released.

    RUN/adapter is always the released version, and the report describes it. After a choice, the
    chosen version is measured on the public records. The study may go on meanwhile."""
    from fedtune.cli.console import versions_table
    from fedtune.core.errors import ConfigError, InputError
    from fedtune.report.declared import site_lines
    from fedtune.report.run_files import read_report
    from fedtune.server.versions import Versions

    if rollback is not None and unpin:
        raise ConfigError("--rollback and --unpin are both given", "only one of the two")
    book = Versions(run)
    signed_by = None
    if rollback is not None or unpin:
        from fedtune.evidence.coordinator_home import coordinator_log
        from fedtune.evidence.verify import key_of

        signed_by = key_of(run)
        if acts := coordinator_log(run):
            rule = "--unpin" if unpin else f"--rollback {rollback}"
            acts.add("release", rule, run=run.absolute())
    if rollback is not None:
        index = book.roll_back(rollback)
    elif unpin:
        index = book.unpin()
    elif (current := book.index()) is not None:
        index = current
    else:
        raise InputError(f"{run}: no versions here", "a run of a study with a [schedule]")
    reason = ""
    if rollback is not None or unpin:
        with Console().status("measuring the version in use on the public records"):
            from fedtune.server.version_report import restate

            reason = restate(run, index, signed_by)
    Console().print(versions_table(index))
    if reason:
        typer.echo(f"report.md has no figure of this version: {reason}", err=True)
    pinned = "; it stays until --unpin" if index.pinned else ""
    typer.echo(f"released: version {index.champion}, {run / 'adapter'}{pinned}")
    if (run / "report.json").is_file() and (said := site_lines(read_report(run))):
        typer.echo(said)
    return asdict(index) | {"not_measured": reason}


GENERATE_FILE = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="The image or recording, for a base that reads one."),
]
GENERATE_CHAT = Annotated[
    bool | None,
    typer.Option(
        "--chat/--plain",
        help="Whether to put the prompt into the model's chat template. Default: as in training.",
        show_default=False,
    ),
]


def generate(
    run: RUN_FOLDER,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="The prompt to continue or answer.")
    ] = "",
    file: GENERATE_FILE = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Maximum number of new tokens.")
    ] = 64,
    chat: GENERATE_CHAT = None,
    site: AT_SITE = None,
) -> dict[str, Any]:
    """Let the base and the adapter answer the same prompt, side by side.

    The answer of a site's personal model begins with a mark that says what it is."""
    from fedtune.cli.console import side_by_side

    with Console().status("writing"):
        from fedtune.evaluation.generate import generate as write

        before, after = write(run_at(run, site), prompt, max_new_tokens, chat=chat, file=file)
    Console().print(side_by_side(before, after))
    return {"base": before, "adapter": after}


def answers(
    run: RUN_FOLDER,
    count: Annotated[
        int,
        typer.Option(min=1, max=20, metavar="N", help="Answer N prompts, spread over the file."),
    ] = 4,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Maximum number of new tokens in an answer that is text."
        ),
    ] = 64,
) -> dict[str, Any]:
    """Let the base and the adapter answer a few of the study's own public prompts.

    The prompts are rows of [evaluation], spread evenly over the file. Prompts and answers are kept
    in RUN/answers.json, which the dashboard shows; export and release never copy it."""
    from fedtune.cli.console import answers_table

    with Console().status("answering"):
        from fedtune.evaluation.answers import answers as answer
        from fedtune.runs.run import Run

        found = answer(Run(run), count, max_new_tokens=max_new_tokens)
    Console().print(answers_table(found))
    return found
