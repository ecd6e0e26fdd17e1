"""Aggregation strategies, one file each. A new one is a new file here with one Strategy class."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from fedtune.errors import ConfigError
from fedtune.strategies._base import Arrays, State, Strategy

if TYPE_CHECKING:
    from fedtune.config import Study


__all__ = ["Arrays", "State", "Strategy", "build", "find", "names"]


def names() -> list[str]:
    """Every strategy in this package."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def find(name: str) -> type[Strategy]:
    """The Strategy class of the module `name`. Errors: ConfigError listing the names there are."""
    if name not in names():
        raise ConfigError(f"strategy.name = {name!r} is not known", "one of " + ", ".join(names()))
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Strategy)
        and value.__module__ == module.__name__
    )
    return found


def build(study: Study) -> Strategy:
    """The study's strategy with its options.

    Errors: ConfigError (unknown strategy or option, value out of range, clash with the study)."""
    strategy = find(study.strategy.name).from_options(study.strategy.options)
    strategy.check(study)
    return strategy
