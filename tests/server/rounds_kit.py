"""What test_rounds.py and test_rounds_refused.py share."""

from __future__ import annotations

import json
from typing import Any

from tests.server.fakes import FakeSite, make_study


def three() -> list[FakeSite]:
    return [FakeSite("a"), FakeSite("b"), FakeSite("c")]


def metrics(trial: Any) -> list[dict[str, Any]]:
    text = (trial.folder / "out" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def one_round() -> Any:
    return make_study().training.model_copy(update={"rounds": 1})
