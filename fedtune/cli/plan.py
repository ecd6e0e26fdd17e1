"""The command that shows what a study costs before it runs, and what it is expected to gain."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedtune.cli.exit_codes import command
from fedtune.cli.study import (
    MORE,
    SET,
    SHARE,
    SITES,
    STUDY,
    load,
    say_expected_gain,
    say_looks,
    say_what_to_expect,
    shares_of,
    sites_of,
)
from fedtune.core.errors import ConfigError

if TYPE_CHECKING:
    from fedtune.core.config import Site


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, panel=panel)(plan)


def plan(
    study: STUDY,
    more: MORE = None,
    sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--size",
            min=1,
            metavar="N",
            help="Compute the cost for a site of this declared size; may be repeated. Site files "
            "are then read only if --sites names them.",
        ),
    ] = None,
    sites: SITES = None,
    share: SHARE = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Do not predict the gain, for which the base model has to be loaded."
        ),
    ] = False,
    settings: SET = None,
) -> dict[str, Any]:
    """Show what a study costs before it runs (σ, ε and rounds for sites of given sizes), and what
    it is expected to gain over public records alone.

    This reads no record of a site: it needs the public plan and the sizes that the sites declare,
    and for the expected gain also the base and the plan's public files."""
    from fedtune.cli.console import plan_table, warn_not_private

    loaded, console = load(study, settings), Console()
    if not loaded.private:
        warn_not_private(console)
        return {"study": loaded.study.name, "private": False}
    asked: list[Site | int] = [*(sizes or [])]
    if sites or more or not asked:
        try:
            asked += sites_of(study, sites, more)
        except ConfigError as error:
            if not (sites or more):
                error.add_note("Without site files: give --size N, a site's patients or records.")
            raise
    from fedtune.accounting.costs import plan as compute_costs
    from fedtune.accounting.costs import query_lines, shared_lines

    costs = compute_costs(loaded, asked)
    console.print(plan_table(loaded, costs))
    shared = shared_lines(loaded, [site.declared_size for site in costs.sites])
    for line in (costs.objective, *query_lines(loaded, len(asked)), *shared):
        console.print(line, highlight=False, markup=False)
    declared = [site.declared_size for site in costs.sites]
    say_what_to_expect(console, loaded, declared, every=not sizes)
    say_looks(console, loaded)
    shares = shares_of(share)
    gain = None if quick else say_expected_gain(console, loaded, declared, shares)
    return {"private": True, **asdict(costs), "expected": gain}
