"""Commands for the person who answers for a site's data."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from fedtune.cli.exit_codes import ErrorWithResult, command
from fedtune.cli.study import SET, STUDY, load, say_expected_gain
from fedtune.core.errors import ConfigError, DataError, InputError, escape_controls

if TYPE_CHECKING:
    from fedtune.core.config import Site, Study
    from fedtune.officer.review import Review
    from fedtune.officer.withdraw import Withdrawal

SITE = Annotated[
    Path, typer.Argument(metavar="SITE", help="This site's site.toml.", show_default=False)
]
PLAN = Annotated[
    Path,
    typer.Argument(
        metavar="STUDY",
        help="A study.toml, the coordinator's answer, or a plan as JSON.",
        show_default=False,
    ),
]


def add_to(app: typer.Typer, panel: str) -> None:
    """Register the commands on `app`. panel: the heading under which --help lists them."""
    for function in (review, let_go, ledger, withdraw, purge, audit):
        command(app, panel=panel)(function)


def review(
    study: PLAN,
    site: Annotated[
        Path,
        typer.Option(
            "--site", metavar="SITE", help="The site.toml under which the plan would run."
        ),
    ] = Path("site.toml"),
    sign: Annotated[
        bool, typer.Option("--sign", help="Sign this plan, and no other, under your login's name.")
    ] = False,
    anyway: Annotated[
        bool,
        typer.Option(
            "--anyway",
            help="With --sign: also sign a plan that the site refuses today. The site "
            "goes on refusing it until site.toml allows it.",
        ),
    ] = False,
    whole: Annotated[
        bool,
        typer.Option(
            "--digest",
            help="For a study.toml: also read its public text, to compute the digest that is "
            "signed and to predict the gain. This takes minutes to an hour; --sign does it "
            "too.",
        ),
    ] = False,
    settings: SET = None,
) -> dict[str, Any]:
    """Say in plain words what a study would run here, what would leave, and what it costs.

    The public text of a study.toml is not read, because cost and rules do not depend on it. With
    --digest it is read, and the gain is predicted too. The command also counts this site's records
    of classes that the plan does not name, and says if site.declared_size is far from the number of
    records or patients; both are for you alone. If policy.admission is
    "reviewed" or "signed", the site keeps each plan that it was sent in its state folder, under
    plans/; --sign admits such a plan."""
    from fedtune.cli.watch import Watch
    from fedtune.core.errors import PolicyRefused
    from fedtune.core.ledger.audit_log import AuditLog, login
    from fedtune.core.vault.waiting_plans import keep_plan
    from fedtune.homes.opening import open_ledger
    from fedtune.officer.review import find_coordinator, is_outline, load_running, read_plan
    from fedtune.officer.review import review as review_plan

    loaded, has_changed = load_running(site)
    if has_changed:
        typer.echo(
            f"{site}: was changed since this site was started. Until it is started again, it takes "
            "part, and pays, by what the file said then; so are the figures below.",
            err=True,
        )
    whole = whole or sign
    screen = Watch(Console(stderr=True), "computing the plan's digest") if whole else nullcontext()
    with screen:
        plan = read_plan(study, loaded, settings or (), whole=whole)
    book = open_ledger(loaded.home)
    acts = AuditLog(book.folder, book.key)
    coordinator = find_coordinator(loaded, study)
    outcome = review_plan(
        plan, loaded, book, outline=is_outline(study, plan), coordinator=coordinator
    )
    _show_review(outcome, plan.study.name)
    expected = _say_gain(plan, loaded, at_hand=whole and study.suffix == ".toml")
    left_out, far = _left_out(plan, loaded), _say_wrong_size(plan, loaded)
    facts: dict[str, Any] = {"plan": outcome.digest} if outcome.digest else {}
    facts["study"] = plan.study.name
    facts["refusals"] = len(outcome.refusals)
    if sign:
        if outcome.refusals and not anyway:
            raise PolicyRefused(
                "a plan that this site refuses is not signed",
                todo="change site.toml first, or sign it with --anyway",
            )
        acts.add("sign", "--anyway" if outcome.refusals else "--sign", **facts)
        book.admit(outcome.digest, login(), loaded.policy.membership)
        keep_plan(loaded, plan)  # so that the digest of this study.toml is known here from now on
        typer.echo(f"\nsigned by {login()}: this plan, and no other, is admitted")
    else:
        acts.add("review", once=1, **facts)
    return {
        "study": plan.study.name,
        "digest": outcome.digest,
        "sections": dict(outcome.sections),
        "refusals": outcome.refusals,
        "verdict": outcome.verdict,
        "left_out": left_out,
        "declared_far": far,
        "expected": expected,
        "signed": sign,
    }


def _say_gain(plan: Study, site: Site, *, at_hand: bool) -> dict[str, Any] | None:
    """Print what a private plan may gain over public records, or which command predicts it. Return
    the forecast, if one was made. at_hand: whether the plan's base and public files are on this
    machine."""
    from fedtune.core.errors import PolicyRefused
    from fedtune.core.vault.policy import permit_plugins
    from fedtune.evaluation.before_paying import explain_who_forecasts

    try:
        permit_plugins(plan, site)  # before one is imported
    except PolicyRefused:
        return None
    if not plan.private:
        return None
    typer.echo()
    if at_hand:
        return say_expected_gain(Console(), plan, [site.site.declared_size], {})
    Console().print(explain_who_forecasts(plan), highlight=False, markup=False)
    return None


def _left_out(plan: Study, site: Site) -> str:
    """Print and return how many of the site's records the plan leaves out because of their class,
    or why they cannot be counted. Return "" if none is left out."""
    from fedtune.core.errors import FedtuneError
    from fedtune.officer.unknown_classes import unknown_classes

    try:
        told = unknown_classes(plan, site)
    except FedtuneError as error:
        told = f"its records cannot be counted: {error}"
    if told:
        line = f"\n[yellow]{escape(told)}[/yellow] (counted here, for this screen alone)"
        Console().print(line, highlight=False)
    return told


def _say_wrong_size(plan: Study, site: Site) -> str:
    """Print and return that site.declared_size is far from the number of units; "" if it is not, or
    if the units cannot be counted (which `_left_out` and `fedtune doctor` then say)."""
    from fedtune.core.errors import FedtuneError
    from fedtune.officer.wrong_size import find_wrong_size

    told = ""
    with suppress(FedtuneError):
        told = find_wrong_size(site, plan.unit)
    if told:
        line = f"\n[yellow]{escape(told)}[/yellow] (counted here, for this screen alone)"
        Console().print(line, highlight=False)
    return told


def _show_review(outcome: Review, name: str) -> None:
    """Print the review of a plan: its sections, then the verdict. name: the study's name."""
    console, style = Console(), "bold red" if outcome.refusals else "bold"

    def print_indented(lines: Sequence[str]) -> None:
        for line in lines:
            console.print(Padding(escape(escape_controls(line)), (0, 0, 0, 2)), highlight=False)

    digest = outcome.digest or "(its digest takes the base and public text: --digest)"
    console.print(f"[bold]{escape(name)}[/bold]  {digest}", highlight=False, soft_wrap=True)
    for heading, lines in outcome.sections:
        console.print(f"\n[bold]{heading}[/bold]")
        print_indented(lines)
    console.print(f"\n[{style}]{escape(outcome.verdict)}[/{style}]", highlight=False)
    print_indented(outcome.refusals)


