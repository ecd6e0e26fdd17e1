"""Whole studies on preferences: from files to a report, and measured again from the folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.core.config import load_study
from fedtune.core.data.dataset import NO_TARGET
from fedtune.core.data.load import load_dataset
from fedtune.core.errors import ConfigError
from fedtune.core.models.adapter_files import load_adapter
from fedtune.core.models.build import build
from fedtune.core.models.cache import CachedDataset
from fedtune.core.objectives.reward import rewards
from fedtune.evaluation.evaluator import Evaluator
from fedtune.evaluation.generate import generate
from fedtune.evaluation.run import evaluate
from fedtune.officer.site_files import sites_in
from fedtune.runs.run import Run
from tests.depth import long_but
from tests.simulated import noise_from, simulate

STUDY = """
privacy = {privacy}
[study]
name = "preferences"
[base]
model = "{base}"
dtype = "float32"
{lora}
[objective]
name = "{objective}"
max_length = 64
[training]
rounds = 3
sampling_rate = 1.0
learning_rate = {rate}
[clipping]
mode = "normalised"
[strategy]
min_sites = 2
[evaluation]
path = "test.jsonl"
metric = "preference"
columns = {{ prompt = "q", chosen = "good", rejected = "bad" }}
"""
SITE = """
[site]
name = "{name}"
declared_size = 40
[data]
path = "{name}.jsonl"
columns = {{ {columns} }}
[policy]
bases = "any"
allow_privacy_off = true
"""
LORA = '[lora]\nrank = 4\nalpha = 8\nmodules = ["q_proj", "down_proj"]\nlast_layers = 2'
MLP = '[lora]\nrank = 4\nalpha = 8\nmodules = ["gate_proj", "down_proj"]\nlast_layers = 1'
PRIVATE = "{ epsilon = 8.0, delta = 1e-3 }"
PAIRS = 'prompt = "q", chosen = "good", rejected = "bad"'
JUDGED = 'prompt = "q", completion = "said", label = "fine"'


def row(draw: random.Random) -> dict[str, Any]:
    fine = draw.random() < 0.5
    good, bad = f"home in {draw.randint(1, 9)} weeks", f"none {draw.randint(1, 9)}"
    said = good if fine else bad
    return {
        "q": f"day {draw.randint(1, 99)}: ",
        "good": good,
        "bad": bad,
        "said": said,
        "fine": fine,
    }


def lay_out(
    folder: Path,
    base: Path,
    objective: str,
    lora: str = LORA,
    privacy: str = PRIVATE,
    rate: float = 1.0,
) -> Path:
    draw = random.Random(0)
    for name in ("north", "south", "test"):
        lines = (json.dumps(row(draw)) + "\n" for _ in range(40))
        (folder / f"{name}.jsonl").write_text("".join(lines))
        if name != "test":
            (folder / "sites" / name).mkdir(parents=True)
            columns = JUDGED if objective == "kto" else PAIRS
            text = SITE.format(name=name, columns=columns)
            text = text.replace(f'"{name}.jsonl"', f'"../../{name}.jsonl"')
            (folder / "sites" / name / "site.toml").write_text(text)
    text = STUDY.format(base=base, objective=objective, lora=lora, privacy=privacy, rate=rate)
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


def run(study: Path) -> tuple[dict[str, Any], Path]:
    out = study.parent / "run"
    return simulate(study, sites_in(study.parent / "sites"), out), out


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo"])
def test_preferences_are_learnt_and_the_report_says_so(
    tmp_path: Path, tiny_base: Path, objective: str
) -> None:
    study = lay_out(tmp_path, tiny_base, objective, privacy='"off"', rate=30.0)
    body, out = run(study)
    before, after = (body["quality"][when]["preference"] for when in ("before", "after"))
    assert after > max(0.9, before + 0.1)
    assert "preference (higher is better)" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    "lora", long_but([LORA], ["", LORA, MLP]), ids=["head alone", "cut", "positions apart"]
)
def test_a_reward_model_from_files_to_its_saved_head(
    tmp_path: Path, tiny_base: Path, lora: str
) -> None:
    with noise_from(0):
        body, out = run(lay_out(tmp_path, tiny_base, "reward", lora))
    assert body["quality"]["before"]["preference"] == 0.5  # a head of zeros prefers nothing
    assert body["quality"]["after"]["preference"] > 0.8
    assert body["privacy"]["epsilon"] <= 8.0
    head = load_file(out / "adapter" / "head.safetensors")
    assert {n: a.shape for n, a in head.items()} == {"weight": (1, 32), "bias": (1,)}
    assert (out / "adapter" / "adapter_model.safetensors").is_file() == bool(lora)
    again = evaluate(Run(out), tmp_path / "test.jsonl")
    for name, value in again["after"].items():
        assert value == pytest.approx(body["quality"]["after"][name], rel=1e-5)
    with pytest.raises(ConfigError, match="trained a head, which writes no text"):
        generate(Run(out), "day 3: ")


def test_a_score_is_read_off_the_last_token(tmp_path: Path, tiny_base: Path) -> None:
    """The same by transformers alone, on the whole text with its eos."""
    study = load_study(lay_out(tmp_path, tiny_base, "reward", MLP))
    network = build(study)
    assert study.evaluation is not None
    data = load_dataset(study.evaluation, study, network.tokenizer)
    start = network.trainable()
    draw = np.random.default_rng(0)
    arrays = {n: np.zeros_like(a) for n, a in start.items()}
    arrays["head.weight"] = draw.normal(size=(1, 32)).astype(np.float32)
    network.load_trainable(arrays)
    try:
        found = torch.zeros(2 * len(data.examples))
        with torch.no_grad():
            for batch in CachedDataset(network, data).batches(range(len(data.examples))):
                scores = rewards(network, batch)
                found[torch.stack([2 * batch.index, 2 * batch.index + 1], dim=1).flatten()] = scores
    finally:
        network.load_trainable(start)
    weight = torch.from_numpy(arrays["head.weight"])[0]
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).model.eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    expected = []
    for each in rows:
        for which in ("good", "bad"):
            ids = [tokenizer.encode(t, add_special_tokens=False) for t in (each["q"], each[which])]
            text = torch.tensor([[*ids[0], *ids[1], tokenizer.eos_token_id]])
            with torch.no_grad():
                expected.append(model(text).last_hidden_state[0, -1] @ weight)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
    passages = [p for example in data.examples for p in example.passages]
    assert all((p.target_ids == NO_TARGET).all() for p in passages)


def test_judgements_are_trained_on_and_pairs_measured(tmp_path: Path, tiny_base: Path) -> None:
    study = load_study(lay_out(tmp_path, tiny_base, "kto"))
    evaluator = Evaluator(study)
    assert len(evaluator) == 40 and evaluator.paired
    assert set(evaluator.measure(None)) == {"preference", "loss"}
    assert load_adapter(run(tmp_path / "study.toml")[1] / "adapter")
