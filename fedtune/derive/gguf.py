"""Convert a transformers folder to a GGUF file, for llama.cpp, Ollama and LM Studio.

Keys and tensors follow llama.cpp's convert_hf_to_gguf.py for the architecture "llama" with a
byte-level BPE tokenizer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fedtune.core.bases.digest import read_json
from fedtune.core.errors import ConfigError

Stored = Literal["float32", "float16", "bfloat16", "q8_0"]
# llama.cpp's names of pre-tokenizers: their regular expressions are built into it.
_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}


def write_gguf(
    folder: Path, out: Path, stored: Stored, about: dict[str, str], licence: str
) -> None:
    """Write `folder` (config.json, model.safetensors in fp32, tokenizer) as the GGUF file `out`.

    - stored: the format of the matrices. Vectors stay fp32. A matrix whose rows do not divide into
      q8_0's blocks is stored in float16
    - about: the general.* keys, such as name, with their values
    - licence: the base's licence, for the key general.license

    Errors: ConfigError if llama.cpp would compute something else; OSError."""
    import gguf

    config = read_json(folder / "config.json")
    _check(config)
    writer: Any = gguf.GGUFWriter(out, "llama")
    writer.add_file_type(_FILE_TYPE[stored])
    writer.add_license(licence)
    for key, value in about.items():
        writer.add_string(f"general.{key}", value)
    _shape(writer, config)
    _vocabulary(writer, folder, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, int(config["num_hidden_layers"]))
    for name, tensor in _tensors(folder, config):
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        if gguf_name is None:
            raise ConfigError(f"tensor {name}: GGUF has no name for it", "a plain Llama model")
        _add(writer, gguf_name, tensor, stored)
    if (frequencies := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", frequencies)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    descriptor = os.open(out, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_FILE_TYPE = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}  # gguf.LlamaFileType


def _check(config: dict[str, Any]) -> None:
    if config.get("model_type") != "llama" or config.get("mlp_bias"):
        raise ConfigError(
            f"GGUF: the base is of the kind {config.get('model_type')!r}",
            "a Llama (SmolLM2, Llama 3, TinyLlama and so on)",
            "export --to hf, then llama.cpp's own convert_hf_to_gguf.py",
        )
    kind = _rope(config).get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(
            f"GGUF: the base has rotary positions of the kind {kind!r}", "default, linear or llama3"
        )


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of rotary positions in a base's config.json, including "rope_theta". In
    that file they stand under transformers' current key or under an older one."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta", 10000.0), **settings}


def _head(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _shape(writer: Any, config: dict[str, Any]) -> None:
    heads, rope = int(config["num_attention_heads"]), _rope(config)
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(_head(config))
    writer.add_value_length(_head(config))
    writer.add_rope_dimension_count(_head(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    if rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _rope_factors(config: dict[str, Any]) -> np.ndarray | None:
    """Return the factors (head/2,), fp32, by which Llama 3 divides the rotary frequencies, where
    head is the width of an attention head; None for other models."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    size, old = _head(config), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factors = []
    for at in range(0, size, 2):
        length = 2 * math.pi * float(rope["rope_theta"]) ** (at / size)
        smooth = min(max((old / length - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / float(rope["factor"]) + smooth))
    return np.array(factors, dtype=np.float32)


# ------------------------------------------------------------------------------------ tensors


def _tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the tensor (fp32) of each weight in `folder`, one at a time. In the
    matrices of queries and keys the halves of rotary positions are interleaved, as llama.cpp
    expects."""
    from safetensors import safe_open

    from fedtune.core.bases.digest import weights

    heads = int(config["num_attention_heads"])
    shared = int(config.get("num_key_value_heads") or heads)
    tied = bool(config.get("tie_word_embeddings"))
    for path in weights(folder):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                if tied and name == "lm_head.weight":
                    continue
                tensor: torch.Tensor = file.get_tensor(name).float()
                if ".q_proj." in name:
                    tensor = interleave_rows(tensor, heads)
                elif ".k_proj." in name:
                    tensor = interleave_rows(tensor, shared)
                yield name, tensor


def interleave_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head: first the first row of the head's first half, then the first
    row of its second half, then the second row of the first half, and so on. tensor: (outputs, …),
    the heads one after another."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _add(writer: Any, name: str, tensor: torch.Tensor, stored: Stored) -> None:
    """Add a tensor to the file: a vector in fp32; a matrix in the format `stored`, or in float16 if
    its rows do not divide into q8_0's blocks.

    - writer: the open gguf.GGUFWriter
    - name: the tensor's name in GGUF
    - tensor: the values, in fp32"""
    import gguf

    kinds = gguf.GGMLQuantizationType
    array = tensor.numpy()
    if array.ndim == 1 or stored == "float32":
        writer.add_tensor(name, array)
    elif stored == "float16" or (stored == "q8_0" and array.shape[-1] % 32):
        writer.add_tensor(name, array.astype(np.float16))
    else:
        kind = kinds.BF16 if stored == "bfloat16" else kinds.Q8_0
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)


# ---------------------------------------------------------------------------------- tokenizer


def _vocabulary(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    import gguf

    tokenizer = read_json(folder / "tokenizer.json")
    settings = read_json(folder / "tokenizer_config.json")
    model, kinds = tokenizer["model"], gguf.TokenType
    pre = _pre_tokenizer(tokenizer)
    size = int(config["vocab_size"])
    tokens = [f"[PAD{at}]" for at in range(size)]
    types = [int(kinds.UNUSED)] * size
    for token, at in model["vocab"].items():
        tokens[at], types[at] = token, int(kinds.NORMAL)
    for added in tokenizer.get("added_tokens") or []:
        kind = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_token_merges(merges)
    ids = {token: at for at, token in enumerate(tokens)}
    for role in ("bos", "eos", "pad", "unk"):
        token = settings.get(f"{role}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token in ids:
            getattr(writer, f"add_{role}_token_id")(ids[token])
    # The tokenizer's template says which tokens transformers puts before a text.
    template = json.dumps((tokenizer.get("post_processor") or {}).get("special_tokens") or {})
    writer.add_add_bos_token(bool(settings.get("bos_token")) and _bos_token(settings) in template)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if (chat := _chat(folder, settings)) is not None:
        writer.add_chat_template(chat)


def _bos_token(settings: dict[str, Any]) -> str:
    token = settings["bos_token"]
    return json.dumps(token["content"] if isinstance(token, dict) else token)


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a tokenizer splits text before BPE. tokenizer:
    the content of tokenizer.json. Errors: ConfigError if llama.cpp does not have this way."""
    model, pre = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers") or [pre]
    last = parts[-1]
    byte_level_bpe = (
        model.get("type") == "BPE"
        and not model.get("byte_fallback")
        and tokenizer.get("normalizer") is None
        and last.get("type") == "ByteLevel"
        and not last.get("add_prefix_space")
    )
    if byte_level_bpe and len(parts) == 1 and last.get("use_regex", True):
        return "gpt-2"
    if byte_level_bpe and len(parts) == 2:
        if parts[0] == _DIGITS and last.get("use_regex", True):
            return "smollm"
        pattern = (parts[0].get("pattern") or {}).get("Regex")
        if parts[0].get("behavior") == "Isolated" and pattern in _SPLITS:
            return _SPLITS[pattern]
    raise ConfigError(
        "GGUF: llama.cpp has no name for the way in which this tokenizer splits text",
        "a byte-level BPE like that of SmolLM2, Llama 3, Qwen 2 or GPT-2",
        "export --to hf, then llama.cpp's own convert_hf_to_gguf.py",
    )


def _chat(folder: Path, settings: dict[str, Any]) -> str | None:
    jinja = folder / "chat_template.jinja"
    template = (
        jinja.read_text(encoding="utf-8") if jinja.is_file() else settings.get("chat_template")
    )
    return template if isinstance(template, str) else None
