"""Table [secure_aggregation] of study.toml: only the sum of the sites' updates can be opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.core.config.types import Number, Table

if TYPE_CHECKING:
    from fedtune.core.config.study import Study


class SecureAggregationTable(Table):
    """How the sites share noise. They mask their updates, so that nobody can open more than a
    round's sum, and only this sum needs the noise of the plan's σ (one dose). With n =
    strategy.min_sites and t = `colluding`, each site adds noise of σ/√(n - t), so that the n - t
    sites that do not collude add one dose together.

    colluding: the number of sites that may collude with the coordinator while ε still holds. It is
    at least one, because every site knows the noise that it added itself."""

    colluding: Number = 1


def check_secure(study: Study) -> None:
    """Check that a plan's other settings fit its table [secure_aggregation], if it has one. Errors:
    ValueError with the reason."""
    table = study.secure_aggregation
    t = study.training
    n = study.strategy.min_sites
    if table is None:
        return
    if n - table.colluding < 2:
        raise ValueError(
            f"secure_aggregation.colluding = {table.colluding}: needs "
            f"strategy.min_sites of at least {table.colluding + 2}, not {n}, so "
            "that at least two sites do not collude"
        )
    reasons = {
        "training.local_steps: must be 1: several steps at a site need its own noised "
        "gradient, which nobody opens": t.local_steps != 1,
        "training.expected_batch: give training.sampling_rate in its place; sites of different "
        "sizes would sample, and add noise, differently": t.sampling_rate is None,
        'strategy.weights: must be "declared": in a sum every unit weighs the same': (
            study.strategy.weights != "declared"
        ),
        "lora.min_rank: sites of other ranks cannot add up to one masked sum": bool(
            study.lora and study.lora.min_rank is not None
        ),
        "training.proximal_mu: must be 0: it has no effect on a single step": t.proximal_mu != 0,
        "schedule: not with secure_aggregation: a patient's budget for life could not tell a "
        "round that is void from one that was opened": study.schedule is not None,
        "clipping: the sum needs a bound on each row": study.clipping is None,
    }
    for reason, broken in reasons.items():
        if broken:
            raise ValueError(f"{reason} (the study has [secure_aggregation])")


def noise_shares(study: Study) -> int:
    """Return the number of sites whose noise adds up to one dose, i.e. to noise of the plan's σ.
    This is n - t, where n is strategy.min_sites and t is secure_aggregation.colluding; it is 1
    without [secure_aggregation].

    Guarantee: if at most t of n sites collude, at least this many are honest, and the noise of
    these alone is at least one dose."""
    table = study.secure_aggregation
    return study.strategy.min_sites - table.colluding if table else 1
