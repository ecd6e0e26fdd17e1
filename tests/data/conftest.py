"""Small tokenizers made on the spot, and short ways to write a file and a study."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedtune.core.config import Study

SPECIAL = ["<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}{{ '<|system|>Be kind.<eos>\n' }}{% endif %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<eos>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def byte_tokenizer(
    *, bos: bool = False, template: str | None = CHAT, prefix_space: bool = False
) -> PreTrainedTokenizerBase:
    """One token a byte, but for two merges: newline+newline, and digit+digit."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("1", "1")]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    core = Tokenizer(model)
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    if prefix_space:  # as SentencePiece models do: a text starts with ▁, a later section does not
        steps.insert(0, pre_tokenizers.Metaspace(prepend_scheme="first", split=False))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    made.chat_template = template
    return made


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerBase]:
    return byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def encoder_tokenizer() -> PreTrainedTokenizerBase:
    """[CLS] words [SEP], as BERT has it."""
    words = ["[UNK]", "[CLS]", "[SEP]", "lion", "cat", "dog"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any, name: str = "data.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


@pytest.fixture
def study() -> Callable[..., Study]:
    def make(privacy: Any = "off", **objective: Any) -> Study:
        body: dict[str, Any] = {
            "study": {"name": "s"},
            "base": {"model": "m"},
            "objective": {"name": "causal_lm", **objective},
            "training": {"rounds": 1, "sampling_rate": 1.0, "learning_rate": 0.1},
            "privacy": privacy,
        }
        if privacy != "off":
            body |= {"clipping": {}}
            body["privacy"] = {"epsilon": 8.0, "delta": 1e-5, **privacy}
        return Study.model_validate_json(json.dumps(body))

    return make
