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


@pytest.mark.parametrize("file", sorted(picture.MEASURED.glob("*.json")), ids=lambda f: f.stem)
def test_the_tables_in_the_docs_are_of_these_figures(file: Path):
    table = picture.by_epsilon(file.stem, picture.read(file))
    assert table in (picture.MEASURED.parent / "quality.md").read_text(encoding="utf-8")


def test_a_table_by_epsilon():
    arms = {"base": {"loss": 2.7}, "epsilon-1": {"loss": 2.6}, "non-private": {"loss": 2.4}}
    shared = {"shared-1-1": {"loss": 2.5, "fallback": 3.512}}
    table = picture.by_epsilon("medquad", {"0": arms | shared, "1": arms | shared})
    assert "| 1 | 0.100 ± 0.000 | 0.200 ± 0.000 | 3.51 | – | – |" in table
    assert "| no noise, same recipe | 0.300 ± 0.000 |" in table
    right = {"base": {"accuracy": 0.2}, "epsilon-0.5": {"accuracy": 0.5}}
    assert "| 0.5 | 0.500 | – | – | – | – |" in picture.by_epsilon("mts_dialog", {"0": right})
