"""Methods of other groups as plans and plug-ins of fedtune, one file each.

Each file describes the method, who published it and which part of it costs ε, and holds

    PLANS   what the method changes in fedtune's own plan of a data set
    TRIED   three settings for each set and ε, among which the validation records of seed 0 choose

and a strategy, if the method cannot be expressed by a plan alone. `compare` runs all of them.
"""

from __future__ import annotations

from examples.write import Table

# ε -> settings.
Settings = dict[float, list[Table]]


def rates(by_epsilon: dict[float, tuple[float, float, float]]) -> Settings:
    """Make three settings for each ε that differ in the sites' learning rate."""
    return {
        epsilon: [{"training": {"learning_rate": rate}} for rate in three]
        for epsilon, three in by_epsilon.items()
    }
