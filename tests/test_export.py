"""Exported models, read back by transformers, by gguf and by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedtune.core.errors import ConfigError, InputError
from fedtune.derive import gguf as gguf_file
from fedtune.derive.export import export
from fedtune.derive.gguf import write_gguf
from fedtune.runs.run import Run
from tests.conftest import TEXT
from tests.test_cli import run as command
from tests.test_merging import study

PROMPT = "The patient was seen in the clinic with a"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return study(tmp_path_factory.mktemp("exported"), tiny_base, "clinic")


@pytest.fixture(scope="module")
def adapted(finished: Path, tiny_base: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(finished / "adapter")).eval()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits[0]
    return found


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([ids]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return list(map(int, out[0, len(ids) :]))


# ---------------------------------------------------------------------------- a transformers folder


def test_plain_transformers_gives_the_logits_of_base_and_adapter(
    finished: Path, adapted: Any, tiny_base: Path, tmp_path: Path
) -> None:
    out = export(Run(finished), tmp_path / "model", "hf")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert (
        ids.tolist()
        == AutoTokenizer.from_pretrained(tiny_base)(PROMPT, return_tensors="pt").input_ids.tolist()
    )
    expected = logits(adapted, ids)
    assert torch.allclose(logits(model, ids), expected, atol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(logits(adapted, ids), expected, atol=1e-2)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_base).chat_template


def test_the_card_says_what_the_report_says(finished: Path, tmp_path: Path) -> None:
    out = export(Run(finished), tmp_path / "model", "hf", "bfloat16")
    card = (out / "README.md").read_text()
    body = json.loads((finished / "report.json").read_text())
    assert card.startswith("---\nlicense:")
    assert "differentially private with ε" in card and str(body["privacy"]["delta"]) in card
    assert "What it does not cover" in card
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert not list(tmp_path.glob("*.new"))


def test_the_card_of_a_run_without_privacy_warns(tmp_path: Path, tiny_base: Path) -> None:
    leaky = study(tmp_path / "leaky", tiny_base, "leaky", privacy='"off"')
    card = (export(Run(leaky), tmp_path / "model", "hf") / "README.md").read_text()
    assert "NOT PRIVATE" in card and '"differential-privacy"' not in card


# ---------------------------------------------------------------------------------------- GGUF


def tensors(path: Path) -> dict[str, np.ndarray]:
    reader = gguf.GGUFReader(path)
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def test_transformers_own_reader_gives_the_same_logits(
    finished: Path, adapted: Any, tmp_path: Path
) -> None:
    out = export(Run(finished), tmp_path / "model.gguf", "gguf", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=out.name, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(logits(model, ids), logits(adapted, ids), atol=1e-4)


@pytest.mark.parametrize(
    ("stored", "room"), [("float16", 1e-3), ("bfloat16", 8e-3), ("q8_0", 8e-3)]
)
def test_smaller_storage_is_near(finished: Path, tmp_path: Path, stored: Any, room: float) -> None:
    exact = tensors(export(Run(finished), tmp_path / "exact.gguf", "gguf", "float32"))
    small = tensors(export(Run(finished), tmp_path / "small.gguf", "gguf", stored))
    assert exact.keys() == small.keys()
    for name, expected in exact.items():
        found = small[name].reshape(expected.shape)
        assert np.abs(found - expected).max() <= room * np.abs(expected).max()
        assert ".weight" in name and (expected.ndim > 1 or np.array_equal(found, expected))
    sizes = [(tmp_path / f"{name}.gguf").stat().st_size for name in ("small", "exact")]
    assert sizes[0] < 0.8 * sizes[1]


def test_what_a_reader_is_told(finished: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(export(Run(finished), tmp_path / "model.gguf", "gguf"))
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert told["general.architecture"] == "llama" and told["general.name"] == "clinic"
    assert "differentially private: ε = " in told["general.description"]
    assert told["llama.attention.head_count_kv"] == 2 and told["llama.block_count"] == 4
    assert told["tokenizer.ggml.pre"] == "gpt-2" and len(told["tokenizer.ggml.tokens"]) == 300
    assert (
        told["tokenizer.ggml.bos_token_id"] == 1 and told["tokenizer.ggml.add_bos_token"] is False
    )
    assert told["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert "<|start|>" in told["tokenizer.chat_template"]


class LlamaCpp:
    """llama.cpp itself, asked over its own server on loopback; skipped where it is not."""

    def __init__(self, path: Path) -> None:
        why = "llama.cpp: pip install 'fedtune[llamacpp]'"
        xllamacpp: Any = pytest.importorskip("xllamacpp", reason=why)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 512, 1, 1
        params.warmup = False
        self._server = xllamacpp.Server(params)

    def _ask(self, what: str, **body: Any) -> list[int]:
        at = f"{self._server.listening_address}/{what}"
        found: list[int] = httpx.post(at, json=body, trust_env=False, timeout=60).json()["tokens"]
        return found

    def tokens(self, text: str) -> list[int]:
        return self._ask("tokenize", content=text, add_special=False, parse_special=True)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        settings = {"temperature": 0, "return_tokens": True, "ignore_eos": True}
        return self._ask("completion", prompt=ids, n_predict=count, **settings)


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe"])
def test_llama_cpp_reads_text_and_writes_the_same_tokens(kind: str, tmp_path: Path) -> None:
    folder = base_of(tmp_path / "base", kind)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write_gguf(folder, tmp_path / "model.gguf", "float32", {"name": "x"}, "mit")
    there = LlamaCpp(tmp_path / "model.gguf")
    for text in (PROMPT, "Na:  140 mmol/l,\n\n12345 it's\tOK", "Blood 120 over 80. [DRUG] <|end|>"):
        assert there.tokens(text) == tokenizer.encode(text, add_special_tokens=False)
    ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    assert there.greedy(ids, 24) == greedy(model, ids, 24)


def base_of(folder: Path, kind: str) -> Path:
    """A random Llama whose tokenizer splits text as `kind` does; with grouped heads, and for
    llama-bpe with Llama 3's rotary positions and a start token in front."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    elif kind == "llama-bpe":
        split = pre_tokenizers.Split(Regex(gguf_file._LLAMA3), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        level = pre_tokenizers.Sequence([split, plain])
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    tokenizer.train_from_iterator(
        [*TEXT, "12 123 1234 "] * 3,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken("[DRUG]", normalized=False)])
    fast: Any = PreTrainedTokenizerFast
    wrapped = fast(
        tokenizer_object=tokenizer,
        pad_token=special[0], bos_token=special[1], eos_token=special[2],
    )  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if kind == "llama-bpe":
        rope = {
            "rope_type": "llama3", "rope_theta": 50000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(wrapped) + 3, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        rope_parameters=rope, tie_word_embeddings=kind != "smollm", initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LlamaForCausalLM(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("forgotten", ["interleave_rows", "_rope_factors"])
def test_llama_cpp_would_notice(
    forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: without the interleaving, or Llama 3's factors, it writes something else."""
    folder = base_of(tmp_path / "base", "llama-bpe")
    same = {"interleave_rows": lambda tensor, heads: tensor, "_rope_factors": lambda config: None}
    monkeypatch.setattr(gguf_file, forgotten, same[forgotten])
    write_gguf(folder, tmp_path / "model.gguf", "float32", {"name": "x"}, "mit")
    ids = list(range(40, 140))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert LlamaCpp(tmp_path / "model.gguf").greedy(ids, 24) != greedy(model, ids, 24)


# ------------------------------------------------------------------------------------- refusals


def test_a_head_is_no_part_of_a_gguf_file(finished: Path, tmp_path: Path) -> None:
    twin = tmp_path / "headed"
    (twin / "adapter").mkdir(parents=True)
    for name in ("plan.json", "report.json"):
        (twin / name).write_text((finished / name).read_text())
    plan = json.loads((twin / "plan.json").read_text()) | {"lora": None}
    (twin / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ConfigError, match="holds no adapter and no head"):
        export(Run(twin), tmp_path / "out", "gguf")
    (twin / "adapter" / "head.safetensors").touch()
    with pytest.raises(ConfigError, match="trained a head"):
        export(Run(twin), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".exporting*"))


def test_other_kinds_of_base_are_refused_in_words(tmp_path: Path, tiny_base: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for path in tiny_base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}))
    with pytest.raises(ConfigError, match="of the kind 'phi3'"):
        write_gguf(folder, tmp_path / "x.gguf", "float32", {}, "mit")
    (folder / "config.json").write_text(json.dumps(config))
    body = json.loads((folder / "tokenizer.json").read_text())
    body["normalizer"] = {"type": "NFC"}
    (folder / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(ConfigError, match="splits text"):
        write_gguf(folder, tmp_path / "x.gguf", "float32", {}, "mit")


def test_refusals_leave_nothing(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a number format of GGUF"):
        export(Run(finished), tmp_path / "out", "hf", "q8_0")
    with pytest.raises(InputError, match="not a run folder"):
        export(Run(tmp_path), tmp_path / "out", "hf")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        export(Run(finished), tmp_path / "there", "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_the_command(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    done = command("export", str(finished), "--to", "gguf", "--dtype", "q8_0", "--out", str(out))
    assert done.exit_code == 0 and "wrote" in done.output
    assert out.is_file()
    assert command("export", str(finished), "--to", "gguf", "--out", str(out)).exit_code == 2