def let_go(
    site: SITE,
    answers: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ANSWER…]",
            help="Names of answers from the list. Default: print the list.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="Release, or with --refuse refuse, all answers that wait now."),
    ] = False,
    refuse: Annotated[
        bool,
        typer.Option(
            "--refuse", help="Refuse these answers for good; what was paid for them stays paid."
        ),
    ] = False,
) -> dict[str, Any]:
    """List the answers that wait at this site to be sent, and release them or refuse them.

    This is for a site with policy.answers = "held". The list shows each answer's study, round,
    length and cost, but never its content: a refusal that followed from the records would tell the
    coordinator about them. A draw of shared noise is released before it is made and paid for. Each
    release or refusal is entered, under your login's name, in the audit log and in the ledger."""
    from fedtune.cli.console import waiting_table
    from fedtune.core.config import load_site
    from fedtune.officer.let_go import decide, list_waiting

    loaded = load_site(site, keys_may_differ=True)
    if every and answers:
        raise InputError("--all is given together with names", "either --all or names")
    if not (every or answers):
        if refuse:
            raise InputError(
                "--refuse is given without any answer", "names from the list, or --all"
            )
        found = list_waiting(loaded)
        typer.echo("" if found else "nothing waits here to be let go", nl=not found)
        if found:
            Console().print(waiting_table(found, loaded.policy.delta))
        return {"waiting": [asdict(one) for one in found]}
    decided = decide(loaded, answers or [], refuse=refuse, every=every)
    for one in decided:
        what = "refused, for good" if refuse else "goes when the coordinator asks for it again"
        typer.echo(f"{one.name}: {one.study}, round {one.round}: {what}")
    if not decided:
        typer.echo("nothing waits here to be let go")
    return {"refused" if refuse else "let_go": [asdict(one) for one in decided]}


