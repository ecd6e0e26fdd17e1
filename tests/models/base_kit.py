"""What test_base.py and test_base_wheels.py share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def edit(path: Path, change: Callable[[dict], object]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def _one_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[-1]
    flat = tensors[name].reshape(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
