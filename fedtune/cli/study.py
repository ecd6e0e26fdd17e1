"""Define the options that the commands on a study.toml share (the file, and values that replace
those in the file), and print messages of the commands that run a study."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.core.errors import ConfigError, DataError, InputError

if TYPE_CHECKING:
    from rich.console import Console

    from fedtune.core.config import Site, Study
    from fedtune.officer.budget_check import Paid

STUDY = Annotated[
    Path, typer.Argument(metavar="STUDY", help="The public plan, study.toml.", show_default=False)
]
SITES = Annotated[
    list[Path] | None,
    typer.Option(
        "--sites",
        metavar="PATH",
        help="A site.toml, or a folder of them; may be repeated. Default: the study's folder.",
    ),
]
MORE = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[SITE…]",
        help="The same as --sites, so that a shell can expand sites/*/site.toml.",
        show_default=False,
    ),
]
TRACKER = Annotated[
    list[str] | None,
    typer.Option(
        "--tracker",
        metavar="NAME",
        help="Also give each round's figures to this tracker: tensorboard, mlflow, or wandb, "
        "which works offline. Write NAME or NAME:OPTION=VALUE,…; may be repeated.",
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
        help="Serve metrics for Prometheus on 127.0.0.1:N, to programs on this machine only. "
        "Default: no metrics are served.",
        show_default=False,
    ),
]
RESUME = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue a run after its last complete round: the run in --out, or else the "
        "study's newest one. If there is none, a run begins.",
    ),
]
SET = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Use this value instead of the one in study.toml, such as training.rounds=4; "
        "may be repeated.",
        show_default=False,
    ),
]


SHARE = Annotated[
    list[str] | None,
    typer.Option(
        "--share",
        metavar="CLASS=SHARE",
        help="For the expected gain: the share of the sites' patients (or records) to assume for "
        "a class without public records. For example, 'genetic changes=0.1' is a tenth for the "
        "class genetic changes. May be repeated.",
        show_default=False,
    ),
]
ANYWAY = Annotated[
    bool,
    typer.Option(
        "--anyway",
        help="Run the study even if the sites' private records are expected to add nothing to "
        "public ones. Default: such a study ends with an error before it costs any ε.",
    ),
]


def shares_of(given: list[str] | None) -> dict[str, float]:
    """Parse the values of --share, each CLASS=SHARE. Return class -> the share of the sites' units
    that is assumed to be of this class. Errors: ConfigError if a share is no number."""
    found: dict[str, float] = {}
    for text in given or ():
        name, _, share = text.rpartition("=")
        try:
            found[name] = float(share)
        except ValueError:
            raise ConfigError(
                f"--share {text}: no number", "CLASS=SHARE, such as 'genetic changes=0.1'"
            ) from None
    return found


def load(study: Path, settings: list[str] | None) -> Study:
    """Read study.toml, with the values of --set in place of its own. Errors: ConfigError."""
    from fedtune.core.config import load_study

    return load_study(study, settings=settings or ())


def say_what_to_expect(
    console: Console, study: Study, sizes: Sequence[int], *, every: bool = True
) -> None:
    """Print before a study starts how long it will take.

    Also warn if δ is too large for sites of these declared sizes, or if the study's learning rate,
    which a recipe set, no longer fits the study's noise. every: whether `sizes` has the size of
    every site of the study; only then is the rate checked."""
    from fedtune.presets.duration import forecast
    from fedtune.presets.rate import rate_note
    from fedtune.report.delta import warning

    if not sizes:
        return
    found = forecast(study, sizes)
    for line in found.lines() if found else ():
        console.print(line, highlight=False, markup=False)
    delta = getattr(study.privacy, "delta", 0.0)
    rate = rate_note(study, sizes) if every else ""
    for line in (warning(delta, study.unit, max(sizes)), rate):
        if line:
            console.print(line, style="bold yellow", highlight=False, markup=False)


def say_looks(console: Console, study: Study) -> None:
    """Print, for a study without a last round, how often versions are compared, and how large a
    gain the present number of public records can show. If these records cannot be read here, only
    the number of comparisons is printed.

    Errors: DataError (public records without the plan's columns of groups)."""
    if study.schedule is None or study.evaluation is None:
        return
    from fedtune.core.data.records import read_records
    from fedtune.core.registry.metrics import METRICS
    from fedtune.evaluation.groups import count_groups
    from fedtune.report.paired import CHANGED, LEAST_GROUP, least_gain

    table = study.schedule
    file = study.evaluation
    records = 0
    with suppress(DataError):
        records = len(read_records(file, unit="record", labelled=True)[0])
    sizes = list[tuple[int, float]]()
    for column, counted in count_groups(file, tuple(table.groups)).items() if records else ():
        sizes += [(number, table.groups[column]) for number in counted.values()]
    judged = [(number, margin) for number, margin in sizes if number >= LEAST_GROUP]
    line = f"a version is released if p ≤ {table.threshold:.2g}, in {table.looks} looks at "
    line += f"the {records:,} public records" if records else "a public file"
    line += f"; at most one study in {1 / table.alpha:.0f} releases one that it should not, for "
    line += f"each file of public records, of which there are at most {table.files}"
    if records and METRICS[file.metric].share:
        alone = least_gain(records, table.threshold, table.margin)
        gain = least_gain(records, table.threshold, table.margin, judged)
        found = f"a gain of {100 * gain:.0f} points is" if gain <= 1 else "no gain is"
        line += f"; {found} found four times in five, if the two "
        line += f"versions give different answers for {CHANGED:.0%} of the records"
        line += f" (without groups {100 * alone:.0f} points)" if gain > alone else ""
    if few := len(sizes) - len(judged):
        line += f"; groups of fewer than {LEAST_GROUP} records decide nothing, here {few}"
    console.print(line, highlight=False, markup=False)


def say_expected_gain(
    console: Console, study: Study, sizes: Sequence[int], shares: Mapping[str, float]
) -> dict[str, Any] | None:
    """Print what a study is expected to gain over public records alone. Return the forecast for
    --json; None if the gain cannot be predicted.

    - sizes: the sites' declared sizes
    - shares: class -> the share of the sites' units that is assumed to be of this class, for
      classes of which there is no public record"""
    from rich.console import Console as Screen

    from fedtune.cli.watch import Watch
    from fedtune.evaluation.before_paying import forecast_and_describe

    with Watch(Screen(stderr=True), "what public records say of the gain"):
        gain, lines = forecast_and_describe(study, sizes, shares)
    if gain and len(sizes) == 1:
        sites = "1 site" if study.strategy.min_sites == 1 else f"{study.strategy.min_sites} sites"
        console.print(
            f"for {sites} of {sizes[0]:,}; for other sizes: `fedtune plan`, --size for each site",
            highlight=False,
            markup=False,
        )
    for line in lines:
        style = "bold yellow" if gain and line == gain.warning else None
        console.print(line, style=style, highlight=False, markup=False)
    return gain.as_dict() if gain else None


def say_what_was_paid(paid: Sequence[Paid], *, ask: bool) -> None:
    """Print before a run begins what each site's records have paid already. Errors: InputError if a
    person was asked and does not agree.

    - paid: for each site, what was paid, and whether this study would be paid for a second time
    - ask: whether to ask a person, on a terminal, before a study is paid for a second time"""
    for site in paid:
        typer.echo(str(site))
    asks = ask and any(site.again for site in paid) and sys.stdin.isatty() and sys.stdout.isatty()
    if asks and not typer.confirm("pay again?"):
        raise InputError(
            "nothing was run, and nothing paid",
            "the answer yes",
            "to continue an interrupted run, use --resume; to pay without a question, use --yes",
        )


@contextmanager
def stopping(run: Path) -> Iterator[None]:
    """Run the block; on Ctrl-C, end it with a KeyboardInterrupt whose text says what is kept in
    `run`, the folder of the run."""
    try:
        yield
    except KeyboardInterrupt:
        from fedtune.runs.choice import stopped_line

        raise KeyboardInterrupt(stopped_line(run)) from None


def sites_of(study: Path, *groups: list[Path] | None) -> list[Site]:
    """Load the sites of a study. groups: site.toml files and folders of them, as SITES and MORE
    give them; without any, those in the study's folder. Errors: ConfigError."""
    from fedtune.officer.site_files import load_sites

    return load_sites([path for paths in groups for path in paths or ()] or study.parent)