def ledger(
    site: SITE,
    backup: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Copy the ledger, without this site's private key, to the new folder DIR.",
        ),
    ] = None,
    restore: Annotated[
        bool,
        typer.Option(
            "--restore",
            help="Start the ledger again after damage; whatever is lost counts as spent.",
        ),
    ] = False,
    copy: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="With --restore: the backup to restore from. Default: what is left of the ledger.",
        ),
    ] = None,
    accept: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help="Accept, under your login's name, that this dataset takes part in further "
            "studies although the cost of some rounds is not known.",
            show_default=False,
        ),
    ] = None,
    accept_declared: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="With --accept DATASET: also accept that some private records of DATASET were "
            "declared public or generated here, as part of the dataset NAME; after a restore, '*' "
            "stands for those that it may have lost. May be given several times.",
            show_default=False,
        ),
    ] = None,
    freeze: Annotated[
        bool,
        typer.Option(
            "--freeze",
            help="Charge, answer and delete nothing here until somebody ends this with --lift.",
        ),
    ] = False,
    lift: Annotated[bool, typer.Option("--lift", help="End a freeze.")] = False,
    reason: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            help="With --accept, --freeze or --lift: the reason, for later readers.",
        ),
    ] = "",
) -> dict[str, Any]:
    """Show what was spent from this site's privacy budget, by which study, and what remains.

    The command reads the whole ledger and checks every signature first. Rounds of an earlier
    release, of another unit or by another column of patients are shown as unknown; no further study
    runs until somebody accepts them (--accept). If a dataset was declared public or generated here,
    the command reads the site's records, and names each such dataset with which they are shared. A
    freeze also holds for a client that is running, and for every membership of a hospital."""
    from fedtune.cli.ledger_view import ledger_view
    from fedtune.core.config import load_site
    from fedtune.core.config.patient_columns import disjoint_datasets, patient_columns
    from fedtune.core.ledger.audit_log import AuditLog, login
    from fedtune.core.ledger.declared import (
        check_acceptable,
        describe_accepted,
        describe_shared,
        list_not_accepted,
        options_to_accept,
    )
    from fedtune.core.ledger.ledger import Ledger
    from fedtune.core.ledger.restore import SALT_LOST
    from fedtune.core.ledger.spending import facts, list_ended
    from fedtune.homes.known_homes import find_head
    from fedtune.homes.opening import find_ledger
    from fedtune.officer import freeze as frozen
    from fedtune.officer.memberships import still

    if freeze and lift:
        raise ConfigError("--freeze and --lift are both given", "only one of the two")
    if accept_declared and accept is None:
        raise ConfigError("--accept-declared is given without --accept", "--accept DATASET, too")
    try:
        loaded = load_site(site, keys_may_differ=True)
    except ConfigError:
        if freeze:  # an emergency waits for no correction of hospital.toml or of another site file
            frozen.freeze(load_site(site, alone=True), reason)
            typer.echo("the ledger is frozen, in spite of this:", err=True)
        raise
    if freeze:
        frozen.freeze(loaded, reason)
    if lift:
        frozen.lift(loaded, reason)
    folder = loaded.site.ledger or loaded.home
    if restore and copy is None and sys.stdin.isatty():
        typer.echo(
            "what cannot be read is charged as spent for good, perhaps all that is left of the "
            "budget; --from DIR, a newer copy of the state folder or a backup, costs less"
        )
        if not typer.confirm("restore without one?"):
            raise InputError(
                "nothing was restored",
                "the answer yes",
                "to restore from a newer copy or a backup, give --from DIR",
            )
    # What a vault pays in the midst of a restore would be charged to no ledger.
    with still(loaded.home, loaded) if restore else nullcontext():
        if restore:
            standing = None if loaded.site.ledger else partial(frozen.read_decisions, folder)
            book = Ledger.restore(folder, copy, standing, find_head(folder))
            held = book.frozen
            if held is None or not held.why.startswith(SALT_LOST):
                typer.echo(
                    f"restored, with {len(book.withdrawn())} withdrawals: those that it had lost "
                    "are entered again, by their receipts and by what was left of the ledger"
                )
            if ended := list_ended(book):
                typer.echo(
                    "rounds of these studies may be missing, so they get no further answer here, "
                    f"and others can begin: {escape_controls(', '.join(ended))}"
                )
            if held:
                typer.echo(f"the ledger is frozen: {escape_controls(held.why)}")
        else:
            found = find_ledger(folder)
            if found is None:
                raise ConfigError(f"{folder}: no ledger yet; it begins with the first study")
            book = found
        acts = AuditLog(book.folder, book.key)
        if restore:  # a damaged log ends the command here
            acts.add("restore", "--from" if copy else "--restore")
    book.verify()
    if backup:
        acts.add("backup", "--backup")
        book.backup(backup)
        typer.echo(f"copied to {backup}, without this site's private key")
    unit = "patient" if loaded.data.columns.patient else "record"
    columns, dataset = patient_columns(loaded), accept or loaded.data.name
    seen = book.head.seq  # nobody accepts what comes while the records are read
    stated = book.as_stated(dataset, disjoint_datasets(loaded), columns)  # as a plan will be judged
    shared, unread = list[str](), None
    only_shows = not (freeze or lift or backup)
    if (accept is not None or only_shows) and list_not_accepted(book, dataset):
        from fedtune.core.vault.declared import list_shared  # loads what reads records

        try:
            shared = list_shared(loaded, book, dataset)
        except (ConfigError, DataError) as error:
            unread = error
    if accept is not None:
        named = accept_declared or []
        if unread and (named or not stated.unknown(accept, unit, columns)):
            raise unread
        check_acceptable(stated, accept, unit, columns, shared, named, seen)
        acts.add("accept", "--accept", dataset=accept)
        counted = stated.spending(accept, columns)
        book.accept(accept, login(), reason, columns, named, seen, counted)
        stated = book.as_stated(dataset, disjoint_datasets(loaded), columns)
        if named:
            typer.echo(f"accepted: {escape_controls(describe_accepted(accept, named))}")
        shared = sorted({*shared} - {*named})
    if shared:
        typer.echo(
            f"NOT ACCEPTED: {escape_controls(describe_shared(dataset, shared))}. No study reads "
            f"{dataset} until somebody accepts this too: fedtune ledger SITE --accept {dataset} "
            f"{escape_controls(options_to_accept(shared))} --reason TEXT"
        )
    if unread:
        typer.echo(
            f"whether {dataset} has records that were declared public or generated is not known, "
            f"since it cannot be read: {escape_controls(str(unread))}"
        )
    Console().print(ledger_view(stated, dataset, loaded.policy, unit, columns))
    held = book.frozen
    shown = facts(stated, dataset, loaded.policy, unit, columns)
    return shown | {"frozen": asdict(held) if held else None}


