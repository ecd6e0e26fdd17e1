"""The command for a hospital that takes part in several consortia with the same patients."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape

from fedtune.cli.exit_codes import command
from fedtune.core.errors import ConfigError, InputError

if TYPE_CHECKING:
    from fedtune.officer.adopt import Adoption
    from fedtune.officer.memberships import Ending, Listed, Membership

NAMED = {"add": "--add", "adopt": "--adopt", "end": "--end", "forget": "--forget"}


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the command on `app`. panel: the heading under which --help lists it."""
    command(app, panel=panel)(memberships)


def memberships(
    home: Annotated[
        Path,
        typer.Argument(
            metavar="HOME",
            help="The hospital's home: the folder of hospital.toml and its ledger. --add with "
            "--data creates it.",
        ),
    ],
    add: Annotated[
        str | None,
        typer.Option(
            "--add",
            metavar="NAME",
            help="Make a membership: write its site.toml to --site, and add its table to "
            "hospital.toml.",
            show_default=False,
        ),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(
            "--site",
            metavar="DIR",
            help="With --add: the membership's own folder, for its site.toml and keys.",
            show_default=False,
        ),
    ] = None,
    max_epsilon: Annotated[
        float | None,
        typer.Option(
            "--max-epsilon",
            min=0.01,
            metavar="E",
            help="With --add: the largest ε that the membership may spend on one dataset. Default: "
            "the hospital's ceiling.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            metavar="DATASET",
            help="With --add: the registered dataset on which the membership trains; default: the "
            "only one. With --data: the name under which the records are registered; "
            "default: records.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="PATH|URL",
            help="With --add, if HOME holds no hospital.toml yet: create it, with these records "
            "as its first dataset. Needs --declared-size.",
            show_default=False,
        ),
    ] = None,
    declared_size: Annotated[
        int | None,
        typer.Option(
            "--declared-size",
            min=1,
            metavar="N",
            help="With --data: the number of patients (or records) as a person states it, not as "
            "it was counted.",
            show_default=False,
        ),
    ] = None,
    patient: Annotated[
        str | None,
        typer.Option(
            "--patient",
            metavar="COLUMN",
            help="With --data: the column of the patients' keys. Default: each record is a unit of "
            "its own.",
            show_default=False,
        ),
    ] = None,
    adopt: Annotated[
        Path | None,
        typer.Option(
            "--adopt",
            metavar="SITE",
            help="Turn a site that has its own ledger into a membership, named by --name. A "
            "copy of its state folder is kept.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="With --adopt: the name of the membership. With --data: the hospital's name; "
            "default: the name of the folder HOME.",
            show_default=False,
        ),
    ] = None,
    withdrawn: Annotated[
        Path | None,
        typer.Option(
            "--withdrawn",
            metavar="FILE",
            help="With --adopt: a file with the keys, one per line, of patients who withdrew "
            "and are in no record any more.",
            show_default=False,
        ),
    ] = None,
    end: Annotated[
        str | None,
        typer.Option(
            "--end",
            metavar="NAME",
            help="End a membership. What it spent stays spent.",
            show_default=False,
        ),
    ] = None,
    anyway: Annotated[
        bool,
        typer.Option(
            "--anyway",
            help="With --end: end the membership even if its studies are under way, or if its site "
            "file cannot be used; in the second case no file is deleted. With --adopt, if HOME has "
            "a ledger already: adopt the site even if it released something without noise. After "
            "that, no private study of the hospital is possible.",
        ),
    ] = False,
    forget: Annotated[
        str | None,
        typer.Option(
            "--forget",
            metavar="PLACE",
            help="Delete this machine's note that another home pays for some records, because the "
            "ledger of that home is of no use any more. PLACE: the path or url of the records, or "
            "the other home. If the ledger of HOME itself is lost, give HOME as PLACE, so that a "
            "new ledger can begin there; HOME may then also be a site's state folder.",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="With --end: end the membership without asking.")
    ] = False,
) -> dict[str, Any]:
    """List the consortia in which a hospital takes part with the same patients, and what each has
    spent; or add, adopt or end a membership.

    All memberships pay from one ledger, in HOME, so that ε spent on a patient in one consortium
    counts in every other. hospital.toml in HOME limits how much ε all memberships together may
    spend on each dataset, and may give each membership a share of that. If the ceiling refuses a
    study, its coordinator learns that the hospital's budget is too small for it, and not who spent
    the rest."""
    given = {"add": add, "adopt": adopt, "end": end, "forget": forget}
    acts = [key for key, value in given.items() if value is not None]
    if len(acts) > 1:
        raise InputError(
            f"{NAMED[acts[0]]} and {NAMED[acts[1]]} are both given", "only one of the two"
        )
    _check_options(
        acts[0] if acts else "",
        {
            "--site": ("add", site), "--max-epsilon": ("add", max_epsilon),
            "--dataset": ("add", dataset), "--data": ("add", data),
            "--declared-size": ("add", declared_size), "--patient": ("add", patient),
            "--withdrawn": ("adopt", withdrawn),
            "--anyway": ("adopt" if adopt else "end", anyway or None),
            "--yes": ("end", yes or None),
        },
    )  # fmt: skip
    if add is not None:
        return _add(home, add, site, max_epsilon, dataset, data, declared_size, patient, name)
    if adopt is not None:
        return _adopt(home, adopt, name, withdrawn, anyway=anyway)
    if end is not None:
        return _end(home, end, anyway=anyway, yes=yes)
    if forget is not None:
        return _forget(home, forget)
    from fedtune.officer.memberships import list_memberships

    listed = list_memberships(home)
    _show(listed)
    return listed.facts()


