"""Draw progress.png: quality and ε by round, side by side."""

from __future__ import annotations

import io
import textwrap
from typing import Any

from fedtune.core.registry.metrics import metric as known_metric
from fedtune.core.registry.rounding import number, rounded_up
from fedtune.report.claim import fallback
from fedtune.report.gain import headline
from fedtune.report.quality import intervals

WIDE = 130  # characters in a line of the caption
ROOM = 1.18  # the rounds' axis is so many times longer than its data: room for the last label
INK = "#222222"
FAINT = "#b8b8b8"
GOOD = "#1f6feb"
COST = "#b35900"
ALARM = "#c00000"


def png(report: dict[str, Any]) -> bytes:
    """Draw the picture of a run, with a panel for each quality metric and one for ε, and return it
    as PNG bytes. No display is needed (Agg). report: the report's content."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    private, quality = _private_evaluations(report), report.get("quality") or {}
    metric = quality.get("metric")
    public = [metric] if metric or not private else []
    if metric not in (None, "loss") and _points(quality, "loss"):
        public.append("loss")  # a metric may rise while the model's loss shows that it degrades
    panels = 1 + len(public) + bool(private)
    figure = Figure(figsize=(4.5 * panels, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    *shown, right = figure.subplots(1, panels)
    for axes, name in zip(shown, public, strict=False):
        _quality(axes, quality, name)
    if private:
        _held_out(shown[-1], private, (report.get("held_out") or {}).get("score", "likelihood"))
    if report.get("private"):
        _epsilon(right, report)
        figure.suptitle(_caption(report), fontsize=8, color="#555555")
    else:
        _alarm(right)
        figure.suptitle(
            "NOT PRIVATE", color="white", backgroundcolor=ALARM, weight="bold", fontsize=16
        )
    figure.get_layout_engine().set(w_pad=0.15)  # type: ignore[union-attr,call-arg]
    for axes in (*shown, right):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _caption(report: dict[str, Any]) -> str:
    """Return the picture's caption: the study's name, then the sentences about the gains and the
    released model (`gain.headline`), each as a paragraph."""
    said = [line.text for line in headline(report.get("quality") or {})]
    parts = [str(report.get("study") or ""), *(textwrap.fill(text, WIDE) for text in said)]
    return "\n".join(parts).replace("$", "")


def _points(quality: dict[str, Any], metric: Any) -> list[tuple[int, float]]:
    """Return the points (round, value) of a metric's curve on the evaluation records; round 0 is
    the base alone. quality: the report's "quality"."""
    points = [
        (row["round"], value)
        for row in quality.get("by_round") or []
        if (value := number(row.get(metric))) is not None
    ]
    before = quality.get("before")
    start = number(before.get(metric) if isinstance(before, dict) else before)
    if start is not None and all(r > 0 for r, _ in points):
        points.insert(0, (0, start))
    return points