def withdraw(
    site: SITE,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file of patient keys, one per line. Default: on a terminal you are asked "
            "for one; otherwise standard input is read.",
        ),
    ] = None,
    unseen: Annotated[
        bool,
        typer.Option(
            "--unseen",
            help="Also withdraw a patient whose key is in no record and no study here yet.",
        ),
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="RECEIPT",
            help="Withdraw nobody; only check whether this receipt is from this site and still "
            "valid.",
        ),
    ] = None,
) -> dict[str, Any]:
    """Leave a patient who withdraws consent out of every later round.

    The command asks for the patient's key (the value in the patient column) without showing it, so
    that the key enters no command history. It says which released adapters were trained with the
    patient, and writes a signed receipt for the patient. A key that is in no record and no study of
    this site is entered only with --unseen; without it, the command ends with exit code 2."""
    from fedtune.core.config import load_site
    from fedtune.homes.opening import open_ledger
    from fedtune.officer.withdraw import (
        NotLogged,
        UnknownPatient,
        check_receipt,
        describe_receipts_column,
        describe_receipts_salt,
    )
    from fedtune.officer.withdraw import withdraw as leave_out

    loaded = load_site(site, keys_may_differ=True)
    book = open_ledger(loaded.home)
    if check:
        when = check_receipt(check, book)
        typer.echo(f"{check}: given by this site; the withdrawal of {when} stands")
        if said := describe_receipts_column(check, book, loaded):
            typer.echo(f"BY ANOTHER COLUMN: {escape_controls(said)}")
        if said := describe_receipts_salt(check, book):
            typer.echo(f"BY ANOTHER SALT: {said}")
        return {"receipt": check, "time": when}
    keys = _keys(file)
    unknown, damaged = 0, None
    results = list[dict[str, Any]]()
    for number, key in enumerate(keys, 1):
        try:
            withdrawal = leave_out(loaded, key, book, unseen)
        except UnknownPatient as error:
            unknown += 1
            results.append({"patient": number, "known": False})
            typer.echo(f"patient {number}: NOT KNOWN HERE: {error}")
            continue
        except NotLogged as error:
            damaged, withdrawal = error.reason, error.withdrawal
            typer.echo(f"patient {number}: not in the audit log: {error}")
        results.append({"patient": number, "known": True, **asdict(withdrawal)})
        typer.echo(f"patient {number}: left out from the next round on")
        _show(withdrawal, "the hospital's files" if loaded.hospital else loaded.data.where)
    if unknown:
        unknown_keys = InputError(
            f"{unknown} of {len(keys)} keys {'is' if unknown == 1 else 'are'} not known here and "
            "not entered",
            todo="look at them again; --unseen enters them all the same",
        )
        raise ErrorWithResult({"patients": results}, unknown_keys)
    if damaged:
        raise ErrorWithResult({"patients": results}, damaged)
    return {"patients": results}


