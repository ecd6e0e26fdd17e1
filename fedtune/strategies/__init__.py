"""Aggregation strategies: one module each, a dataclass whose fields are study.strategy.options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.registry import Group
from fedtune.strategies._base import Arrays, State, Strategy

if TYPE_CHECKING:
    from fedtune.config import Study


__all__ = ["STRATEGIES", "Arrays", "State", "Strategy", "build", "names"]

STRATEGIES = Group("strategies", "strategy.name", __name__, Strategy)  # type: ignore[type-abstract]


def names() -> list[str]:
    """Every strategy of this release."""
    return STRATEGIES.release()


def build(study: Study) -> Strategy:
    """The study's strategy with its options.

    Errors: ConfigError (unknown strategy or option, value out of range, clash with the study)."""
    strategy = STRATEGIES.build(study.strategy.name, study.strategy.options)
    strategy.check(study)
    return strategy
