"""Define the interface of an aggregation strategy: add updates as they arrive, apply them once
per round.

A strategy is a dataclass whose fields are study.strategy.options; each has a module in
fedtune/strategies. A site's vault knows only the strategies' names, for its policy, and imports
none of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from fedtune.core.errors import ConfigError
from fedtune.core.registry import Group

if TYPE_CHECKING:
    from fedtune.core.config import Study
    from fedtune.strategies._posterior import ClassFigures


Arrays = dict[str, npt.NDArray[np.float32]]
State = dict[str, npt.NDArray[np.float64]]


class Strategy(ABC):
    """Turns a round's updates (fp32 differences from the adapter that was sent) into the next
    adapter.

    Subclasses are dataclasses whose fields are the options of study.strategy.options. What a
    strategy keeps within a round, and from round to round (its state), is not in these fields.
    | case                     | what follows                                               |
    | no update was added      | `apply` returns the adapter as it was, and the state stays |
    | updates in another order | the same result, to 1e-12 of the largest value             |
    Guarantee: a strategy only post-processes what the sites sent, which costs no ε."""

    averages: ClassVar[bool] = True  # n identical updates move the adapter by exactly that update
    # Whether `apply` moves the adapter by a constant times the updates' weighted mean. The noise in
    # the updates then moves the adapter by the same constant times the noise's weighted mean.
    is_mean: ClassVar[bool] = False
    # Whether sites send class statistics, from which `apply` makes the adapter
    # (objective.directions).
    of_statistics: ClassVar[bool] = False

    def check(self, study: Study) -> None:  # noqa: B027 - a hook that most leave empty
        """Check that the plan's other settings fit this strategy. Errors: ConfigError."""

    def prepare(self, study: Study, frozen: Arrays) -> None:  # noqa: B027 - as `check`
        """Take the plan that the sites run, and its public arrays that are never trained. Called
        once, before any update is added.

        - study: the plan
        - frozen: the arrays, by name"""

    def update_like(self, adapter: Arrays) -> Arrays:
        """Return arrays that have the names and shapes of an update. By default this is `adapter`
        itself."""
        return adapter

    def describe_round(self, units: float, deviation: float) -> None:  # noqa: B027 - as `check`
        """Take two figures of the round before `apply` is called.

        - units: the number of declared units over which the round's updates are averaged
        - deviation: the standard deviation of the noise in each number of the average; 0 without
          noise; NaN if it differs among the numbers, as after several local steps, with AdamW, or
          with sites of lower rank"""

    @abstractmethod
    def add(self, update: Arrays, weight: float) -> None:
        """Add one site's update to the round.

        - update: the arrays by name; the caller has checked that names and shapes are right and the
          numbers finite
        - weight: the site's weight in the round's mean"""

    @abstractmethod
    def apply(self, adapter: Arrays) -> Arrays:
        """Return the next adapter, and forget the round's updates. adapter: the arrays of the
        adapter that the round started from, by name."""

    def class_figures(self) -> ClassFigures | None:
        """Return what the releases so far show about the classes: for each class the noised number
        of its units and whether it was learnt, and the standard deviation of that noise. None for a
        strategy without classes, or before the first round."""
        return None

    def state(self) -> State:
        """Return the arrays, by name, that must survive a restart between rounds; {} if there are
        none."""
        return {}

    def load_state(self, state: State) -> None:
        """Restore the arrays that `state` returned before a restart. Errors: ConfigError if they
        are another strategy's."""
        if state:
            raise ConfigError(
                "the checkpoint holds another strategy's state", "the run's own strategy"
            )


def require(condition: bool, option: str, expected: str) -> None:
    """Raise an error unless `condition` holds. option: the option's name; expected: the range that
    is allowed, in words. Errors: ConfigError that names both."""
    if not condition:
        raise ConfigError(f"strategy.options.{option} is out of range", expected)


def move_adapter(adapter: Arrays, step: State) -> Arrays:
    """Return the adapter moved by `step`: the sum of the arrays of each name, added in fp64 and
    rounded to fp32."""
    return {n: (a.astype(np.float64) + step[n]).astype(np.float32) for n, a in adapter.items()}


def unflatten(state: State, groups: tuple[str, ...]) -> dict[str, State]:
    """Split the names of arrays at their first "/": {"m/name": a} becomes {"m": {"name": a}}.
    groups: the parts that may stand before the "/"; the result has a dict for each, {} if no name
    begins with it. Errors: ConfigError if a name begins otherwise."""
    found: dict[str, State] = {group: {} for group in groups}
    for key, array in state.items():
        group, _, name = key.partition("/")
        if group not in found or not name:
            raise ConfigError(
                "the checkpoint holds another strategy's state", "the run's own strategy"
            )
        found[group][name] = array
    return found


STRATEGIES = Group(
    "strategies",
    "strategy.name",
    "fedtune.strategies",
    Strategy,  # type: ignore[type-abstract]
)


def build_strategy(study: Study) -> Strategy:
    """Build the study's strategy with its options.

    Errors: ConfigError (unknown strategy or option, value out of range, clash with the study)."""
    strategy = STRATEGIES.build(study.strategy.name, study.strategy.options)
    strategy.check(study)
    return strategy