def _show(withdrawal: Withdrawal, path: Path | str) -> None:
    """Print what a withdrawal could not undo, and where its receipt lies. path: the receipt's
    file."""
    if withdrawal.in_file is None:
        typer.echo(f"  {path} cannot be read, and may still hold records")
    elif withdrawal.in_file:
        typer.echo(
            f"  {withdrawal.in_file} records are still in {path}; they are not "
            "read into training any more, and deleting them is up to their owner"
        )
    typer.echo(f"  receipt for the patient: {withdrawal.receipt_file}")
    if not withdrawal.trained_on:
        typer.echo("  no study was ever prepared with this patient's records")
    for model in withdrawal.personal:
        typer.echo(f"  {model} was trained on them: not used until `fedtune personalise` ran again")
    for release in withdrawal.releases:
        most = "at most that much" if release.epsilon is not None else "an amount that is not known"
        typer.echo(
            f"  {release.name} ({release.digest[7:19]}…): {release.rounds} updates were sent "
            f"so far or wait for approval, ε = {release.cost}; what is made of "
            f"them keeps {most}, and the updates to come nothing"
        )


def _keys(file: Path | None) -> list[str]:
    """Read patient keys, one per line, from `file`. If `file` is None, ask for one key on a
    terminal, or read keys from a pipe. Errors: InputError if no key is given."""
    from fedtune.officer.withdraw import read_keys

    if file:
        lines = read_keys(file)
    elif sys.stdin.isatty():
        lines = [getpass.getpass("patient: ")]
    else:
        lines = list(sys.stdin)
    keys = [key for line in lines if (key := line.strip())]
    if not keys:
        raise InputError(
            "no patient's key was given, and nobody was left out",
            todo="give one a line, in --file or on standard input",
        )
    return keys


