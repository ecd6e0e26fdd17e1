"""Exported models merged whole, by mergekit: the same sums as merging the runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.core.errors import ConfigError, NotGenuine
from fedtune.derive import merge_exported
from fedtune.derive.export import export
from fedtune.derive.merge import merge_runs
from fedtune.derive.merge_exported import merge_models
from fedtune.derive.merge_methods import Method
from fedtune.runs.run import Run
from tests.test_merging import parents  # noqa: F401  (a fixture)

pytest.importorskip("mergekit", reason="pip install 'fedtune[merge]'")


@pytest.fixture(scope="module")
def models(parents: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:  # noqa: F811
    folder = tmp_path_factory.mktemp("models")
    return [export(Run(run), folder / run.name, "hf") for run in parents]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_whole_models_are_merged_and_the_budgets_with_them(
    parents: list[Path],  # noqa: F811
    models: list[Path],
    tiny_base: Path,
    tmp_path: Path,
    method: Method,
) -> None:
    out = tmp_path / "both"
    body = merge_models(models, out, method=method)
    merged, base = weights(out), weights(tiny_base)
    one, other = (weights(model) for model in models)
    moved = [n for n in base if "down_proj" in n and not torch.equal(one[n], base[n])]
    assert moved
    for name in merged if method == "linear" else ():
        expected = one[name] + other[name] - base[name]
        assert torch.allclose(merged[name], expected, atol=1e-5)
    assert not torch.allclose(merged[moved[0]], one[moved[0]], atol=1e-5)
    assert AutoTokenizer.from_pretrained(out)("fever").input_ids
    again = merge_runs([*map(Run, parents)], tmp_path / "runs", measure=False).report
    assert body["privacy"]["epsilon"] == pytest.approx(again["privacy"]["epsilon"])
    assert json.loads((out / "report.json").read_text())["merge"]["parents"][1]["epsilon"]
    assert "Merged from 2 runs" in (out / "README.md").read_text()
    assert not (out / "mergekit_config.yml").exists()


def test_refusals(parents: list[Path], models: list[Path], tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="works on adapters"):
        merge_models(models, out, method="svd")
    with pytest.raises(ConfigError, match="other: not an exported model"):
        merge_models([models[0], parents[1]], out)
    with pytest.raises(ConfigError, match="are the same"):
        merge_models([models[0], models[0]], out)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_says_which(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "mergekit"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mergekit", None)
    with pytest.raises(ConfigError, match=r"mergekit.*fedtune\[merge\]"):
        merge_models(models, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_signed_run_says_counts_and_not_the_report_beside_it(
    models: list[Path], tmp_path: Path
) -> None:
    """No signature covers the exported model's own report, which anybody can edit. Twin: without
    the run beside it, nothing else says what the model cost."""
    forged = shutil.copytree(models[1], tmp_path / "forged")
    body = json.loads((forged / "report.json").read_text())
    body["base"]["digest"] = "sha256:" + "0" * 64
    (forged / "report.json").write_text(json.dumps(body))
    true = merge_exported._reports([models[0], models[1]])
    assert merge_exported._reports([models[0], forged]) == true
    (forged / "run" / "report.json").write_text("{}")
    with pytest.raises(NotGenuine):
        merge_exported._reports([models[0], forged])
    shutil.rmtree(forged / "run")
    with pytest.raises(ConfigError, match="different bases"):
        merge_exported._reports([models[0], forged])


@pytest.mark.parametrize("run", [True, False])
def test_a_quantised_base_is_no_base_of_whole_models(
    models: list[Path], tmp_path: Path, run: bool
) -> None:
    """The plan of the run beside the model says it, or else the model's own report. Twin: the same
    models of a base that is not quantised."""
    copies = [shutil.copytree(model, tmp_path / model.name) for model in models]
    assert len(merge_exported._reports(copies)) == 2
    file = copies[0] / ("run/plan.json" if run else "report.json")
    body = json.loads(file.read_text())
    body["base"]["quantisation"] = {"method": "nf4"}
    if run:  # an unsigned run, whose files may be changed
        for name in ("signature.json", "evidence.json"):
            (copies[0] / "run" / name).unlink()
    else:
        shutil.rmtree(copies[0] / "run")
    file.write_text(json.dumps(body))
    with pytest.raises(ConfigError, match="of a quantised base cannot be merged"):
        merge_exported._reports(copies)
