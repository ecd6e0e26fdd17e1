"""Forecast, before a study spends any ε, how much more accurate its model will be than a model made
from public records alone.

The forecast uses only the plan, its public files and the sites' declared sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fedtune.core.config import Study, noise_shares
from fedtune.core.data.files import rows
from fedtune.core.dp.calibration import resolve
from fedtune.core.dp.shared_noise import own_sigma
from fedtune.core.errors import ConfigError, DataError, ModelError
from fedtune.core.strategy import State, build_strategy
from fedtune.evaluation.expected_gain import HEADING, ExpectedGain, Sites, World, expected_gain
from fedtune.strategies._posterior import FOLDS
from fedtune.strategies.discriminant import HELD_OUT, basis_in, public_in


def forecast_gain(
    study: Study,
    known: State,
    sizes: Sequence[int],
    shares: Mapping[str, float] | None = None,
    records: int = 0,
) -> ExpectedGain | None:
    """Forecast how much more accurate a private study's model will be than a model made from public
    records alone. Return None if no forecast can be made: for a study whose coordinator does not
    build a head from class statistics (`can_forecast`), and if too few public records have a class.

    - known: the state of the study's strategy before the first round, as `public.start.start` makes
      it (`Start.strategy`)
    - sizes: the sites' declared sizes
    - shares: class -> which share of the sites' units is in it, for classes that public records
      lack
    - records: the number of records in [evaluation]; 0 if there are none

    The same arguments always give the same forecast. Errors: ConfigError if `shares` names an
    unknown class, or a share is not between 0 and 1."""
    if not can_forecast(study) or HELD_OUT not in known:
        return None
    labels, objective = study.objective.labels, study.objective.resolved
    basis = basis_in(known, objective.directions, objective.count_weight)
    hits, held_out = known[HELD_OUT]
    declared = _by_class(shares or {}, labels)
    world = World(basis, public_in(known), hits / held_out, declared)
    return expected_gain(world, sites_of(study, sizes), labels, records)


def forecast_and_describe(
    study: Study, sizes: Sequence[int], shares: Mapping[str, float] | None = None
) -> tuple[ExpectedGain | None, list[str]]:
    """Forecast, before a study is started, how much more accurate its model will be than a model
    made from public records alone. Only the study's base and its public files are read. Return the
    forecast and the lines of text that describe it. If no forecast can be made, return None and one
    line that says why; for a study that is not private, None and no line.

    - sizes: the sites' declared sizes
    - shares: class -> which share of the sites' units is in it, for classes that public records
      lack

    Errors: ConfigError if `shares` names an unknown class, or a share is not between 0 and 1."""
    if not can_forecast(study):
        return None, [explain_no_forecast(study)] if study.private else []
    from fedtune.public.start import start

    try:
        records = _records(study)
        found = forecast_gain(study, start(study).strategy, sizes, shares, records)
    except (ModelError, DataError) as error:
        return None, [f"{HEADING}: no forecast, since {error}"]
    return found, found.lines() if found else [explain_no_forecast(study)]


def explain_no_forecast(study: Study) -> str:
    """Return a sentence that says why nobody can forecast how much more accurate a study's model
    will be than a model made from public records alone."""
    if study.continuous:
        why = "a study without a last round learns from records that are not there yet"
    elif not build_strategy(study).of_statistics:
        why = "no plan that trains by gradients has a forecast"
    else:
        why = f"fewer than {FOLDS} public records have a class"
    return f"{HEADING}: cannot be forecast; {why}"


def explain_who_forecasts(study: Study) -> str:
    """Return a sentence for a machine that lacks the study's public files. It says who can forecast
    how much more accurate the study's model will be than a model made from public records alone, or
    why nobody can."""
    if not can_forecast(study):
        return explain_no_forecast(study)
    return (
        f"{HEADING}: the coordinator can forecast it from public records, for all sites' declared "
        "sizes, before anything is paid: ask the coordinator what `fedtune plan` says"
    )


def _records(study: Study) -> int:
    """Return the number of the study's [evaluation] records; 0 if the study has no such table.
    Errors: DataError."""
    table = study.evaluation
    if table is None:
        return 0
    return sum(isinstance(row, dict) for row in rows(table.path, {}, strict=False))


def can_forecast(study: Study) -> bool:
    """Return whether one can forecast how much more accurate this study's model will be than a
    model made from public records alone. The study must be private and have a last round, and its
    coordinator must build a head from class statistics."""
    return study.private and not study.continuous and build_strategy(study).of_statistics


def sites_of(study: Study, sizes: Sequence[int]) -> Sites:
    """Describe the sites of a study for the forecast: their sizes, and the noise that is left when
    all rounds are averaged. sizes: the sites' declared sizes; if there is only one, it stands for
    strategy.min_sites sites of this size."""
    everyone = tuple(sizes) if len(sizes) > 1 else tuple(sizes) * study.strategy.min_sites
    budget, honest = resolve(study, max(everyone)), noise_shares(study)
    own = own_sigma(budget.noise_multiplier, honest) / math.sqrt(budget.rounds)
    sigma = own * math.sqrt(honest)
    return Sites(everyone, sigma, len(everyone) / honest)


def _by_class(shares: Mapping[str, float], labels: Sequence[str]) -> dict[int, float]:
    """Return the shares with each class's number in place of its name.

    - shares: class -> which share of the sites' units is in it
    - labels: the names of all classes, in the order of their numbers

    Errors: ConfigError if a class is unknown, a share is not between 0 and 1, or the shares add up
    to 1 or more."""
    for name, share in shares.items():
        if name not in labels:
            raise ConfigError(
                f"--share {name}: not a class of the plan", f"one of {', '.join(labels)}"
            )
        if not 0 < share < 1:
            raise ConfigError(f"--share {name}={share:g}", "a share above 0 and below 1")
    if sum(shares.values()) >= 1:
        raise ConfigError(
            "the shares add up to 1 or more",
            "less than 1, because the other classes have units too",
        )
    return {labels.index(name): share for name, share in shares.items()}
