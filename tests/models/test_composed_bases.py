"""Bases that are put together here: Whisper out of CTranslate2's format, SmolLM2 with a tower."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSpeechSeq2Seq, WhisperForConditionalGeneration

from fedtune.core.bases.digest import digest
from fedtune.core.bases.find import find_base, load_backbone
from fedtune.core.errors import ModelError
from fedtune.wheels import smol_vision, whisper
from tests.media import whisper as tiny_whisper

HALVES = {"q_proj": 0, "k_proj": 1, "v_proj": 2}


def _ctranslate2(state: dict[str, torch.Tensor], into: Path, version: int = 6) -> None:
    """Write a Whisper's weights as CTranslate2 does: fused, with zeros for a bias it has not."""
    out: dict[str, np.ndarray] = {}

    def both(theirs: str, *ours: str) -> None:
        for kind in ("weight", "bias"):
            parts = [
                state.get(f"{name}.{kind}", torch.zeros(len(state[f"{name}.weight"])))
                for name in ours
            ]
            out[f"{theirs}/{kind}"] = torch.cat(parts).numpy()

    def norm(theirs: str, ours: str) -> None:
        out[f"{theirs}/gamma"] = state[f"{ours}.weight"].numpy()
        out[f"{theirs}/beta"] = state[f"{ours}.bias"].numpy()

    for side in ("encoder", "decoder"):
        for layer in range(whisper.CONFIG[f"{side}_layers"]):
            theirs, ours = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            own = f"{ours}.self_attn"
            fused = [f"{own}.{name}" for name in HALVES]
            both(f"{theirs}/self_attention/linear_0", *fused)
            both(f"{theirs}/self_attention/linear_1", f"{own}.out_proj")
            norm(f"{theirs}/self_attention/layer_norm", f"{own}_layer_norm")
            if side == "decoder":
                own = f"{ours}.encoder_attn"
                both(f"{theirs}/attention/linear_0", f"{own}.q_proj")
                both(f"{theirs}/attention/linear_1", f"{own}.k_proj", f"{own}.v_proj")
                both(f"{theirs}/attention/linear_2", f"{own}.out_proj")
                norm(f"{theirs}/attention/layer_norm", f"{own}_layer_norm")
            both(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            both(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        places = state[f"model.{side}.embed_positions.weight"]
        out[f"{side}/position_encodings/encodings"] = places.numpy()
    for name in ("conv1", "conv2"):
        both(f"encoder/{name}", f"model.encoder.{name}")
    out["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"].numpy()
    word = lambda text: struct.pack("<H", len(text) + 1) + text.encode() + b"\0"  # noqa: E731
    body = struct.pack("<I", version) + word("WhisperSpec") + struct.pack("<II", 3, len(out))
    for name, array in out.items():
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        raw = array.astype("<f4").tobytes()
        body += word(name) + shape + struct.pack("<BI", 0, len(raw)) + raw
    (into / whisper.BIN).write_bytes(body)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A tiny Whisper of transformers, and its weights in the other format."""
    source, raw = tiny_whisper(tmp_path / "source"), tmp_path / "raw"
    raw.mkdir()
    config = json.loads((source / "config.json").read_text())
    monkeypatch.setattr(whisper, "WIDTH", config["d_model"])
    monkeypatch.setattr(whisper, "CONFIG", config)
    model = WhisperForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    _ctranslate2(model.state_dict(), raw)
    (raw / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    return source, raw


def test_a_whisper_comes_out_as_it_went_in(written: tuple[Path, Path], tmp_path: Path) -> None:
    source, raw = written
    whisper.convert(raw, tmp_path / "made")
    one, two = (
        AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (source, tmp_path / "made")
    )
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert find_base(str(tmp_path / "made")).kind == "speech"


def test_what_is_not_whole_is_no_base(written: tuple[Path, Path], tmp_path: Path) -> None:
    raw = written[1]
    whole = (raw / whisper.BIN).read_bytes()
    for body, says in ((whole[:-100], "not whole"), (b"\5" + whole[1:], "of version 5")):
        (raw / whisper.BIN).write_bytes(body)
        with pytest.raises(ModelError, match=says):
            whisper.convert(raw, tmp_path / "made")
        assert not (tmp_path / "made").exists()


def test_a_tower_is_the_same_everywhere_and_tells_images_apart(
    tiny_base: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        smol_vision.compose(tiny_base, tmp_path / name)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    base = find_base(str(tmp_path / "one"))
    assert base.kind == "image_text"
    model = load_backbone(base, torch.float32)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 1, 3, smol_vision.SIDE, smol_vision.SIDE, generator=draw)
    seen = model.model.get_image_features(pixels, return_dict=True).pooler_output
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
