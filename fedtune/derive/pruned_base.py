"""Build a base for a student by dropping layers of another base. The result is a folder that
transformers loads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.core.bases.digest import weights
from fedtune.core.bases.find import Base, load_backbone, load_tokenizer
from fedtune.core.bases.shared_memory import stored_as
from fedtune.core.errors import ConfigError, ModelError
from fedtune.derive.depth_pruning import choose_pruned_layers, pruned_config, supports_refit

COPIED_FILES = ("README.md", "LICENSE")


def write_pruned_base(
    base: Base, layers: int, folder: Path, texts: Sequence[np.ndarray] = ()
) -> list[int]:
    """Write a copy of `base` that has only `layers` of its layers to `folder`, in the dtype in
    which the base is stored. Return the indices of the layers that stay.

    - base: the whole base
    - layers: how many layers stay; at least 2, and fewer than the base has
    - folder: the new folder, in which transformers finds model and tokenizer
    - texts: token ids of public texts. From them depth_pruning.py computes which layers to drop,
      and how to change the layer before the dropped ones so that it replaces them. Without texts,
      or if the architecture does not support this, the first layers stay and also the last one,
      whose output the head reads

    Errors: ConfigError if `layers` is below 2, or not below the base's number; ModelError if the
    architecture has no list of layers in a known place."""
    files, half_dtypes = weights(base.path), (torch.bfloat16, torch.float16)
    dtype = next((kind for kind in half_dtypes if stored_as(files, kind)), torch.float32)
    model: Any = load_backbone(base, dtype)
    holder, name = _layers(model, base)
    layer_list = getattr(holder, name)
    total = len(layer_list)
    if not 1 < layers < total:
        raise ConfigError(f"--layers {layers}: {base.name} has {total}", f"2 to {total - 1} layers")
    dropped = range(layers - 1, total - 1)
    if texts and supports_refit(model):
        pruned = choose_pruned_layers(model, total - layers, texts)
        dropped = range(pruned.first, pruned.first + pruned.width)
        layer_list[pruned.first - 1].mlp.down_proj.weight = nn.Parameter(
            pruned.weight, requires_grad=False
        )
    kept_layers = [at for at in range(total) if at not in dropped]
    setattr(holder, name, nn.ModuleList([layer_list[at] for at in kept_layers]))
    model.config = pruned_config(model.config, kept_layers, total)
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    for file_name in COPIED_FILES:
        if (base.path / file_name).is_file():
            shutil.copy(base.path / file_name, folder / file_name)
    return kept_layers


def _layers(model: nn.Module, base: Base) -> tuple[Any, str]:
    """Find the list of the model's layers. Return the module that holds this list, and the list's
    name in the module. base: names the model in the error's text. Errors: ModelError if the
    architecture has no list in a known place."""
    for path, name in (("model", "layers"), ("encoder", "layer")):
        holder = getattr(model, path, None)
        if isinstance(getattr(holder, name, None), nn.ModuleList):
            return holder, name
    raise ModelError(f"{base.name}: layers of this architecture cannot be dropped")
