"""A student with fewer layers than its base, as a folder that transformers loads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.bases.digest import weights
from fedtune.bases.find import Base, load_backbone, load_tokenizer
from fedtune.bases.shared_memory import stored_as
from fedtune.derive.depth_pruning import best_gap, fewer, fits
from fedtune.errors import ConfigError, ModelError

KEPT = ("README.md", "LICENSE")


def shallow(base: Base, layers: int, folder: Path, texts: Sequence[np.ndarray] = ()) -> list[int]:
    """Write `base` with `layers` of its layers to `folder`, in the dtype that it is stored in;
    returns which layers stayed.

    texts: token ids of public texts, which say where to leave layers out, and to which the layer
    before the gap is fitted (gap.py). Without them, or where an architecture cannot be fitted so,
    the first layers stay, and the very last, which prepares the answer.
    Errors: ConfigError (not fewer), ModelError (an architecture without a list of layers)."""
    files, halves = weights(base.path), (torch.bfloat16, torch.float16)
    dtype = next((kind for kind in halves if stored_as(files, kind)), torch.float32)
    model: Any = load_backbone(base, dtype)
    holder, name = _layers(model, base)
    own = getattr(holder, name)
    total = len(own)
    if not 1 < layers < total:
        raise ConfigError(f"--layers {layers}: {base.name} has {total}", f"2 to {total - 1}")
    gap = range(layers - 1, total - 1)
    if texts and fits(model):
        found = best_gap(model, total - layers, texts)
        gap = range(found.first, found.first + found.width)
        own[found.first - 1].mlp.down_proj.weight = nn.Parameter(found.weight, requires_grad=False)
    kept = [at for at in range(total) if at not in gap]
    setattr(holder, name, nn.ModuleList([own[at] for at in kept]))
    model.config = fewer(model.config, kept, total)
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    for each in KEPT:
        if (base.path / each).is_file():
            shutil.copy(base.path / each, folder / each)
    return kept


def _layers(model: nn.Module, base: Base) -> tuple[Any, str]:
    """The module that holds the list of layers, and the list's name."""
    for path, name in (("model", "layers"), ("encoder", "layer")):
        holder = getattr(model, path, None)
        if isinstance(getattr(holder, name, None), nn.ModuleList):
            return holder, name
    raise ModelError(f"{base.name}: not an architecture whose layers can be left out")
