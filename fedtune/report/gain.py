"""Build the sentences about what the sites' records added and which model is released. Every output
that shows a run's quality shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from fedtune.core.registry.rounding import number
from fedtune.report.claim import judge_change, verdict
from fedtune.report.preference import alarms

TRAINED, START = "trained", "start"  # which model is released: quality.released.model in a report
PUBLIC = "what public text alone gives"


@dataclass(frozen=True)
class Line:
    """One sentence about a run's quality.

    - about: what the sentence is about: "start" for the gain over the public start, "base" for the
      gain over the base, "released" for the model that the run releases
    - text: the sentence, without a full stop
    - good: whether the sentence states a desired result"""

    about: Literal["start", "base", "released"]
    text: str
    good: bool


def headline(quality: dict[str, Any]) -> list[Line]:
    """Build the sentences about a run's quality, in order: the gain over the public start, the
    gain over the base, what is released.

    | case                            | sentences                                              |
    | the study has no public start   | only the gain over the base                            |
    | a comparison was not made       | its sentence is left out                               |
    | the public start is released    | the gain over the base is that of the start and not of |
    |                                 | the trained model                                      |

    >>> gain = {"records": 60, "over_start": [-0.5, 0.25], "change": [-1.5, -1.0]}
    >>> found = {"metric": "loss", "start": {"loss": 2.25}, "gain": gain}
    >>> [line.text for line in headline(found)]
    ['the trained model is not told apart from what public text alone gives (2.25, for no ε): \
change of loss -0.5 to +0.25, 95 % over 60 records', 'the trained model is better than the base: \
change of loss -1.5 to -1, 95 % over 60 records']
    """
    lines = (_over_start(quality), _over_base(quality), _describe_release(quality))
    return [line for line in lines if line]


def over_start(quality: dict[str, Any]) -> str:
    """Say in a few words how the trained model compares with the public start: "better than", "not
    told apart from" or "worse than"; "NOT shown to be better than" for a preference run with
    alarms; "" if the two were not compared."""
    metric, start = quality.get("metric"), quality.get("start")
    told = judge_change(str(metric), (quality.get("gain") or {}).get("over_start"))
    if not isinstance(start, dict) or number(start.get(metric)) is None or told is None:
        return ""
    is_doubtful = told[0] == "better than" and alarms(quality)
    return "NOT shown to be better than" if is_doubtful else told[0]


def is_start_released(quality: dict[str, Any]) -> bool:
    """Return whether a run releases its public start, and not the trained model. quality: the
    report's "quality"."""
    decision = quality.get("released")
    return isinstance(decision, dict) and decision.get("model") == START


def choose_better(gain: float, unseen: float = 0.0) -> str:
    """Return which model the rule selection.release = "better" releases: START or TRAINED. It is
    START only if the public start is better on the selection records, and would remain better if
    the trained model were right about every unit of the classes that these records lack.

    - gain: the trained model's metric on the selection records minus the start's, with the sign
      changed if lower is better
    - unseen: the share of the sites' units in classes that the selection records lack

    >>> choose_better(0.0), choose_better(-0.1)
    ('trained', 'start')
    >>> choose_better(-0.1, unseen=0.05), choose_better(-0.1, unseen=0.2)
    ('start', 'trained')
    """
    return TRAINED if (1 - unseen) * gain + unseen >= 0 else START


def advice(report: dict[str, Any]) -> str:
    """Return a sentence on what would help, if the sites' records were not shown to add anything to
    public text. Return "" if they were, or if the study has no public start."""
    claim = over_start(report.get("quality") or {})
    if not claim or claim == "better than":
        return ""
    privacy = report.get("privacy") or {}
    sites = privacy.get("sites") or {}
    helps = [f"more {privacy.get('unit') or 'record'}s a site", "more sites"]
    if report.get("private"):
        if not any("secure_aggregation" in site for site in sites.values()):
            enough = "" if len(sites) >= 3 else ", from three sites on"
            helps.append(f"one dose of noise for all sites by [secure_aggregation]{enough}")
        helps.append("a higher ε, where every site's policy allows it")
    return (
        f"the sites' records were not shown to add anything to public text: the model is {claim} "
        f"it. What would help: {'; '.join(helps)}"
    )


def _over_start(quality: dict[str, Any]) -> Line | None:
    if not (claim := over_start(quality)):
        return None
    metric, gain = str(quality["metric"]), quality["gain"]
    told = judge_change(metric, gain["over_start"])
    assert told is not None  # since over_start returned a text
    text = (
        f"the trained model is {claim} {PUBLIC} ({number(quality['start'][metric]):.4g}, for no "
        f"ε): {told[1]}, 95 % over {gain.get('records')} records"
    )
    return Line("start", text, good=claim == "better than")


def _over_base(quality: dict[str, Any]) -> Line | None:
    claim = verdict(quality)
    if not claim:
        return None
    who = "what is released" if is_start_released(quality) else "the trained model"
    return Line("base", f"{who} is {claim}", good=claim.startswith("better than"))


def _describe_release(quality: dict[str, Any]) -> Line | None:
    decision = quality.get("released")
    if not isinstance(decision, dict) or "model" not in decision:
        return None
    if not is_start_released(quality):
        return Line("released", f"released: the trained model; {decision.get('why')}", good=True)
    metric = quality.get("metric")
    own = number((quality.get(TRAINED) or {}).get(metric))
    own_figure = "" if own is None else f" ({metric} {own:.4g})"
    chosen_by = ", ".join(
        f"{number(decision.get(model)):.4g} for {name}"
        for model, name in ((TRAINED, "it"), (START, "public text"))
        if number(decision.get(model)) is not None
    )
    text = (
        f"released: {PUBLIC}; the trained model{own_figure}, which was worse on the "
        f"{decision.get('records')} [selection] records ({chosen_by}), is kept in {TRAINED}/; the "
        "ε that it cost stays spent"
    )
    return Line("released", text, good=False)
