"""A run learns to please a reward model on public prompts, with a KL penalty; no record is read."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.core.bases.find import find_base
from fedtune.core.config import Columns, PublicTable
from fedtune.core.errors import ConfigError, Refused
from fedtune.core.models.loaded import load
from fedtune.core.models.network import Network
from fedtune.core.run_folder import load_plan
from fedtune.derive.improve import (
    PolicyEvaluation,
    PolicyEvaluator,
    PolicyScores,
    _step_callback,
    improve,
)
from fedtune.derive.settings import RlooSettings
from fedtune.runs.run import Run
from tests.dp.conftest import study
from tests.simulated import noise_from, simulate
from tests.test_cli import run
from tests.test_end_to_end import lay_out

pytest.importorskip("trl")
HOW = RlooSettings(steps=12, prompts=4, answers=6, new_tokens=6, learning_rate=1e-2, kl_coef=0.02)


@pytest.fixture(scope="module")
def clear_base(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The tiny base with louder words: its next tokens are no longer all but equally likely."""
    folder = tmp_path_factory.mktemp("bases") / "clear"
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.norm.weight.mul_(15)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, clear_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    path = lay_out(folder, clear_base, "{ epsilon = 3.0, delta = 1e-3, unit = 'patient' }")
    with noise_from(0):
        simulate(path, sorted(folder.glob("site-*.toml")), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory, policy: Path, tiny_base: Path) -> Path:
    """As a finished reward run leaves it, with a head that likes some answers far more."""
    folder = tmp_path_factory.mktemp("reward") / "run"
    made = study(base={"model": str(tiny_base)}, objective={"name": "reward", "max_length": 64})
    network = Network(find_base(str(tiny_base)), torch.float32, made.lora, 1)
    draw = np.random.default_rng(2)
    arrays = network.trainable()
    arrays["head.weight"] = draw.normal(size=arrays["head.weight"].shape).astype(np.float32)
    network.load_trainable(arrays)
    network.save(folder / "adapter")
    (folder / "plan.json").write_text(made.model_dump_json())
    report = json.loads((policy / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> PublicTable:
    path = tmp_path / "public.jsonl"
    rows = [{"prompt": f"fever day {n}, and a cough"} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PublicTable(path=path, columns=Columns(prompt="prompt"), licence="CC0-1.0")


def test_the_reward_rises_within_max_kl(
    tmp_path: Path,
    policy: Path,
    reward: Path,
    prompts: PublicTable,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    body = improve(
        Run(policy), Run(reward), prompts, out, max_kl=5.0, eval_every=3, settings=HOW
    ).report
    assert "train_runtime" not in capsys.readouterr().out  # trl's own figures
    before, after = body["quality"]["before"], body["quality"]["after"]
    evaluations = body["quality"]["by_round"]
    assert abs(evaluations[0]["reward"]) < 1e-6  # centred on the run's own answers
    assert abs(before["reward"]) < 0.5 and before["kl"] == 0
    # The report's answers are others than those by which the policy was chosen.
    assert after["reward"] not in [row["reward"] for row in evaluations]
    assert after["reward"] > 0.3
    assert 0 < after["kl"] <= 5.0
    own = json.loads((policy / "report.json").read_text())["privacy"]["epsilon"]
    assert body["privacy"]["epsilon"] > own  # the reward run learned from the same sites
    said = (out / "report.md").read_text()
    for words in ("cost no ε", "CC0-1.0", body["derived"]["prompts"]["digest"], "reward"):
        assert words in said, words
    plain: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(load_plan(out).base.model), str(out / "adapter")
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        theirs = torch.log_softmax(plain(input_ids=ids).logits[0, -1], dim=0)
    ours = load(out).next_tokens(ids[0].numpy(), np.array([3]))[0]
    np.testing.assert_allclose(theirs.numpy(), ours.numpy(), atol=1e-4)
    assert plain.generate(input_ids=ids, max_new_tokens=3, pad_token_id=0).shape[1] > 4
    made, came = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (out, policy))
    assert made.keys() == came.keys()
    assert all(not torch.equal(made[name], came[name]) for name in made)  # A, too


@pytest.mark.parametrize("told", [False, True])
def test_nobody_is_told_that_a_machine_trains(
    tmp_path: Path,
    policy: Path,
    reward: Path,
    prompts: PublicTable,
    monkeypatch: pytest.MonkeyPatch,
    told: bool,
) -> None:
    """trl's trainers report to the hub; the twin, which leaves them as they come, is seen."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _telemetry

    sent: list[object] = []
    monkeypatch.delenv("CI", raising=False)  # there trl tells nobody anyhow
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: None)
    monkeypatch.setattr(_telemetry._TELEMETRY_QUEUE, "put", sent.append)
    if told:
        monkeypatch.setattr("fedtune.core.bases.wheel.silence_libraries", lambda: None)
    once = RlooSettings(steps=1, prompts=2, answers=2, new_tokens=2, learning_rate=3e-2)
    with contextlib.suppress(Refused):
        improve(Run(policy), Run(reward), prompts, tmp_path / "out", eval_every=1, settings=once)
    assert bool(sent) == told


def test_what_is_kept_is_worth_most_by_reward_less_the_price_of_its_kl() -> None:
    evaluations = iter(
        [
            PolicyEvaluation(0.5, 0.5, 0.0),
            PolicyEvaluation(0.9, 3.0, 0.0),
            PolicyEvaluation(0.6, 0.8, 0.0),
        ]
    )
    policy = SimpleNamespace(model=torch.nn.Linear(1, 1))
    evaluator = SimpleNamespace(evaluate=lambda *_: next(evaluations), policy=policy)
    scores = PolicyScores(
        max_kl=4.0,
        kl_coef=0.2,
        eval_every=1,
        steps=3,
        by_step=[(0, PolicyEvaluation(0.0, 0.0, 0.0))],
    )
    on_step = _step_callback(scores, cast(PolicyEvaluator, evaluator), [])
    assert all(on_step(step) for step in (1, 2, 3))
    assert scores.best is not None and scores.best[0] == 3  # 0.44; the highest reward is worth 0.3


def test_past_max_kl_nothing_is_kept(
    tmp_path: Path, policy: Path, reward: Path, prompts: PublicTable
) -> None:
    with pytest.raises(Refused, match="no checkpoint with KL"):
        out = tmp_path / "out"
        improve(Run(policy), Run(reward), prompts, out, max_kl=1e-6, eval_every=3, settings=HOW)
    assert {p.name for p in tmp_path.iterdir()} == {"public.jsonl"}


def test_without_privacy_it_says_so(
    tmp_path: Path, policy: Path, reward: Path, prompts: PublicTable
) -> None:
    body = json.loads((reward / "report.json").read_text())
    (reward / "report.json").write_text(json.dumps(body | {"private": False}))
    try:
        found = improve(
            Run(policy),
            Run(reward),
            prompts,
            tmp_path / "out",
            eval_every=6,
            settings=HOW,
            max_kl=50.0,
        ).report
    finally:
        (reward / "report.json").write_text(json.dumps(body))
    assert not found["private"]
    assert "NOT PRIVATE" in (tmp_path / "out" / "report.md").read_text()


def test_only_a_reward_run_judges(tmp_path: Path, policy: Path, prompts: PublicTable) -> None:
    with pytest.raises(ConfigError, match="no reward model"):
        improve(Run(policy), Run(policy), prompts, tmp_path / "out", settings=HOW)


def test_the_command_stops_clean(
    tmp_path: Path, policy: Path, reward: Path, prompts: PublicTable, monkeypatch: Any
) -> None:
    import fedtune.derive.improve as module

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_rloo", stop)
    told = run(
        "improve", policy, "--reward", reward, "--prompts", prompts.path,
        "--licence", "CC0-1.0", "--out", tmp_path / "out", "--new-tokens", "4",
    )  # fmt: skip
    assert told.exit_code == 130, told.output
    assert {p.name for p in tmp_path.iterdir()} == {"public.jsonl"}
    assert run("improve", "--help").exit_code == 0
