"""Build what `fedtune ledger` prints: what was spent on a dataset, by which study, and what
remains.

Every ε is rounded up and what remains is rounded down, so that a person who adds the columns up
never finds more room than there is."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from fedtune.cli.tables import Figures
from fedtune.core.config import PolicyTable
from fedtune.core.ledger.declared import read_declarations
from fedtune.core.ledger.entries import EVERY, RULES, Cohort, Spent
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.ledger.patient_column import describe_withdrawn_before
from fedtune.core.ledger.spending import (
    DatasetBudget,
    MembershipLine,
    StudyLine,
    budget,
    find_heaviest_budget,
    membership_lines,
    share_of,
    study_lines,
)
from fedtune.core.registry.rounding import rounded_down, rounded_up
from fedtune.core.vault.budget import describe_other_columns, describe_restored
from fedtune.report.claim import THREE_EPSILONS

INFINITE = "∞ (not private)"
NOT_KNOWN = "not known"
NOTHING_RUNS = "nothing more runs"
MORE_MAY_FIT = (
    "ceiling minus spent. Studies cost less together than the sum of their ε, so one with a larger "
    "ε may fit: fedtune review says"
)


def ledger_view(
    ledger: Ledger,
    dataset: str,
    policy: PolicyTable,
    unit: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Group:
    """Build what `fedtune ledger` prints about one dataset. It counts the dataset's own charges,
    and those of every other dataset, except charges that were made after the two were declared
    disjoint.

    - policy: the site's policy, with δ, the ceilings and, if there is one, the hospital
    - unit: the site's unit, "patient" or "record"; None: state each study's ε for the unit that the
      study had
    - columns: each dataset's column of patients, as the site's files are now; None: as last
      declared"""
    spent, cohorts = ledger.spending(dataset, columns), ledger.cohorts(dataset)
    parts: list[Table | str] = []
    arrivals = any(cohort.arrival for cohort in cohorts)
    if spent:
        lines = study_lines(spent, policy.delta, unit)
        parts.append(studies_table(lines, policy.delta, arrivals=arrivals))
    unit = unit or (spent[0].charge.unit if spent else "")
    unknown = {each.seq for each in spent if not each.is_known_for(unit)}
    if arrivals:
        parts.append(cohorts_table(dataset, spent, cohorts, policy, unknown))
    total = replace(find_heaviest_budget(dataset, cohorts, policy), known=not unknown)
    parts.append(budget_table(total, policy.membership))
    if policy.hospital:
        whose = membership_lines(dataset, cohorts, policy, unknown)
        share = share_of(dataset, cohorts, policy, unknown)
        earlier = policy.membership if policy.hospital.earlier else ""
        parts.append(memberships_table(whose, policy.membership, share, earlier))
    parts += not_known(ledger, dataset, spent, unit, columns)
    if frozen := ledger.frozen:
        why = f": {frozen.why}" if frozen.why else ""
        parts.append(
            f"[bold red]FROZEN[/bold red] by {escape(frozen.who)} on {_date(frozen.time)}"
            f"{escape(why)}. Nothing is charged, answered or deleted until somebody lifts it: "
            "fedtune ledger SITE --lift"
        )
    if columns and (said := describe_withdrawn_before(ledger, columns)):
        parts.append(escape(f"BY ANOTHER COLUMN: {said}."))
    parts.append(footer(ledger, dataset))
    return Group(*parts)


def studies_table(lines: Sequence[StudyLine], delta: float, *, arrivals: bool = False) -> Table:
    """Build the table of the studies that were charged, one row for each of `lines`. delta: the δ
    at which the ε of `lines` was computed. arrivals: whether the table of patients by arrival
    follows this one."""
    less = " A patient paid for the rounds since the arrival alone: the next table." * arrivals
    table = Figures(
        title="studies",
        caption=f"ε: what each study alone has paid, at policy.max_delta = {delta:g}; a report "
        f"states it at the study's own δ.{less} {THREE_EPSILONS} Times are UTC.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("study, last charged", min_width=20, overflow="fold")
    table.add_column("dataset", min_width=7, overflow="fold")
    shared = any(line.fallback is not None for line in lines)
    whatever = ("whatever\nhappens",) if shared else ()
    for head in ("rounds", "paid", "sent", "steps", "σ", "q", "ε", *whatever):
        table.add_column(head, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(
            f"{escape(line.name)}\n{line.study.removeprefix('sha256:')[:8]}, {_date(line.last)}",
            f"{'every' if line.dataset == EVERY else escape(line.dataset)}\n{_unit(line)}",
            str(line.rounds),
            str(line.charged),
            str(line.released),
            str(line.steps),
            _span(line.sigma),
            _span(line.rate),
            _format_epsilon(line.epsilon) if line.known else "not known",
            *([_format_fallback(line)] if shared else []),
        )
    return table


def _format_fallback(line: StudyLine) -> str:
    """Return as text the ε that a study cost at most, even if the sites that shared noise collude:
    its fallback ε, which this site's own noise alone gives, or its ε if no noise was shared. Return
    "not known" if the cost is not known."""
    if not line.known:
        return "not known"
    return _format_epsilon(line.epsilon if line.fallback is None else line.fallback)


def cohorts_table(
    dataset: str,
    spent: Sequence[Spent],
    cohorts: Sequence[Cohort],
    policy: PolicyTable,
    unknown: Collection[int] = (),
) -> Table:
    """Build the table of a dataset's cohorts (units that arrived together), one row each: when it
    arrived, its size, rounds and ε, and whether rounds leave it out by now because its budget is
    spent.

    - spent: the charges of `dataset`
    - cohorts: the dataset's cohorts, each with the charges that count for it
    - policy: the site's policy, whose δ is used
    - unknown: the numbers of the entries of charges whose ε is not known"""
    last = max((entry.seq for entry in spent if entry.dataset == dataset), default=0)
    table = Figures(
        title="patients by arrival",
        caption="ε is one patient's, over the rounds since the arrival. Who was left out of the "
        "last round has no budget for it; nobody outside is told. These counts stay here.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("arrived")
    for head in ("patients", "rounds", "ε"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    for cohort in cohorts:
        charged = [entry for entry in cohort.spent if entry.dataset == dataset]
        out = last > cohort.arrival and last not in {entry.seq for entry in charged}
        table.add_row(
            f"{_date(cohort.time)} ({escape(cohort.name)})" if cohort.arrival else "before",
            str(cohort.units or "?"),
            str(len(charged)),
            _format_epsilon(budget(dataset, cohort.spent, policy).epsilon)
            if {*cohort.entries}.isdisjoint(unknown)
            else NOT_KNOWN,
            "spent: left out" if out else "",
        )
    return table


def _unit(line: StudyLine) -> str:
    return line.unit if line.records == 1 else f"{line.unit} (≤ {line.records} rows)"


def memberships_table(
    lines: Sequence[MembershipLine],
    membership: str = "",
    share: DatasetBudget | None = None,
    earlier: str = "",
) -> Table:
    """Build the table of what each of a hospital's memberships spent.

    - membership: the membership at whose site the table is shown; "" if it is shown for the
      hospital
    - share: the budget of `membership`, whose remainder is shown in that membership's row; None to
      show none
    - earlier: the membership that owns the charges from before the ledger was the hospital's; "" if
      none is named"""
    table = Figures(
        title="who spent it",
        caption="ε: what each membership alone has spent, as the ceiling counts it; the total "
        "composes them all, and is not their sum. No coordinator sees this.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("membership", overflow="fold")
    for head in ("studies", "paid", "ε"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("")
    if share and membership not in {line.membership for line in lines}:
        lines = [*lines, MembershipLine(membership, 0, 0, 0.0)]
    for line in lines:
        left = ""
        if share and line.membership == membership:
            left = f"share {share.ceiling:g}: {rounded_down(share.remaining)} remains"
            left += "" if share.known else ", if all rounds gave an ε"
        table.add_row(
            escape(_payer(line.membership, earlier)),
            str(line.studies),
            str(line.charged),
            _format_epsilon(line.epsilon) if line.known else NOT_KNOWN,
            left,
        )
    return table


def _payer(membership: str, earlier: str) -> str:
    """Return the text by which a table names who paid a charge.

    | membership, as the charge states it | text |
    | "": from before the shared ledger | "before the home", after `earlier` if it is given |
    | EVERY: entered by a restore of the ledger | that the charge counts for all memberships |
    | any other | the membership's name |
    """
    before = f"{earlier}, before the home" if earlier else "before the home"
    return {"": before, EVERY: "restored: counts for all"}.get(membership, membership)


def budget_table(total: DatasetBudget, membership: str = "") -> Table:
    """Build the table of a dataset's budget: its ceilings, what is spent and what remains. total:
    the budget. membership: "" for a site with a ledger of its own; otherwise the table says that
    the ceilings are the hospital's."""
    policy = "policy" if not membership else "the hospital's policy"
    table = Figures(
        title=f"budget of {escape(total.dataset)}" + (", all memberships" if membership else ""),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    full_delta, half_delta = f"at δ = {2 * total.delta:g}", f"at δ = {total.delta:g}"
    if not total.known:
        table.add_row("spent", NOT_KNOWN, "some rounds give no ε; below they count as if they did")
    table.add_row(
        "spent" if total.known else "",
        _format_epsilon(total.epsilon),
        f"{full_delta}: every study, each chosen after the one before; what the ceiling holds "
        f"({total.how})",
    )
    if total.pld != total.epsilon:  # where the filter costs something
        table.add_row(
            "",
            _format_epsilon(total.pld),
            f"{half_delta}: the same rounds, had all been planned at once (PLD); no ceiling holds "
            "it",
        )
    table.add_row("ceiling", f"{total.ceiling:g}", f"{policy}.max_epsilon")
    table.add_row(
        "remains", rounded_down(total.remaining), MORE_MAY_FIT if total.remaining else NOTHING_RUNS
    )
    if total.fallback is not None and total.fallback_remaining is not None:
        whatever = "whatever becomes of secure aggregation, by this site's own noise alone"
        table.add_row(
            "whatever happens", _format_epsilon(total.fallback), f"{full_delta}: {whatever}"
        )
        table.add_row("ceiling", f"{total.fallback_ceiling:g}", f"{policy}.max_fallback_epsilon")
        none = "" if total.fallback_remaining else NOTHING_RUNS
        table.add_row("remains", rounded_down(total.fallback_remaining), none)
    return table


def not_known(
    ledger: Ledger,
    dataset: str,
    spent: Sequence[Spent],
    unit: str,
    columns: Mapping[str, str] | None = None,
) -> list[str]:
    """Describe the rounds whose cost is not known for `unit`, and who accepted them, in a list of
    one text; [] if there are none.

    - spent: the charges of `dataset`
    - unit: "patient" or "record", the unit for which ε is shown
    - columns: each dataset's column of patients, as the site's files are now; None: as last
      declared"""
    rounds = [entry for entry in spent if not entry.is_known_for(unit)]
    if not rounds:
        return []
    earlier = [entry for entry in rounds if entry.charge.rules < RULES]
    sentences = [
        f"NOT KNOWN: what {len(rounds)} of the rounds above cost one {unit}. They are counted as "
        "if it were."
    ]
    if earlier:
        sentences.append(
            f"{len(earlier)} were charged by an earlier release: which records of a patient "
            "trained, and whether they trained at all, could follow from other patients' records, "
            "so the ε beside them is not what it cost."
        )
    restored = [entry for entry in rounds if entry.dataset == EVERY]
    otherwise = [entry for entry in rounds if entry.has_other_column]
    current = [entry for entry in rounds if entry.charge.rules == RULES and entry.dataset != EVERY]
    if others := sum(entry.charge.unit not in (unit, "any") for entry in current):
        sentences.append(f"{others} were charged per another unit than the {unit}.")
    if otherwise:
        sentences.append(
            f"{describe_other_columns(otherwise)}; if not, it may be too small. Whoever withdrew "
            "is known by the earlier column's key: repeat `fedtune withdraw` with the new one."
        )
    if restored:
        sentences.append(f"{describe_restored(restored)}; if not, it may be too small.")
    for entry in ledger.accepted(dataset):
        why = f": {entry.why}" if entry.why else ""
        sentences.append(
            f"Accepted by {entry.who} on {_date(entry.time)}, up to entry {entry.upto}{why}"
        )
    if ledger.unknown(dataset, unit, columns):
        sentences.append(
            "Until somebody at this site accepts it, no round runs on this dataset: "
            f"fedtune ledger SITE --accept {dataset} --reason TEXT"
        )
    return [escape(" ".join(sentences))]


def footer(ledger: Ledger, dataset: str) -> str:
    """Describe on one line the ledger's head and its other datasets."""
    head = ledger.head
    others = [name for name in ledger.datasets if name != dataset]
    beside = f"; other datasets here: {', '.join(others)}" if others else ""
    for name, what in read_declarations(ledger).items():
        beside += f"; {name} is declared {what}: its runs pay from ledgers of their own"
    text = f"{ledger.folder}: entry {head.seq}, {head.hash[:16]}, verified{beside}"
    return escape(text)


def _format_epsilon(epsilon: float) -> str:
    return rounded_up(epsilon) if math.isfinite(epsilon) else INFINITE


def _span(ends: tuple[float, float]) -> str:
    return f"{ends[0]:g}" if ends[0] == ends[1] else f"{ends[0]:g} to {ends[1]:g}"


def _date(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).date().isoformat()
