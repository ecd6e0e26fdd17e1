"""Print what commands show in a terminal: tables, and the closing lines of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedtune.cli.tables import Figures
from fedtune.core.errors import escape_controls
from fedtune.core.registry.rounding import percent, rounded_up
from fedtune.report.claim import shared_line, verdict
from fedtune.report.classes import class_lines
from fedtune.report.declared import INVENTED, site_lines
from fedtune.report.delta import chance
from fedtune.report.figures import format_short, size_text
from fedtune.report.gain import advice, headline
from fedtune.report.preference import alarms, pair_lines
from fedtune.report.teacher import teacher_line

if TYPE_CHECKING:
    from fedtune.accounting.costs import Plan
    from fedtune.core.bases.find import Row
    from fedtune.core.config import Study
    from fedtune.evaluation.compare_bases import Fit
    from fedtune.evaluation.predictions import Predictions
    from fedtune.officer.let_go import Waiting
    from fedtune.server.versions import Index

BANNER = "NOT PRIVATE: no noise is added; the adapter may reveal the records it is trained on"

SIDE_BY_SIDE, OWN_RECORDS = "the base and the adapter, side by side", "on records of your own"


def warn_not_private(console: Console) -> None:
    console.print(Panel(BANNER, style="bold white on red", expand=False))


def waiting_table(waiting: Sequence[Waiting], delta: float) -> Table:
    """Build the table of the answers that wait until a person at this site releases them: one row
    each, with study, kind, round, size in bytes and ε. delta: the δ at which ε is computed."""
    table = Figures(
        caption=f"ε: of this round alone, at policy.max_delta = {delta:g}. Times are UTC.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("name", no_wrap=True)
    for head in ("study", "what"):
        table.add_column(head, overflow="fold")
    for head in ("round", "bytes", "ε"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("since", overflow="fold")
    for one in waiting:
        paid = "paid" if one.kind == "answer" else "not paid for yet"
        epsilon = f"{one.epsilon}\n{one.fallback} whatever happens" if one.fallback else one.epsilon
        owner = f"\nfor {escape(one.membership)}" if one.membership else ""
        table.add_row(
            one.name,
            f"{escape(one.study)}\n{one.plan.removeprefix('sha256:')[:8]}{owner}",
            f"{one.kind}\n{paid}",
            str(one.round),
            f"{one.size:,}",
            epsilon,
            one.since,
        )
    return table


def closing(console: Console, out: Path, report: dict[str, Any]) -> None:
    """Print a finished run's result, its folder and the next step. out: the run's folder. report:
    the content of its report.json."""
    quality = report.get("quality") or {}
    metric, before, after = (quality.get(k) for k in ("metric", "before", "after"))
    before = before.get(metric) if isinstance(before, dict) else before
    after = after.get(metric) if isinstance(after, dict) else after
    console.print()
    if metric:
        console.print(
            f"{metric}: {format_short(before)} → [bold]{format_short(after)}[/bold]",
            highlight=False,
        )
    for added in headline(quality):
        style = None if added.good else "bold yellow"
        console.print(f"  {added.text}", style=style, highlight=False, markup=False)
    for line in class_lines(quality):
        console.print(f"  {line}", style="bold yellow", highlight=False, markup=False)
    print_pairs(console, quality)
    for name, alone in (report.get("alone") or {}).items():
        console.print(f"  {name} alone, at the same ε: {format_short(alone)}", markup=False)
    if report.get("private"):
        p = report["privacy"]
        console.print(
            f"private: ε = {rounded_up(p.get('epsilon'))}, δ = {p.get('delta')} "
            f"per {p.get('unit')}",
            highlight=False,
        )
        if line := shared_line(p):
            console.print(f"  {line}", highlight=False, markup=False)
        if line := teacher_line(report):
            console.print(f"  {line}", highlight=False, markup=False)
    else:
        warn_not_private(console)
    if report.get("invented"):
        console.print(f"invented records: {INVENTED}", highlight=False, markup=False)
    if said := site_lines(report):
        console.print(said, style="bold yellow", highlight=False, markup=False)
    from fedtune.evidence.verify import signer

    if report.get("alone"):  # the demo, whose model nobody needs
        commands = [
            (f'fedtune generate {out} --prompt "…"', SIDE_BY_SIDE),
            (f"fedtune evaluate {out} --data FILE", OWN_RECORDS),
            ("fedtune init my-study", "a study of your own"),
        ]
    else:
        commands = uses_of(out)
    wide = max(len(line) for line, _ in commands)
    lines = [f"run      {out}", f"report   {out / 'report.md'}"]
    if report.get("simulation"):
        lines.append(f"check    fedtune verify {out} --simulation")
    elif by := signer(out):
        lines.append(f'signed   fedtune verify {out} --trust "{by}"')
    lines.append("")
    if more := advice(report):
        lines += ["next     " + more, ""]
    for index, (line, why) in enumerate(commands):
        lines.append(f"{'' if index else 'then' if more else 'next':<9}{line:<{wide}}   {why}")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def uses_of(out: Path) -> list[tuple[str, str]]:
    """List the commands that can use this run's model, as pairs (command line, what it is for).
    out: the run's folder."""
    from fedtune.core.run_folder import has_head, load_plan

    plan, headed = load_plan(out), has_head(out)
    told = next((table.columns for table in (plan.evaluation, plan.public) if table), None)
    media, choices = told and told.media, plan.evaluation and plan.evaluation.choices
    prompt = " ".join(
        ["--file PATH"] * bool(media) + ['--prompt "…"'] * (not (told and told.audio))
    )
    commands = [
        (f"fedtune predict {out} --data FILE", "classes of new records")
        if headed or choices  # a head writes no text
        else (f"fedtune generate {out} {prompt}", SIDE_BY_SIDE),
        (f"fedtune evaluate {out} --data FILE", OWN_RECORDS),
    ]
    if headed or not media:  # other programs' formats take no adapter on a base that reads media
        why = "as one model, for other programs"
        commands.append((f"fedtune export {out} --out {out.name}-model", why))
    return commands


