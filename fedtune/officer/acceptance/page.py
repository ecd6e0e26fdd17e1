"""Render a site's acceptance (its decision about a finished model, with the figures on its own
held-out records) as one HTML page without scripts or requests, for screen, phone and paper, light
and dark."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from fedtune.evidence.dossier.drawing import STYLE as PICTURE
from fedtune.evidence.dossier.drawing import Picture
from fedtune.evidence.dossier.page import POLICY, STYLE, sections
from fedtune.officer.acceptance.drawing import differences, reliability
from fedtune.officer.acceptance.measures import GAP, RECALL
from fedtune.officer.acceptance.models import MODEL

DARK = """
:root { color-scheme: light dark; }
@media screen and (prefers-color-scheme: dark) {
  body { color: #e6edf3; background: #12161c; } a { color: #7fb2ff; }
  h2 { border-color: #69737e; } th, td { border-color: #69737e; }
  thead th, pre { background: #1d232b; }
  .note { border-color: #f0a04b; } .source, figcaption { color: #a3adb8; }
  .accepted { background: #16301f; } .refused { background: #3a1616; }
  .open { background: #38260f; }
}
"""
VERDICT = """
.verdict { padding: .75rem 1rem; border-left: .5rem solid; font-size: 1.15rem; }
.accepted { background: #e6f4ea; border-color: #246b3a; }
.refused { background: #fbe9e9; border-color: #9c1c1c; }
.open { background: #fff3e0; border-color: #964800; }
figure { display: inline-block; max-width: 100%; margin-right: 1rem; vertical-align: top; }
figure img { width: auto; max-width: 100%; min-width: 0; } figcaption { max-width: 27rem; }
td, th { font-variant-numeric: tabular-nums; } tbody th { font-weight: 500; }
caption { break-after: avoid; }
@media screen { .wide table { min-width: 36rem; } }
"""
PRIVATE = (
    "Private to the site {site}. These are exact figures of held-out patients, without noise; no "
    "study's ε covers them. Nothing of this page leaves with the ledger, a dossier or the status."
)
TELLING = (
    "Who is told “accepted” or “refused” learns an exact fact about these patients: on which side "
    "of the thresholds they lie. It is one bit, or of three answers at most log₂ 3; but for a few "
    "patients, or after many decisions about the same ones, it may tell of one of them. Telling is "
    "a person's act, outside any ε; no coordinator's training or release may follow from it, since "
    "the next model would then depend on these patients without noise."
)


def page(figures: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return a decision and its figures as an HTML page, in which all texts are escaped. figures:
    the content of figures.json. record: the signed record of the decision."""
    name = escape(f"Acceptance of {figures['study']} at {figures['site']}")
    kind = {"accepted": "accepted", "refused": "refused"}.get(figures["decision"], "open")
    content = {"sections": list(_sections(figures, record))}
    pictures = _pictures(figures)
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name}</title>\n<style>{STYLE}{VERDICT}{DARK}</style>\n</head>\n<body>",
        f"<header>\n<h1>{name}</h1>\n</header>",
        '<main id="main" tabindex="-1">',
        f'<p class="note">{escape(PRIVATE.format(site=figures["site"]))}</p>',
        f'<p class="verdict {kind}"><strong>{escape(_describe_decision(figures))}</strong> '
        f"{escape(_because(figures))}</p>",
        pictures,
        sections(content, pictures=False),
        "</main>\n</body>\n</html>\n",
    ])  # fmt: skip


def _describe_decision(figures: Mapping[str, Any]) -> str:
    return {"accepted": "Accepted.", "refused": "Refused."}.get(
        figures["decision"], "Not resolved."
    )


def _because(figures: Mapping[str, Any]) -> str:
    """Return a few sentences that say which figures decided, and how the groups compare."""
    judged = figures["judged"]
    if figures["decision"] == "accepted":
        parts = [f"Every one of {len(judged)} figures lies on the right side of its threshold."]
    else:
        named = [one for one in judged if one["decision"] == figures["decision"]]
        told = "; ".join(_what(one) for one in named[:4])
        told += f"; and {len(named) - 4} more" if len(named) > 4 else ""
        where = "wholly on the wrong side" if figures["decision"] == "refused" else "undecided"
        parts = [f"{where[0].upper()}{where[1:]}: {told}."]
    if figures["different"]:
        parts.append(f"Groups that differ from all others: {'; '.join(_name_different(figures))}.")
    elif figures["comparisons"]:
        parts.append("No group was found to differ from all others.")
    resolved = {(c["column"], c["value"]) for c in figures["compared"] if c["found"] is not None}
    small = {(c["column"], c["value"]) for c in figures["compared"]} - resolved
    if small:
        parts.append(f"Not resolved: {len(small)} groups.")
    return " ".join(parts)


def _name_different(figures: Mapping[str, Any]) -> Iterator[str]:
    """Yield a text for each group that differs from all others: its name, and the measures in which
    it differs, each as better or worse. figures: the content of figures.json."""
    found: dict[str, list[str]] = {}
    for one in figures["compared"]:
        if one["found"]:
            how = f"{one['measure']}, {'worse' if one['worse'] else 'better'}"
            found.setdefault(f"{one['column']} = {one['value']}", []).append(how)
    yield from (f"{group} ({'; '.join(how)})" for group, how in found.items())


def _what(one: Mapping[str, Any]) -> str:
    of = f" of {one['of']}" if one["of"] else ""
    of = " over the public start" if one["better_by"] else of
    return f"{one['measure']}{of}{': ' if one['why'] else ''}{one['why']}"


# ---------------------------------------------------------------------------------- sections


def _sections(figures: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    units = f"{figures['unit']}s"
    rows = [
        [
            one["measure"],
            "all, over the public start" if one["better_by"] else one["of"] or "all",
            _bound(one, figures),
            _format_figure(one),
            _format_decision(one),
        ]
        for one in figures["judged"]
    ]
    yield _section("judged", "What was judged", [
        _table(
            "Figures beside the thresholds that were written before",
            ["Figure", "Of", "Threshold", "Found, with its interval", "Decision"],
            rows,
        ),
        _text(
            "Accepted where the 95 % interval lies on the right side of the threshold as a whole, "
            "refused where it lies on the wrong one, not resolved else. Of a group it is how much "
            f"worse it is than all others, with an interval at {figures['level']:.2%}."
        ),
    ])  # fmt: skip
    yield _section("models", "Beside other models", _models(figures))
    if figures["compared"]:
        yield _section("groups", "By group", _groups(figures))
    yield _section("records", f"Which {units}", _records(figures))
    yield _section("worst", "The worst errors", _show_worst(figures))
    yield _section("telling", "What telling it reveals", [_text(TELLING)])
    yield _section("record", "The record", _record(figures, record))


def _models(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    models = figures["models"]
    names = [name for name in models[MODEL] if not name.startswith(RECALL)]
    classes = [name for name in models[MODEL] if name.startswith(RECALL)]
    others = [name for name in models if name != MODEL]
    blocks = [
        _table(
            "Each model on the same records, with 95 % intervals",
            ["Figure", *models],
            [[name, *(_format_figure(models[m][name]) for m in models)] for name in names],
        ),
        _table(
            "This model less each other, by the same resamples",
            ["Figure", *(f"less {name}" for name in others)],
            [[name, *(_format_change(models[m][name]) for m in others)] for name in names],
        ),
    ]
    if classes:
        rows = [
            [
                name.removeprefix(RECALL),
                str(models[MODEL][name]["patients"]),
                str(models[MODEL][name]["records"]),
                *(_format_figure(models[m][name]) for m in models),
            ]
            for name in classes
        ]
        head = ["Class", f"{figures['unit'].capitalize()}s", "Records", *models]
        blocks.append(_table("By class: share of its records that are taken for it", head, rows))
    missing = figures["not_scored"]
    blocks += [_text(f"Not measured: {name}: {why}.") for name, why in missing.items()]
    return blocks


def _groups(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows, unresolved = list[list[str]](), dict[str, dict[str, list[str]]]()
    for one in figures["compared"]:
        group, told = one["group"], one["difference"]
        of_group = f"{one['column']} = {one['value']}"
        if told is None:
            unresolved.setdefault(of_group, {}).setdefault(one["why"], []).append(one["measure"])
            continue
        found = ("differs, worse" if one["worse"] else "differs") if one["found"] else "not found"
        of = f"{_format_figure(group)}, of {group['patients']}"
        less = f"{_with_sign(told['figure'])} {_interval(told['interval'], signed=True)}"
        rows.append([of_group, one["measure"], of, less, found])
    head = ["Group", "Figure", "In the group (95 %)", "Less all others", "A difference"]
    blocks = [_table("Each group beside all others", head, rows)]
    if unresolved:
        lines = [
            [of_group, "; ".join(f"{why} ({', '.join(which)})" for why, which in reasons.items())]
            for of_group, reasons in unresolved.items()
        ]
        blocks.append(_table("Not resolved", ["Group", "Why, and which figures"], lines))
    if figures["comparisons"]:
        blocks.append(_text(
            f"{figures['comparisons']} comparisons; each interval of a difference is at "
            f"{figures['level']:.2%}, so that with no difference anywhere at most "
            f"{figures['alarms']:.0%} of such pages find one (Bonferroni). A group of fewer than "
            f"{figures['least_group']} {figures['unit']}s is not resolved, whatever its figure."
        ))  # fmt: skip
    return blocks


def _records(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    unit = figures["unit"]
    rows = [[f"{unit}s judged on", str(figures["patients"])], ["records", str(figures["records"])]]
    rows += [[f"left out, {why}", str(n)] for why, n in figures["left_out"].items()]
    rows += [[f"rejected, {why}", str(n)] for why, n in figures["rejected"].items()]
    rows += [["cut to objective.max_length", str(figures["cut"])]] if figures["cut"] else []
    blocks = [_table("Counted at this site", ["What", "Number"], rows)]
    compared = "by their patients' keys and by longer texts"
    if figures["compared_by"] != "patients":
        compared = "by their contents alone, since a table names no patient column"
    blocks.append(_text(
        "Compared with what trains here, now and by the ledger ever since, "
        f"{compared}; whoever was trained on is left out with all records. Patients whom another "
        "hospital trained on are not known here."
    ))  # fmt: skip
    if not figures["training_read"]:
        blocks.append(
            _text("The records of [data] are not here: the ledger's memory alone was compared.")
        )
    if figures["known_since"]:
        blocks.append(_text(
            f"The ledger knows who trained here since {figures['known_since']} alone: on that day "
            "it was restored, or took over the charges of another ledger. Whoever trained before "
            "and is in [data] no more was not found, and may be among those judged on."
        ))  # fmt: skip
    looks = figures["looks"]
    if looks["earlier"]:
        blocks.append(_text(
            f"These very records were looked at {looks['earlier']} times before, for "
            f"{looks['models']} models and {looks['settings']} settings: with each look it is "
            "likelier that a model passes by chance."
        ))  # fmt: skip
    return blocks


def _show_worst(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = figures["worst"]
    if not rows:
        return [_text("No record was taken for a wrong class.")]
    head = list(rows[0])
    cells = [[_number(v) if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return [
        _table("Where they stand in the site's files", [name.capitalize() for name in head], cells),
        _text(
            "Wrong answers of which the model was the surest, or the records of highest loss; a "
            "row counts as a spreadsheet does. No content of a record is on this page."
        ),
    ]  # fmt: skip


def _record(figures: Mapping[str, Any], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    model = record["model"]
    rows = [
        ["decision", record["decision"]],
        ["time", record["time"]],
        ["by", record["person"] or record["login"]],
        ["plan", model["plan"]],
        ["base", model["base"]],
        ["adapter's files", model["adapter"]],
        ["settings", record["settings"]],
        ["records, keyed by this site's salt", record["held_out"]],
        ["site's key", record["key"]],
        ["signature", record["signature"]],
    ]
    return [
        _table("As in record.json, which this site signed", ["What", "Value"], rows),
        _text(f"Intervals of measures that are no shares: {figures['resamples']} resamples of "
              f"{figures['unit']}s, seed {figures['seed']}; of shares: Clopper and Pearson's."),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------- writing


def _section(id_: str, title: str, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": id_, "title": title, "blocks": blocks}


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {"kind": "table", "table": caption, "head": list(head), "rows": rows}


def _text(text: str) -> dict[str, Any]:
    return {"kind": "text", "text": text}


def _bound(one: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    if one["of"]:
        return f"at most {one['bound']:g} worse"
    if one["better_by"]:
        return f"more than {one['bound']:g} better"
    higher = figures["models"][MODEL][one["measure"]]["higher_is_better"]
    return f"at {'least' if higher else 'most'} {one['bound']:g}"


def _format_decision(one: Mapping[str, Any]) -> str:
    return f"{one['decision']}{': ' if one['why'] else ''}{one['why']}"


def _format_figure(found: Mapping[str, Any]) -> str:
    return f"{_number(found['figure'])} {_interval(found['interval'])}"


def _format_change(found: Mapping[str, Any]) -> str:
    return f"{_with_sign(found['change'])} {_interval(found['change_interval'], signed=True)}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _with_sign(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def _interval(bounds: Sequence[float | None], *, signed: bool = False) -> str:
    low, high = ((_with_sign if signed else _number)(bound) for bound in bounds)
    return f"({low} to {high})"


def _pictures(figures: Mapping[str, Any]) -> str:
    parts = []
    if figures.get("reliability"):
        alt = "; ".join(
            f"{bin_['records']:.0f} at {bin_['probability']:.2f}: {bin_['right']:.2f} right"
            for bin_ in figures["reliability"]
        )
        parts.append(_figure(
            reliability(figures["reliability"]), alt,
            "How often the model is right, by the probability that it gives its answer; on the "
            "dashes it would mean what it says. Beside a point: how many records it stands for.",
        ))  # fmt: skip
    shown = [one for one in figures["compared"] if one["difference"] and one["measure"] != GAP]
    if shown:
        first = next(iter(dict.fromkeys(one["measure"] for one in shown)))
        rows = [one for one in shown if one["measure"] == first]
        alt = "; ".join(
            f"{one['column']} = {one['value']}: {_with_sign(one['difference']['figure'])} "
            f"{_interval(one['difference']['interval'], signed=True)}"
            for one in rows
        )
        parts.append(_figure(
            differences(first, rows, figures["level"]), alt,
            f"{first}: each group less all others, with its interval at {figures['level']:.2%}.",
        ))  # fmt: skip
    return "\n".join(parts)


def _figure(picture: Picture, alt: str, caption: str) -> str:
    data = base64.b64encode(picture.svg(PICTURE).encode()).decode()
    return (
        f'<figure><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
