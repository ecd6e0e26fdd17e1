"""Report the side effects of a preference run, next to its share of pairs that are ordered
correctly, and warn if these effects make the result doubtful.

A command's closing lines, `fedtune evaluate` and the report all use these functions.
"""

from __future__ import annotations

from typing import Any

from fedtune.core.registry.rounding import number
from fedtune.report.text import figure, table

FALLEN = 0.5  # nats per token that the better answers may lose: perplexity times 1.65


def alarms(quality: dict[str, Any]) -> list[str]:
    """List the warnings about a preference run, one text each; [] if there are none. quality: the
    report's "quality".

    | warning               | given if                                                             |
    | held-out loss rose    | 95 % interval of the change of the objective's own loss is above 0   |
    | better answers lost   | the better answers' log-likelihood fell by more than FALLEN nats per |
    |                       | token                                                                |
    | text may be destroyed | a warning above is given, and the better answers' log-likelihood     |
    |                       | before training was measured                                         |

    >>> fell = {"before": 0.69, "after": 0.5, "change": [-0.3, -0.1]}
    >>> alarms({"gain": {"pairs": {"loss": fell}}})
    []"""
    pairs = _pairs(quality)
    loss, chosen = pairs.get("loss") or {}, pairs.get("chosen_logp") or {}
    found = []
    low, high = map(number, loss.get("change") or (None, None))
    if loss.get("own", True) and low is not None and high is not None and low > 0:
        found.append(
            f"the held-out loss rose from {figure(loss.get('before'))} to "
            f"{figure(loss.get('after'))} (change {low:+.3g} to {high:+.3g}, 95 %)"
        )
    before, after = number(chosen.get("before")), number(chosen.get("after"))
    if before is not None and after is not None and not after - before >= -FALLEN:
        found.append(
            f"the better answers lost {before - after:.3g} nats of log-likelihood per token; "
            f"expected at most {FALLEN:g}"
        )
    if found and before is not None:
        found.append("the text may be destroyed: read what `fedtune generate` writes with this run")
    return found


def pair_lines(quality: dict[str, Any]) -> list[str]:
    """Return the figures of a preference run for a terminal, one line "name: value" for each; []
    for another run. quality: the report's "quality"."""
    return [f"{name}: {value}" for name, value in _rows(_pairs(quality))]


def section(quality: dict[str, Any]) -> str:
    """Return the report's part on a preference run as Markdown; "" for another run."""
    pairs = _pairs(quality)
    rows = _rows(pairs)
    if not rows:
        return ""
    how = (
        "Rewards are β times the log-ratio of an answer to the base, summed over its tokens. KL is "
        "of the model from the base, over the next token, exact at each token of both answers of "
        "the data: not an estimate from answers that the model wrote."
        if "kl" in pairs
        else "The margin is the score of the better answer less that of the worse."
    )
    return f"### The pairs\n\n{table(['measure', ''], map(list, rows), numbers=False)}\n\n{how}"


def _pairs(quality: dict[str, Any]) -> dict[str, Any]:
    pairs = (quality.get("gain") or {}).get("pairs")
    return pairs if isinstance(pairs, dict) else {}


def _rows(pairs: dict[str, Any]) -> list[tuple[str, str]]:
    if not pairs:
        return []
    share, margin = pairs.get("preference") or {}, pairs.get("margin") or {}
    beta = f" (β = {figure(pairs['beta'])})" if "beta" in pairs else ""
    kind = "implied-reward margin" if beta else "score margin"
    rows = [
        ("pairs in order", f"{_arrow(share)}, 95 % {_range(share.get('interval'))}"),
        ("held-out loss", _describe_change(pairs.get("loss") or {})),
        (f"{kind}{beta}", f"{figure(margin.get('after'))}, 95 % {_range(margin.get('interval'))}"),
        ("of these above 0", figure(pairs.get("in_order"))),
    ]
    for key, name in (("chosen_logp", "better"), ("rejected_logp", "worse")):
        if key in pairs:
            rows.append((f"{name} answers, nats per token", _describe_change(pairs[key])))
    if "kl" in pairs:
        rows.append(("KL from the base, nats per token", figure(pairs["kl"])))
    for key in ("longer", "shorter"):
        split = pairs.get(key) or {}
        text = (
            f"{_arrow(split)} of {figure(split.get('records'))}"
            if split.get("records")
            else "no such pair"
        )
        rows.append((f"in order where the better answer is the {key}", text))
    return rows


def _arrow(pair: dict[str, Any]) -> str:
    return f"{figure(pair.get('before'))} → {figure(pair.get('after'))}"


def _describe_change(pair: dict[str, Any]) -> str:
    return f"{_arrow(pair)}, change {_range(pair.get('change'), '+')}"


def _range(bounds: Any, sign: str = "") -> str:
    low, high = map(number, bounds or (None, None))
    return "–" if low is None or high is None else f"{low:{sign}.3g} to {high:{sign}.3g}"