def _check_options(act: str, options: dict[str, tuple[str, Any]]) -> None:
    for option, (of, value) in options.items():
        if value is not None and of != act:
            raise InputError(f"{option} is given without {NAMED[of]}", NAMED[of])


# -------------------------------------------------------------------------------------------- add


def _add(
    home: Path,
    name: str,
    site: Path | None,
    max_epsilon: float | None,
    dataset: str | None,
    data: str | None,
    size: int | None,
    patient: str | None,
    hospital_name: str | None,
) -> dict[str, Any]:
    from fedtune.core.config.hospital import FILE
    from fedtune.core.config.load import load_hospital
    from fedtune.officer import memberships as officer
    from fedtune.presets.membership import site_text

    if site is None:
        raise InputError("--add is given without --site", "--site DIR, the membership's folder")
    wrote = list[Path]()
    if not (home / FILE).exists():
        if data is None or size is None:
            raise ConfigError(
                f"{home / FILE}: no such file",
                "a hospital's home, or --data PATH and --declared-size N to make one",
                "if a site here has taken part already, begin with it: --adopt SITE --name NAME",
            )
        registered = _registered(data, patient)
        wrote.append(
            officer.make_home(home, hospital_name or home.resolve().name, size,
                              dataset or "records", registered)
        )  # fmt: skip
    elif data is not None or size is not None or patient is not None:
        raise ConfigError(
            f"{home / FILE} exists",
            "no --data, --declared-size or --patient",
            "to register another dataset, edit that file",
        )
    text = site_text(home.resolve(), load_hospital(home), name, dataset)
    path = site / "site.toml"
    for each in officer.add(home, name, path, text, max_epsilon):
        wrote += [each] if each not in wrote else []
    for each in wrote:
        typer.echo(f"wrote {each}")
    typer.echo(
        f"\nnext   look through {path}: columns of the records, and what this consortium may do\n"
        f"       fedtune doctor {path}   what is ready, and what is missing\n"
        f"       fedtune enroll {path}   ask the coordinator to take part\n"
        f"       fedtune client {path} --answer FILE   take part, beside the other memberships"
    )
    return {"wrote": wrote, "membership": name}


def _registered(data: str, patient: str | None) -> Any:
    """Build the entry by which hospital.toml registers a dataset. data: the path or the url of the
    records. patient: the column of the patients' keys; None if each record is a unit of its own."""
    from fedtune.core.config.database import anchor_url
    from fedtune.core.config.hospital import RegisteredData
    from fedtune.presets.places import place_of, split_place

    if "://" in data and "#" not in data:
        data += "#records"  # its table is the site file's
    place = place_of(data)
    if isinstance(place, Path):
        return RegisteredData(path=place.absolute(), patient=patient)
    return RegisteredData(url=anchor_url(split_place(place)[0], Path.cwd()), patient=patient)


# ------------------------------------------------------------------------------------------ adopt


def _adopt(
    home: Path, site: Path, name: str | None, withdrawn: Path | None, *, anyway: bool
) -> dict[str, Any]:
    from fedtune.officer.adopt import adopt
    from fedtune.officer.withdraw import read_keys

    if name is None:
        raise InputError("--adopt is given without --name", "--name NAME, of the membership")
    keys = read_keys(withdrawn) if withdrawn else []
    made = adopt(home, site, name, keys, anyway=anyway)
    _show_adoption(made, site)
    return asdict(made)


def _show_adoption(made: Adoption, site: Path) -> None:
    if made.copy is None:
        typer.echo(f"{site} was adopted before; what was left of its old ledger is taken away")
    else:
        whose = (
            "its ledger is the hospital's now"
            if made.first
            else f"{made.charges} charges of its own ledger are entered in the hospital's"
        )
        typer.echo(f"{site} is the membership {made.name} of {made.home}: {whose}")
        typer.echo(f"kept   {made.copy}\n       {made.site_copy}")
        typer.echo("       a copy of everything as it was; delete it once all is well")
    for old, new in made.datasets.items():
        if old != new:
            typer.echo(f"its dataset {old} is called {new} here")
    for dataset, charged in made.charged.items():
        typer.echo(
            f"what was paid for its dataset {dataset} counts against every dataset of the "
            f"hospital, as {charged}: some of its patients may be in others by now"
        )
    if made.restored:
        typer.echo(
            f"{made.restored} charges that a restore of its ledger had entered count against every "
            "dataset of the hospital, and against patients who come later"
        )
    if made.unrecognised:
        typer.echo(
            f"{made.unrecognised} withdrawals from before a restore that made a new salt are not "
            "entered, since no key matches them: who was not withdrawn again since then is not "
            f"left out. `fedtune withdraw {site}` leaves a patient out"
        )
    for path in made.receipts:
        typer.echo(f"a new receipt for a patient who had withdrawn: {path}")
    typer.echo(
        f"\nnext   fedtune memberships {made.home}   who spent what\n"
        f"       fedtune ledger {site}   the total against the ceiling\n"
        f"       fedtune client {site}   as before: its coordinator knows it by the same keys"
    )


