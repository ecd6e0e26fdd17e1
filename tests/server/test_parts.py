"""What the report says of the engine is what a site's training takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.training.unit_gradients import UnitGradientEngine
from fedtune.server.parts import Dependencies
from tests.dp.conftest import records, study


@pytest.mark.parametrize(("wanted", "named"), [("auto", "one-pass"), ("opacus", "opacus")])
def test_the_engine_in_the_report(tiny_base: Path, wanted: str, named: str) -> None:
    training = {"rounds": 1, "sampling_rate": 1.0, "learning_rate": 0.1, "engine": wanted}
    plan = study(base={"model": str(tiny_base), "dtype": "float32"}, training=training)
    data, objective = CachedDataset(build(plan), records([1, 1])), plan.objective.resolved
    ran = UnitGradientEngine(data, objective, engine=plan.training.engine)
    assert Dependencies().engine(plan) == ran.name == named