def _quality(axes: Any, quality: dict[str, Any], metric: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    points = _points(quality, metric)
    if not points:
        return _draw_empty(axes, "Quality", "not measured")
    rounds, values = zip(*points, strict=True)
    selected = [
        (row["round"], value)
        for row in quality.get("selection") or []
        if (value := number((row.get("selection") or {}).get(metric))) is not None
    ]
    if selected:  # in this case the evaluation records are measured only at the start and the end
        axes.plot(*zip(*selected, strict=True), color=GOOD, alpha=0.4, label="selection records")
        axes.plot(rounds, values, color=GOOD, marker="o", linestyle="", label="evaluation records")
        axes.legend(frameon=False, fontsize=8)
    else:
        axes.plot(rounds, values, color=GOOD, marker="o", markersize=4, clip_on=False, zorder=3)
    bounds = intervals(quality, metric)
    above = values[-1] >= values[0]
    if rounds[0] == 0:
        axes.axhline(values[0], color=FAINT, linestyle="--", linewidth=1, zorder=1)
        if "before" in bounds:
            axes.axhspan(*bounds["before"], color=FAINT, alpha=0.25, linewidth=0, zorder=0)
        axes.annotate(
            "base alone", (1, values[0]), xycoords=("axes fraction", "data"),
            xytext=(0, -4 if above else 4), va="top" if above else "bottom",
            textcoords="offset points", ha="right", color="#777777", fontsize=8,
        )  # fmt: skip
    # The curve is that of the trained model, even if the public start is released.
    low, high = bounds.get("trained", bounds.get("after", (values[-1], values[-1])))
    axes.errorbar(
        rounds[-1], values[-1], yerr=[[max(values[-1] - low, 0)], [max(high - values[-1], 0)]],
        color=GOOD, capsize=4, elinewidth=1.2, clip_on=False,
    )  # fmt: skip
    axes.annotate(  # beside the interval: a label above the last point lies on the line
        f"{values[-1]:.3g}", (rounds[-1], values[-1]), xytext=(7, 3 if above else -3),
        va="bottom" if above else "top", textcoords="offset points", color=GOOD, weight="bold",
        annotation_clip=False,
    )  # fmt: skip
    begun = quality.get("start")
    if (public := number(begun.get(metric) if isinstance(begun, dict) else None)) is not None:
        axes.axhline(public, color=FAINT, linestyle=":", linewidth=1.2, zorder=1)
        axes.annotate(
            "public text alone", (1, public), xycoords=("axes fraction", "data"), xytext=(0, 4),
            textcoords="offset points", ha="right", va="bottom", color="#777777", fontsize=8,
        )  # fmt: skip
    about = known_metric(metric)
    lower = " (lower is better)" if not about.higher_is_better else ""
    axes.set_title(
        f"{str(metric).replace('_', ' ')}{lower}{_count(quality)}", loc="left", color=INK
    )
    if about.bounded:
        axes.set_ylim(0, 1.02)
    axes.margins(y=0.15)
    last = max(rounds[-1], 1)
    axes.set_xlim(0, last * ROOM)
    axes.set_xlabel("round")
    ticks = MaxNLocator(integer=True).tick_values(0, last)
    axes.set_xticks([tick for tick in ticks if 0 <= tick <= last])


def _count(quality: dict[str, Any]) -> str:
    """Return a text that begins with a line break, and states the number of evaluation records and
    what the error bars are; "" if the number is not known. quality: the report's "quality"."""
    count = number((quality.get("gain") or {}).get("records"))
    return f"\n{int(count):,} records, 95 % intervals" if count else ""


def _private_evaluations(report: dict[str, Any]) -> list[tuple[int, float, float]]:
    """Return a triple (round, score, standard deviation of the score's noise) for each private
    evaluation of the run. An evaluation whose count of units does not exceed its noise has no
    score, and is left out."""
    points = []
    for row in report.get("rounds") or []:
        answer = row.get("private_quality") or {}
        value = number(answer.get("likelihood", answer.get("accuracy")))
        deviation = number(answer.get("noise_sd"))
        if value is not None and deviation is not None:
            points.append((int(row["round"]), value, deviation))
    return points


def _held_out(axes: Any, private: list[tuple[int, float, float]], score: str) -> None:
    from matplotlib.ticker import MaxNLocator

    rounds, values, deviations = zip(*private, strict=True)
    axes.errorbar(
        rounds, values, yerr=[2 * sd for sd in deviations], color=GOOD, marker="o", markersize=4,
        capsize=3, elinewidth=1, ecolor=FAINT,
    )  # fmt: skip
    axes.set_title(f"{score} at the sites (± 2 sd of noise)", loc="left", color=INK, fontsize=10)
    axes.margins(y=0.15)
    axes.set_xlim(0, max(rounds[-1], 1) * 1.05)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _epsilon(axes: Any, report: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    privacy = report.get("privacy") or {}
    final = number(privacy.get("epsilon"))
    by_site: dict[str, list[tuple[int, float]]] = {}
    for row in report.get("rounds") or []:
        spent = row.get("epsilon")
        for name, value in spent.items() if isinstance(spent, dict) else [("", spent)]:
            if (n := number(value)) is not None:
                by_site.setdefault(name, [(0, 0.0)]).append((row["round"], n))
    unit = privacy.get("unit", "record")
    if final is None:
        return _draw_empty(axes, "ε", "not known")
    if not by_site:  # the rounds have no ε: draw the run's final figure alone
        last = max([1, *[int(row["round"]) for row in report.get("rounds") or []]])
        by_site = {"": [(last, final)]}
    for points in by_site.values():
        rounds, values = zip(*points, strict=True)
        axes.plot(rounds, values, color=COST, marker="o", markersize=4, clip_on=False,
                  alpha=0.35 if len(by_site) > 1 else 1.0)  # fmt: skip
    last = max(points[-1][0] for points in by_site.values())
    axes.annotate(
        f"ε = {rounded_up(final)}{_format_fallback(privacy)}", (last, final), xytext=(0, 6),
        ha="right", textcoords="offset points", color=COST, weight="bold",
    )  # fmt: skip
    sites = f", {len(by_site)} sites" if len(by_site) > 1 else ""
    axes.set_title(f"ε spent per {unit}{sites} (δ = {privacy.get('delta'):g})", loc="left")
    axes.set_xlim(0, max(last, 1))
    axes.set_ylim(0, final * 1.2)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _format_fallback(privacy: dict[str, Any]) -> str:
    held = fallback(privacy)
    return "" if held is None else f", {rounded_up(held['epsilon'])} whatever happens"


def _alarm(axes: Any) -> None:
    axes.set_facecolor("#fdeaea")
    axes.text(0.5, 0.5, "privacy was off:\nno noise, no ε", ha="center", va="center",
              color=ALARM, fontsize=14, weight="bold", transform=axes.transAxes)  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_empty(axes: Any, title: str, text: str) -> None:
    axes.set_title(title, loc="left", color=INK)
    axes.text(0.5, 0.5, text, ha="center", va="center", color="#777777", transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])