# -------------------------------------------------------------------------------------------- end


def _end(home: Path, name: str, *, anyway: bool, yes: bool) -> dict[str, Any]:
    from fedtune.cli.console import files_table
    from fedtune.officer.memberships import end, list_ending

    ending = list_ending(home, name)
    if ending.anyway and not anyway:
        raise InputError(
            ending.anyway,
            todo="wait until its studies have ended, or correct its site file; or give --anyway",
        )
    _show_ending(ending)
    if ending.site:
        Console().print(files_table(ending.site.site.state, ending.delete))
    if not yes and not typer.confirm(f"end the membership {name}?"):
        raise InputError("nothing was changed", todo="say yes, or give --yes")
    copy = end(ending, anyway=anyway)
    typer.echo(
        f"ended {name}; its site file is refused from now on. hospital.toml as it was: {copy}"
    )
    typer.echo("tell its coordinator, who can end its access: `fedtune revoke`")
    deleted = sum(map(len, ending.delete.values()))
    return {"ended": name, "deleted": deleted, "copy": copy}


def _show_ending(ending: Ending) -> None:
    from fedtune.core.registry.rounding import rounded_up

    typer.echo(
        f"the end of the membership {ending.name}\n"
        "stays for good   its charges, the audit log and the receipts of withdrawals in the home\n"
        "not taken back   what was released: "
        + (
            "; ".join(
                f"{dataset}, {line.studies} studies, ε = "
                + (rounded_up(line.epsilon) if line.known else "not known")
                for dataset, line in ending.paid.items()
            )
            or "nothing"
        )
        + "\ndeleted          the files below"
    )


def _forget(home: Path, place: str) -> dict[str, Any]:
    from fedtune.core.config.load import load_hospital
    from fedtune.core.ledger.audit_log import AuditLog
    from fedtune.core.ledger.files import traces
    from fedtune.homes.known_homes import forget, is_known
    from fedtune.homes.opening import open_ledger

    # A site's own state folder is a home too, and may be empty yet.
    if not (traces(home) or is_known(home, place)):
        load_hospital(home)
    forgotten = forget(place, home)
    if traces(home):
        AuditLog(home, open_ledger(home).key).add("forget", "--forget", homes=len(forgotten))
    for each in forgotten:
        typer.echo(f"forgot that {each} pays for {place}")
    typer.echo(
        "what that ledger paid is in no total of this home; a site that still pays from it is "
        "refused at its next start"
    )
    return {"forgot": forgotten, "place": place}


# ------------------------------------------------------------------------------------------- list


def _show(listed: Listed) -> None:
    """Print the memberships, and each dataset's total."""
    from fedtune.cli.ledger_view import budget_table, memberships_table
    from fedtune.cli.tables import Figures

    table = Figures(
        title=f"memberships of {escape(listed.hospital.hospital.name)}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for head in ("membership", "consortium", "share, spent", "now"):
        table.add_column(head, overflow="fold")
    for each in listed.memberships:
        table.add_row(
            f"{escape(each.name)}\n{escape(str(each.site_file))}",
            escape(_consortium(each)),
            escape(_share(each)),
            escape(_now(each)),
        )
    Console().print(table)
    tables = listed.hospital.memberships.items()
    earlier = next((name for name, table in tables if table.earlier), "")
    for total in listed.totals:
        Console().print(budget_table(total, "all"))
        if lines := listed.who[total.dataset]:
            Console().print(memberships_table(lines, earlier=earlier))
    if not listed.memberships:
        typer.echo(f"none so far: fedtune memberships {listed.home} --add NAME --site DIR")


def _consortium(one: Membership) -> str:
    if one.problem:
        return one.problem
    if one.consortium is None:
        return "none joined yet"
    return f"{one.consortium['address']}\n{one.consortium['fingerprint']}"


def _share(one: Membership) -> str:
    from fedtune.core.registry.rounding import rounded_up

    spent = [
        f"{name}: {rounded_up(budget.epsilon) if budget.known else 'not known'}"
        for name, budget in one.share.items()
    ]
    return "\n".join([f"ε = {one.max_epsilon:g}", *spent])


def _now(one: Membership) -> str:
    studies = [f"under way: {name}" for name in one.studies.values()]
    return "\n".join(["its client runs" if one.runs else "not running", *studies])
