"""Render report.md: the privacy claim first, then the numbers behind it."""

from __future__ import annotations

from typing import Any

from fedtune.core.registry.rounding import number, percent, rounded_up
from fedtune.report.claim import (
    THREE_EPSILONS,
    assumptions,
    best_guess,
    fallback,
    limits,
    protects,
    strength,
)
from fedtune.report.declared import (
    INVENTED,
    declared_line,
    free_query_line,
    simulation_line,
)
from fedtune.report.held_out import write_shown
from fedtune.report.text import cell, figure, table

DIRECTIONS = ("bytes_up", "bytes_down")
SCORES = {
    "likelihood": "the mean probability that the model gives their answers (the geometric mean "
    "over an answer's tokens; higher is better)",
    "accuracy": "the share for which the model's likeliest label is the right one",
}
MOST_COLUMNS = 6  # the most sites that a table shows in columns beside each other
# Entries of report.json with a section of their own. `_base` shows every other table as settings.
ELSEWHERE = frozenset(
    {
        *("privacy", "quality", "base", "rounds", "sites", "absences", "wire", "alone", "merge"),
        *("derived", "lora_ranks", "teacher", "declared", "ran", "settings", "signed", "held_out"),
    }
)


def markdown(report: dict[str, Any]) -> str:
    """Return the whole report as Markdown. Text that came from a site is escaped and shortened to
    one line."""
    from fedtune.report.derived import section as derived
    from fedtune.report.merged import section as merged
    from fedtune.report.provenance import section as provenance
    from fedtune.report.quality import section as quality
    from fedtune.report.teacher import section as teacher
    from fedtune.report.teacher import teacher_left_out_line

    ran = not {"merge", "derived"} & report.keys()  # a merged or derived model had no round

    parts = [
        f"# {cell(report.get('study', 'study'))}: report",
        f"> **A simulation.** {cell(said)}" if (said := simulation_line(report)) else "",
        f"> **Invented records.** {INVENTED}" if report.get("invented") else "",
        f"> **Not patients' data.** {cell(said)}" if (said := declared_line(report)) else "",
        f"> **Not covered.** {cell(said)}" if (said := free_query_line(report)) else "",
        f"> **Not covered.** {said}" if (said := teacher_left_out_line(report)) else "",
        _claim(report) if report.get("private") else _banner(report),
        quality(report) if "merge" not in report else "",  # `merged` gives it for each parent
        *derived(report.get("derived") or {}),
        *teacher(report),
        *merged(report.get("merge") or {}, report.get("privacy") or {}),
        _private_quality(report) if report.get("private") else "",
        _describe_alone(report["quality"]["metric"], report["alone"])
        if report.get("alone")
        else "",
        _sites(report.get("privacy") or {}) if report.get("private") else "",
        _ranks(report.get("lora_ranks") or {}),
        _rounds(report.get("rounds") or []) if ran else "",
        _wire(report),
        _list_missing(report.get("rounds") or [], report.get("sites") or {}) if ran else "",
        _absences(report.get("absences") or {}, len(report.get("rounds") or [])),
        _base(report),
        *provenance(report),
        f"Written by fedtune {cell(report.get('fedtune', ''))}; plan "
        f"`{cell(report.get('plan_digest'))}`. The same numbers for machines: report.json.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _claim(report: dict[str, Any]) -> str:
    p = report["privacy"]
    unit = str(p.get("unit", "record"))
    epsilon, delta = rounded_up(p.get("epsilon")), figure(p.get("delta"))
    who = f"{protects(unit)} at any one site"
    guess = percent(best_guess(p))
    not_covered = "\n".join(f"- {line}" for line in limits(unit, fallback(p) is not None))
    return (
        f"**This run is differentially private with ε = {epsilon} and δ = {delta} for {who} "
        f"(neighbouring data sets: {cell(p.get('relation'))}).**\n\n"
        f"{_describe_shared(p)}"
        "## What it means\n\n"
        f"Somebody holds the updates that left the sites, the adapter, or text that it wrote, and "
        f"asks whether {protects(unit)} took part. Even an attacker who knows every other record "
        f"and the plan, and would otherwise toss a coin, is right **at most {guess}** of the time "
        "(50 % is no knowledge, 100 % is certainty). This is a proven upper bound for the worst "
        "case, not the result of an attack that was tried. By ε alone, without the noise of "
        f"this plan, the protection is {strength(p.get('epsilon'))}.\n\n"
        f"{_for_life(report)}{_held_out(p)}"
        f"ε is counted by {cell(p.get('accountant'))} from the log that each site writes as it "
        "adds the noise, not from the plan. δ is the probability set aside for outcomes that the "
        "bound on ε does not describe.\n\n"
        f"## What it does not cover\n\n{not_covered}"
    )


def _describe_shared(privacy: dict[str, Any]) -> str:
    """Return the paragraph about shared noise. It states the assumption under which ε holds, and
    the ε that holds without this assumption. Return "" if the sites shared no noise. privacy: the
    report's "privacy"."""
    whatever = fallback(privacy)
    if whatever is None:
        return ""
    return (
        f"**It holds if {assumptions(whatever)}.** The sites shared one dose of noise and masked "
        "what they sent, so that nobody opened more than a round's sum. **Whatever happens, "
        f"ε = {rounded_up(whatever['epsilon'])} holds**, by the noise that each site added itself: "
        "an attacker to whom every site's own update was opened is right at most "
        f"{percent(best_guess(whatever | {'sites': {}}))} of the time. Attempts at a round that "
        "came to nothing count in both.\n\n"
    )


def _banner(report: dict[str, Any]) -> str:
    warning = (report.get("privacy") or {}).get("warning")
    return (
        "> # ⚠ NOT PRIVATE\n>\n"
        "> **Privacy was switched off for this run.** No noise was added. The updates and the "
        "adapter may reveal the records they were trained on, word for word. "
        "Do not give the adapter to anybody who may not read the records themselves."
        + (f"\n>\n> {cell(warning)}" if warning else "")
    )


def _for_life(report: dict[str, Any]) -> str:
    """Return the paragraph that a report has about a study without a last round; "" for a study
    with one."""
    if not report.get("continuous"):
        return ""
    return (
        "The study has no last round. ε is what a patient who was there in every round so far has "
        "paid, and never more than the plan's ε: at that a site leaves a patient out, for good. "
        "A patient who arrived later has paid for the rounds after the arrival alone. Which "
        "patients are out is known at their site alone.\n\n"
    )


def _held_out(privacy: dict[str, Any]) -> str:
    """Return the paragraph about the ε of the sites' held-out records, which are not trained on but
    queried; "" if there was no query. privacy: the report's "privacy"."""
    evaluation = privacy.get("evaluation") or {}
    if not evaluation.get("steps"):
        return ""
    return (
        f"The sites' held-out records have ε = {rounded_up(evaluation.get('epsilon'))} of their "
        "own (private evaluation, below). For whoever is among both the training and the held-out "
        f"records of a site it is ε = {rounded_up(evaluation.get('with_training'))}.\n\n"
    )


def _private_quality(report: dict[str, Any]) -> str:
    evaluation = (report.get("privacy") or {}).get("evaluation") or {}
    answered = [
        (r, r["private_quality"]) for r in report.get("rounds") or [] if r.get("private_quality")
    ]
    if not evaluation or not answered:
        return ""
    rows = []
    score = "accuracy" if "accuracy" in answered[-1][1] else "likelihood"
    for r, q in answered:
        value, deviation = number(q.get(score)), number(q.get("noise_sd"))
        shown = "lost in the noise" if value is None else f"{value:.4f}"
        spread = "–" if deviation is None else f"± {2 * deviation:.4f}"
        missing = "; ".join(f"{name}: {why}" for name, why in sorted(q["missing"].items()))
        sites = cell(", ".join(map(str, q.get("sites") or [])) or None)
        rows.append([figure(r.get("round")), shown, spread, sites, cell(missing or None)])
    head = ["round", score, "2 sd of the noise", "sites", "missing"]
    return (
        f"## Private evaluation\n\nOn held-out records that stay at the sites: {SCORES[score]}. "
        "Each site sent noised sums alone. "
        f"For {protects(str(evaluation.get('unit', 'record')))} there, all answers together have "
        f"ε = {rounded_up(evaluation.get('epsilon'))} at δ = {figure(evaluation.get('delta'))}, "
        f"from {figure(evaluation.get('steps'))} answers with noise σ = "
        f"{figure(evaluation.get('noise_multiplier'))}.\n\n{table(head, rows)}"
        f"{_held_out_table(report)}"
    )


def _held_out_table(report: dict[str, Any]) -> str:
    """Return the table of the newest query's answers by class, group and site; "" if there is
    none."""
    if (shown := write_shown(report)) is None:
        return ""
    said = "\n".join(f"- {cell(line, 2000)}" for line in shown.lines)
    rows = [[cell(text) for text in row] for row in shown.rows]
    return f"\n\n### {cell(shown.title)}\n\n{table(map(cell, shown.head), rows)}\n\n{said}"


def _describe_alone(metric: str, alone: dict[str, float]) -> str:
    rows = [[cell(name), figure(value)] for name, value in sorted(alone.items())]
    told = (
        "The same study with one site, at the same ε. These figures are of runs of their own, "
        "which no signature of this run covers."
    )
    return f"### Each site alone\n\n{told}\n\n" + table(["site", f"{cell(metric)} after"], rows)


def _sites(privacy: dict[str, Any]) -> str:
    shared = fallback(privacy) is not None
    rows = [
        [
            cell(name),
            rounded_up(site.get("epsilon")),
            *([_format_fallback(site)] if shared else []),
            figure(site.get("delta", privacy.get("delta"))),
            figure(site.get("noise_multiplier")),
            figure(site.get("max_grad_norm")),
            figure(site.get("sampling_rate")),
            figure(site.get("steps")),
        ]
        for name, site in sorted((privacy.get("sites") or {}).items())
    ]
    if not rows:
        return ""
    head = ["site", "ε", "δ", "noise σ (× C)", "clipping C", "sampling q", "noised steps"]
    head[2:2] = ["ε whatever happens"] if shared else []
    return (
        f"## Privacy by site\n\n{table(head, rows)}\n\n"
        f"Clipping: {cell(privacy.get('clipping'))}. {_step(privacy)} Gaussian noise of standard "
        "deviation σC is added to the sum. The ε in the first line is the largest of this "
        "column.\n\n"
        f"These ε are reported ones. {THREE_EPSILONS}"
    )


def _step(privacy: dict[str, Any]) -> str:
    """Return a sentence that says what is drawn and what is clipped in a step. privacy: the
    report's "privacy"."""
    if privacy.get("sampling") != "record":
        return (
            "In every step a unit takes part with probability q, and each unit's gradient is cut "
            "to length C."
        )
    return (
        "In every step a record takes part with probability q, and each record's gradient is cut "
        "to length C, so that a unit of k records (at most "
        f"{figure(privacy.get('records_per_unit'))}) moves the sum by up to kC."
    )


def _format_fallback(site: dict[str, Any]) -> str:
    table = site.get("secure_aggregation") or {"fallback_epsilon": site.get("epsilon")}
    return rounded_up(table.get("fallback_epsilon"))


def _ranks(ranks: dict[str, Any]) -> str:
    """Return the section about the rank that each site trained. ranks: the report's "lora_ranks";
    {} if every site trained the full rank, which gives ""."""
    if not ranks:
        return ""
    trained = [f"{cell(name)} {figure(rank)}" for name, rank in sorted(ranks["sites"].items())]
    rows = []
    for band in ranks["columns"]:
        share, noise = number(band.get("share")), number(band.get("noise"))
        apart = noise / share if noise is not None and share else None
        columns = f"{figure(band.get('first'))}–{figure(band.get('last'))}"
        rows.append([columns, figure(share), figure(noise), figure(apart)])
    head = ["ranks", "share of the mean", "noise", "noise / share"]
    return (
        f"## Ranks by site\n\nOf {figure(ranks['of'])} ranks, a site trained in each round, in "
        f"turn: {', '.join(trained)}. Every update is divided by the sum of all weights, so the "
        "aggregate is the exact mean of the sites' changes: ranks that fewer sites train move by "
        "their share. "
        "Over all rounds, against a run in which every site trains all ranks (noise: the standard "
        f"deviation in one of the adapter's numbers):\n\n{table(head, rows)}"
    )


def _rounds(rounds: list[dict[str, Any]]) -> str:
    if not rounds:
        return "## Rounds\n\nNone was completed."
    rows = [
        [
            figure(r.get("round")),
            cell(", ".join(map(str, r.get("participants") or [])) or None),
            cell(", ".join(sorted(r.get("missing") or {})) or None),
            figure(_bytes(r.get("bytes_up"))),
            figure(_bytes(r.get("bytes_down"))),
            figure(round(number(r.get("seconds")) or 0.0, 1)),
        ]
        for r in rounds
    ]
    head = ["round", "trained", "missing", "bytes from sites", "bytes to sites", "seconds"]
    return f"## Rounds\n\n{table(head, rows)}"


def _wire(report: dict[str, Any]) -> str:
    """Return the section about what was sent: the encodings, and the bytes of each site in each
    round. For more than MOST_COLUMNS sites, only each site's total is given. Return "" if no bytes
    were noted."""
    wire, rounds = report.get("wire") or {}, report.get("rounds") or []
    masked = fallback(report.get("privacy") or {}) is not None
    update = "masked words" if masked else cell(wire.get("update"))
    names = sorted({n for r in rounds for direction in DIRECTIONS for n in r.get(direction) or {}})
    if not names:
        return ""
    by_round = [[figure(r.get("round")), *_site_bytes(names, [r])] for r in rounds]
    totals = _site_bytes(names, rounds)
    if len(names) <= MOST_COLUMNS:
        bytes_table = table(["round", *map(cell, names)], [*by_round, ["all", *totals]])
    else:
        bytes_table = table(["site", "all rounds"], zip(map(cell, names), totals, strict=True))
    return (
        f"## Bytes by site\n\nFrom the site / to the site, as sent: updates as {update}, the "
        f"adapter as {cell(wire.get('adapter'))}. A plan, with the adapter's frozen factor, counts "
        f"in the round that it was sent for.\n\n{bytes_table}"
    )


def _site_bytes(names: list[str], rounds: list[dict[str, Any]]) -> list[str]:
    """Return one text for each of the sites `names`: the bytes that it sent and received, as "sent
    / received", summed over `rounds`."""
    return [
        " / ".join(
            figure(sum((r.get(direction) or {}).get(name, 0) for r in rounds))
            for direction in DIRECTIONS
        )
        for name in names
    ]


def _bytes(by_site: Any) -> float:
    return float(sum(by_site.values()) if isinstance(by_site, dict) else by_site or 0)


def _list_missing(rounds: list[dict[str, Any]], sites: dict[str, Any]) -> str:
    rounds_by_reason: dict[tuple[str, str], list[int]] = {}
    for r in rounds:
        late = {n: f"late: {why}" for n, why in (r.get("late") or {}).items()}
        for name, reason in ((r.get("missing") or {}) | late).items():
            rounds_by_reason.setdefault((str(name), str(reason)), []).append(
                int(r.get("round") or 0)
            )
    named = {name for name, _ in rounds_by_reason}
    rows = [
        [cell(name), "all", cell(admission)]
        for name, admission in sorted(sites.items())
        if admission != "admitted" and name not in named
    ]
    rows += [
        [cell(name), cell(", ".join(map(str, at))), cell(reason)]
        for (name, reason), at in sorted(rounds_by_reason.items())
    ]
    if not rows:
        return "## Who was missing\n\nNobody: every site that was asked trained in every round."
    return f"## Who was missing\n\n{table(['site', 'rounds', 'reason'], rows, numbers=False)}"


def _absences(absences: dict[str, Any], rounds: int) -> str:
    rows = [
        [
            cell(name),
            f"{figure(absence.get('rounds'))} of {rounds}",
            figure(absence.get("longest_rounds")),
            figure(absence.get("longest_seconds")),
        ]
        for name, absence in sorted(absences.items())
    ]
    head = ["site", "rounds missed", "longest absence, rounds", "longest absence, s"]
    return table(head, rows) if rows else ""


def _base(report: dict[str, Any]) -> str:
    base, parts = report.get("base") or {}, []
    rows = [[cell(key), cell(base.get(key))] for key in ("name", "digest", "licence", "dtype")]
    parts.append(f"## Base model\n\n{table(['', ''], rows, numbers=False)}")
    for key, value in sorted(report.items()):
        if key not in ELSEWHERE and isinstance(value, dict) and value:
            rows = [[cell(name), _setting(item)] for name, item in sorted(value.items())]
            settings = table(["setting", "value"], rows, numbers=False)
            parts.append(f"## {cell(key).capitalize()}\n\n{settings}")
    return "\n\n".join(parts)


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return figure(value)
    return cell(_words(value))


def _words(value: Any) -> str:
    """Format a value of a report for people. The items of a list or dict are joined by commas,
    without brackets or quotes."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(item)}" for name, item in sorted(value.items()))
    return ", ".join(map(_words, value)) if isinstance(value, list) else str(value)
