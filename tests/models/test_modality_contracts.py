"""Every modality of the release keeps what check-plugin measures, and broken ones do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.audit import contracts
from fedtune.core.data.media import Media
from fedtune.core.modalities import MODALITIES
from fedtune.core.modalities.audio_text import Speech
from fedtune.core.modalities.image_text import Images, Tiled
from tests.depth import long_but
from tests.media import WITHOUT_AV, idefics3, llava, qwen2_vl, whisper

BASES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "idefics3": ("image_text", idefics3),
    "llava": ("image_text", llava),
    "qwen2_vl": ("image_text", qwen2_vl),
    "whisper": ("audio_text", whisper),
    "clips, idefics3": ("video_text", idefics3),
    "clips, llava": ("video_text", llava),
}
PROMISED = ["place-holders", "too few", "tensor", "parity", "isolation", "sensitivity", "noise"]


def results(name: str, base: Path) -> dict[str, bool]:
    return {result.name: result.passed for result in contracts.modality(name, str(base))}


def test_every_modality_is_tried() -> None:
    assert sorted({name for name, _ in BASES.values()} | {"text"}) == MODALITIES.release()


@pytest.mark.parametrize("kind", long_but(["llava", "whisper"], BASES))
def test_a_modality_keeps_every_contract(tmp_path: Path, kind: str) -> None:
    name, make = BASES[kind]
    if name == "video_text":
        pytest.importorskip("av", reason=WITHOUT_AV)
    assert results(name, make(tmp_path / kind)) == dict.fromkeys(PROMISED, True)


def test_the_text_modality_keeps_every_contract(tiny_base: Path) -> None:
    assert results("text", tiny_base) == dict.fromkeys(PROMISED, True)


def test_a_reader_that_counts_no_place_holders_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Images, "check", lambda self, ids, tiles: None)
    found = results("image_text", llava(tmp_path / "llava"))
    assert not found["too few"] and found["place-holders"] and found["tensor"]


def test_a_reader_that_writes_too_few_place_holders_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Tiled.text
    monkeypatch.setattr(Tiled, "text", lambda self, r, c: honest(self, 0, 0))
    assert not results("image_text", idefics3(tmp_path / "idefics3"))["place-holders"]


def test_a_tensor_that_differs_each_time_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, draw = Speech.tensor, np.random.default_rng(0)

    def tensor(self: Any, media: Media) -> torch.Tensor:
        return honest(self, media) + float(draw.normal())

    monkeypatch.setattr(Speech, "tensor", tensor)
    assert not results("audio_text", whisper(tmp_path / "whisper"))["tensor"]
