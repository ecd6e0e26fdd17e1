"""The table of a measured set, also where training changed nothing."""

from __future__ import annotations

import pytest

from benchmarks.sets import MTS
from benchmarks.tables import TWIN, table


@pytest.mark.parametrize(("gain", "share"), [(0.0, "–"), (0.2, "50%")])
def test_the_share_of_no_gain_is_no_figure(gain: float, share: str) -> None:
    results = {
        seed: {
            "base": {MTS.metric: 0.5},
            TWIN: {MTS.metric: 0.5 + gain},
            "epsilon-8": {MTS.metric: 0.5 + gain / 2, "epsilon": 8.0},
        }
        for seed in ("0", "1")
    }
    (line,) = [one for one in table(MTS, results).splitlines() if "ε = 8" in one and "8.00" in one]
    assert line.split("|")[-2].strip() == share
