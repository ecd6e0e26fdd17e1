"""A preference run that destroyed the text is said to have done so, in all places alike."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.core.models.adapter_files import pick_arrays
from fedtune.evaluation.evaluator import Evaluator
from fedtune.evaluation.pairs import PairScores, pair_facts
from fedtune.evaluation.run import evaluate
from fedtune.report.claim import verdict
from fedtune.report.preference import FALLEN, alarms
from fedtune.report.scores import Scores
from fedtune.runs.run import Run
from tests.cli_kit import run as command
from tests.objectives.test_runs import lay_out, row, run
from tests.simulated import noise_from

FIGURES = {"preference", "loss", "margin", "chosen_logp", "kl"}


NOISE = "{ epsilon = 0.1, delta = 1e-3 }"  # an adapter that is noise and nothing else


@pytest.fixture(scope="module")
def fluent_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that writes such answers, wrong ones rather than right ones: it has a
    text to lose, and something to learn."""
    folder = tmp_path_factory.mktemp("bases") / "fluent"
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    draw = random.Random(1)
    rows = [row(draw) for _ in range(32)]
    texts = [
        r["q"] + r[which] + tokenizer.eos_token for r in rows for which in ("good", *["bad"] * 3)
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trained(
    folder: Path, base: Path, objective: str, rate: float, privacy: str = '"off"'
) -> tuple[Any, Path]:
    folder.mkdir()
    return run(lay_out(folder, base, objective, privacy=privacy, rate=rate))


@pytest.mark.long
@pytest.mark.parametrize("objective", [pytest.param("dpo", marks=pytest.mark.long), "kto"])
def test_a_wrecked_model_is_not_announced_as_a_gain(
    tmp_path: Path, fluent_base: Path, objective: str
) -> None:
    """Its twin, the same study at a sane rate, is."""
    with noise_from(0):
        wrecked, out = trained(tmp_path / "wrecked", fluent_base, objective, 200.0, NOISE)
    assert len(alarms(wrecked["quality"])) >= 2
    assert not verdict(wrecked["quality"]).startswith("better")
    report = (out / "report.md").read_text()
    assert "**Warning:**" in report and "fedtune generate" in report
    assert "NOT shown to be better" in Run(out)._repr_html_()
    again = evaluate(Run(out), tmp_path / "wrecked" / "test.jsonl")
    assert again["alarms"] == alarms(wrecked["quality"])
    shown = command("evaluate", out, "--data", tmp_path / "wrecked" / "test.jsonl").output
    assert "warning: " in shown and "the text may be destroyed" in shown

    sane, out = trained(tmp_path / "sane", fluent_base, objective, 5.0)
    assert alarms(sane["quality"]) == []
    assert verdict(sane["quality"]).startswith(("better", "not told apart"))
    rounds = Run(out).metrics
    assert all(rounds[f"quality.{name}"][-1] == sane["quality"]["after"][name] for name in FIGURES)
    assert "Warning" not in (out / "report.md").read_text()
    assert "NOT" not in Run(out)._repr_html_()
    assert evaluate(Run(out), tmp_path / "sane" / "test.jsonl")["alarms"] == []


def quality(**pairs: Any) -> dict[str, Any]:
    change = {"records": 58, "change": [0.01, 0.276]}
    return {"metric": "preference", "gain": change | ({"pairs": pairs} if pairs else {})}


def test_the_verdict_by_its_limits() -> None:
    """A loss that rose beyond its interval, and better answers that lost more than FALLEN."""
    fine = {
        "loss": {"before": 0.69, "after": 0.7, "change": [-0.01, 0.02], "own": True},
        "chosen_logp": {"before": -2.0, "after": -2.0 - FALLEN, "change": [-0.6, -0.4]},
    }
    assert alarms(quality(**fine)) == [] == alarms(quality())
    assert verdict(quality(**fine)) == verdict(quality())
    assert verdict(quality()).startswith("better than the base")
    rose = {"loss": {"before": 0.69, "after": 10.8, "change": [9.0, 11.0], "own": True}}
    fell = {"chosen_logp": {"before": -2.0, "after": -2.01 - FALLEN, "change": [-0.6, -0.4]}}
    lost = {"chosen_logp": {"before": -2.0, "after": float("nan"), "change": [0.0, 0.0]}}
    for changed, expected in ((rose, "rose from 0.69"), (fell, "0.51 nats"), (lost, "nan nats")):
        found = alarms(quality(**fine | changed))
        assert expected in found[0] and "fedtune generate" in found[-1]
        assert verdict(quality(**fine | changed)).startswith("NOT shown to be better")
    other = {"loss": rose["loss"] | {"own": False}}  # of judgements it is no objective's loss
    assert alarms(quality(**fine | other)) == []


def test_the_figures_are_those_of_the_objective_and_of_transformers(
    tmp_path: Path, fluent_base: Path
) -> None:
    """The margin is the one in DPO's own loss; KL is transformers' at the answers' tokens."""
    _, out = trained(tmp_path / "study", fluent_base, "dpo", 5.0)
    saved = Run(out).adapter()
    evaluator = Evaluator(Run(out).study, {n: a for n, a in saved.items() if "lora_A" in n})
    adapter = pick_arrays(saved, evaluator.network.parameters(), out / "adapter")
    before, after = evaluator.untouched, evaluator.scores(adapter, with_kl=True)
    assert before.pairs is not None and after.pairs is not None
    ratios = after.pairs.logps - before.pairs.logps
    margins = evaluator.beta * (ratios[:, 0] - ratios[:, 1])
    np.testing.assert_allclose(after.loss, np.log1p(np.exp(-margins)), rtol=1e-4)
    facts = pair_facts(before, after, evaluator.beta)
    assert facts["margin"]["after"] == pytest.approx(margins.mean()) and facts["beta"] == 0.1
    assert facts["longer"]["records"] + facts["shorter"]["records"] == 40

    base = AutoModelForCausalLM.from_pretrained(fluent_base, dtype=torch.float32).eval()
    policy = Run(out).load_peft(copy.deepcopy(base))
    tokenizer = AutoTokenizer.from_pretrained(fluent_base)
    found, tokens = 0.0, 0
    for line in (tmp_path / "study" / "test.jsonl").read_text().splitlines():
        pair = json.loads(line)
        for which in ("good", "bad"):
            prompt = tokenizer.encode(pair["q"], add_special_tokens=False)
            answer = tokenizer.encode(pair[which], add_special_tokens=False)
            ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
            with torch.no_grad():
                p, q = (m(ids).logits[0].log_softmax(dim=1) for m in (policy, base))
            kl = (p.exp() * (p - q)).sum(dim=1)[len(prompt) - 1 : -1]
            found, tokens = found + float(kl.sum()), tokens + len(kl)
    assert facts["kl"] == pytest.approx(found / tokens, rel=1e-3) and facts["kl"] > 0.01


def scores(lengths: list[tuple[int, int]], margin: list[float]) -> Scores:
    n = len(margin)
    pairs = PairScores.empty(n)
    pairs.lengths = np.array(lengths)
    return Scores(*(np.zeros(n) for _ in range(5)), np.array(margin), pairs)


def test_the_split_by_length_counts_pairs() -> None:
    """Of a head, whose margin is its scores': longer, shorter, and pairs of one length in none."""
    lengths = [(9, 3), (8, 3), (7, 3), (2, 4), (5, 5)]
    facts = pair_facts(scores(lengths, [0.0] * 5), scores(lengths, [1, 2, -1, -1, 0]), 1.0)
    assert facts["longer"] == {"records": 3, "before": 0.5, "after": pytest.approx(2 / 3)}
    assert facts["shorter"] == {"records": 1, "before": 0.5, "after": 0.0}
    assert facts["margin"]["after"] == pytest.approx(0.2) and facts["in_order"] == 0.5
    assert not {"kl", "chosen_logp", "beta"} & facts.keys()