def purge(
    site: SITE,
    study: Annotated[
        str | None,
        typer.Option(
            "--study",
            metavar="NAME|DIGEST",
            help="Delete only what belongs to this study, such as its updates, plan and personal "
            "models. Default: the files of all studies, and the client's logs, status and "
            "other files that no study needs.",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> dict[str, Any]:
    """Delete what this site keeps of studies beside the ledger, after listing it and asking.

    Deleted are released updates, draws that wait for approval or are from an earlier release,
    plans, notes of studies and of where runs lie, the client's logs and status, training losses,
    personal models, pages and figures of acceptances, counts of records, what the data sheet
    attested, ledgers of runs of declared data, the space reserved for the ledger, and temporary
    files. The site's own ledger, the step log, the audit log, patients' receipts and this site's
    keys stay. If the coordinator asks again for a round whose update is deleted, the round is
    trained and paid for again, so run this after a study."""
    from fedtune.cli.console import files_table
    from fedtune.core.config import load_site
    from fedtune.officer import purge as purger

    listing = purger.listing(load_site(site, keys_may_differ=True), study)
    Console().print(files_table(listing.state, listing.deletable))
    for digest, name in listing.studies.items():
        typer.echo(f"{name}  {digest}")
    for path in listing.unknown:
        typer.echo(f"not fedtune's, left as it is: {path}")
    if not listing.files:
        typer.echo("nothing to delete")
        return {"deleted": {}, "unknown": listing.unknown}
    typer.echo(
        "the ledger, the step log and this site's keys stay; a round that is asked for again is "
        "trained, and paid for, again"
    )
    if not yes and not (sys.stdin.isatty() and typer.confirm("delete these files?")):
        raise InputError("nothing was deleted", "the answer yes", "run the command with --yes")
    purger.purge(listing)
    typer.echo(f"deleted {len(listing.files)} files; the ledger is whole")
    return {"deleted": listing.deletable, "unknown": listing.unknown}


def audit(
    study: STUDY,
    trials: Annotated[
        int, typer.Option(min=1000, metavar="N", help="Number of trials of the one-step audit.")
    ] = 40_000,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Audit the plan of this finished run of the study, with the noise and clipping "
            "that it had, and write audit.md into its folder.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for audit.json.")] = Path(
        "audit"
    ),
    settings: SET = None,
) -> dict[str, Any]:
    """Attack a plan on generated records, and print a lower bound on ε beside the claimed ε.

    No site's records are read. If the bound is above the claim, something is broken, and the exit
    code is 3."""
    from rich.markdown import Markdown

    from fedtune.core.errors import Refused

    with Console().status("attacking"):
        from fedtune.audit import AUDIT, audit_study
        from fedtune.report.audit import section
        from fedtune.runs.run import Run

        result = audit_study(
            load(study, settings), out, trials=trials, run=Run(run) if run else None
        )
    Console().print(Markdown("\n\n".join(section(result))))
    typer.echo(f"wrote {out / 'audit.json'}" + (f" and {run / AUDIT}" if run else ""))
    if not result["passed"]:
        error = Refused(
            "an audit contradicts the claim", todo="do not release; run `fedtune doctor`"
        )
        raise ErrorWithResult(result, error)
    return result
