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
    """Turns a round's updates (fp32 differences from the adapter that was sent) into an adapter.

    Subclasses are dataclasses whose fields are the options of study.strategy.options; the state
    that they keep within a round, and from round to round, is not among the fields.
    | no update was added      | `apply` returns the adapter as it was, and the state stays |
    | updates in another order | the same result, to 1e-12 of the largest value             |
    Guarantee: a strategy only post-processes what the sites sent, which costs no ε.
    """

    averages: ClassVar[bool] = True  # n identical updates move the adapter by exactly that update
    # Whether updates move the adapter by a constant times their weighted mean, and so does noise.
    is_mean: ClassVar[bool] = False
    # Whether sites send class statistics, from which `apply` makes the adapter
    # (objective.directions).
    of_statistics: ClassVar[bool] = False

    def check(self, study: Study) -> None:  # noqa: B027 - a hook that most leave empty
        """Check that the plan's other settings fit this strategy. Errors: ConfigError."""

    def prepare(self, study: Study, frozen: Arrays) -> None:  # noqa: B027 - as `check`
        """Receive the plan that the sites run, and its public arrays that are never trained. Called
        once, before any update is added."""

    def update_like(self, adapter: Arrays) -> Arrays:
        """Return arrays with the names and shapes of an update: by default the adapter's."""
        return adapter

    def describe_round(self, units: float, deviation: float) -> None:  # noqa: B027 - as `check`
        """Receive the number of declared units in the round's weighted mean and the standard
        deviation of the noise in each of the mean's numbers. Called before `apply`.

        deviation is 0 without noise, and NaN if it differs among the numbers, as after several
        local steps, with AdamW, or with sites of lower rank."""

    @abstractmethod
    def add(self, update: Arrays, weight: float) -> None:
        """Add one site's update to the round. The caller has checked that its names and shapes are
        right and its numbers finite. weight: the site's weight in the round's mean."""

    @abstractmethod
    def apply(self, adapter: Arrays) -> Arrays:
        """Return the next adapter, and forget the round's updates."""

    def class_figures(self) -> ClassFigures | None:
        """Return what the releases so far show about the classes: the noised number of units of
        each, the deviation of that noise, and whether each was learnt. None for a strategy without
        classes, or before a round."""
        return None

    def state(self) -> State:
        """Return the arrays, by name, that must survive a restart between rounds; {} if there are
        none."""
        return {}

    def load_state(self, state: State) -> None:
        """Restore what `state` returned. Errors: ConfigError if it is another strategy's state."""
        if state:
            raise ConfigError("the checkpoint holds another strategy's state")


def require(condition: bool, option: str, expected: str) -> None:
    """Check `condition`. Errors: ConfigError that names `option` and the `expected` range."""
    if not condition:
        raise ConfigError(f"strategy.options.{option} is out of range", expected)


def move_adapter(adapter: Arrays, step: State) -> Arrays:
    """Return adapter + step, summed in fp64 and returned in fp32."""
    return {n: (a.astype(np.float64) + step[n]).astype(np.float32) for n, a in adapter.items()}


def unflatten(state: State, groups: tuple[str, ...]) -> dict[str, State]:
    """Turn {"m/name": a} into {"m": {"name": a}}. Errors: ConfigError on a key outside `groups`."""
    found: dict[str, State] = {group: {} for group in groups}
    for key, array in state.items():
        group, _, name = key.partition("/")
        if group not in found or not name:
            raise ConfigError("the checkpoint holds another strategy's state")
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