def print_verdict(console: Console, result: dict[str, Any]) -> None:
    """Print whether the model is better than what public text alone gives, and than the base; for a
    run on preference pairs also further metrics and warnings. result: what evaluation.run.evaluate
    returns."""
    said = [(line.text, line.good) for line in headline(result) if line.about == "start"]
    claim = verdict(result)
    for text, good in [*said, (claim, claim.startswith("better"))]:
        console.print(
            f"  {text}", style=None if good else "bold yellow", highlight=False, markup=False
        )
    if result["no start"]:
        why = f"not compared with what public text alone gives: {result['no start']}"
        console.print(f"  {why}", highlight=False, markup=False)
    print_pairs(console, result)


def print_pairs(console: Console, quality: dict[str, Any]) -> None:
    """Print further metrics and warnings of a preference run; print nothing for another run."""
    for line in pair_lines(quality):
        console.print(f"  {line}", highlight=False, markup=False)
    for alarm in alarms(quality):
        console.print(f"  warning: {alarm}", style="bold yellow", highlight=False, markup=False)


def plan_table(study: Study, plan: Plan) -> Table:
    """Build the table of what each site will run and what it costs, one row per site."""
    unit, most = plan.unit, max(site.declared_size for site in plan.sites)
    table = Figures(
        title=f"{escape(plan.study)}: what it costs",
        caption=f"ε protects one {unit}, at δ = {plan.sites[0].delta:g}: "
        f"{chance(plan.sites[0].delta, unit, most)}. risk: an attacker who "
        f"knows every other record is right about one {unit}'s presence at most so often (50 %: "
        "knows nothing).",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("site")
    whatever = ("whatever happens",) if study.secure_aggregation else ()
    rounds = "rounds at most" if study.continuous else "rounds"  # in which one patient takes part
    for head in (f"{unit}s", rounds, "steps", "q", "batch", "noise σ", "ε", "risk", *whatever):
        table.add_column(head, justify="right", no_wrap=True)
    for row in plan.sites:
        numbers = (f"{row.declared_size:,}", str(row.rounds), str(row.steps))
        noise = (f"{row.sampling_rate:.3g}", f"{row.batch:.4g}", f"{row.noise_multiplier:.4g}")
        costs = [rounded_up(row.epsilon), percent(row.risk)]
        costs += [f"ε = {rounded_up(row.fallback_epsilon)}"] if whatever else []
        table.add_row(escape(row.site), *numbers, *noise, *costs)
    return table


def versions_table(index: Index) -> Table:
    """Build the table of a run's versions with the decision about each, and mark the version in
    use."""
    table = Figures(
        caption="against: the version in use then, on the same public records. p: how likely so "
        "large an advantage would be by chance. look: the number of the comparison on these "
        "records. public: the sha256 of these records.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for head in ("version", "scheduled, UTC"):
        table.add_column(head, no_wrap=True)
    for head in ("value", "against", "p", "look"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("public", no_wrap=True)
    table.add_column("decision", overflow="fold")
    for v in index.versions:
        mark = " ←" if v.number == index.champion else ""
        other = "–" if v.champion is None else f"{format_short(v.champion_value)} ({v.champion})"
        at = v.at[:16].replace("T", " ") or "–"
        look = "–" if v.look is None else str(v.look)
        row = [f"{v.number}{mark}", at, format_short(v.value), other, format_short(v.p), look]
        row += [v.public[:8] or "–", f"{v.decision}: {v.why}" if v.why else v.decision]
        table.add_row(*(escape(escape_controls(cell)) for cell in row))
    return table


def acts_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Build the table of an audit log's entries."""
    table = Figures(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head in ("", "time, UTC", "act", "by"):
        table.add_column(head, no_wrap=True)
    for head in ("rule", "facts"):
        table.add_column(head, overflow="fold")
    for entry in entries:
        who = entry["login"] + (f" for {entry['person']}" if entry["person"] else "")
        facts = ", ".join(f"{name} {_digest(value)}" for name, value in entry["facts"].items())
        at = entry["time"][:19].replace("T", " ")
        row = (str(entry["seq"]), at, entry["event"], who, entry["rule"], facts)
        table.add_row(*(escape(escape_controls(cell)) for cell in row))
    return table


def _digest(value: Any) -> str:
    text = str(value)
    return f"{text[7:19]}…" if text.startswith("sha256:") else text


def evaluation_table(result: dict[str, Any]) -> Table:
    """Build the table of a run's metric, each value with a 95 % interval: for the base, for the
    public start if it was measured, for the adapter, and the adapter's change over both. result:
    what evaluation.run.evaluate returns."""
    metric, interval = result["metric"], result["interval"]
    reasons = [f", {n:,} left out: {why}" for why, n in sorted(result["rejected"].items()) if n]
    caption = f"{result['records']:,} records" + "".join(reasons)
    caption += f", {result['cut']:,} cut to objective.max_length" if result.get("cut") else ""
    table = Figures("", metric, "95 % interval", caption=caption, caption_justify="left")
    before, after = result["before"][metric], result["after"][metric]
    rows = {
        "before": ("base alone", before, ""),
        "after": ("with the adapter", after, ""),
        "change": ("change over the base", after - before, "+"),
    }
    if result["start"]:
        start = result["start"][metric]
        rows |= {
            "start": ("public text alone", start, ""),
            "over_start": ("change over public text alone", after - start, "+"),
        }
    for key in ("before", "start", "after", "change", "over_start"):
        if key in rows:
            (label, value, sign), (low, high) = rows[key], interval[key]
            table.add_row(label, f"{value:{sign}.4g}", f"{low:{sign}.4g} to {high:{sign}.4g}")
    return table


def predictions_table(made: Predictions, rows: int) -> Group:
    """Build the table of the first `rows` predictions. Below it, list how often each label is
    predicted and how many records are rejected, by reason."""
    table = Figures(box=box.SIMPLE_HEAD)
    table.add_column("row", justify="right")
    for name in made.carried:
        table.add_column(escape(escape_controls(name)))
    table.add_column("prediction" if made.labels else "score")
    table.add_column("probability" if made.labels else "", justify="right")
    shares = made.probabilities.max(axis=1, initial=0.0)
    shown = zip(range(rows), made.predicted, shares, made.scores, made.reasons, strict=False)
    for at, label, share, score, reason in shown:
        cells = (column[at] for column in made.carried.values())
        head = [
            Text(str(at + 1)),
            *(Text(escape_controls("" if c is None else str(c))) for c in cells),
        ]
        if reason:
            table.add_row(*head, Text(f"rejected: {reason}", style="dim"))
        elif label is None:
            table.add_row(*head, f"{score:.4f}")
        else:
            table.add_row(*head, Text(escape_controls(label)), f"{share:.3f}")
    more = f", the first {rows} above" if 0 < rows < len(made) else ""
    lines = [f"{len(made)} records{more}"]
    counts = Counter(label for label in made.predicted if label is not None)
    lines += [f"{n:6} {escape_controls(label)}" for label, n in counts.most_common()]
    lines += [f"{n:6} rejected: {reason}" for reason, n in made.rejected.most_common()]
    return Group(*([table] if rows else []), Text("\n".join(lines)))


def fit_table(fit: Fit) -> Group:
    """Build a table with a row for each candidate base, smallest first. Below it, list the bases
    that cannot be used."""
    epsilons = next((list(row.predicted) for row in fit.rows if row.predicted), [])
    table = Figures(
        title=f"bases, by size; {fit.metric}",
        caption="size: parameters. memory: the most that a process held. tokens: per second in a "
        "first pass. records: per second in a training step. alone: the untouched base. ε: "
        "predicted from one pass over public records, not measured. up, down: per site and round.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("base", overflow="fold")
    heads = ("size", "memory", "tokens,\nrecords", "alone", *(f"ε = {e}" for e in epsilons))
    for head in (*heads, "up,\ndown"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in fit.rows:
        if not row.failed:
            cost = (f"{row.parameters / 1e6:,.4g} M", size_text(row.memory))
            speed = f"{row.tokens:,.0f}\n{row.step:,.0f}"
            predictions = [format_short((row.predicted or {}).get(e)) for e in epsilons]
            wire = f"{size_text(row.up)}\n{size_text(row.down)}"
            table.add_row(
                escape(row.model), *cost, speed, format_short(row.base), *predictions, wire
            )
    unfit = [Text(f"{row.model}: {row.failed}", "yellow") for row in fit.rows if row.failed]
    return Group(table, *unfit)


def files_table(folder: Path, paths_by_kind: dict[str, list[Path]]) -> Table:
    """Build the table of the number and total size of a folder's files, by kind."""
    table = Figures(
        title=escape(str(folder)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("what")
    for head in ("files", "size"):
        table.add_column(head, justify="right", no_wrap=True)
    for kind, paths in paths_by_kind.items():
        size = sum(path.lstat().st_size for path in paths)
        table.add_row(kind, f"{len(paths):,}", size_text(size))
    return table


def side_by_side(before: str, after: str) -> Table:
    table = Table("base alone", "with the adapter", show_lines=True)
    table.add_row(Text(before), Text(after))
    return table


def answers_table(found: dict[str, Any]) -> Table:
    """Build the table of prompts with the expected answer and the answers of base and adapter. An
    answer that is a label has its probability beside it. found: the content of the run's
    answers.json."""

    def text(answer: dict[str, Any]) -> Text:
        share = answer.get("probability")
        said = (
            "all equally likely" if answer["answer"] is None else escape_controls(answer["answer"])
        )
        return Text(said if share is None else f"{said} ({share:.2f})")

    table = Table("prompt", "expected", "base alone", "with the adapter", show_lines=True)
    for one in found["answers"]:
        prompt, expected = (
            Text(escape_controls(one["prompt"])),
            Text(escape_controls(one["expected"])),
        )
        table.add_row(prompt, expected, text(one["base"]), text(one["adapter"]))
    return table


def models_lines(rows: Sequence[Row]) -> str:
    """Format each base on three lines, so that its digest can be copied in one piece."""
    return "\n".join(
        f"{row.name}  ({row.kind}, {row.parameters / 1e6:.0f} M parameters, {row.licence}; "
        f"{'on this machine' if row.cached else 'not fetched yet'})\n    {row.digest}\n"
        f"    {row.upstream}"
        for row in rows
    )
