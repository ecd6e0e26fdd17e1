"""Explain at a site, when a budget refuses a plan, which ε was spent and which plan would still
fit.

Guarantee: this explanation never leaves the site. The coordinator gets only the refusal's own text,
which names a rule and public values, not what other studies spent (decision 0010)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from fedtune.core.config import PrivacyTable, Site, Study
from fedtune.core.config.patient_columns import patient_columns
from fedtune.core.errors import FedtuneError
from fedtune.core.ledger.entries import Charge
from fedtune.core.ledger.ledger import Ledger
from fedtune.core.ledger.spending import StudyLine, budget, study_lines
from fedtune.core.registry.rounding import rounded_up
from fedtune.core.vault.budget import Budget
from fedtune.core.vault.policy import compute_within_limits

PLACES = "runs.json"  # in the state folder: where runs of `fedtune simulate` lie, by plan
SEARCH = 7  # halvings between nothing and what the plan asks for
MOST = 4  # studies that are listed
CEILINGS = ("policy.max_epsilon", "policy.max_fallback_epsilon", "the plan's own lifetime")
TODO = (
    "take what fits, or try settings on data that no patient is in (`fedtune tune`); whoever "
    "answers for the data decides whether to raise policy.max_epsilon"
)


def explain(study: Study, site: Site, ledger: Ledger | None) -> list[str]:
    """Explain, on the site's own screen, why the budget refuses `study`. Return the lines: first
    the ε that the dataset of [data] has spent; then the newest studies that spent it, at most MOST,
    each with the folder of its run if this site knows it; last, what part of `study` would still
    fit. ledger: the ledger with the charges; None if there is none yet."""
    policy, name = site.policy, site.data.name
    spent = ledger.spending(name, patient_columns(site)) if ledger else []
    total = budget(name, spent, policy)
    lines = study_lines(spent, policy.delta, study.unit)
    runs = places(site)
    paid = f"ε = {rounded_up(total.epsilon)} (at δ = {2 * total.delta:g}) of {policy.ceiling:g}"
    if any(not each.is_known_for(study.unit) for each in spent):
        paid += ", as far as it is known"
    if total.fallback is not None:
        paid += f"; whatever happens ε = {rounded_up(total.fallback)} of {total.fallback_ceiling:g}"
    newest = sorted(lines, key=lambda line: -line.last)
    told = [f"dataset {name!r} has paid {paid}", *(_study(line, runs) for line in newest[:MOST])]
    if len(lines) > MOST:
        told.append(f"and {len(lines) - MOST} more studies (`fedtune ledger`)")
    fitting = fits(study, site, ledger.charges(name) if ledger else [])
    return [*told, f"what fits: {fitting or 'nothing of this study'}"]


def fits(study: Study, site: Site, charges: Sequence[Charge]) -> str:
    """Find how much of a refused study would still fit, and return it as a text, such as
    "training.rounds up to 12 (--set training.rounds=12)". The text gives the largest
    privacy.epsilon that stays within the budget or, if the plan gives σ, the most rounds. The value
    is found to about a hundredth of the plan's. Return "" if nothing fits, and for a study without
    noise or without a last round.

    charges: all charges so far against the dataset"""
    privacy = study.privacy
    if not isinstance(privacy, PrivacyTable) or study.continuous:
        return ""
    if privacy.noise_multiplier is None and privacy.epsilon is not None:
        most = _find_largest(
            privacy.epsilon,
            lambda value: is_within(study.changed(privacy={"epsilon": value}), site, charges),
        )
        down = math.floor(most * 100) / 100
        return f"privacy.epsilon up to {down:g} (--set privacy.epsilon={down:g})" if down else ""
    rounds = study.training.rounds or 0

    def of_rounds(value: float) -> bool:
        changes = {"training": {"rounds": int(value)}, "privacy": {"epsilon": None}}
        return int(value) > 0 and is_within(study.changed(**changes), site, charges)

    most = int(_find_largest(rounds, of_rounds))
    return f"training.rounds up to {most} (--set training.rounds={most})" if most else ""


def _find_largest(asked: float, fit: Callable[[float], bool]) -> float:
    """Search between 0 and `asked` for the largest value for which `fit` returns true, in SEARCH
    halvings. Return 0 if no value that was tried fits."""
    low, high = 0.0, float(asked)
    for _ in range(SEARCH):
        middle = (low + high) / 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def is_within(study: Study, site: Site, charges: Sequence[Charge]) -> bool:
    try:
        plan = compute_within_limits(study, site)
        Budget(site.policy, plan, charges).check()
    except FedtuneError:
        return False
    return True


def _study(line: StudyLine, runs: dict[str, str]) -> str:
    at = datetime.fromtimestamp(line.last, UTC).date().isoformat()
    where = f", in {runs[line.study]}" if line.study in runs else ""
    digest = line.study.removeprefix("sha256:")[:8]
    whatever = f" ({rounded_up(line.fallback)} whatever happens)" if line.fallback else ""
    if not line.known:
        return f"{line.name} ({digest}, {at}): ε is not known{where}"
    return f"{line.name} ({digest}, {at}): ε = {rounded_up(line.epsilon)}{whatever} alone{where}"


def places(site: Site) -> dict[str, str]:
    """Read where `fedtune simulate` wrote runs on this site's records. Return plan's digest -> the
    run's folder; {} if the file that lists them is missing or damaged."""
    try:
        table = json.loads((site.site.state / PLACES).read_text(encoding="utf-8"))
        return {str(key): str(value) for key, value in table.items()}
    except (OSError, ValueError, AttributeError):
        return {}
