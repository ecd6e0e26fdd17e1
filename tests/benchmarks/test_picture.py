"""The picture of quality against ε is of the figures in results.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import picture


def test_a_fall_of_the_loss_is_a_gain():
    results = {
        "0": {"base": {"loss": 2.7}, "epsilon-1": {"loss": 2.6}},
        "1": {"base": {"loss": 2.7}, "epsilon-1": {"loss": 2.8}},
    }
    assert picture.gains(results, "loss")["epsilon-1"] == pytest.approx([0.1, -0.1])
    assert picture.gains(results, "loss")["base"] == [0.0, 0.0]


def test_it_draws_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    arms = {"base": {"loss": 2.7}, "epsilon-1": {"loss": 2.6}, "epsilon-0.5": {"loss": 2.65}}
    (tmp_path / "results.json").write_text(json.dumps({"0": arms}))
    out = tmp_path / "picture.png"
    monkeypatch.setattr("sys.argv", ["picture", f"medquad={tmp_path}", "--out", str(out)])
    picture.main()
    assert out.read_bytes().startswith(b"\x89PNG")
