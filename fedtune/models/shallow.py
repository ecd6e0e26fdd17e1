"""A student with fewer layers than its base, as a folder that transformers loads.

The deep layers just before the last change least what passes through them, so the first layers
stay, and the very last, which prepares the answer.
Reference: Gromov et al. 2024, "The unreasonable ineffectiveness of the deeper layers"."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedtune.errors import ConfigError, ModelError
from fedtune.models.base import Base, load_backbone, load_tokenizer
from fedtune.models.digest import weights
from fedtune.models.mapped import stored_as

KEPT = ("README.md", "LICENSE")


def shallow(base: Base, layers: int, folder: Path) -> list[int]:
    """Write `base` with `layers` of its layers to `folder`, in the dtype that it is stored in;
    returns which layers stayed.

    Errors: ConfigError (not fewer), ModelError (an architecture without a list of layers)."""
    files, halves = weights(base.path), (torch.bfloat16, torch.float16)
    dtype = next((kind for kind in halves if stored_as(files, kind)), torch.float32)
    model = load_backbone(base, dtype)
    holder, name = _layers(model, base)
    total = len(getattr(holder, name))
    if not 1 < layers < total:
        raise ConfigError(f"--layers {layers}: {base.name} has {total}", f"2 to {total - 1}")
    kept = [*range(layers - 1), total - 1]
    setattr(holder, name, nn.ModuleList([getattr(holder, name)[at] for at in kept]))
    config: Any = model.config
    for key, value in list(vars(config).items()):  # one entry for each layer
        if isinstance(value, list) and len(value) == total:
            setattr(config, key, [value[at] for at in kept])
    config.num_hidden_layers = layers
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
