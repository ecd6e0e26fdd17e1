"""Trap 24: a step that dies while its noise is drawn has been charged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fedtune.core.dp.clip import Chunk
from fedtune.core.dp.steplog import StepLog
from tests.dp.conftest import make_plan


def test_the_line_is_on_disk_before_the_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At q = 1 the sampler draws nothing: the noise is first to ask the system for a key."""

    def dies(size: int) -> bytes:
        raise KeyboardInterrupt

    log = StepLog(tmp_path / "log")
    monkeypatch.setattr(os, "urandom", dies)
    with pytest.raises(KeyboardInterrupt):
        make_plan().step(2, 4, lambda rows: iter([Chunk(rows, [torch.ones(2, 4)])]), log, 1)
    assert len(log.steps()) == 1
