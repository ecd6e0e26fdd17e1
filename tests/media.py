"""Tiny random bases of more than text, and files of noise: no real image, recording or clip."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    LlavaConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from tests.conftest import _bpe

PICTURE = ["<fake_token_around_image>", "<global-img>", "<image>"]
TAGS = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def _tokenizer(folder: Path, special: list[str], size: int = 320) -> PreTrainedTokenizerFast:
    every = ["<|pad|>", "<|start|>", "<|end|>", *special]
    made = PreTrainedTokenizerFast(
        tokenizer_object=_bpe(every, size),
        pad_token="<|pad|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        model_max_length=512,
    )
    made.add_special_tokens(
        {"additional_special_tokens": [AddedToken(t, special=True) for t in special]}
    )
    made.save_pretrained(folder)
    return made


def _write(folder: Path, config: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForImageTextToText.from_config(config).save_pretrained(folder)


def idefics3(folder: Path, *, split: bool = True) -> Path:
    """SmolVLM's architecture: split, an image has 5 tiles (3 where it is long), else 1."""
    tokenizer = _tokenizer(folder, [*PICTURE, *TAGS])
    config = Idefics3Config(
        text_config=TEXT | {"vocab_size": len(tokenizer)},
        vision_config=TOWER,
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    _write(folder, config)
    Idefics3ImageProcessorPil(
        do_image_splitting=split,
        size={"longest_edge": 32 if split else 16},
        max_image_size={"longest_edge": 16},
    ).save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    tokenizer = _tokenizer(folder, ["<image>"])
    config = LlavaConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer)},
        vision_config=TOWER | {"model_type": "clip_vision_model", "projection_dim": 24},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    _write(folder, config)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    return folder


def qwen2_vl(folder: Path) -> Path:
    """Images on a square of nine tokens."""
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = _tokenizer(folder, marks)
    start, end, image_token, video = map(tokenizer.convert_tokens_to_ids, marks)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = {k: v for k, v in TEXT.items() if k != "model_type"}
    config = Qwen2VLConfig(
        text_config=text | {"vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "embed_dim": 24,
            "hidden_size": 32,
            "num_heads": 2,
            "patch_size": 4,
        },
        image_token_id=image_token,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    _write(folder, config)
    Qwen2VLImageProcessorPil(
        size={"shortest_edge": 64, "longest_edge": 24 * 24}, patch_size=4
    ).save_pretrained(folder)
    return folder


def whisper(folder: Path) -> Path:
    """One second at most."""
    tokenizer = _tokenizer(folder, ["<|startoftranscript|>"])
    extractor = WhisperFeatureExtractor(chunk_length=1)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=extractor.nb_max_frames // 2,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=tokenizer.convert_tokens_to_ids("<|startoftranscript|>"),
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        WhisperForConditionalGeneration(config).save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


BASES = {"idefics3": idefics3, "llava": llava, "qwen2_vl": qwen2_vl, "whisper": whisper}


def image(path: Path, seed: int, shape: tuple[int, int] = (20, 20)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path.name


def recording(path: Path, seed: int, seconds: float = 0.3, rate: int = 8000) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    count = int(seconds * rate)
    values = 9000 * np.sin(np.arange(count) * draw.uniform(0.1, 1)) + draw.normal(0, 900, count)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.astype("<i2").tobytes())
    return path.name


WITHOUT_AV = "PyAV is in the video extra: pip install av"


def clip(
    path: Path,
    pictures: Sequence[Any],
    codec: str = "mjpeg",
    times: Sequence[int] | None = None,
    rate: int = 8,
) -> str:
    """A clip of these pictures, (height, width, 3) of bytes; times: when each is shown, in 1/rate
    of a second."""
    av = pytest.importorskip("av", reason=WITHOUT_AV)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.thread_count = 1
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture, np.uint8))
            frame.pts = times[number] if times else number
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path.name


def film(path: Path, seed: int, frames: int = 12) -> str:
    """A clip of noise."""
    draw = np.random.default_rng(seed)
    return clip(path, draw.integers(0, 256, (frames, 24, 32, 3), dtype=np.uint8))
