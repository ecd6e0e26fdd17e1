"""A continuous study over fake sites: a public metric that is a number of the adapter alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedtune.core.config import Study
from fedtune.report.change_plan import Look
from fedtune.server.parts import Dependencies
from fedtune.server.schedule import SimulatedClock
from tests.server.fakes import FakeEvaluator, FakeSite, Trial, make_parts, make_study

START = 1.8e9  # a multiple of an hour


def continuous(**strategy: Any) -> Study:
    body = make_study(min_sites=2, **strategy).model_dump(mode="json")
    del body["training"]["rounds"]
    body["privacy"] |= {"epsilon": 8.0, "unit": "patient"}
    body["evaluation"] |= {"every": 1}
    body["schedule"] = {"every": "1h"}
    import json

    return Study.model_validate_json(json.dumps(body))


def loss(adapter: dict[str, np.ndarray]) -> float:
    return float(sum(float(array.sum()) for array in adapter.values()))


def alike(before: float, after: float) -> Look:
    """What is seen where each of 40 records has the same loss."""
    columns = ({"loss": [value] * 40} for value in (before, after))
    return Look("loss", *columns, groups={})


class Judge(FakeEvaluator):
    """Sure of whichever has the lower sum."""

    def look(self, champion: Any, challenger: Any) -> Look:
        return alike(loss(champion), loss(challenger))


def load(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "adapter.npz") as arrays:
        return dict(arrays)


def parts(upto: int, clock: SimulatedClock | None = None, **changes: Any) -> Dependencies:
    usual = {
        "evaluator": lambda study, frozen: Judge(),
        "load": load,
        "fingerprint": lambda path: "public",
        "contents": lambda table: frozenset({"record"}),
        "clock": clock or SimulatedClock(START),
        "upto": upto,
        "skip": False,
    }
    return make_parts(**(usual | changes))


def sites() -> list[FakeSite]:
    return [FakeSite("a"), FakeSite("b")]


def go(trial: Trial, upto: int, clock: SimulatedClock | None = None, **changes: Any) -> Any:
    """Rounds up to `upto`, from wherever the run stands."""
    return trial.run(continuous(), resume=True, parts=parts(upto, clock, **changes))
