"""The kit for one device: what it finds right is right, and each of its checks can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import device, measure
from benchmarks.device import ISOLATION, PARITY, SENSITIVITY
from benchmarks.measure import Table
from benchmarks.variants import Ours, Setting, World
from fedtune.core.dp import clip

SETTING = Setting(base="tiny", records=3, tokens=16)


def ours() -> Ours:
    torch.manual_seed(0)
    made = Ours(World(SETTING))
    device.move_adapter(made)
    return made


def test_a_tiny_base_is_right_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "REPETITIONS", 1)
    row = device.check(SETTING)
    assert row[PARITY] < 1e-5 and row["same bits"] and 0.9 < row[SENSITIVITY] <= 1
    assert [bound.verdict for bound in device.bounds_of(row)] == ["met"] * 3
    assert row["ours, s"] > 0 and row["time over plain PEFT"] > 0


def test_a_wrong_gradient_is_found() -> None:
    made = ours()
    right = made.engine.matrix
    made.engine.matrix = lambda rows: right(rows) * 1.01  # type: ignore[method-assign]
    found = device.find_error(made, None)
    assert found == pytest.approx(0.01, rel=0.01)
    row = {"base": "tiny", "weights": "float32", PARITY: found}
    verdicts = [bound.verdict for bound in device.bounds_of(row)]
    assert verdicts == ["MISSED", "not measured", "not measured"]


@pytest.mark.parametrize("depends", ["on the others", "on the order"])
def test_a_gradient_that_depends_on_other_records_is_found(depends: str) -> None:
    made = ours()
    right = made.engine.matrix

    def wrong(rows: Any) -> torch.Tensor:
        found = right(rows)
        if depends == "on the order":
            return found + 1e-7 * torch.arange(len(found))[:, None]
        return found + 1e-7 * (len(found) - 1)

    assert device.has_same_bits(made)
    made.engine.matrix = wrong  # type: ignore[method-assign]
    assert not device.has_same_bits(made)
    row = {"base": "tiny", "weights": "float32", "same bits": False}
    assert [b.verdict for b in device.bounds_of(row) if ISOLATION in b.says] == ["MISSED"]


def test_a_sum_that_is_not_clipped_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ours()
    assert device.find_sensitivity(made) <= 1
    unclipped = lambda parts, *_: torch.ones(len(parts[0]), dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(clip, "scales", unclipped)
    assert device.find_sensitivity(made) > 1


def test_one_base_that_fails_takes_no_other_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anything lost that was found before the time was up."""
    rows = [RuntimeError("out of memory"), {"base": "1b", "weights": "4bit", "ours, s": 0.1}]

    def fresh(*_: object, timeout: float) -> dict[str, Any]:
        assert timeout > 0
        found = rows.pop(0)
        if isinstance(found, RuntimeError):
            raise found
        return found

    monkeypatch.setattr(measure, "fresh", fresh)
    clock = iter([0.0, 0.0, 1.0, 61.0])
    monkeypatch.setattr(device.time, "monotonic", lambda: next(clock))
    table = Table("cpu", "Checked")
    settings = [Setting(base="tiny"), Setting(base="1b", four_bit=True), Setting(base="7b")]
    device.check_all(settings, table, minutes=1, out=tmp_path)
    saved = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert [row.get("not run") for row in saved] == [
        "out of memory",
        None,
        "no time left of 1 minutes",
    ]


def test_a_process_that_takes_too_long_is_ended() -> None:
    with pytest.raises(TimeoutError, match="not finished after 0 s"):
        measure.fresh("timeit", "-n1", "-r1", "import time; time.sleep(60)", timeout=0.3)
